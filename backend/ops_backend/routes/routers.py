"""Routers of the API, whose routes are whole as they stand.

What includes a router prepares each of its routes once more, 0.2 s for all of them at the first request of an app: ours
takes them over as they are.
"""

from fastapi import APIRouter

from ops_backend.routes.errors import refusals
from ops_contract.wire import API_PREFIX

# Of what any request may be told, whose body is too large or wrong, or whose database is away.
ANYWHERE = refusals(413, 422, 503)


def api_router(tag: str, prefix: str = "") -> APIRouter:
    """Below API_PREFIX, for who says who they are."""
    return APIRouter(prefix=API_PREFIX + prefix, tags=[tag], responses=ANYWHERE | refusals(401))
