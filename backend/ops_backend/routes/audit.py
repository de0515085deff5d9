"""Who did what, and from where."""

from typing import Annotated

from fastapi import Query
from pydantic import AwareDatetime

from ops_backend.dependencies import AdminDep, PageCursor, SessionDep
from ops_backend.routes.routers import api_router
from ops_backend.store import audit
from ops_contract.audit import Action, AuditPage

router = api_router("audit", "/audit")


@router.get("")
async def list_audit(
    session: SessionDep,
    _: AdminDep,
    who: Annotated[str | None, Query(description="the name of a token")] = None,
    action: Annotated[Action | None, Query(description="what was done")] = None,
    target: Annotated[str | None, Query(description="an id that it was done to, or its beginning")] = None,
    since: Annotated[AwareDatetime | None, Query(description="not before that, with its time zone")] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="so many a page")] = 50,
    cursor: PageCursor = None,
) -> AuditPage:
    """Every change that was accepted, and who was refused: newest first, in pages. What only reads is not noted."""
    return await audit.list_page(session, audit.Filter(who, action, target, since), limit, cursor)
