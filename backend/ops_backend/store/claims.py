"""claim: pending → running, one claimer at a time; refuse: running → pending, when the worker did not take it."""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.children import children, planned
from ops_backend.store.sql import LOCK_HOLDS, NEWEST_FIRST, continues, plain, record, statement
from ops_contract.agents import CheckpointRef, FailureRecord
from ops_contract.jobs import MOST_THREADS, Job
from ops_contract.lifecycle import Status, StudyPhase
from ops_contract.plans import ChildResult
from ops_contract.reports import Fault
from ops_contract.study_results import GridResult, SweepResult

# Any number that no other user of the database takes; it spells "claim" in base 36.
CLAIM_LOCK = 20_808_214

# Its own statement, before the claim's: a snapshot from before the lock would not see the last claimer's holds.
TRY_CLAIM_LOCK = statement(f"SELECT pg_try_advisory_xact_lock({CLAIM_LOCK})")


def runs(worker: str) -> str:
    """Whether it takes this operation `o`: see `runs_user_code`."""
    return f"""CASE WHEN o.workload = 'command' OR o.workload LIKE '%:%' THEN {worker}.user_code
                         ELSE o.workload = ANY ({worker}.workloads)
                              AND ({worker}.user_code OR coalesce(o.job->'env', '{{}}') = '{{}}') END"""


# A slot is free while the hold it was last given to is not alive. `auto` wants a GPU slot and takes a CPU slot only
# where no live worker offers this workload a GPU at all: a drained one still does. A frozen number of threads prefers
# a slot of that many cores.
# A study only plans and reduces, on any slot: what its job asks for its children need.
# A lease counts from the claim itself: a transaction that was held up dates its now() back.
# A fork without a checkpoint of its own is handed its fork point even if that was marked corrupt meanwhile: the worker
# then refuses it, and the fork fails. Without one it would begin at step 0, which nobody asked for.
CLAIM = statement(f"""
    WITH offered AS MATERIALIZED (
        SELECT s.incarnation, s.index, s.device, s.cores, w.url, w.secret, w.workloads, w.user_code,
               w.drain IS NULL AND coalesce(s.rests_until <= now(), true)
               AND NOT EXISTS (SELECT FROM holds h
                                WHERE h.operation_id = s.operation_id AND h.attempt = s.attempt
                                  AND h.incarnation = s.incarnation AND h.ended_at IS NULL) AS free
          FROM slots s JOIN workers w USING (incarnation)
         WHERE NOT w.draining AND w.last_seen_at > now() - make_interval(secs => :lease_s)
    ), chosen AS MATERIALIZED (
        SELECT o.id, o.not_before, o.resume_checkpoint_id, o.forked_from_checkpoint_id, slot.*
          FROM operations o
          CROSS JOIN LATERAL (
            SELECT f.incarnation, f.index, f.device, f.cores, f.url, f.secret
              FROM offered f
             WHERE f.free AND {runs("f")}
               AND (o.kind = 'study' OR f.cores >= coalesce((o.job->'resources'->>'cores')::int, 1))
               AND (o.kind = 'study' OR CASE o.job->'execution'->>'accelerator'
                     WHEN 'auto' THEN f.device <> 'cpu' OR NOT EXISTS (
                          SELECT FROM offered g WHERE g.device <> 'cpu' AND {runs("g")})
                     ELSE f.device = o.job->'execution'->>'accelerator' END)
             ORDER BY o.kind = 'study' AND f.device = 'cpu' DESC,
                      f.cores = (o.job->'execution'->>'threads')::int DESC NULLS LAST, f.incarnation, f.index
             LIMIT 1
          ) slot
         WHERE o.status = 'pending' AND coalesce(o.not_before <= now(), true)
         ORDER BY o.priority DESC, o.created_at, o.id
         LIMIT 1
           FOR NO KEY UPDATE OF o SKIP LOCKED
    ), checkpoint AS MATERIALIZED (
        SELECT c.id, c.id = chosen.forked_from_checkpoint_id AS is_fork_point
          FROM checkpoints c JOIN chosen ON {continues("chosen")} OR c.id = chosen.forked_from_checkpoint_id
         ORDER BY coalesce(c.id = chosen.resume_checkpoint_id, false) DESC, {NEWEST_FIRST}
         LIMIT 1
    ), pinned AS (
        UPDATE checkpoints c SET pinned_at = now()
          FROM checkpoint WHERE c.id = checkpoint.id AND (c.status = 'committed' OR checkpoint.is_fork_point)
        RETURNING c.id, c.operation_id, c.path, c.step, c.epoch, c.phase, c.size_bytes, c.manifest_sha256
    ), moved AS (
        UPDATE operations o
           SET status = 'running', attempt = o.attempt + 1, event_seq = o.event_seq + 1, not_before = NULL,
               started_at = coalesce(o.started_at, now()),
               job = CASE WHEN o.kind <> 'study' AND o.job->'execution'->>'threads' IS NULL
                          THEN jsonb_set(o.job, '{{execution,threads}}', to_jsonb(least(chosen.cores, {MOST_THREADS})))
                          ELSE o.job END
          FROM chosen
         WHERE o.id = chosen.id AND o.status = 'pending'
           AND (NOT EXISTS (SELECT FROM checkpoint) OR EXISTS (SELECT FROM pinned))
        RETURNING o.id, o.event_seq, o.attempt, 'pending' AS from_status, o.status, o.job, o.phase, o.accept_changes,
                  chosen.incarnation, chosen.index, chosen.url, chosen.secret, chosen.not_before AS was_due_at
    ), attempted AS (
        INSERT INTO attempts (operation_id, number, incarnation, checkpoint_id, start_step, starts_at_evaluation)
        SELECT moved.id, moved.attempt, moved.incarnation, pinned.id, coalesce(pinned.step, 0),
               coalesce(pinned.phase = 'evaluate', false)
          FROM moved LEFT JOIN pinned ON true
    ), held AS (
        INSERT INTO holds (operation_id, attempt, incarnation, lease_expires_at)
        SELECT id, attempt, incarnation, clock_timestamp() + make_interval(secs => :lease_s) FROM moved
    ), taken AS (
        UPDATE slots s SET operation_id = moved.id, attempt = moved.attempt
          FROM moved WHERE s.incarnation = moved.incarnation AND s.index = moved.index
    ), told AS (
        {record("'claim'", "jsonb_build_object('worker', incarnation)")}
    )
    SELECT moved.id AS operation_id, moved.attempt, moved.job, moved.phase AS study_phase, moved.accept_changes,
           moved.incarnation, moved.index, moved.url, moved.secret,
           pinned.id AS checkpoint_id, pinned.path, pinned.step, pinned.epoch, pinned.phase, pinned.size_bytes,
           pinned.manifest_sha256, parent.job AS parent_job,
           coalesce(extract(epoch FROM clock_timestamp() - greatest(moved.was_due_at, queued.at)), 0)::float8 AS due_s
      FROM moved LEFT JOIN pinned ON true
      LEFT JOIN events queued ON queued.operation_id = moved.id AND queued.seq = moved.event_seq - 1
      LEFT JOIN operations parent ON parent.id = pinned.operation_id AND parent.id <> moved.id
""")

# Of all operations, the newest attempts whose trainer had started: what ended before had no work to lose.
FAILURE_RECORD = statement("""
    SELECT coalesce(sum(extract(epoch FROM coalesce(ended_at, now()) - started_at)), 0)::float8 AS running_s,
           count(*) FILTER (WHERE outcome IN ('lost', 'failed')) AS failures
      FROM (SELECT started_at, ended_at, outcome FROM attempts
             WHERE started_at IS NOT NULL ORDER BY started_at DESC LIMIT 1000) newest
""")

REFUSE = statement(f"""
    WITH {LOCK_HOLDS}, target AS MATERIALIZED (
        SELECT id, status FROM operations
         WHERE id = :id AND attempt = :attempt AND status IN ('running', 'cancelling')
           AND (SELECT bool_or(incarnation = :incarnation AND last_seq = 0) FROM locked)
           FOR NO KEY UPDATE
    ), moved AS (
        UPDATE operations o
           SET status = CASE t.status WHEN 'running' THEN 'pending' ELSE 'cancelled' END,
               ended_at = CASE t.status WHEN 'running' THEN NULL ELSE now() END,
               event_seq = o.event_seq + 1
          FROM target t WHERE o.id = t.id
        RETURNING o.id, o.event_seq, o.attempt, t.status AS from_status, o.status
    ), ended AS (
        UPDATE holds h SET ended_at = now()
          FROM moved, locked
         WHERE h.operation_id = moved.id AND h.attempt = moved.attempt AND h.incarnation = locked.incarnation
    ), closed AS (
        UPDATE attempts a SET ended_at = now(), outcome = 'refused', error = :error
          FROM moved WHERE a.operation_id = moved.id AND a.number = moved.attempt
    ), rested AS (
        UPDATE slots s SET rests_until = now() + make_interval(secs => :rest_s)
          FROM moved WHERE s.incarnation = :incarnation AND s.operation_id = moved.id AND s.attempt = moved.attempt
    )
    {record("CASE from_status WHEN 'running' THEN 'refuse' ELSE 'stop' END")}
    RETURNING to_status
""")


@dataclass(frozen=True)
class Claim:
    """An attempt that was claimed and has to be delivered."""

    operation_id: UUID
    attempt: int
    incarnation: UUID
    slot: int
    url: str
    secret: str
    job: Job
    checkpoint: CheckpointRef | None
    parent_job: Job | None
    children: list[ChildResult] | None
    planned: SweepResult | GridResult | None
    accept_changes: bool
    record: FailureRecord
    due_s: float  # how long it had been due


async def claim_next(session: AsyncSession, lease_s: float) -> Claim | None:
    """Move the first due operation that fits a free slot pending → running. None: nothing fits, or another claims."""
    if not await session.scalar(TRY_CLAIM_LOCK):
        return None
    row = (await session.execute(CLAIM, {"lease_s": lease_s})).mappings().one_or_none()
    if row is None:
        return None
    reduces = row["study_phase"] == StudyPhase.REDUCE
    checkpoint = None
    if row["checkpoint_id"] is not None:
        checkpoint = CheckpointRef.model_validate({name: row[name] for name in CheckpointRef.model_fields})
    return Claim(
        operation_id=row["operation_id"],
        attempt=row["attempt"],
        incarnation=row["incarnation"],
        slot=row["index"],
        url=row["url"],
        secret=row["secret"],
        job=Job.model_validate(row["job"]),
        checkpoint=checkpoint,
        parent_job=Job.model_validate(row["parent_job"]) if row["parent_job"] else None,
        children=await children(session, row["operation_id"]) if reduces else None,
        planned=await planned(session, row["operation_id"]) if reduces else None,
        accept_changes=row["accept_changes"],
        record=await failure_record(session),
        due_s=row["due_s"],
    )


async def failure_record(session: AsyncSession) -> FailureRecord:
    """How often attempts on this service lose work; running ones count as far as they are."""
    row = (await session.execute(FAILURE_RECORD)).mappings().one()
    return FailureRecord(**row)


async def refuse_if_held(session: AsyncSession, claim: Claim, *, error: Fault, rest_s: float) -> Status | None:
    """Move running → pending (cancelling → cancelled) uncharged, and let the slot rest."""
    status = await session.scalar(
        REFUSE,
        {
            "id": claim.operation_id,
            "attempt": claim.attempt,
            "incarnation": claim.incarnation,
            "error": plain(error),
            "detail": {"error": plain(error)},
            "rest_s": rest_s,
        },
    )
    return Status(status) if status else None
