"""What holds may write: a report counts only when it moves the sequence of a hold that has not ended."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store import output
from ops_backend.store.replay import BEFORE, compare
from ops_backend.store.retention import retire
from ops_backend.store.sql import plain, record, statement
from ops_backend.store.studies import insert_children
from ops_backend.store.transitions import finish_if_held
from ops_contract.agents import ReportBatch
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Phase, Status
from ops_contract.reports import (
    MODEL,
    ArtifactSaved,
    CheckpointSaved,
    Finish,
    LogChunk,
    Metrics,
    Note,
    Report,
    Result,
    Series,
    Standing,
    Started,
)

# The update locks the row, so what follows in the transaction is fenced: a reaper that wants to end the hold waits.
# (An INSERT … SELECT … WHERE status = 'running' locks nothing, and a fenced row slips in.)
ADVANCE = statement(f"""
    WITH before AS MATERIALIZED (
        SELECT last_seq FROM holds
         WHERE operation_id = :id AND attempt = :attempt AND incarnation = :incarnation
           AND ended_at IS NULL AND last_seq BETWEEN :next_seq - 1 AND :last_seq - 1
           FOR NO KEY UPDATE
    )
    UPDATE holds h
       SET last_seq = :last_seq, progress = coalesce(:progress, h.progress),
           first_step = least(h.first_step, :first_step), last_step = greatest(h.last_step, :last_step),
           checkpoint_step = greatest(h.checkpoint_step, :checkpoint_step)
      FROM before
     WHERE h.operation_id = :id AND h.attempt = :attempt AND h.incarnation = :incarnation
    RETURNING before.last_seq, coalesce((SELECT max(h.last_step) FROM {BEFORE}), -1) AS reported_until
""")

# Before the own hold alone is: two members of a gang that report and finish at once would wait for each other.
LOCK_ALL = statement("""
    SELECT incarnation FROM holds WHERE operation_id = :id AND attempt = :attempt ORDER BY incarnation FOR UPDATE
""")

EXPLAIN = statement("""
    SELECT last_seq, ended_at IS NOT NULL AS ended FROM holds
     WHERE operation_id = :id AND attempt = :attempt AND incarnation = :incarnation
""")

# Frozen like the threads: every later attempt, forks and retention go by it.
RESOLVE = statement("UPDATE operations SET job = job || :job WHERE id = :id")

INSERT_METRICS = statement("""
    INSERT INTO metrics (operation_id, attempt, seq, name, first_step, steps, values)
    VALUES (:id, :attempt, :seq, :name, :first_step, :steps, :values)
""")

# A command may go on from a file of its own: it began where it says, and what was reported before stays.
START = statement("""
    UPDATE attempts a
       SET started_at = coalesce(a.started_at, now()), trainer_pid = :trainer_pid, environment = :environment,
           exactness = :exactness,
           start_step = CASE WHEN o.kind = 'command' AND a.checkpoint_id IS NULL THEN :start_step ELSE a.start_step END
      FROM operations o
     WHERE a.operation_id = :id AND a.number = :attempt AND o.id = a.operation_id
""")

INSERT_CHECKPOINT = statement("""
    INSERT INTO checkpoints (id, operation_id, attempt, checkpoint_type, status, step, epoch, phase, path, size_bytes,
                             manifest_sha256, monitored)
    VALUES (:checkpoint_id, :id, :attempt, :checkpoint_type, 'committed', :step, :epoch, :phase, :path, :size_bytes,
            :manifest_sha256, :monitored)
""")

# What an attempt left that published it and died before its finish is replaced; its files are then nobody's.
PUT_ARTIFACT = statement("""
    INSERT INTO artifacts (id, operation_id, attempt, name, step, path, size_bytes, sha256)
    VALUES (:artifact_id, :id, :attempt, :name, :step, :path, :size_bytes, :sha256)
    ON CONFLICT (operation_id, name) DO UPDATE
       SET id = excluded.id, attempt = excluded.attempt, step = excluded.step, path = excluded.path,
           size_bytes = excluded.size_bytes, sha256 = excluded.sha256, created_at = now()
""")

PUT_RESULT = statement("""
    INSERT INTO results (operation_id, attempt, content) VALUES (:id, :attempt, :content)
    ON CONFLICT (operation_id) DO UPDATE SET attempt = excluded.attempt, content = excluded.content, created_at = now()
""")

# The resumed attempt has a checkpoint of its own now: from here on the lineage decides, and its code and data are the
# ones to compare with.
FORGET_RESUME_CHOICE = statement("""
    UPDATE operations SET resume_checkpoint_id = NULL, resume_explicit = false, accept_changes = false
     WHERE id = :id AND attempt = :attempt AND (resume_checkpoint_id IS NOT NULL OR accept_changes)
""")

BREAK_PROMISE = statement("""
    UPDATE attempts
       SET exactness = jsonb_build_object(
               'promise', 'best_effort', 'reasons', (exactness->'reasons') || to_jsonb(CAST(:reason AS text)))
     WHERE operation_id = :id AND number = :attempt AND NOT (exactness->'reasons') ? :reason
""")

NOTE = statement(f"""
    WITH moved AS (
        UPDATE operations SET event_seq = event_seq + 1 WHERE id = :id AND attempt = :attempt
        RETURNING id, event_seq, attempt, status AS from_status, status
    )
    {record("'note'")}
""")


@dataclass(frozen=True)
class Accepted:
    """`new` are the reports that the hold did not have before; `status` is where its finish left the operation."""

    last_seq: int
    new: list[Report]
    status: Status | None


async def accept(session: AsyncSession, id: UUID, attempt: int, batch: ReportBatch, backoff_s: float) -> Accepted:
    """Write what is new in the batch; what the hold already had is skipped.

    Raises 404 without such a hold, 409 `fenced` when it has ended, 409 `out_of_order` when a number is missing,
    422 for a finish that is not the last, or a checkpoint or artifact outside its place.
    """
    _check(id, attempt, batch)
    last_seq = batch.first_seq + len(batch.reports) - 1
    finish = batch.reports[-1] if isinstance(batch.reports[-1], Finish) else None
    body = batch.reports[:-1] if finish else batch.reports
    key = {"id": id, "attempt": attempt, "incarnation": batch.incarnation}
    if finish:
        await session.execute(LOCK_ALL, {"id": id, "attempt": attempt})
    had, reported_until = await _advance(session, key, batch, body) if body else (batch.first_seq - 1, -1)
    new = body[had - batch.first_seq + 1 :]
    await _write_metrics(session, id, attempt, had + 1, new)
    for report in new:
        await _write(session, id, attempt, report)
        if isinstance(report, Metrics) and (again := [s for s in report.series if s.steps[0] <= reported_until]):
            await compare(session, id, attempt, again)
    status = None
    if finish and had < last_seq:
        status = await finish_if_held(session, id, attempt, batch.incarnation, last_seq, finish, backoff_s)
        if status is None:
            await _explain(session, key, last_seq)
        if status is Status.WAITING and finish.plan is not None:
            await insert_children(session, id, finish.plan)
        if status is Status.COMPLETED:
            await retire(session, id)
    return Accepted(last_seq, batch.reports[had - batch.first_seq + 1 :], status)


async def _advance(
    session: AsyncSession, key: dict[str, Any], batch: ReportBatch, body: list[Report]
) -> tuple[int, int]:
    """Take the numbers of `body`; the last number that the hold had before, and the last step reported before it."""
    steps = [step for r in body if isinstance(r, Metrics) for series in r.series for step in series.steps]
    last_seq = batch.first_seq + len(body) - 1
    values = {
        "next_seq": batch.first_seq,
        "last_seq": last_seq,
        "progress": plain(batch.progress) if batch.progress else None,
        "first_step": min(steps, default=None),
        "last_step": max(steps, default=None),
        "checkpoint_step": max((r.step for r in body if isinstance(r, CheckpointSaved)), default=None),
    }
    row = (await session.execute(ADVANCE, key | values)).one_or_none()
    if row is None:
        return await _explain(session, key, last_seq), -1
    return row.last_seq, row.reported_until


async def _explain(session: AsyncSession, key: dict[str, Any], last_seq: int) -> int:
    """Why the guard failed: the hold's last number when it has all of this already, else the refusal raised."""
    row = (await session.execute(EXPLAIN, key)).one_or_none()
    if row is None:
        raise OpsError(ErrorCode.NOT_FOUND, "this worker has never held this attempt")
    if last_seq <= row.last_seq:
        return int(row.last_seq)
    if row.ended:
        raise OpsError(ErrorCode.FENCED, "this attempt has ended; stop its trainer", last_seq=row.last_seq)
    message = f"report {row.last_seq + 1} is missing: send again from there"
    raise OpsError(ErrorCode.OUT_OF_ORDER, message, last_seq=row.last_seq)


async def _write_metrics(session: AsyncSession, id: UUID, attempt: int, first_seq: int, new: list[Report]) -> None:
    """Of all reports at once: after an outage there are hundreds of them."""
    numbered = [(seq, report) for seq, report in enumerate(new, first_seq) if isinstance(report, Metrics)]
    rows = [_metric_row(id, attempt, seq, series) for seq, report in numbered for series in report.series]
    if rows:
        await session.execute(INSERT_METRICS, rows)


async def _write(session: AsyncSession, id: UUID, attempt: int, report: Report) -> None:
    match report:
        case Started():
            values = plain(report) | {"id": id, "attempt": attempt}
            await session.execute(START, values)
            if report.resolved:
                await session.execute(RESOLVE, {"id": id, "job": plain(report.resolved)})
        case Metrics():
            pass  # written with those of the whole batch
        case CheckpointSaved():
            row = report.model_dump(exclude={"kind"}) | {"id": id, "attempt": attempt}
            await session.execute(INSERT_CHECKPOINT, row)
            await session.execute(FORGET_RESUME_CHOICE, {"id": id, "attempt": attempt})
            await retire(session, id)
        case ArtifactSaved():
            await session.execute(PUT_ARTIFACT, report.model_dump(exclude={"kind"}) | {"id": id, "attempt": attempt})
        case Result():
            await session.execute(PUT_RESULT, {"id": id, "attempt": attempt, "content": plain(report.content)})
        case Note():
            await session.execute(NOTE, {"id": id, "attempt": attempt, "detail": {"message": report.message}})
            if report.inexact:
                await session.execute(BREAK_PROMISE, {"id": id, "attempt": attempt, "reason": report.inexact})
        case Standing():
            pass  # the batch's progress is written with its number
        case LogChunk():
            await output.write(session, id, attempt, report)
        case Finish():
            raise AssertionError("a finish ends its batch and is not written here")


def _metric_row(id: UUID, attempt: int, seq: int, series: Series) -> dict[str, Any]:
    return {
        "id": id,
        "attempt": attempt,
        "seq": seq,
        "name": series.name,
        "first_step": series.steps[0],
        "steps": series.steps,
        "values": series.floats(),
    }


def _check(id: UUID, attempt: int, batch: ReportBatch) -> None:
    if any(isinstance(r, Finish) for r in batch.reports[:-1]):
        raise OpsError(ErrorCode.INVALID, "reports: a finish must be the last of its batch")
    for report in batch.reports:
        if isinstance(report, CheckpointSaved | ArtifactSaved):
            places = _places(report)
            if report.path not in [f"{id}/{attempt}-{report.step}{place}" for place in places]:
                raise OpsError(
                    ErrorCode.INVALID, f"path: this {report.kind} belongs at {id}/{attempt}-{report.step}{places[0]}"
                )


def _places(report: CheckpointSaved | ArtifactSaved) -> list[str]:
    """No text of a client's becomes a path: it is derived, and compared."""
    if isinstance(report, CheckpointSaved):
        return ["-evaluate" if report.phase is Phase.EVALUATE else ""]
    if report.name == MODEL:
        return [f"-model/{MODEL}"]
    # What the job's `artifacts` matched, or what the workload's finish() left.
    return [f"-{report.name}", f"-finish/{report.name.removeprefix('files/')}"]
