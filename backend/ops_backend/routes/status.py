"""The one call that every dashboard polls."""

from typing import Annotated
from uuid import UUID

from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import SecurityScopes
from pydantic import TypeAdapter, ValidationError
from starlette.types import Receive, Send
from starlette.types import Scope as Connection

from ops_backend.dependencies import ReaderDep, StatusReadsDep, caller
from ops_backend.routes.errors import refusals
from ops_contract.operations import Operation
from ops_contract.tokens import Scope
from ops_contract.wire import API_PREFIX

_PATH = f"{API_PREFIX}/operations/{{id}}"
_UUID = TypeAdapter(UUID)
_WANTED = SecurityScopes([Scope.READ])


def install(app: FastAPI) -> None:
    """The first of all routes, at the app itself: each router that is asked before costs a poll some microseconds."""
    documented = refusals(401, 404, 422, 503) | {304: {"description": "unchanged"}}
    for method in ("GET", "HEAD"):
        app.router.add_api_route(
            _PATH,
            get_operation,
            methods=[method],
            response_model=Operation,
            responses=documented,
            tags=["operations"],
            include_in_schema=method == "GET",
            route_class_override=StatusRoute,
        )


async def get_operation(
    id: UUID,
    reads: StatusReadsDep,
    _: ReaderDep,
    if_none_match: Annotated[str | None, Header(description="an `ETag`; 304 while nothing has changed")] = None,
) -> Response:
    """The operation as it is now. Its ETag changes with it; sent back as If-None-Match, it spares the body."""
    return (await reads.get(id)).answer(if_none_match)


class StatusRoute(APIRoute):
    """Gives its endpoint what the signature says, by hand: to solve it as dependencies costs more than the answer."""

    async def handle(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            return await super().handle(scope, receive, send)  # 405
        request = Request(scope)
        user, reads = await caller(request, _WANTED), request.app.state.status_reads
        response = await get_operation(_id(request), reads, user, request.headers.get("if-none-match"))
        await response(scope, receive, send)


def _id(request: Request) -> UUID:
    try:
        return _UUID.validate_python(request.path_params["id"])
    except ValidationError as error:
        raise RequestValidationError([problem | {"loc": ("path", "id")} for problem in error.errors()]) from None
