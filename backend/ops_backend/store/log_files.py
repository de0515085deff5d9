"""Which operations have ended without their files, and what is written into these and into exports."""

from array import array
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.lineage import STARTS, lineage
from ops_backend.store.sql import statement
from ops_backend.store.transitions import not_found
from ops_contract.jobs import Job

# Any number that no other user of the database takes; it spells "logs" in base 36.
LOGS_LOCK = 1_010_944

_UNLOGGED = "status IN ('completed', 'failed', 'cancelled') AND logged_event_seq IS DISTINCT FROM event_seq"

# Round and round by id: one whose directory cannot be written does not stand in the way of the others.
UNLOGGED = statement(f"""
    SELECT id FROM operations WHERE {_UNLOGGED} ORDER BY coalesce(id <= :cursor_id, false), id LIMIT 20
""")

TRY_LOGS_LOCK = statement(f"SELECT pg_try_advisory_xact_lock({LOGS_LOCK})")

_RECORDED = f"""
    SELECT o.id, o.event_seq, o.attempt, o.job, coalesce(o.started_at, o.created_at) AS began_at,
           {STARTS} AS starts
      FROM operations o WHERE o.id = :id"""

RECORDED = statement(_RECORDED)

# The lock keeps it from being deleted while its files are written: nobody would look for them afterwards.
ENDED = statement(f"{_RECORDED} AND {_UNLOGGED} FOR KEY SHARE OF o")

# Not those of an attempt that has begun since: then nothing will come of these files, but they must still add up.
CURVES = statement("""
    SELECT name, attempt, steps, values FROM metrics
     WHERE operation_id = :id AND attempt <= :attempt ORDER BY name, attempt, first_step
""")

MARK = statement("""
    UPDATE operations SET logged_event_seq = event_seq WHERE id = :id AND event_seq = :event_seq RETURNING id
""")


@dataclass(frozen=True)
class Curve:
    """A metric along the lineage at rising steps; 16 bytes a point."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class Recorded:
    """An operation as it was at `event_seq`; `began_at` is when it was first claimed."""

    id: UUID
    event_seq: int
    job: Job
    began_at: datetime
    curves: dict[str, Curve]


async def unlogged(session: AsyncSession, after: UUID | None) -> list[UUID]:
    """Some that have ended without files of that end; those behind `after` first."""
    return list(await session.scalars(UNLOGGED, {"cursor_id": after}))


async def read(session: AsyncSession, id: UUID) -> Recorded:
    """What there is so far, in whatever status. Raises 404."""
    row = (await session.execute(RECORDED, {"id": id})).one_or_none()
    if row is None:
        raise not_found(id)
    return await _recorded(session, row)


async def read_if_unlogged(session: AsyncSession, id: UUID) -> Recorded | None:
    """What its files are made of. None: they are there, it runs again, or another backend is writing files.

    The transaction is the only one that writes files until it ends.
    """
    if not await session.scalar(TRY_LOGS_LOCK):
        return None
    row = (await session.execute(ENDED, {"id": id})).one_or_none()
    return None if row is None else await _recorded(session, row)


async def mark_if_unmoved(session: AsyncSession, ended: Recorded) -> bool:
    """The files are of this end; False when it has moved meanwhile. Until the transaction ends it cannot move."""
    return await session.scalar(MARK, {"id": ended.id, "event_seq": ended.event_seq}) is not None


async def _recorded(session: AsyncSession, row: Row[Any]) -> Recorded:
    ends = {entry.attempt: entry.end_step for entry in lineage(row.starts or [])}
    curves: dict[str, Curve] = {}
    found = await session.stream(CURVES, {"id": row.id, "attempt": row.attempt}, execution_options={"yield_per": 20})
    async for part in found:
        curve = curves.setdefault(part.name, Curve())
        end_step = ends[part.attempt]
        for step, value in zip(part.steps, part.values, strict=True):
            if end_step is None or step < end_step:
                curve.steps.append(step)
                curve.values.append(value)
    return Recorded(row.id, row.event_seq, Job.model_validate(row.job), row.began_at, curves)
