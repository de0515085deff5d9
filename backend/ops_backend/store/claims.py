"""claim: pending → running, one claimer at a time; refuse: running → pending, when the worker did not take it."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.children import children, planned
from ops_backend.store.sql import LOCK_HOLDS, NEWEST_FIRST, by_member, continues, moved_at, plain, record, statement
from ops_backend.tables import WISH
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


_DEVICES = "(o.job->'execution'->>'devices')::int"
_NODES = "(o.job->'resources'->>'nodes')::int"
IS_GANG = f"o.kind = 'training' AND {_DEVICES} > 1"


def suits(slot: str) -> str:
    """Whether a slot is what operation `o` asks for, alone; `offered` are all that there are.

    `auto` wants a GPU slot and takes a CPU slot only where no live worker offers this workload a GPU at all: a drained
    one still does. A study only plans and reduces, on any slot: what its job asks for its children need.
    """
    return f"""{runs(slot)}
               AND (o.kind = 'study' OR {slot}.cores >= coalesce((o.job->'resources'->>'cores')::int, 1))
               AND (o.kind = 'study' OR CASE o.job->'execution'->>'accelerator'
                     WHEN 'auto' THEN {slot}.device <> 'cpu' OR NOT EXISTS (
                          SELECT FROM offered g WHERE g.device <> 'cpu' AND {runs("g")})
                     ELSE {slot}.device = o.job->'execution'->>'accelerator' END)"""


def room(slots: str) -> str:
    """The slots that gang `o` could use among these, which are called `f`: all on one kind of device, never mps.

    With `share`, how many it takes of each node at least (of one, all), and `on_host`, how many that one has of them.
    A slot without a port is that of a worker which knows no gangs.
    """
    return f"""
                SELECT * FROM (
                    SELECT f.incarnation, f.index, f.host, f.cores, {_DEVICES} / coalesce({_NODES}, 1) AS share,
                           count(*) OVER (PARTITION BY f.host) AS on_host,
                           count(*) OVER (PARTITION BY f.incarnation) AS on_worker,
                           bool_or(f.is_local) OVER (PARTITION BY f.host) AS is_local
                      FROM {slots}
                       AND f.port IS NOT NULL AND {runs("f")}
                       AND f.cores >= coalesce((o.job->'resources'->>'cores')::int, 1)
                       AND f.device = CASE o.job->'execution'->>'accelerator' WHEN 'auto' THEN
                               CASE WHEN EXISTS (SELECT FROM offered g WHERE g.device = 'cuda' AND {runs("g")})
                                    THEN 'cuda' ELSE 'cpu' END
                               ELSE o.job->'execution'->>'accelerator' END) fitting
                 WHERE {_NODES} IS NULL OR on_host >= share"""


# What live workers offer; a lease counts as their sign of life. `is_local`: nobody else reaches that address.
OFFERED = """
        SELECT s.incarnation, s.index, s.device, s.cores, s.port, s.operation_id, s.attempt, s.rests_until,
               w.name, w.host, w.url, w.secret, w.workloads, w.user_code, w.drain IS NULL AS undrained,
               w.url ~ '^https?://(localhost|127[.]|\\[::1\\])' AS is_local
          FROM slots s JOIN workers w USING (incarnation)
         WHERE NOT w.draining AND w.last_seen_at > now() - make_interval(secs => :lease_s)"""

# Of a row found by its id: where the planner believes that little waits, `=` would have it look through all that does.
_STILL_PENDING = "CASE WHEN o.status = 'pending' THEN true ELSE false END"

# Of `room`: whether it is enough for gang `o`.
_IS_ENOUGH = f"""count(*) >= {_DEVICES} AND ({_NODES} IS NULL OR count(DISTINCT host) >= {_NODES})"""

# Which slots of its node a gang takes first, and the order of its ranks.
_FIRST = "cores = (o.job->'execution'->>'threads')::int DESC NULLS LAST, on_worker DESC, incarnation, index"
_RANKS = "is_local, node, incarnation, index"
# Of an event, what a gang has besides its leader.
_MEMBERS = """coalesce((SELECT jsonb_build_object('members', jsonb_agg(
                              jsonb_build_object('worker', name, 'ranks', ranks) ORDER BY first_rank))
                            FROM members HAVING sum(ranks) > 1), '{}')"""
_QUEUE = "ORDER BY o.priority DESC, o.created_at, o.id"

# By scalars that are read once: null, and so false, where no gang reserves.
_BEHIND = """coalesce((-o.priority, o.created_at, o.id) > ((SELECT -priority FROM head),
                               (SELECT created_at FROM head), (SELECT id FROM head)), false)"""

# A slot is free while the hold it was last given to is not alive. A frozen number of threads prefers a slot of that
# many cores.
# A gang takes its slots all or none. The first one of the queue that the live workers could hold reserves what it could
# use: whoever is behind it passes those over, else the small ones would always be there first. It takes the host that
# has the least room which is enough, else as few hosts as there can be. Ranks go by member, the members of a host side
# by side; an address that only its own host reaches cannot be rank 0's for others.
# Of those that wish for the same, only the first one due is looked at: where that does not fit, none behind it does. So
# a claim costs what there are of different wishes, not of operations that wait.
#
# Of it, after WITH RECURSIVE: the `first` of each wish, what is offered, and what a claim may give (`free`; what is
# `reserved` is not for who is behind the `head`).
SUPPLY = f"""offered AS MATERIALIZED ({OFFERED}
    ), vacant AS MATERIALIZED (
        SELECT f.* FROM offered f
         WHERE f.undrained AND coalesce(f.rests_until <= now(), true)
           AND NOT EXISTS (SELECT FROM holds h
                            WHERE h.operation_id = f.operation_id AND h.attempt = f.attempt
                              AND h.incarnation = f.incarnation AND h.ended_at IS NULL)
    ), wishes AS (
        (SELECT {WISH} AS wish FROM operations
          WHERE {WISH} IS NOT NULL AND EXISTS (SELECT FROM vacant) ORDER BY {WISH} LIMIT 1)
        UNION ALL
        SELECT (SELECT {WISH} FROM operations
                 WHERE {WISH} > wishes.wish ORDER BY {WISH} LIMIT 1)
          FROM wishes WHERE wishes.wish IS NOT NULL
    ), first AS MATERIALIZED (
        SELECT due.*
          FROM wishes
          CROSS JOIN LATERAL (
            SELECT o.id, o.priority, o.created_at, o.not_before, o.kind, o.workload, o.job
              FROM operations o
             WHERE {WISH} = wishes.wish AND coalesce(o.not_before <= now(), true)
             {_QUEUE} LIMIT 1
          ) due
    ), head AS MATERIALIZED (
        SELECT o.id, o.priority, o.created_at, reserved.*
          FROM (SELECT * FROM first o WHERE {IS_GANG} {_QUEUE} OFFSET 0) o
          CROSS JOIN LATERAL (
            SELECT array_agg(incarnation) AS incarnations, array_agg(index) AS indexes
              FROM ({room("offered f WHERE f.undrained")}) usable
            HAVING {_IS_ENOUGH}
          ) reserved
         {_QUEUE} LIMIT 1
    ), free AS MATERIALIZED (
        SELECT f.*, (f.incarnation, f.index) IN (
                        SELECT r.incarnation, r.index FROM head, unnest(head.incarnations, head.indexes)
                                                                     AS r (incarnation, index)) AS reserved
          FROM vacant f"""

# The slots that operation `o` gets of `free` just now, the leader's first; null where it cannot be placed.
PLACED = f"""
            SELECT CASE WHEN {IS_GANG} THEN (
                SELECT jsonb_agg(jsonb_build_array(incarnation, index) ORDER BY {_RANKS})
                  FROM (
                    SELECT *, row_number() OVER (ORDER BY node, {_FIRST}) AS nth,
                           row_number() OVER (PARTITION BY node ORDER BY {_FIRST}) AS nth_of_node
                      FROM (
                        SELECT *, dense_rank() OVER (
                                      ORDER BY on_host >= share DESC,
                                               CASE WHEN on_host >= share THEN on_host ELSE -on_host END, host) AS node
                          FROM ({room(f"free f WHERE NOT (f.reserved AND {_BEHIND})")}) usable
                      ) by_node
                  ) ordered
                 WHERE CASE WHEN {_NODES} IS NULL THEN nth <= {_DEVICES}
                            ELSE node <= {_NODES} AND nth_of_node <= share END
                HAVING count(*) = {_DEVICES}
            ) ELSE (
                SELECT jsonb_build_array(jsonb_build_array(f.incarnation, f.index))
                  FROM free f
                 WHERE NOT (f.reserved AND {_BEHIND}) AND {suits("f")}
                 ORDER BY o.kind = 'study' AND f.device = 'cpu' DESC,
                          f.cores = (o.job->'execution'->>'threads')::int DESC NULLS LAST, f.incarnation, f.index
                 LIMIT 1
            ) END AS slots OFFSET 0"""

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
              FROM (SELECT * FROM first o {_QUEUE} OFFSET 0) o
              CROSS JOIN LATERAL (
{PLACED}
              ) placed
             WHERE (EXISTS (SELECT FROM free WHERE NOT reserved) OR NOT {_BEHIND})
               AND placed.slots IS NOT NULL
             {_QUEUE}
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

# Of the job of a gang: what live workers could give it, drained ones too, whoever has it now.
COULD_HOLD = statement(f"""
    WITH offered AS MATERIALIZED ({OFFERED}
    ), o AS (
        SELECT CAST(:workload AS text) AS workload, CAST(:job AS jsonb) AS job
    )
    SELECT found.*, EXISTS (SELECT FROM offered) AS anybody
      FROM o CROSS JOIN LATERAL (
        SELECT count(*) AS slots, count(DISTINCT host) AS nodes, {_IS_ENOUGH} AS enough
          FROM ({room("offered f WHERE true")}) usable
      ) found
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
    def leader(self) -> Member:
        return self.members[0]

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
        checkpoint = CheckpointRef.model_validate({name: row[name] for name in CheckpointRef.model_fields})
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


@dataclass(frozen=True)
class Capacity:
    """Of live workers, taken slots included: so many slots suit a gang, on so many nodes with enough of them each."""

    enough: bool
    slots: int
    nodes: int
    anybody: bool  # whether any worker is live at all


async def capacity(session: AsyncSession, job: Job, lease_s: float) -> Capacity:
    """For the gang of `job`."""
    values = {"workload": job.workload, "job": plain(job), "lease_s": lease_s}
    return Capacity(**(await session.execute(COULD_HOLD, values)).mappings().one())


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
