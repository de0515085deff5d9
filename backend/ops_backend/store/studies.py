"""What a study and its children make of each other: levels that are polled, so that no order of commits can lose them.

A parent's transition never touches a child, nor a child's its parent: each statement moves the one and only reads the
other.
"""

from dataclasses import dataclass
from uuid import UUID, uuid4

from sqlalchemy import TextClause
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import plain, record, statement
from ops_backend.store.transitions import CancelPush, cancelling, push_of
from ops_backend.tables import quoted
from ops_contract.jobs import Job, kind_of
from ops_contract.lifecycle import LIVE, Status
from ops_contract.plans import ChildPlan, Plan
from ops_contract.studies import NOT_RUN

_LIVE = quoted(sorted(LIVE))
CANCELLED_STUDY = "its study was cancelled"
# Rows that one statement moves: what is left is moved by the next one.
AT_ONCE = 500

FIND_PARENT = statement("SELECT job FROM operations WHERE id = :id AND kind = 'study'")

# In the transaction of the report, after the study began to wait. A child that is there already is left alone: one that
# has its result keeps it, and one that ended without is moved by REPLAN. Children are queued in the plan's order.
INSERT_CHILDREN = statement(f"""
    WITH parent AS (
        SELECT * FROM operations WHERE id = :id
    ), wanted AS MATERIALIZED (
        SELECT * FROM json_to_recordset(:children) AS x (id uuid, key text, name text, job jsonb, about json,
                                                          position int)
    ), planned AS (
        INSERT INTO planned (parent_id, child_key, attempt, position, about)
        SELECT parent.id, wanted.key, parent.attempt, wanted.position, wanted.about FROM parent, wanted
        ON CONFLICT (parent_id, child_key) DO UPDATE
           SET attempt = excluded.attempt, position = excluded.position, about = excluded.about
    ), moved AS (
        INSERT INTO operations (id, name, kind, workload, job, code_sha256, labels, priority, max_retries,
                                submitted_by, parent_id, child_key, planned_attempt, created_at, status, event_seq)
        SELECT w.id, w.name, w.job->>'kind', p.workload, w.job, p.code_sha256, p.labels, p.priority, p.max_retries,
               p.submitted_by, p.id, w.key, p.attempt, now() + make_interval(secs => w.position * 1e-6), 'pending', 1
          FROM parent p, wanted w
        ON CONFLICT (parent_id, child_key) WHERE parent_id IS NOT NULL DO NOTHING
        RETURNING id, event_seq, attempt, NULL::text AS from_status, status
    )
    {record("'submit'", "jsonb_build_object('study', CAST(:id AS uuid))")}
""")

# Whether any of the levels may have something to move: all that is asked while there is no study.
STIRS = statement(f"""
    SELECT EXISTS (SELECT FROM operations WHERE kind = 'study' AND status IN ('waiting', 'cancelling'))
        OR EXISTS (SELECT FROM operations c JOIN operations s ON s.id = c.parent_id
                    WHERE c.parent_id IS NOT NULL AND c.status IN ({_LIVE}) AND s.status = 'cancelled')
""")

# A child of the plan that a waiting study has made since the child ran last, and without a result.
_PLANNED_AGAIN = """
    planned p JOIN operations c ON c.parent_id = p.parent_id AND c.child_key = p.child_key
     WHERE p.parent_id = s.id AND p.attempt = s.attempt AND p.attempt > c.planned_attempt
       AND c.status IN ('failed', 'cancelled')"""

REPLAN = statement(f"""
    WITH target AS MATERIALIZED (
        SELECT o.id, o.status, again.attempt
          FROM operations s
         CROSS JOIN LATERAL (SELECT c.id, p.attempt FROM {_PLANNED_AGAIN}) again
          JOIN operations o ON o.id = again.id AND o.status IN ('failed', 'cancelled')
         WHERE s.kind = 'study' AND s.status = 'waiting'
         ORDER BY o.id LIMIT {AT_ONCE}
           FOR NO KEY UPDATE OF o SKIP LOCKED
    ), moved AS (
        UPDATE operations o
           SET status = 'pending', event_seq = o.event_seq + 1, planned_attempt = t.attempt, failures = 0,
               lost_without_progress = 0, not_before = NULL, error = NULL, ended_at = NULL, cancel_force = false,
               cancel_reason = NULL, exit_unconfirmed = false, phase = CASE o.kind WHEN 'study' THEN 'plan' END
          FROM target t WHERE o.id = t.id
        RETURNING o.id, o.event_seq, o.attempt, t.status AS from_status, o.status
    )
    {record("'replan'", "'{}'")}
    RETURNING operation_id
""")

REDUCE = statement(f"""
    WITH target AS MATERIALIZED (
        SELECT s.id, s.status FROM operations s
         WHERE s.kind = 'study' AND s.status = 'waiting'
           AND NOT EXISTS (SELECT FROM operations c WHERE c.parent_id = s.id AND c.status IN ({_LIVE}))
           AND NOT EXISTS (SELECT FROM {_PLANNED_AGAIN})
         LIMIT {AT_ONCE}
           FOR NO KEY UPDATE SKIP LOCKED
    ), moved AS (
        UPDATE operations o SET status = 'pending', phase = 'reduce', event_seq = o.event_seq + 1
          FROM target t WHERE o.id = t.id
        RETURNING o.id, o.event_seq, o.attempt, t.status AS from_status, o.status
    )
    {record("'reduce'", "'{}'")}
    RETURNING operation_id
""")

# Also of a study that has ended: a child may have been made, or resumed, at that moment.
CANCEL_CHILDREN = cancelling(f"""
        SELECT c.id, c.status, c.cancel_force OR s.cancel_force AS force
          FROM operations c JOIN operations s ON s.id = c.parent_id
         WHERE c.parent_id IS NOT NULL AND c.status IN ({_LIVE}) AND s.status IN ('cancelling', 'cancelled')
           AND (c.status <> 'cancelling' OR s.cancel_force AND NOT c.cancel_force)
         ORDER BY c.id LIMIT {AT_ONCE}
           FOR NO KEY UPDATE OF c SKIP LOCKED""")

# Of the children that ended for the newest plan: whether so many have failed since the last one that completed. What
# has once stopped stays so until it is planned again: it takes several of these statements where there are many, and
# one that ran meanwhile may complete.
_BROKEN = """
    (SELECT count(*) FILTER (WHERE c.status = 'failed' AND c.ended_at > coalesce(done.at, '-infinity'))
                >= (s.job->'study'->>'stop_after_failures')::int
            OR bool_or(c.status = 'cancelled' AND c.cancel_reason = :cancel_reason)
       FROM planned p
       JOIN operations c ON c.parent_id = p.parent_id AND c.child_key = p.child_key
      CROSS JOIN (SELECT max(d.ended_at) AS at FROM operations d
                   WHERE d.parent_id = s.id AND d.status = 'completed') done
      WHERE p.parent_id = s.id AND p.attempt = s.attempt AND c.planned_attempt = s.attempt)"""

# One that is claimed at that moment runs: it is pending no more.
STOP_AFTER_FAILURES = cancelling(f"""
        SELECT c.id, c.status, false AS force
          FROM operations c
         WHERE c.status = 'pending' AND c.parent_id IN (
               SELECT s.id FROM operations s
                WHERE s.kind = 'study' AND s.status = 'waiting'
                  AND s.job->'study'->>'stop_after_failures' IS NOT NULL AND {_BROKEN})
         ORDER BY c.id LIMIT {AT_ONCE}
           FOR NO KEY UPDATE OF c SKIP LOCKED""")

# One whose attempt still runs is ended by that attempt.
STOP = statement(f"""
    WITH target AS MATERIALIZED (
        SELECT s.id, s.status FROM operations s
         WHERE s.kind = 'study' AND s.status = 'cancelling'
           AND NOT EXISTS (SELECT FROM holds h WHERE h.operation_id = s.id AND h.ended_at IS NULL)
           AND NOT EXISTS (SELECT FROM operations c WHERE c.parent_id = s.id AND c.status IN ({_LIVE}))
         LIMIT {AT_ONCE}
           FOR NO KEY UPDATE SKIP LOCKED
    ), moved AS (
        UPDATE operations o SET status = 'cancelled', ended_at = now(), event_seq = o.event_seq + 1
          FROM target t WHERE o.id = t.id
        RETURNING o.id, o.event_seq, o.attempt, t.status AS from_status, o.status
    )
    {record("'stop'", "'{}'")}
    RETURNING operation_id
""")


@dataclass(frozen=True)
class ChildCancelled:
    """What a cancel of its study, or its siblings' failures, made of a child, and whom to tell at once."""

    id: UUID
    status: Status
    force: bool
    push: CancelPush | None


async def insert_children(session: AsyncSession, id: UUID, plan: Plan) -> None:
    """Those of the plan that are not there yet. The study is waiting already, by this very transaction."""
    study = Job.model_validate(await session.scalar(FIND_PARENT, {"id": id}))
    rows = [
        {
            "id": str(uuid4()),
            "key": child.key,
            "name": child.name,
            "job": plain(child_job(study, child)),
            "about": plain(child.about),
            "position": position,
        }
        for position, child in enumerate(plan.children)
    ]
    await session.execute(INSERT_CHILDREN, {"id": id, "children": rows})


def child_job(study: Job, child: ChildPlan) -> Job:
    """Whose code, secrets and working directory it has is the study's alone to say, not its planner's."""
    changed = child.model_dump(include={"config", "command", "env", "resources"})
    changed |= {"kind": kind_of(study.workload), "execution": child.execution.model_dump()}
    return Job.model_validate(study.model_dump(exclude={"study"}) | changed)


async def stirs(session: AsyncSession) -> bool:
    return bool(await session.scalar(STIRS))


async def replan(session: AsyncSession) -> list[UUID]:
    """Move failed, cancelled → pending: children without a result that their waiting study has planned again."""
    return list(await session.scalars(REPLAN))


async def reduce(session: AsyncSession) -> list[UUID]:
    """Move waiting → pending: studies without a live child, nor one to be run again."""
    return list(await session.scalars(REDUCE))


async def cancel_children(session: AsyncSession) -> list[ChildCancelled]:
    """Move the live children of cancelled and cancelling studies as `cancel_if_live` does, with its force."""
    return await _cancelled(session, CANCEL_CHILDREN, CANCELLED_STUDY)


async def stop_after_failures(session: AsyncSession) -> list[ChildCancelled]:
    """Move pending → cancelled: children of waiting studies of which too many in a row have failed."""
    return await _cancelled(session, STOP_AFTER_FAILURES, NOT_RUN)


async def _cancelled(session: AsyncSession, which: TextClause, reason: str) -> list[ChildCancelled]:
    values = {"cancel_reason": reason, "detail": {"reason": reason}}
    return [
        ChildCancelled(row.id, Status(row.status), row.force, push_of(row))
        for row in await session.execute(which, values)
    ]


async def stop(session: AsyncSession) -> list[UUID]:
    """Move cancelling → cancelled: studies of which nothing runs any more."""
    return list(await session.scalars(STOP))
