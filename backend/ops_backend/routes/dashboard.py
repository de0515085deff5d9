"""`/`: the dashboard, and `/docs`: its API. Neither asks for a login; the API that the dashboard reads does."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import HTMLResponse

from ops_backend import pages
from ops_backend.api_page import api_page
from ops_contract.errors import ErrorCode, OpsError

router = APIRouter(include_in_schema=False)

# No script but ours, no frame around us, nothing from another host. Styles may be inline: plotly brings its own in a
# <style> that changes with its version, and they run no code.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_ALWAYS = {"X-Content-Type-Options": "nosniff", "Vary": "Accept-Encoding"}
_PAGE = _ALWAYS | {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FOR_GOOD = _ALWAYS | {"Cache-Control": "public, max-age=31536000, immutable"}

Accepts = Annotated[str, Header(alias="Accept-Encoding")]
Has = Annotated[str | None, Header(alias="If-None-Match")]


@router.get("/")
@router.head("/")
async def page(accept_encoding: Accepts = "", if_none_match: Has = None) -> Response:
    return _answer(pages.index(), _PAGE, accept_encoding, if_none_match)


@router.get("/docs")
async def docs(request: Request) -> Response:
    return HTMLResponse(api_page(request.app.openapi()), headers=_PAGE)


@router.get("/dashboard/{release}/{name}")
@router.head("/dashboard/{release}/{name}")
async def asset(release: str, name: str, accept_encoding: Accepts = "", if_none_match: Has = None) -> Response:
    """Under the name of its release, or of its version, a file never changes."""
    found: pages.Page | None = None
    if (release, name) == ("vendor", pages.plotly_name()):
        found = await asyncio.to_thread(pages.plotly)  # five megabytes to pack, once
    elif release == pages.release():
        found = pages.assets().get(name)
    if found is None:
        raise OpsError(ErrorCode.NOT_FOUND, "no such file of the dashboard; load the page again")
    return _answer(found, _FOR_GOOD, accept_encoding, if_none_match)


def _answer(page: pages.Page, headers: dict[str, str], accept_encoding: str, if_none_match: str | None) -> Response:
    headers = headers | {"ETag": page.tag}
    if if_none_match and page.tag in if_none_match:
        return Response(status_code=304, headers=headers)
    if "gzip" in accept_encoding:
        return Response(page.packed, headers=headers | {"Content-Encoding": "gzip"}, media_type=page.media_type)
    return Response(page.body, headers=headers, media_type=page.media_type)
