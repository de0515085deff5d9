"""What one operation has come to: children, results, attempts, metrics, checkpoints, artifacts, energy, output."""

from typing import Annotated
from uuid import UUID

from fastapi import Query, Response
from fastapi.responses import PlainTextResponse

from ops_backend.dependencies import AuditDep, PageCursor, ReaderDep, SessionDep, SessionsDep, SettingsDep, UserDep
from ops_backend.routes.errors import refusals
from ops_backend.routes.files import FILE_ANSWERS, ArtifactResponse
from ops_backend.routes.raw_bodies import as_json
from ops_backend.routes.routers import api_router
from ops_backend.store import children, curves, energy, output, queries
from ops_backend.store.curves import LAST_STEP
from ops_backend.store.ledger_views import Rates
from ops_backend.store.retention import delete_if_unused, explain_delete
from ops_backend.tags import UNCHANGED, IfNoneMatch, Tagged
from ops_contract.audit import Action
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import Artifacts, Attempts, Checkpoints, Events, MetricNames, MetricPoints, Results
from ops_contract.ledger import EnergyLedger, EnergyWindows
from ops_contract.operations import Children
from ops_contract.studies import MAX_CHILDREN
from ops_contract.wire import LOG_COMPLETE, LOG_END, LOG_NEXT, LOG_OFFSET

router = api_router("operations", "/operations")

AfterSeq = Annotated[int, Query(ge=0, lt=2**31, description="only later events")]


@router.get("/{id}/children", responses=refusals(404))
async def operation_children(
    id: UUID,
    session: SessionDep,
    _: ReaderDep,
    limit: Annotated[int, Query(ge=1, le=MAX_CHILDREN, description="so many a page")] = 500,
    cursor: PageCursor = None,
) -> Children:
    """A study's children in the order of its plan, with what each has given so far; none of what is no study."""
    return await children.page(session, id, limit, cursor)


@router.get("/{id}/results", responses=refusals(404))
async def operation_results(id: UUID, session: SessionDep, _: ReaderDep) -> Results:
    """What it came to: of a training how much it was trained on what, of a study its rows, fits and statistics."""
    return await children.results(session, id)


@router.get("/{id}/attempts", responses=refusals(404))
async def get_attempts(id: UUID, session: SessionDep, _: ReaderDep) -> Attempts:
    """Its executions, the first one first: where each ran, from which step on, how it ended, whether it is exact."""
    return await queries.attempts(session, id)


@router.get("/{id}/metrics", response_model=MetricPoints | MetricNames, responses=refusals(404))
async def get_metrics(
    id: UUID,
    session: SessionDep,
    _: ReaderDep,
    name: Annotated[
        str | None, Query(description="which metric; without it their names, first and last points")
    ] = None,
    max_points: Annotated[int | None, Query(ge=10, le=10_000, description="fewer points, with every spike")] = None,
    after_step: Annotated[int, Query(ge=-1, lt=2**63, description="only later steps")] = -1,
    until_step: Annotated[int, Query(ge=0, lt=2**63, description="no later ones; with max_points")] = LAST_STEP,
    cursor: Annotated[str | None, Query(description="an answer's: only what has come since")] = None,
) -> Response:
    """Every point that counts, every bit kept, in pages; without `name` the names that there are.

    `max_points` keeps of equal widths of steps the lowest and the highest point and the first NaN, and both ends.
    """
    if name is not None:
        return as_json(await curves.read(session, id, name, after_step, max_points, cursor, until_step))
    if (after_step, until_step, max_points, cursor) != (-1, LAST_STEP, None, None):
        raise OpsError(ErrorCode.INVALID, "name: say which metric; without it only the names are told")
    return as_json(await curves.names(session, id))


@router.get("/{id}/checkpoints", responses=refusals(404))
async def get_checkpoints(id: UUID, session: SessionDep, _: ReaderDep) -> Checkpoints:
    """Those that are committed, and those that are marked; `step` is the next one to run from there."""
    return await queries.checkpoints(session, id)


@router.delete(
    "/{id}/checkpoints/{checkpoint_id}", status_code=204, response_class=Response, responses=refusals(404, 409)
)
async def delete_checkpoint(id: UUID, checkpoint_id: UUID, session: SessionDep, _: UserDep, audit: AuditDep) -> None:
    """Give up a checkpoint: it can no longer be used. Its files go within seconds, and its row after them."""
    if not await delete_if_unused(session, id, checkpoint_id):
        raise await explain_delete(session, id, checkpoint_id)
    await audit.note(session, Action.DELETE_CHECKPOINT, checkpoint_id, of=str(id))


@router.get("/{id}/artifacts", responses=refusals(404))
async def get_artifacts(id: UUID, session: SessionDep, _: ReaderDep) -> Artifacts:
    """The files that a completed operation left: `model.safetensors`, its final model."""
    return await queries.artifacts(session, id)


@router.head("/{id}/artifacts/{artifact_id}", include_in_schema=False)
@router.get(
    "/{id}/artifacts/{artifact_id}",
    status_code=200,  # else FastAPI reads it from the class, and finds none
    response_class=ArtifactResponse,
    responses=FILE_ANSWERS | refusals(404),
)
async def get_artifact(
    id: UUID, artifact_id: UUID, sessions: SessionsDep, settings: SettingsDep, _: ReaderDep
) -> Response:
    """The file itself, with ranges; its ETag is its SHA-256."""
    async with sessions.begin() as session:
        artifact = await queries.artifact(session, id, artifact_id)
    return ArtifactResponse(settings.storage_root, artifact)


@router.get("/{id}/energy", response_model=EnergyLedger, responses=UNCHANGED | refusals(404))
async def get_energy(
    id: UUID, session: SessionDep, _: ReaderDep, settings: SettingsDep, if_none_match: IfNoneMatch = None
) -> Response:
    """The ledger: useful, lost, overhead; by attempt, epoch and device; carbon and cost. Unknown is null, and why."""
    rates = Rates(settings.carbon_g_per_kwh, settings.price_per_kwh, settings.currency)
    return Tagged(await energy.ledger(session, id, rates)).answer(if_none_match)


@router.get("/{id}/energy/windows", responses=refusals(404))
async def get_windows(
    id: UUID,
    session: SessionDep,
    _: ReaderDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="how many at most")] = 1000,
    cursor: PageCursor = None,
) -> EnergyWindows:
    """What the ledger adds up, in pages: a time series of each device of each attempt."""
    return await energy.windows(session, id, limit, cursor)


@router.get("/{id}/events", responses=refusals(404))
async def get_events(id: UUID, session: SessionDep, _: ReaderDep, after_seq: AfterSeq = 0) -> Events:
    """Its history, oldest first, in pages: ask again with the last `seq`. `message` is a sentence for people."""
    return await queries.events(session, id, after_seq)


_LOG_HEADERS = {
    LOG_OFFSET: ("integer", "where the body begins: past `offset` where output was left out"),
    LOG_NEXT: ("integer", "the `offset` to go on from"),
    LOG_END: ("integer", "the end of what there is so far"),
    LOG_COMPLETE: ("boolean", "the operation has ended, and the body is the end of its output"),
}
_LOG = {
    "description": "bytes as they were written, which need not be UTF-8",
    "content": {"text/plain": {"schema": {"type": "string"}}},
    "headers": {name: {"description": what, "schema": {"type": of}} for name, (of, what) in _LOG_HEADERS.items()},
}


@router.get("/{id}/logs", response_class=Response, responses={200: _LOG, **refusals(404)})
async def get_logs(
    id: UUID,
    session: SessionDep,
    _: ReaderDep,
    offset: Annotated[int, Query(gt=-(2**63), lt=2**63, description="in bytes; negative: so many before the end")] = 0,
    max_bytes: Annotated[int, Query(ge=1, le=4 * 2**20, description="of a body, at most")] = 2**20,
) -> Response:
    """What its attempts wrote to stdout and stderr, one after another, as one text.

    A body has no gap: it ends where output was left out, and the next one begins after that.
    """
    part = await output.read(session, id, offset, max_bytes)
    headers = {
        LOG_OFFSET: str(part.start),
        LOG_NEXT: str(part.start + len(part.data)),
        LOG_END: str(part.end),
        LOG_COMPLETE: str(part.complete).lower(),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",  # no browser may take it for a page of ours
    }
    return PlainTextResponse(part.data, headers=headers)
