"""claim: pending → running, one claimer at a time; refuse: running → pending, when the worker did not take it."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.children import children, planned
from ops_backend.store.placement import BEHIND, PLACED, QUEUE, SUPPLY
from ops_backend.store.sql import (
    LOCK_HOLDS,
    NEWEST_FIRST,
    by_member,
    continues,
    moved_at,
    of_row,
    plain,
    record,
    statement,
)
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

# Of a row found by its id: where the planner believes that little waits, `=` would have it look through all that does.
_STILL_PENDING = "CASE WHEN o.status = 'pending' THEN true ELSE false END"

# Of an event, what a gang has besides its leader.
_MEMBERS = """coalesce((SELECT jsonb_build_object('members', jsonb_agg(
                              jsonb_build_object('worker', name, 'ranks', ranks) ORDER BY first_rank))
                            FROM members HAVING sum(ranks) > 1), '{}')"""

# One that another transaction has locked is passed over, and with it, this once, those behind it with the same wish.
# A lease counts from the claim itself: a transaction that was held up dates its now() back.
# A fork without a checkpoint of its own is handed its fork point even if that was marked corrupt meanwhile: the worker
# then refuses it, and the fork fails. Without one it would begin at step 0, which nobody asked for.
CLAIM = statement(f"""
    WITH RECURSIVE {SUPPLY}
    ), chosen AS MATERIALIZED (
        SELECT fitting.id, fitting.not_before, locked.resume_checkpoint_id, locked.forked_from_checkpoint_id,
               fitting.slots
          FROM (
            SELECT o.id, o.not_before, placed.slots
              FROM (SELECT * FROM first o {QUEUE} OFFSET 0) o
              CROSS JOIN LATERAL (
{PLACED}
              ) placed
             WHERE (EXISTS (SELECT FROM free WHERE NOT reserved) OR NOT {BEHIND})
               AND placed.slots IS NOT NULL
             {QUEUE}
            OFFSET 0
          ) fitting
          CROSS JOIN LATERAL (
            SELECT resume_checkpoint_id, forked_from_checkpoint_id
              FROM operations o
             WHERE o.id = fitting.id AND {_STILL_PENDING}
               FOR NO KEY UPDATE SKIP LOCKED
          ) locked
         LIMIT 1
    ), members AS MATERIALIZED (
        SELECT f.incarnation, f.name, f.url, f.secret, array_agg(f.index ORDER BY given.nth) AS slots,
               min(f.cores) AS cores, (min(given.nth) - 1)::int AS first_rank, count(*)::int AS ranks,
               (array_agg(f.port ORDER BY given.nth))[1] AS port
          FROM chosen
          CROSS JOIN jsonb_array_elements(chosen.slots) WITH ORDINALITY AS given (slot, nth)
          JOIN offered f ON f.incarnation = (given.slot->>0)::uuid AND f.index = (given.slot->1)::int
         GROUP BY f.incarnation, f.name, f.url, f.secret
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
                          THEN jsonb_set(o.job, '{{execution,threads}}',
                                         to_jsonb(least((SELECT min(cores) FROM members), {MOST_THREADS})))
                          ELSE o.job END
          FROM chosen
         WHERE o.id = chosen.id AND {_STILL_PENDING}
           AND (NOT EXISTS (SELECT FROM checkpoint) OR EXISTS (SELECT FROM pinned))
        RETURNING o.id, o.event_seq, o.attempt, 'pending' AS from_status, o.status, o.job, o.phase, o.accept_changes,
                  (chosen.slots->0->>0)::uuid AS incarnation, chosen.not_before AS was_due_at
    ), attempted AS (
        INSERT INTO attempts (operation_id, number, incarnation, checkpoint_id, start_step, starts_at_evaluation)
        SELECT moved.id, moved.attempt, moved.incarnation, pinned.id, coalesce(pinned.step, 0),
               coalesce(pinned.phase = 'evaluate', false)
          FROM moved LEFT JOIN pinned ON true
    ), held AS (
        INSERT INTO holds (operation_id, attempt, incarnation, lease_expires_at, first_rank, ranks)
        SELECT moved.id, moved.attempt, m.incarnation, clock_timestamp() + make_interval(secs => :lease_s),
               m.first_rank, m.ranks
          FROM moved, members m
    ), taken AS (
        UPDATE slots s SET operation_id = moved.id, attempt = moved.attempt
          FROM moved, members m WHERE s.incarnation = m.incarnation AND s.index = ANY (m.slots)
    ), told AS (
        {record("'claim'", f"jsonb_build_object('worker', incarnation) || {_MEMBERS}")}
    )
    SELECT moved.id AS operation_id, moved.attempt, moved.job, moved.phase AS study_phase, moved.accept_changes,
           moved.incarnation,
           (SELECT jsonb_agg(jsonb_build_object('incarnation', incarnation, 'url', url, 'secret', secret, 'port', port,
                                                'slots', slots, 'first_rank', first_rank) ORDER BY first_rank)
              FROM members) AS members,
           pinned.id AS checkpoint_id, pinned.path, pinned.step, pinned.epoch, pinned.phase, pinned.size_bytes,
           pinned.manifest_sha256, parent.job AS parent_job,
           coalesce(extract(epoch FROM clock_timestamp() - greatest(moved.was_due_at, {moved_at("moved")})),
                    0)::float8 AS due_s
      FROM moved LEFT JOIN pinned ON true
      LEFT JOIN operations parent ON parent.id = pinned.operation_id AND parent.id <> moved.id
""")

# Of all operations, the newest attempts whose trainer had started: what ended before had no work to lose.
FAILURE_RECORD = statement("""
    SELECT coalesce(sum(extract(epoch FROM coalesce(ended_at, now()) - started_at)), 0)::float8 AS running_s,
           count(*) FILTER (WHERE outcome IN ('lost', 'failed')) AS failures
      FROM (SELECT started_at, ended_at, outcome FROM attempts
             WHERE started_at IS NOT NULL ORDER BY started_at DESC LIMIT 1000) newest
""")

REFUSE_DETAIL = f"CAST(:detail AS jsonb) || {by_member('incarnation = :incarnation')}"

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
               exit_unconfirmed = t.status = 'cancelling' AND (SELECT count(*) FROM locked) > 1,
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
    {record("CASE from_status WHEN 'running' THEN 'refuse' ELSE 'stop' END", REFUSE_DETAIL)}
    RETURNING to_status
""")


@dataclass(frozen=True)
class Member:
    """A worker of an attempt, and the slots that it gives: the first one runs `first_rank`."""

    incarnation: UUID
    url: str
    secret: str
    slots: list[int]
    first_rank: int


@dataclass(frozen=True)
class Claim:
    """An attempt that was claimed and has to be delivered to each of its members, the leader first.

    `host` and `port` are where rank 0 of a gang listens, as the backend knows its worker; None of any other.
    """

    operation_id: UUID
    attempt: int
    members: list[Member]
    host: str | None
    port: int | None
    job: Job
    checkpoint: CheckpointRef | None
    parent_job: Job | None
    children: list[ChildResult] | None
    planned: SweepResult | GridResult | None
    accept_changes: bool
    record: FailureRecord
    due_s: float  # how long it had been due

    @property
    def world_size(self) -> int:
        return sum(len(member.slots) for member in self.members)


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
        checkpoint = of_row(CheckpointRef, row)
    leader = row["members"][0]
    return Claim(
        operation_id=row["operation_id"],
        attempt=row["attempt"],
        members=[_member(member) for member in row["members"]],
        host=urlsplit(leader["url"]).hostname,
        port=leader["port"],
        job=Job.model_validate(row["job"]),
        checkpoint=checkpoint,
        parent_job=Job.model_validate(row["parent_job"]) if row["parent_job"] else None,
        children=await children(session, row["operation_id"]) if reduces else None,
        planned=await planned(session, row["operation_id"]) if reduces else None,
        accept_changes=row["accept_changes"],
        record=await failure_record(session),
        due_s=row["due_s"],
    )


def _member(row: dict[str, Any]) -> Member:
    return Member(UUID(row["incarnation"]), row["url"], row["secret"], row["slots"], row["first_rank"])


async def failure_record(session: AsyncSession) -> FailureRecord:
    """How often attempts on this service lose work; running ones count as far as they are."""
    row = (await session.execute(FAILURE_RECORD)).mappings().one()
    return FailureRecord(**row)


async def refuse_if_held(
    session: AsyncSession, claim: Claim, member: Member, *, error: Fault, rest_s: float
) -> Status | None:
    """Move running → pending (cancelling → cancelled) uncharged for all members, and let the slots of this one rest."""
    status = await session.scalar(
        REFUSE,
        {
            "id": claim.operation_id,
            "attempt": claim.attempt,
            "incarnation": member.incarnation,
            "error": plain(error),
            "detail": {"error": plain(error)},
            "rest_s": rest_s,
        },
    )
    return Status(status) if status else None
