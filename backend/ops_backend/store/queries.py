"""Reads of one operation, bounded in rows and in queries, whatever it has lived through."""

from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.storage import LOGS
from ops_backend.store import energy, ledger
from ops_backend.store.children import COUNTS
from ops_backend.store.energy import OUTCOMES, entries
from ops_backend.store.engine_jobs import ENGINE
from ops_backend.store.lineage import STARTS, lineage, starts_of
from ops_backend.store.sql import continues, of_row, statement
from ops_backend.store.story import tell
from ops_backend.store.transitions import not_found
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import (
    Artifacts,
    ArtifactView,
    Attempts,
    AttemptView,
    Checkpoints,
    CheckpointView,
    Events,
    EventView,
)
from ops_contract.jobs import Logger
from ops_contract.ledger import Shares
from ops_contract.lifecycle import TERMINAL
from ops_contract.operations import (
    ForkedFrom,
    Operation,
    OperationSummary,
    ProgressView,
    ResumedFrom,
)

# The newest hold that told anything; a claimed attempt that has not spoken yet shows where it starts instead.
_PROGRESS = """
    LEFT JOIN attempts a ON a.operation_id = o.id AND a.number = o.attempt
    LEFT JOIN LATERAL (
        SELECT h.attempt, h.progress FROM holds h
         WHERE h.operation_id = o.id AND h.progress IS NOT NULL ORDER BY h.attempt DESC, h.first_rank LIMIT 1
    ) told ON true"""

# An attempt that was seen to differ takes the promise from the whole operation, whatever its successors promise.
OPERATIONS = statement(f"""
    SELECT o.*, a.start_step, told.attempt AS told_attempt, told.progress,
           (SELECT x.exactness FROM attempts x
             WHERE x.operation_id = o.id AND x.exactness IS NOT NULL
             ORDER BY coalesce((x.replay->>'differing')::int > 0, false) DESC, x.number DESC LIMIT 1) AS exactness,
           c.id AS checkpoint_id, c.checkpoint_type, c.created_at AS checkpoint_created_at,
           c.epoch AS checkpoint_epoch, c.step AS checkpoint_step,
           fork.operation_id AS fork_operation_id, fork.step AS fork_step,
           {STARTS} AS starts,
           {OUTCOMES} AS outcomes, {entries("attempt", "quality", "use")} AS energy, {COUNTS} AS children,
           {ENGINE} AS engine
      FROM operations o {_PROGRESS}
      LEFT JOIN checkpoints c ON c.id = coalesce(o.resume_checkpoint_id, a.checkpoint_id)
      LEFT JOIN checkpoints fork ON fork.id = o.forked_from_checkpoint_id
     WHERE o.id = ANY (:ids)
""")

SUMMARY = f"""
    SELECT o.id, o.name, o.status, o.kind, o.workload, o.labels, o.submitted_by, o.priority, o.attempt, o.error,
           o.created_at, o.started_at, o.ended_at, o.parent_id, a.start_step, told.attempt AS told_attempt,
           told.progress, {COUNTS} AS children
      FROM operations o {_PROGRESS}"""

SUMMARIES = statement(f"{SUMMARY} WHERE o.id = ANY (:ids)")

ATTEMPTS = statement("""
    SELECT a.*, w.name AS worker, w.host, h.first_step, h.last_step,
           (SELECT jsonb_agg(jsonb_build_object('worker_id', m.incarnation, 'worker', k.name, 'host', k.host,
                                                'first_rank', m.first_rank, 'ranks', m.ranks) ORDER BY m.first_rank)
              FROM holds m JOIN workers k USING (incarnation)
             WHERE m.operation_id = a.operation_id AND m.attempt = a.number) AS members
      FROM attempts a
      JOIN workers w USING (incarnation)
      LEFT JOIN holds h ON h.operation_id = a.operation_id AND h.attempt = a.number AND h.incarnation = a.incarnation
     WHERE a.operation_id = :id ORDER BY a.number
""")

CHECKPOINTS = statement(f"""
    SELECT c.*, coalesce({continues("o")}, false) AS in_lineage
      FROM operations o JOIN checkpoints c ON c.operation_id = o.id OR c.id = o.forked_from_checkpoint_id
     WHERE o.id = :id ORDER BY c.created_at, c.step
""")

# The model of the attempt that completed it; of the files that its job keeps the newest, however it ended.
ARTIFACTS = statement("""
    SELECT x.* FROM artifacts x JOIN operations o ON o.id = x.operation_id
     WHERE o.id = :id AND (x.name LIKE 'files/%' OR o.status = 'completed' AND o.attempt = x.attempt)
       AND (CAST(:artifact_id AS uuid) IS NULL OR x.id = :artifact_id) ORDER BY x.name, x.attempt
""")

EVENTS = statement("""
    SELECT e.*, o.submitted_by, w.name AS worker, a.start_step, a.checkpoint_id
      FROM events e
      JOIN operations o ON o.id = e.operation_id
      LEFT JOIN attempts a ON a.operation_id = e.operation_id AND a.number = e.attempt
      LEFT JOIN workers w USING (incarnation)
     WHERE e.operation_id = :id AND e.seq > :after ORDER BY e.seq LIMIT 1000
""")


async def get(session: AsyncSession, id: UUID) -> Operation:
    """Raises 404."""
    row = (await session.execute(OPERATIONS, {"ids": [id]})).one_or_none()
    if row is None:
        raise not_found(id)
    return operation_of(row)


def operation_of(row: Any) -> Operation:
    """Of a row of `OPERATIONS`."""
    return Operation(
        **summary(row),
        job=row.job,
        max_retries=row.max_retries,
        failures=row.failures,
        cancel_reason=row.cancel_reason,
        exit_unconfirmed=row.exit_unconfirmed,
        not_before=row.not_before,
        exactness=row.exactness,
        energy=ledger.view(row.energy or [], row.outcomes or [], row.status),
        resumed_from=_resumed_from(row),
        forked_from=_forked_from(row),
        replay_of=row.replay_of,
        lineage=lineage(row.starts or []),
        engine=row.engine,
        logs=_logs(row),
    )


async def summaries(session: AsyncSession, ids: list[UUID]) -> dict[UUID, OperationSummary]:
    """Of those that there are."""
    rows = await session.execute(SUMMARIES, {"ids": ids})
    return {row.id: OperationSummary(**summary(row)) for row in rows}


async def attempts(session: AsyncSession, id: UUID) -> Attempts:
    rows = (await session.execute(ATTEMPTS, {"id": id})).all()
    used = await energy.by_attempt(session, id)  # of as many, or of one that was claimed in between
    return Attempts(items=[_attempt(row, shares) for row, shares in zip(rows, used, strict=False)])


def _attempt(row: Row[Any], used: Shares) -> AttemptView:
    same = AttemptView.model_fields.keys() & row._mapping.keys()
    return AttemptView(
        **{name: row._mapping[name] for name in same},
        worker_id=row.incarnation,
        world_size=sum(member["ranks"] for member in row.members),
        energy_j=used.total.energy_j,
        lost_j=used.lost.energy_j,
        energy_reason=used.total.reason,
    )


async def checkpoints(session: AsyncSession, id: UUID) -> Checkpoints:
    await starts_of(session, id)
    rows = (await session.execute(CHECKPOINTS, {"id": id})).mappings()
    return Checkpoints(items=[of_row(CheckpointView, row) for row in rows])


async def artifacts(session: AsyncSession, id: UUID) -> Artifacts:
    await starts_of(session, id)
    rows = (await session.execute(ARTIFACTS, {"id": id, "artifact_id": None})).mappings()
    return Artifacts(items=[ArtifactView(**row) for row in rows])


async def artifact(session: AsyncSession, id: UUID, artifact_id: UUID) -> ArtifactView:
    """Raises 404."""
    row = (await session.execute(ARTIFACTS, {"id": id, "artifact_id": artifact_id})).mappings().one_or_none()
    if row is None:
        raise OpsError(ErrorCode.NOT_FOUND, "this operation has no such artifact; look with `ops artifacts`")
    return ArtifactView(**row)


async def events(session: AsyncSession, id: UUID, after: int) -> Events:
    await starts_of(session, id)
    rows = (await session.execute(EVENTS, {"id": id, "after": after})).all()
    return Events(items=[event_view(row) for row in rows])


def event_view(row: Row[Any]) -> EventView:
    """`row` has what `tell` wants."""
    fields = EventView.model_fields.keys() - {"message"}
    return EventView(**{f: getattr(row, f) for f in fields}, message=tell(row))


def summary(row: Row[Any]) -> dict[str, Any]:
    what = ("id", "name", "status", "kind", "workload", "labels", "submitted_by", "priority", "attempt", "error")
    family, times = ("parent_id", "children"), ("created_at", "started_at", "ended_at")
    return {name: getattr(row, name) for name in (*what, *family, *times)} | {"progress": _progress(row)}


def _progress(row: Row[Any]) -> ProgressView | None:
    if row.children is not None:
        ended, total = sum(row.children.get(status, 0) for status in TERMINAL), sum(row.children.values())
        return ProgressView(step=ended, steps_total=total, percent=100 * ended / total)
    if row.start_step is None:
        return None
    told = dict(row.progress or {})
    if row.told_attempt != row.attempt:
        told = {"step": row.start_step, "steps_total": told.get("steps_total")}
    total = told.get("steps_total")
    return ProgressView(**told, percent=100 * told["step"] / total if total else None)


def _resumed_from(row: Row[Any]) -> ResumedFrom | None:
    if row.checkpoint_id is None:
        return None
    return ResumedFrom(
        checkpoint_id=row.checkpoint_id,
        checkpoint_type=row.checkpoint_type,
        created_at=row.checkpoint_created_at,
        epoch=row.checkpoint_epoch,
        step=row.checkpoint_step,
    )


def _forked_from(row: Row[Any]) -> ForkedFrom | None:
    if row.forked_from_checkpoint_id is None:
        return None
    return ForkedFrom(
        operation_id=row.fork_operation_id, checkpoint_id=row.forked_from_checkpoint_id, step=row.fork_step
    )


def _logs(row: Row[Any]) -> str | None:
    written = row.logged_event_seq == row.event_seq and row.job["execution"].get("logger") != Logger.NONE
    return f"{row.id}/{LOGS}" if written else None
