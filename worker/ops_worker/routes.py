"""The worker's HTTP server: what the backend's dispatcher calls."""

import logging
from typing import Annotated
from uuid import UUID

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ops_contract.agents import (
    CancelTraining,
    HoldRef,
    ProbeStorage,
    StartTraining,
    StorageProbed,
    Validate,
    Validated,
    WorkerHealth,
)
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.http_gate import HEADERS, MAX_HEAD_BYTES, Gate
from ops_contract.lifecycle import Kind
from ops_worker.agent import Agent

log = logging.getLogger(__name__)

# Two jobs at most, each of which the API took in a body of half of this.
MAX_BODY_BYTES = 16 * 2**20


def create_app(agent: Agent) -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.state.agent = agent
    app.include_router(open_to_all)
    app.include_router(backend_only)
    app.add_middleware(Gate, max_body_bytes=MAX_BODY_BYTES)
    app.add_exception_handler(OpsError, _answer)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(Exception, _unexpected)
    return app


def server_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        http="h11",  # which bounds what it parses
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )


def _agent(request: Request) -> Agent:
    agent: Agent = request.app.state.agent
    return agent


AgentDep = Annotated[Agent, Depends(_agent)]


async def _authenticate(agent: AgentDep, authorization: Annotated[str, Header()] = "") -> None:
    if not agent.is_the_api(authorization.removeprefix("Bearer ")):
        raise OpsError(ErrorCode.UNAUTHENTICATED, "this takes the secret with which this worker registered")


open_to_all = APIRouter()
backend_only = APIRouter(dependencies=[Depends(_authenticate)])


@open_to_all.get("/health")
async def health(agent: AgentDep) -> WorkerHealth:
    return agent.health()


@backend_only.post("/{kind}/start")
async def start(kind: Kind, order: StartTraining, agent: AgentDep) -> Response:
    if order.checkpoint is not None:
        raise OpsError(ErrorCode.INVALID, f"checkpoint: a start has none; use /{kind}/resume")
    return await _take(kind, order, agent)


@backend_only.post("/{kind}/resume")
async def resume(kind: Kind, order: StartTraining, agent: AgentDep) -> Response:
    if order.checkpoint is None:
        raise OpsError(ErrorCode.INVALID, f"checkpoint: a resume needs one; use /{kind}/start")
    return await _take(kind, order, agent)


@backend_only.post("/validate")
async def validate(question: Validate, agent: AgentDep) -> Validated:
    return await agent.validate(question)


@backend_only.post("/storage")
async def probe_storage(wish: ProbeStorage, agent: AgentDep) -> StorageProbed:
    return await agent.probe_storage(wish)


@backend_only.post("/operations/{id}/cancel", status_code=202)
async def cancel(id: UUID, order: CancelTraining, agent: AgentDep) -> HoldRef:
    agent.cancel(id, order)
    return HoldRef(operation_id=id, attempt=order.attempt)


async def _take(kind: Kind, order: StartTraining, agent: Agent) -> JSONResponse:
    if order.job.kind is not kind:
        raise OpsError(ErrorCode.INVALID, f"job.kind: this is a {order.job.kind}; use /{order.job.kind}/…")
    new = await agent.start(order)
    ref = HoldRef(operation_id=order.operation_id, attempt=order.attempt)
    return JSONResponse(ref.model_dump(mode="json"), 202 if new else 200)


async def _answer(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OpsError)
    return JSONResponse(error.body().model_dump(mode="json"), error.http_status)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = [{"field": ".".join(map(str, e["loc"][1:])) or "body", "problem": e["msg"]} for e in error.errors()]
    message = f"{problems[0]['field']}: {problems[0]['problem']}"
    return await _answer(request, OpsError(ErrorCode.INVALID, message, errors=problems))


async def _plain(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: ErrorCode.NOT_FOUND, 405: ErrorCode.METHOD_NOT_ALLOWED}.get(error.status_code, ErrorCode.INVALID)
    return await _answer(request, OpsError(code, f"{request.method} {request.url.path}: {error.detail}"))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    extra = {"operation_id": request.path_params.get("id")}
    log.error("%s %s failed", request.method, request.url.path, exc_info=error, extra=extra)
    answer = await _answer(request, OpsError(ErrorCode.INTERNAL, "an error of ours; the worker's log has it"))
    answer.raw_headers += HEADERS  # it is sent from outside of the gate
    return answer
