"""fork and replay: – → pending, a new operation that begins at a checkpoint of another, which is pinned by it."""

from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import NEWEST_FIRST, continues, record, statement
from ops_backend.store.submit import Fleet, Submission, invalid, new_operation, resolved_job
from ops_backend.store.transitions import not_found
from ops_contract.agents import Validated
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.jobs import Execution, Job, JobSpec, Setup
from ops_contract.lifecycle import Kind
from ops_contract.operations import ForkRequest, ReplayRequest
from ops_contract.problems import problems_of

# The last step of which the lineage has a report. What evaluates a step does not redo its update.
_REPORTED = """
    SELECT max(least(h.last_step, (SELECT min(later.start_step) - 1 FROM attempts later
                                    WHERE later.operation_id = o.id AND later.number > h.attempt))) AS last_step
      FROM holds h WHERE h.operation_id = o.id AND h.last_step IS NOT NULL"""
_REDOES_SOME = "c.step + (c.phase = 'evaluate')::int <= reported.last_step"

# One that is named may lie on a branch that a resume left behind: the fork has a lineage of its own. Until it is
# inserted the lock keeps the operation from being deleted.
FIND_FORK_POINT = statement(f"""
    SELECT o.name, o.job, o.labels, o.priority, o.max_retries, o.forked_from_checkpoint_id, reported.last_step,
           c.id AS checkpoint_id, c.step, c.epoch, writer.job AS writer_job
      FROM operations o
     CROSS JOIN LATERAL ({_REPORTED}) reported
      LEFT JOIN LATERAL (
        SELECT c.id, c.operation_id, c.step, c.epoch
          FROM checkpoints c
         WHERE c.status = 'committed' AND (c.operation_id = o.id OR c.id = o.forked_from_checkpoint_id)
           AND CASE WHEN CAST(:checkpoint_id AS uuid) IS NULL THEN {continues("o")} AND (NOT :replays OR {_REDOES_SOME})
                    ELSE c.id = :checkpoint_id END
         ORDER BY {NEWEST_FIRST}
         LIMIT 1
      ) c ON true
      LEFT JOIN operations writer ON writer.id = c.operation_id
     WHERE o.id = :id
       FOR KEY SHARE OF o
""")

DETAIL = """jsonb_strip_nulls(jsonb_build_object('replay_of', CAST(:replay_of AS uuid), 'forked_from', (SELECT
                jsonb_build_object('operation_id', operation_id, 'checkpoint_id', id, 'step', step) FROM pinned)))"""

# Retention moves a row on from `committed` under the same row's lock: either it is pinned here, or nothing is made.
# A replay may have none, and begins where its parent did; a command and a measurement too, and run anew.
FORK = statement(f"""
    WITH pinned AS (
        UPDATE checkpoints SET pinned_at = now() WHERE id = :checkpoint_id AND status = 'committed'
        RETURNING id, operation_id, step
    ), moved AS (
        INSERT INTO operations (id, name, kind, workload, job, code_sha256, labels, priority, max_retries,
                                submitted_by, idempotency_key, body_sha256, forked_from_checkpoint_id, replay_of,
                                accept_changes, status, event_seq)
        SELECT :id, :name, :kind, :workload, :job, :code_sha256, :labels, :priority, :max_retries,
               :submitted_by, :idempotency_key, :body_sha256, (SELECT id FROM pinned), :replay_of,
               :accept_changes, 'pending', 1
         WHERE CAST(:checkpoint_id AS uuid) IS NULL OR EXISTS (SELECT FROM pinned)
        ON CONFLICT (submitted_by, idempotency_key) DO NOTHING
        RETURNING id, event_seq, attempt, NULL::text AS from_status, status
    ), told AS (
        {record("'submit'", DETAIL)}
    )
    SELECT (SELECT id FROM moved) AS id, EXISTS (SELECT FROM pinned) AS pinned
""")

# What a checkpoint is counted or kept in: under other values it would mean something else. Before the first update
# there is nothing of it yet.
_FIXED = {
    "seed": "the order of the samples within the epoch follows from it",
    "batch_size": "steps and the position in the epoch are counted in it",
    "accumulate_grad_batches": "steps and the position in the epoch are counted in it",
    "optimizer": "the checkpoint holds the other optimizer's state",
}


async def fork_if_there(
    session: AsyncSession,
    id: UUID,
    wish: ForkRequest,
    submission: Submission,
    fleet: Fleet,
    told: Validated | None = None,
) -> UUID | None:
    """Insert the fork; None when a concurrent request with the same key was first.

    Raises 404 without the operation or the checkpoint, 422 for overrides that cannot be carried over.
    """
    point, spec, job = await _forked(session, id, wish, fleet, told)
    values = new_operation(spec, job, submission) | {"replay_of": None, "accept_changes": wish.accept_changes}
    return await _insert(session, wish, point, values)


async def forked_job(
    session: AsyncSession, id: UUID, wish: ForkRequest, fleet: Fleet, told: Validated | None = None
) -> Job:
    """What the fork would run; nothing is stored. Raises as `fork_if_there`."""
    return (await _forked(session, id, wish, fleet, told))[2]


async def _forked(
    session: AsyncSession, id: UUID, wish: ForkRequest, fleet: Fleet, told: Validated | None
) -> tuple[Row[Any], JobSpec, Job]:
    point = await _find(session, id, wish)
    runs_anew = point.job["kind"] in (Kind.COMMAND, Kind.MEASUREMENT)
    if point.job["kind"] == Kind.STUDY:
        message = "a study has no checkpoint to fork: submit a changed one, or fork one of its children (`ops list`)"
        raise OpsError(ErrorCode.NO_CHECKPOINT, message)
    if point.checkpoint_id is None and (wish.from_checkpoint or not runs_anew):
        raise _no_checkpoint(wish)
    spec = _forked_spec(point, wish)
    if not runs_anew:
        _check_carried_over(spec.execution, point)
    return point, spec, await resolved_job(session, spec, fleet, told, "overrides.")


async def replay_if_there(session: AsyncSession, id: UUID, wish: ReplayRequest, submission: Submission) -> UUID | None:
    """Insert the replay, of the very same job; None when a concurrent request with the same key was first.

    Raises 404 without the operation or the checkpoint, 409 when no step after it has been reported.
    """
    point = await _find(session, id, wish)
    if point.checkpoint_id is None and (wish.from_checkpoint or point.forked_from_checkpoint_id):
        raise _no_checkpoint(wish)
    spec = _forked_spec(point, ForkRequest(name=f"replay of {point.name}"[:200]))
    job = _replayed_job(point, wish)
    values = new_operation(spec, job, submission) | {"replay_of": id, "accept_changes": False}
    return await _insert(session, wish, point, values)


async def _find(session: AsyncSession, id: UUID, wish: ForkRequest | ReplayRequest) -> Row[Any]:
    """The parent, and the checkpoint to begin at when there is one. Raises 404."""
    values = {"id": id, "checkpoint_id": wish.from_checkpoint, "replays": isinstance(wish, ReplayRequest)}
    point = (await session.execute(FIND_FORK_POINT, values)).one_or_none()
    if point is None:
        raise not_found(id)
    return point


async def _insert(
    session: AsyncSession, wish: ForkRequest | ReplayRequest, point: Row[Any], values: dict[str, Any]
) -> UUID | None:
    made = (await session.execute(FORK, values | {"checkpoint_id": point.checkpoint_id})).one()
    if point.checkpoint_id is not None and not made.pinned:
        raise _no_checkpoint(wish)
    inserted: UUID | None = made.id
    return inserted


def _replayed_job(point: Row[Any], wish: ReplayRequest) -> Job:
    """The parent's, up to the last reported step or so many steps. It keeps no checkpoint but those to go on from."""
    start, last = point.step or 0, point.last_step
    if last is None or last < start:
        raise OpsError(
            ErrorCode.NOT_REPLAYABLE,
            f"this operation has reported nothing from step {start} on that could be compared; "
            "choose an earlier checkpoint (`ops checkpoints list`), or wait until it has",
            last_step=last,
        )
    job = Job.model_validate(point.job)
    execution = job.execution.model_copy(update={"checkpoint_save_top_k": 0, "checkpoint_save_last": True})
    until = last + 1 if wish.steps is None else min(last + 1, start + wish.steps)
    return job.model_copy(update={"execution": execution, "until_step": until})


def _forked_spec(point: Row[Any], wish: ForkRequest) -> JobSpec:
    """The parent's job with the overrides in it, checked as a submit is."""
    parent, new = Job.model_validate(point.job), wish.overrides
    merged = (
        parent.model_dump(include=set(Setup.model_fields))
        | {
            "kind": parent.kind,
            "workload": None if parent.kind is Kind.COMMAND else parent.workload,
            "env": parent.env | new.env,
            "config": parent.config | new.config,
            "execution": parent.execution.model_dump() | new.execution,
            "labels": point.labels | new.labels,
            "priority": point.priority if new.priority is None else new.priority,
            "max_retries": point.max_retries if new.max_retries is None else new.max_retries,
            "name": wish.name,
        }
        | new.model_dump(include={"command", "code"}, exclude_none=True)
    )
    try:
        return JobSpec.model_validate(merged)
    except ValidationError as error:
        raise invalid(problems_of(error, JobSpec, "overrides.")) from error


def _check_carried_over(new: Execution, point: Row[Any]) -> None:
    """Raises 422 where the checkpoint would mean something else, or nothing would be left to train."""
    old = Job.model_validate(point.writer_job).execution
    problems = [
        (name, f"cannot change from {getattr(old, name)} at step {point.step}: {why}; fork a checkpoint of step 0")
        for name, why in _FIXED.items()
        if point.step > 0 and getattr(new, name) != getattr(old, name)
    ]
    if new.max_epochs <= point.epoch:
        problems.append(("max_epochs", f"the checkpoint is at the end of epoch {point.epoch}; give more than that"))
    if new.max_steps is not None and new.max_steps <= point.step:
        problems.append(("max_steps", f"the checkpoint is at step {point.step}; give more than that, or null"))
    if problems:
        raise invalid([(f"overrides.execution.{name}", problem) for name, problem in problems])


def _no_checkpoint(wish: ForkRequest | ReplayRequest) -> OpsError:
    what = "no such committed checkpoint" if wish.from_checkpoint else "no committed checkpoint yet"
    return OpsError(ErrorCode.NO_CHECKPOINT, f"this operation has {what}; look with `ops checkpoints list`")
