"""Jobs of a scheduler that start workers: intended → submitted → running → ended, each on behalf of one operation.

Every statement guards itself, so that any number of backends may look after the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.engines import EngineRequest
from ops_backend.store.placement import PLACED, QUEUE, SUPPLY
from ops_backend.store.sql import PENDING_SINCE, plain, record, statement
from ops_contract.jobs import Job

# Spells "engin" in base 36. Whoever counts open rows, or moves one to another operation, has it.
ENGINE_LOCK = 24_582_191
TRY_LOCK = statement(f"SELECT pg_try_advisory_xact_lock({ENGINE_LOCK})")
LOCK = statement(f"SELECT pg_advisory_xact_lock({ENGINE_LOCK})")

# After the first job in a row that was of no use, and the longest between two.
BACKOFF_S, MAX_BACKOFF_S = 5, 300

COUNT_OPEN = statement("SELECT count(*) FROM engine_jobs WHERE state <> 'ended'")

# There may be any number, of which no more are looked at: the first to ask for workers, or to take one over.
LOOKED_AT = 1000

# Due for so long, and the claim could not place it; whatever it can, it claims.
WANTING = statement(f"""
    WITH RECURSIVE {SUPPLY}
    )
    SELECT o.id, o.attempt, o.job, coalesce(last.failures, 0) AS failures
      FROM operations o
      LEFT JOIN LATERAL (
        SELECT j.ended_at, j.failures FROM engine_jobs j WHERE j.operation_id = o.id ORDER BY j.created_at DESC LIMIT 1
      ) last ON true
     WHERE o.status = 'pending'
       AND greatest(o.not_before, {PENDING_SINCE}) <= now() - make_interval(secs => :after_s)
       AND NOT EXISTS (SELECT FROM engine_jobs j WHERE j.operation_id = o.id AND j.state <> 'ended')
       AND (coalesce(last.failures, 0) = 0 OR last.ended_at <= now() - make_interval(
            secs => least({MAX_BACKOFF_S}, {BACKOFF_S} * 2 ^ least(last.failures - 1, 16))))
       AND ({PLACED}) IS NULL
     {QUEUE}
     LIMIT {LOOKED_AT}
""")

INTEND = statement("""
    INSERT INTO engine_jobs (id, operation_id, attempt, engine, name, request, failures)
    SELECT :id, o.id, o.attempt, :engine, :name, :request, :failures FROM operations o
     WHERE o.id = :operation_id AND o.status = 'pending'
    ON CONFLICT (operation_id) WHERE state <> 'ended' DO NOTHING
    RETURNING id
""")

# Workers are told by their names from those that somebody else has started; Slurm may begin its numbers anew.
OPEN = statement("""
    SELECT j.id, j.operation_id, j.attempt, j.external_id, j.name, j.request, j.state, j.engine_state, j.reason,
           j.failures, j.warned_at IS NOT NULL AS warned, o.status = 'pending' AS awaited,
           o.status = 'pending' AND o.attempt = j.attempt AS unserved,
           EXISTS (SELECT FROM workers w
                    WHERE w.name LIKE 'slurm-' || j.external_id || '-%' AND w.registered_at >= j.created_at) AS came,
           extract(epoch FROM now() - j.created_at)::float8 AS age_s
      FROM engine_jobs j LEFT JOIN operations o ON o.id = j.operation_id
     WHERE j.engine = :engine AND j.state <> 'ended'
     ORDER BY j.created_at, j.id
""")

# What was read is still so: of two backends that see the same change one writes it, and tells of it.
OBSERVE = statement(f"""
    WITH seen AS (
        UPDATE engine_jobs
           SET state = :state, external_id = coalesce(:external_id, external_id), engine_state = :engine_state,
               reason = :reason, failures = failures + :failures,
               submitted_at = CASE WHEN :state <> 'intended' THEN coalesce(submitted_at, now()) END,
               warned_at = CASE WHEN :warned THEN coalesce(warned_at, now()) END,
               ended_at = CASE WHEN :state = 'ended' THEN now() END
         WHERE id = :id AND state = :was AND engine_state IS NOT DISTINCT FROM CAST(:was_engine_state AS text)
           AND (warned_at IS NOT NULL) = :was_warned
        RETURNING id, operation_id
    ), moved AS (
        UPDATE operations o SET event_seq = o.event_seq + 1
          FROM seen
         WHERE o.id = seen.operation_id AND o.status IN ('pending', 'running') AND CAST(:message AS text) IS NOT NULL
        RETURNING o.id, o.event_seq, o.attempt, o.status AS from_status, o.status
    ), told AS (
        {record("'note'", "jsonb_build_object('message', CAST(:message AS text), 'engine', true)")}
    )
    SELECT id FROM seen
""")

# A worker takes the first operation that it can, not the one on whose behalf it came.
ELSEWHERE = statement("""
    SELECT j.id, j.operation_id, h.operation_id AS runs
      FROM engine_jobs j
      JOIN workers w ON w.name LIKE 'slurm-' || j.external_id || '-%' AND w.registered_at >= j.created_at
      JOIN holds h ON h.incarnation = w.incarnation AND h.ended_at IS NULL
     WHERE j.engine = :engine AND j.state <> 'ended' AND h.operation_id <> j.operation_id
       AND EXISTS (SELECT FROM operations o WHERE o.id = j.operation_id AND o.status = 'pending')
     ORDER BY j.id
     LIMIT 1
""")

MOVE = statement("""
    UPDATE engine_jobs j
       SET operation_id = :operation_id, warned_at = NULL,
           attempt = coalesce((SELECT o.attempt FROM operations o WHERE o.id = :operation_id), j.attempt)
     WHERE j.id = :id AND j.state <> 'ended'
    RETURNING id
""")

OPEN_OF = statement("SELECT id FROM engine_jobs WHERE operation_id = :operation_id AND state <> 'ended'")


@dataclass(frozen=True)
class Wanting:
    """An operation that waits for a slot, and what to ask for. `failures`: jobs in a row that were of no use to it."""

    id: UUID
    job: Job
    failures: int


@dataclass(frozen=True)
class OpenJob:
    """`awaited`: its operation is pending; `unserved`: and nothing of it was begun since; `came`: a worker has."""

    id: UUID
    operation_id: UUID
    attempt: int
    external_id: str | None
    name: str
    request: EngineRequest
    state: str
    engine_state: str | None
    reason: str | None
    failures: int
    warned: bool
    awaited: bool
    unserved: bool
    came: bool
    age_s: float


@dataclass(frozen=True)
class Seen:
    """What a row becomes. `message` is a note for its operation; `failures` are added."""

    state: str
    engine_state: str | None
    reason: str | None
    external_id: str | None = None
    message: str | None = None
    failures: int = 0
    warned: bool = False


async def room(session: AsyncSession, max_jobs: int) -> int:
    """How many more may be open, until the transaction ends; 0 too while another backend decides."""
    if not await session.scalar(TRY_LOCK):
        return 0
    return max(0, max_jobs - int(await session.scalar(COUNT_OPEN) or 0))


async def wanting(session: AsyncSession, lease_s: float, after_s: float) -> list[Wanting]:
    """Those that have been due for so long, in the order of the queue, and have no open job; the first of them."""
    rows = await session.execute(WANTING, {"lease_s": lease_s, "after_s": after_s})
    return [Wanting(row.id, Job.model_validate(row.job), row.failures) for row in rows]


async def intend(
    session: AsyncSession, operation_id: UUID, engine: str, request: EngineRequest, failures: int
) -> UUID | None:
    """What is written before the scheduler is asked. None: it is pending no more, or has an open job."""
    id = uuid4()
    values = {
        "id": id, "operation_id": operation_id, "engine": engine, "name": name_of(id), "request": plain(request),
        "failures": failures,
    }  # fmt: skip
    found: UUID | None = await session.scalar(INTEND, values)
    return found


def name_of(id: UUID) -> str:
    """By which the scheduler knows a job, before anybody knows the scheduler's id."""
    return f"relight-{id}"


async def open_jobs(session: AsyncSession, engine: str) -> Sequence[OpenJob]:
    rows = (await session.execute(OPEN, {"engine": engine})).mappings()
    return [OpenJob(**{**row, "request": EngineRequest.model_validate(row["request"])}) for row in rows]


async def observe(session: AsyncSession, job: OpenJob, seen: Seen) -> bool:
    """False: it is as `job` says no more."""
    values = {
        "id": job.id, "was": job.state, "was_engine_state": job.engine_state, "was_warned": job.warned,
        "state": seen.state, "external_id": seen.external_id, "engine_state": seen.engine_state,
        "reason": seen.reason, "message": seen.message, "failures": seen.failures, "warned": seen.warned,
    }  # fmt: skip
    return await session.scalar(OBSERVE, values) is not None


async def settle(session: AsyncSession, engine: str) -> bool:
    """Give a job to the operation that its worker runs, and that one's own job in exchange. Whether one moved."""
    await session.execute(LOCK)
    row = (await session.execute(ELSEWHERE, {"engine": engine})).one_or_none()
    if row is None:
        return False
    other = await session.scalar(OPEN_OF, {"operation_id": row.runs})
    if other is not None:  # aside, for one statement: an operation has one open row
        await session.execute(MOVE, {"id": other, "operation_id": uuid4()})
    await session.execute(MOVE, {"id": row.id, "operation_id": row.runs})
    if other is not None:
        await session.execute(MOVE, {"id": other, "operation_id": row.operation_id})
    return True


async def hand_over(session: AsyncSession, job: OpenJob, operation_id: UUID) -> bool:
    """To another operation that waits for the same. False: it has a job of its own meanwhile, or this one has ended."""
    await session.execute(LOCK)
    if await session.scalar(OPEN_OF, {"operation_id": operation_id}) is not None:
        return False
    return await session.scalar(MOVE, {"id": job.id, "operation_id": operation_id}) is not None


# The newest job of an operation that waits for it, or runs; one that has ended while the next is not asked for yet.
ENGINE = """
    (SELECT jsonb_build_object('engine', j.engine, 'job', j.external_id, 'reason', j.reason, 'asked_at', j.created_at,
                               'state', coalesce(j.engine_state, j.state))
       FROM engine_jobs j
      WHERE j.operation_id = o.id AND o.status IN ('pending', 'running')
        AND (j.state <> 'ended' OR o.status = 'pending' AND j.failures > 0)
      ORDER BY j.created_at DESC LIMIT 1)"""
