"""The one call that every dashboard polls, and the short way to it."""

import re
from time import perf_counter
from typing import cast
from uuid import UUID

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Send
from starlette.types import Scope as Connection

from ops_backend.dependencies import ReaderDep, StatusReadsDep
from ops_backend.routes.errors import refusals
from ops_backend.routes.routers import api_router
from ops_backend.tags import UNCHANGED, IfNoneMatch
from ops_contract.operations import Operation
from ops_contract.tokens import Scope
from ops_contract.wire import API_PREFIX

_ROUTE = "/operations/{id}"
_POLL = re.compile(rf"{API_PREFIX}/operations/([0-9a-f]{{8}}(?:-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})")
_READ = frozenset({b"authorization", b"if-none-match", b"content-length", b"transfer-encoding"})

router = api_router("operations")


@router.head(_ROUTE, include_in_schema=False)
@router.get(_ROUTE, response_model=Operation, responses=UNCHANGED | refusals(404))
async def get_operation(
    request: Request, id: UUID, reads: StatusReadsDep, _: ReaderDep, if_none_match: IfNoneMatch = None
) -> Response:
    """The operation as it is now. Its ETag changes with it; sent back as If-None-Match, it spares the body."""
    if unread := getattr(request.state, "unread", None):  # the short way waited for it already
        raise cast(Exception, unread)
    return (await reads.get(id)).answer(if_none_match)


class ShortWay(FastAPI):
    """An app with a short way to the polls that are as they mostly are, and are answered with 200 or 304.

    What it says is what the route says, without what leads there: routing, dependencies and middleware take several
    times as long as the answer. It refuses nothing itself: who is refused, and what could not be read, is said there.
    """

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        asked = _POLL.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "GET" else None
        if asked is None or not (headers := self._plain_headers(scope)):
            return await super().__call__(scope, receive, send)
        began_s = perf_counter()
        try:
            body = await self.state.status_reads.get(UUID(asked[1]))
        except Exception as error:
            scope.setdefault("state", {})["unread"] = error
            return await super().__call__(scope, receive, send)
        start, content = body.messages(headers.get(b"if-none-match"))
        self.state.telemetry.answered("GET", _ROUTE, start["status"], perf_counter() - began_s)
        await send(start)
        await send(content)

    def _plain_headers(self, scope: Connection) -> dict[bytes, str] | None:
        """Of a request without a query or a body, by who may read and is known without a query of ours."""
        if scope["query_string"]:
            return None
        # Of several of a name the first one counts, as on the long way.
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"]) if name in _READ}
        if b"content-length" in headers or b"transfer-encoding" in headers:
            return None
        scheme, _, token = headers.get(b"authorization", "").partition(" ")
        who = self.state.identities.known(token) if scheme in ("Bearer", "bearer") else None
        return headers if who is not None and Scope.READ in who.scope.allows else None
