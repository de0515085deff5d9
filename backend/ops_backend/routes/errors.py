"""One shape for every error, whoever raised it."""

import logging
import math
from typing import Any, TypeVar

from asyncpg import InterfaceError, PostgresError
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from ops_backend.audit import note_refusal
from ops_backend.store.submit import invalid
from ops_contract.errors import HTTP_STATUS, ErrorBody, ErrorCode, OpsError
from ops_contract.http_gate import HEADERS
from ops_contract.problems import in_words, problems_of
from ops_contract.wire import API_PREFIX

log = logging.getLogger(__name__)

_BAD_VALUE = ("22", "23")  # data exception, integrity constraint violation
# Connection exception, insufficient resources, operator intervention (a statement that took too long is one),
# transaction rolled back, a standby, idle for too long, a lock that others hold for too long.
_AWAY = ("08", "53", "57", "40", "25006", "25P03", "55P03")


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's documentation. Who has to say who they are (401) may not be the one that it is for (403).

    Or has said it wrong too often (429).
    """
    statuses = (*statuses, 403, 429) if 401 in statuses else statuses
    return {status: {"model": ErrorBody} for status in statuses}


M = TypeVar("M", bound=BaseModel)


def read(model: type[M], body: bytes) -> M:
    """A body that the route reads itself, because its bytes count. Raises 422."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid([(field or "body", problem) for field, problem in problems_of(error, model)]) from error


def install(app: FastAPI) -> None:
    app.add_exception_handler(OpsError, _answer)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    for kind in (DBAPIError, PostgresError, InterfaceError):  # the last two from what asks the driver itself
        app.add_exception_handler(kind, _database)
    app.add_exception_handler(PoolTimeoutError, _away)
    app.add_exception_handler(OSError, _away)  # asyncpg's own word for a database that cannot be reached
    app.add_exception_handler(Exception, _unexpected)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OpsError)
    note_refusal(request, error.http_status)
    return JSONResponse(error.body().model_dump(mode="json"), error.http_status, _headers(error))


def _headers(error: OpsError) -> dict[str, str]:
    match error.http_status:
        case 401:
            return {"WWW-Authenticate": "Bearer"}
        case 429:
            return {"Retry-After": str(math.ceil(error.details.get("retry_after_s", 1)))}
        case 503:
            return {"Retry-After": "1"}
    return {}


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await _answer(request, invalid([(_path(e["loc"]), in_words(e)) for e in error.errors()]))


async def _plain(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {status: code for code, status in HTTP_STATUS.items() if code not in (ErrorCode.NO_CHECKPOINT,)}
    code = ErrorCode.NOT_FOUND if error.status_code == 404 else codes.get(error.status_code, ErrorCode.INVALID)
    message = f"no such path: {request.url.path}" if error.status_code == 404 else str(error.detail)
    return await _answer(request, OpsError(code, message))


async def _database(request: Request, error: Exception) -> JSONResponse:
    """By the class of its SQLSTATE: a value it refuses is the sender's fault, a statement it refuses is ours."""
    gone = isinstance(error, DBAPIError) and error.connection_invalidated
    cause = error.orig if isinstance(error, DBAPIError) else error
    state = str(getattr(cause, "sqlstate", None) or "")
    if state.startswith(_BAD_VALUE):
        log.warning("refused by the database: %s", cause, extra=_about(request))
        return await _answer(request, OpsError(ErrorCode.INVALID, f"the database refused a value: {cause}"))
    if gone or not state or state.startswith(_AWAY):  # no state: the connection is gone
        return await _away(request, error)
    log.error("a statement of ours failed", exc_info=error, extra=_about(request))
    return await _unexpected(request, error)


async def _away(request: Request, error: Exception) -> JSONResponse:
    log.warning("database away or busy: %r", error, extra=_about(request))
    return await _answer(
        request, OpsError(ErrorCode.UNAVAILABLE, "the database is away or busy; try again in a moment")
    )


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    answer = await _answer(request, OpsError(ErrorCode.INTERNAL, "an error of ours; the server's log has it"))
    answer.raw_headers += HEADERS  # it is sent from outside of the gate
    return answer


def _about(request: Request) -> dict[str, str | None]:
    """The operation that the request is of, for the log."""
    found = request.path_params if request.url.path.startswith(f"{API_PREFIX}/operations/") else {}
    return {"operation_id": found.get("id"), "attempt": found.get("attempt")}


def _path(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc if part not in ("body", "query", "path", "header")) or "body"
