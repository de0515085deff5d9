"""The one call that every dashboard polls, and the short way to it."""

import re
from time import perf_counter
from typing import Annotated, cast
from uuid import UUID

from fastapi import FastAPI, Header, Request, Response
from fastapi.security import SecurityScopes
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from ops_backend.dependencies import ReaderDep, StatusReadsDep, caller
from ops_backend.routes.errors import refusals
from ops_backend.telemetry import Telemetry
from ops_contract.errors import OpsError
from ops_contract.operations import Operation
from ops_contract.tokens import Scope
from ops_contract.wire import API_PREFIX

_ROUTE = "/operations/{id}"
_POLL = re.compile(rf"{API_PREFIX}/operations/([0-9a-f]{{8}}(?:-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})")
_WANTED = SecurityScopes([Scope.READ])
# A request with one of these has a body, which is not the short way's.
_OF_BODIES = frozenset({b"content-length", b"transfer-encoding"})


def install(app: FastAPI, telemetry: Telemetry) -> None:
    """Before all routers, and the short way before all middleware that is added until now."""
    documented = refusals(401, 404, 422, 503) | {304: {"description": "unchanged"}}
    for method in ("GET", "HEAD"):
        app.router.add_api_route(
            API_PREFIX + _ROUTE,
            get_operation,
            methods=[method],
            response_model=Operation,
            responses=documented,
            tags=["operations"],
            include_in_schema=method == "GET",
        )
    app.add_middleware(ShortWay, telemetry=telemetry)


async def get_operation(
    request: Request,
    id: UUID,
    reads: StatusReadsDep,
    _: ReaderDep,
    if_none_match: Annotated[str | None, Header(description="an `ETag`; 304 while nothing has changed")] = None,
) -> Response:
    """The operation as it is now. Its ETag changes with it; sent back as If-None-Match, it spares the body."""
    if unread := getattr(request.state, "unread", None):  # the short way waited for it already
        raise cast(Exception, unread)
    return (await reads.get(id)).answer(if_none_match)


class ShortWay:
    """Answers the polls that are as they mostly are, and that are answered with 200 or 304; all else goes the long way.

    What it says is what the route says, without what leads there: routing, dependencies and middleware take several
    times as long as the answer. It refuses nothing itself: who is refused, and what could not be read, is said there.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        asked = _POLL.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "GET" else None
        if asked is None or scope["query_string"] or any(name in _OF_BODIES for name, _ in scope["headers"]):
            return await self._app(scope, receive, send)
        began_s = perf_counter()
        request = Request(scope)
        try:
            await caller(request, _WANTED)
        except OpsError:
            return await self._app(scope, receive, send)
        try:
            body = await request.app.state.status_reads.get(UUID(asked[1]))
        except Exception as error:
            request.state.unread = error
            return await self._app(scope, receive, send)
        start, content = body.messages(request.headers.get("if-none-match"))
        self._telemetry.answered("GET", _ROUTE, start["status"], perf_counter() - began_s)
        await send(start)
        await send(content)
