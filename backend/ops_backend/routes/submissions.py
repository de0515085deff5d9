"""New operations: submitted, or made of another one by a fork or a replay."""

from collections.abc import Awaitable, Callable
from functools import cache
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import BackgroundTasks, Header, Query, Request, Response
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.database import Sessions
from ops_backend.dependencies import (
    AuditDep,
    DispatcherDep,
    FleetDep,
    SessionDep,
    SessionsDep,
    UserDep,
    Validating,
    ValidatorDep,
)
from ops_backend.routes.errors import read, refusals
from ops_backend.routes.raw_bodies import as_json, reads
from ops_backend.routes.routers import api_router
from ops_backend.store import queries
from ops_backend.store.estimates import preview
from ops_backend.store.fork import fork_if_there, forked_job, replay_if_there
from ops_backend.store.submit import Submission, once, replay, resolved_job, submit_if_new
from ops_backend.store.validation import Question, question
from ops_contract.agents import Validated
from ops_contract.audit import Action
from ops_contract.jobs import Job, JobSpec
from ops_contract.operations import ForkRequest, Operation, ReplayRequest, StudyPreview

router = api_router("operations", "/operations")

IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=200, description="the same key and body again make nothing new")
]
DryRun = Annotated[
    bool, Query(description="store nothing, and answer 200 with the resolved job; of a study with its plan too")
]
Made = TypeVar("Made")


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
    fleet: FleetDep,
    audit: AuditDep,
    after: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
    dry_run: DryRun = False,
) -> Operation | Response:
    """Submit an operation; the same `Idempotency-Key` and body again give the same operation (200)."""
    body = await request.body()
    submission = Submission(user.name, idempotency_key, body)

    async def asked(session: AsyncSession) -> Question | None:
        if not dry_run and await replay(session, submission):
            return None
        return await question(session, await resolved_job(session, read(JobSpec, body), fleet), fleet.lease_s)

    async def submitted(session: AsyncSession, told: Validated | None) -> Operation | Response:
        if dry_run:
            job = await resolved_job(session, read(JobSpec, body), fleet, told)
            plan = told.plan if told else None
            return as_json(job if job.study is None else await preview(session, job, plan, fleet.lease_s))

        async def make() -> UUID | None:
            return await submit_if_new(session, read(JobSpec, body), submission, fleet, told)

        operation, is_new = await _once(session, submission, make, response)
        if is_new:
            await audit.note(session, Action.SUBMIT, operation.id, name=operation.name)
        after.add_task(dispatcher.wake)
        return operation

    return await _judged(sessions, validator, asked, submitted)


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
    fleet: FleetDep,
    audit: AuditDep,
    after: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
    dry_run: DryRun = False,
) -> Operation | Response:
    """A new operation that begins at a checkpoint of this one, with its job but for the overrides."""
    body = await request.body() or b"{}"
    submission = Submission(user.name, idempotency_key, _whole("fork", id, body))

    @cache
    def wish() -> ForkRequest:
        """Read when it is looked at: a replay comes before validation."""
        return read(ForkRequest, body)

    async def asked(session: AsyncSession) -> Question | None:
        if not dry_run and await replay(session, submission):
            return None
        if not (wish().overrides.config or wish().overrides.code):
            return None
        return await question(session, await forked_job(session, id, wish(), fleet), fleet.lease_s)

    async def forked(session: AsyncSession, told: Validated | None) -> Operation | Response:
        if dry_run:
            return as_json(await forked_job(session, id, wish(), fleet, told))

        async def make() -> UUID | None:
            return await fork_if_there(session, id, wish(), submission, fleet, told)

        operation, is_new = await _once(session, submission, make, response)
        if is_new:
            await audit.note(session, Action.FORK, operation.id, of=str(id))
        after.add_task(dispatcher.wake)
        return operation

    return await _judged(sessions, validator, asked, forked)


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
    submission = Submission(user.name, idempotency_key, _whole("replay", id, body))

    async def make() -> UUID | None:
        return await replay_if_there(session, id, read(ReplayRequest, body), submission)

    operation, is_new = await _once(session, submission, make, response)
    if is_new:
        await audit.note(session, Action.REPLAY, operation.id, of=str(id))
    after.add_task(dispatcher.wake)
    return operation


async def _judged(
    sessions: Sessions,
    validator: Validating,
    asked: Callable[[AsyncSession], Awaitable[Question | None]],
    made: Callable[[AsyncSession, Validated | None], Awaitable[Made]],
) -> Made:
    """What `made` makes of the job, with what a worker says of it where `asked` has a question.

    The network is between two transactions, never inside one; where nobody is to be asked, one transaction does.
    """
    async with sessions.begin() as session:
        to_ask = await asked(session)
        if to_ask is None:
            return await made(session, None)
    told = await validator.ask(to_ask)
    async with sessions.begin() as session:
        return await made(session, told)


async def _once(
    session: AsyncSession, submission: Submission, make: Callable[[], Awaitable[UUID | None]], response: Response
) -> tuple[Operation, bool]:
    """The operation, and whether it is new (201) or was made by the same key before (200)."""
    id, is_new = await once(session, submission, make)
    response.status_code = 201 if is_new else 200
    return await queries.get(session, id), is_new


def _whole(verb: str, id: UUID, wish: bytes) -> bytes:
    """What an idempotency key stands for: the same wish for another operation is another request."""
    return b'{"%s": "%s", "wish": %s}' % (verb.encode(), str(id).encode(), wish)
