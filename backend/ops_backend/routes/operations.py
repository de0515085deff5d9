"""What users do with operations."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.database import Sessions
from ops_backend.dependencies import (
    AuditDep,
    DispatcherDep,
    PageCursor,
    ReaderDep,
    SessionDep,
    SessionsDep,
    SettingsDep,
    TelemetryDep,
    UserDep,
    Validating,
    ValidatorDep,
)
from ops_backend.engines.requests import elastic
from ops_backend.routes.errors import read, refusals
from ops_backend.routes.files import FILE_ANSWERS, ArtifactResponse
from ops_backend.routes.raw_bodies import reads
from ops_backend.store import children, curves, deletion, output, queries
from ops_backend.store.curves import LAST_STEP
from ops_backend.store.estimates import preview
from ops_backend.store.fork import fork_if_there, forked_job, replay_if_there
from ops_backend.store.retention import delete_if_unused, explain_delete
from ops_backend.store.submit import once, replay, resolved_job, submit_if_new
from ops_backend.store.transitions import cancel_if_live, explain_cancel, explain_resume, resume_if_ended
from ops_backend.store.validation import Question, question
from ops_backend.tags import UNCHANGED, IfNoneMatch, Tagged
from ops_contract.agents import Validated
from ops_contract.audit import Action
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.jobs import Job, JobSpec
from ops_contract.lifecycle import Kind, Status
from ops_contract.operations import (
    Artifacts,
    Attempts,
    CancelRequest,
    Checkpoints,
    Children,
    Events,
    ForkRequest,
    MetricNames,
    MetricPoints,
    Operation,
    OperationPage,
    ReplayRequest,
    Results,
    ResumeAccepted,
    ResumeRequest,
    StudyPreview,
)
from ops_contract.problems import offer
from ops_contract.studies import MAX_CHILDREN
from ops_contract.wire import LOG_COMPLETE, LOG_END, LOG_NEXT, LOG_OFFSET, Wire

router = APIRouter(prefix="/operations", tags=["operations"], responses=refusals(401))

IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=200, description="the same key and body again make nothing new")
]
AfterSeq = Annotated[int, Query(ge=0, lt=2**31, description="only later events")]

DryRun = Annotated[
    bool, Query(description="store nothing, and answer 200 with the resolved job; of a study with its plan too")
]


@router.post(
    "",
    status_code=201,
    response_model=Operation,
    responses={200: {"model": Operation | Job | StudyPreview}, **refusals(409)},
    openapi_extra=reads(JobSpec, {"workload": "digits", "execution": {"max_epochs": 20}}, required=True),
)
async def submit(
    request: Request,
    response: Response,
    sessions: SessionsDep,
    user: UserDep,
    dispatcher: DispatcherDep,
    validator: ValidatorDep,
    settings: SettingsDep,
    audit: AuditDep,
    after: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
    dry_run: DryRun = False,
) -> Operation | Response:
    """Submit an operation; the same `Idempotency-Key` and body again give the same operation (200)."""
    body = await request.body()

    async def asked(session: AsyncSession) -> Question | None:
        if not dry_run and await replay(session, user.name, idempotency_key, body):
            return None
        job = await resolved_job(session, read(JobSpec, body), settings.lease_s, elastic=elastic(settings))
        return await question(session, job, settings.lease_s)

    async def submitted(session: AsyncSession, told: Validated | None) -> Operation | Response:
        if dry_run:
            spec = read(JobSpec, body)
            job = await resolved_job(session, spec, settings.lease_s, told=told, elastic=elastic(settings))
            plan = told.plan if told else None
            return as_json(job if job.study is None else await preview(session, job, plan, settings.lease_s))

        async def make() -> UUID | None:
            spec, lease_s = read(JobSpec, body), settings.lease_s
            return await submit_if_new(
                session, spec, user.name, idempotency_key, body, lease_s, told, elastic(settings)
            )

        id, is_new = await once(session, user.name, idempotency_key, body, make)
        operation = await queries.get(session, id)
        if is_new:
            await audit.note(session, Action.SUBMIT, id, name=operation.name)
        response.status_code = 201 if is_new else 200
        after.add_task(dispatcher.wake)
        return operation

    # The network is between two transactions, never inside one; where nobody is to be asked, one does.
    async with sessions.begin() as session:
        to_ask = await asked(session)
        if to_ask is None:
            return await submitted(session, None)
    told = await validator.ask(to_ask)
    async with sessions.begin() as session:
        return await submitted(session, told)


@router.get("", response_model=OperationPage, responses=UNCHANGED)
async def list_operations(
    session: SessionDep,
    user: ReaderDep,
    status: Annotated[str | None, Query(description="one or several, joined by commas")] = None,
    kind: Annotated[Kind | None, Query(description="what it does")] = None,
    workload: Annotated[str | None, Query(description="its name, as `GET /workloads` has it")] = None,
    label: Annotated[str | None, Query(description="key or key=value")] = None,
    q: Annotated[str | None, Query(description="part of the name, or the beginning of the id")] = None,
    mine: Annotated[bool, Query(description="those that this token submitted")] = False,
    parent_id: Annotated[
        UUID | Literal["none"] | None, Query(description="a study's children; none: what is no study's child")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="so many a page")] = 50,
    cursor: PageCursor = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Operations, newest first, in pages: `next_cursor` is the `cursor` of the next one, null on the last.

    A page by `q` looks at 100,000 operations at most: it may be short, or empty, and not the last.
    """
    wanted = queries.Filter(_known(status), kind, workload, label, q, user.name if mine else None, parent_id)
    return Tagged(await queries.list_page(session, wanted, limit, cursor)).answer(if_none_match)


@router.get("/{id}/children", responses=refusals(404))
async def operation_children(
    id: UUID,
    session: SessionDep,
    _: ReaderDep,
    limit: Annotated[int, Query(ge=1, le=MAX_CHILDREN, description="so many a page")] = 500,
    cursor: PageCursor = None,
) -> Children:
    """A study's children in the order of its plan, with what each has given so far; none of what is no study."""
    await queries.starts_of(session, id)
    return await children.page(session, id, limit, cursor)


@router.get("/{id}/results", responses=refusals(404))
async def operation_results(id: UUID, session: SessionDep, _: ReaderDep) -> Results:
    """What it came to: of a training how much it was trained on what, of a study its rows, fits and statistics."""
    await queries.starts_of(session, id)
    return await children.results(session, id)


@router.delete("/{id}", status_code=204, response_class=Response, responses=refusals(404, 409))
async def delete_operation(id: UUID, session: SessionDep, _: UserDep, audit: AuditDep) -> None:
    """Delete an operation that has ended, for good. Its files, checkpoints and model included, go soon after."""
    if not await deletion.delete_if_ended(session, id):
        raise await deletion.explain_delete(session, id)
    await audit.note(session, Action.DELETE, id)


@router.post("/{id}/cancel", status_code=202, responses=refusals(404, 409))
async def cancel_operation(
    id: UUID,
    session: SessionDep,
    _: UserDep,
    dispatcher: DispatcherDep,
    telemetry: TelemetryDep,
    audit: AuditDep,
    after: BackgroundTasks,
    wish: CancelRequest | None = None,
) -> Operation:
    """Ask it to save a checkpoint and stop. It is `cancelling` until its process is gone; a pending one ends at once.

    `force` kills its trainer, also where a cancel is under way already.
    """
    wish = wish or CancelRequest()
    cancelled = await cancel_if_live(session, id, wish.reason, wish.force)
    if cancelled is None:
        raise await explain_cancel(session, id)
    await audit.note(session, Action.CANCEL, id, reason=wish.reason or None, force=wish.force or None)
    after.add_task(telemetry.moved, cancelled.status)
    for push in cancelled.pushes:
        after.add_task(dispatcher.push_cancel, id, push, wish.reason, wish.force)
    return await queries.get(session, id)


@router.post("/{id}/resume", status_code=202, responses=refusals(404, 409))
async def resume_operation(
    id: UUID,
    session: SessionDep,
    _: UserDep,
    dispatcher: DispatcherDep,
    audit: AuditDep,
    after: BackgroundTasks,
    wish: ResumeRequest | None = None,
) -> ResumeAccepted:
    """Go on with a failed or cancelled operation, from its newest checkpoint or the one that is named.

    A refused call changes nothing: 404 without a checkpoint, 409 while it runs or when it is completed.
    """
    wish = wish or ResumeRequest()
    resumed = await resume_if_ended(session, id, wish.from_checkpoint, wish.accept_changes)
    if resumed is None:
        raise await explain_resume(session, id, wish.from_checkpoint)
    await audit.note(session, Action.RESUME, id, accept_changes=wish.accept_changes or None)
    after.add_task(dispatcher.wake)
    return resumed


@router.post(
    "/{id}/fork",
    status_code=201,
    response_model=Operation,
    responses={200: {"model": Operation | Job}, **refusals(404, 409)},
    openapi_extra=reads(ForkRequest, {"overrides": {"execution": {"max_epochs": 40}}}, required=False),
)
async def fork_operation(
    id: UUID,
    request: Request,
    response: Response,
    sessions: SessionsDep,
    user: UserDep,
    dispatcher: DispatcherDep,
    validator: ValidatorDep,
    settings: SettingsDep,
    audit: AuditDep,
    after: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
    dry_run: DryRun = False,
) -> Operation | Response:
    """A new operation that begins at a checkpoint of this one, with its job but for the overrides."""
    body = await request.body() or b"{}"
    whole = _whole("fork", id, body)

    async def asked(session: AsyncSession) -> Question | None:
        wish = read(ForkRequest, body)
        if not dry_run and await replay(session, user.name, idempotency_key, whole):
            return None
        if not (wish.overrides.config or wish.overrides.code):
            return None
        job = await forked_job(session, id, wish, settings.lease_s, elastic=elastic(settings))
        return await question(session, job, settings.lease_s)

    told = await _told(sessions, validator, asked)
    async with sessions.begin() as session:
        if dry_run:
            wish = read(ForkRequest, body)
            return as_json(await forked_job(session, id, wish, settings.lease_s, told, elastic(settings)))

        async def make() -> UUID | None:
            wish = read(ForkRequest, body)
            return await fork_if_there(
                session, id, wish, user.name, idempotency_key, whole, settings.lease_s, told, elastic(settings)
            )

        fork_id, is_new = await once(session, user.name, idempotency_key, whole, make)
        operation = await queries.get(session, fork_id)
        if is_new:
            await audit.note(session, Action.FORK, fork_id, of=str(id))
    response.status_code = 201 if is_new else 200
    after.add_task(dispatcher.wake)
    return operation


@router.post(
    "/{id}/replay",
    status_code=201,
    responses={200: {"model": Operation}, **refusals(404, 409)},
    openapi_extra=reads(ReplayRequest, {"steps": 50}, required=False),
)
async def replay_operation(
    id: UUID,
    request: Request,
    response: Response,
    session: SessionDep,
    user: UserDep,
    dispatcher: DispatcherDep,
    audit: AuditDep,
    after: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Operation:
    """A new operation that redoes steps of this one; its attempts' `replay` says whether every value was the same."""
    body = await request.body() or b"{}"
    whole = _whole("replay", id, body)

    async def make() -> UUID | None:
        wish = read(ReplayRequest, body)
        return await replay_if_there(session, id, wish, user.name, idempotency_key, whole)

    replay_id, is_new = await once(session, user.name, idempotency_key, whole, make)
    if is_new:
        await audit.note(session, Action.REPLAY, replay_id, of=str(id))
    response.status_code = 201 if is_new else 200
    after.add_task(dispatcher.wake)
    return await queries.get(session, replay_id)


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


def _whole(verb: str, id: UUID, wish: bytes) -> bytes:
    """What an idempotency key stands for: the same wish for another operation is another request."""
    return b'{"%s": "%s", "wish": %s}' % (verb.encode(), str(id).encode(), wish)


def as_json(body: Wire) -> Response:
    """Written by the model itself: a union's own serializer would turn NaN into null."""
    return Response(body.model_dump_json(), media_type="application/json")


async def _told(
    sessions: Sessions, validator: Validating, asked: Callable[[AsyncSession], Awaitable[Question | None]]
) -> Validated | None:
    """What a worker says of the job: the network is between two transactions, never inside one."""
    async with sessions.begin() as session:
        to_ask = await asked(session)
    return await validator.ask(to_ask) if to_ask else None


def _known(statuses: str | None) -> str | None:
    for unknown in sorted(set((statuses or "").split(",")) - {"", *Status}):
        raise OpsError(ErrorCode.INVALID, f"status: no such status {unknown}; {offer(unknown, Status)}")
    return statuses or None
