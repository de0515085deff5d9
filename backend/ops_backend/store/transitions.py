"""finish, lost, cancel, resume: each one statement that says its guard, moves, and records."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, TextClause
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import LOCK_HOLDS, NEWEST_FIRST, by_member, continues, of_row, plain, record, statement
from ops_backend.tables import quoted
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import CANCELLABLE, RESUMABLE, TRANSITIONS, Outcome, Status
from ops_contract.operations import ResumeAccepted, ResumedFrom
from ops_contract.reports import Finish

MAX_BACKOFF_S = 300
CHARGED = quoted(sorted(t.event for t in TRANSITIONS if t.charged))
MAX_LOST_WITHOUT_PROGRESS = 3
# Of a member whose gang goes on without it, until the last one has finished.
IN_ORDER = frozenset({Outcome.COMPLETED, Outcome.CANCELLED, Outcome.PREEMPTED})

# Of a failure that is charged: how often, and what comes of it.
FINISH_DETAIL = f"""CAST(:detail AS jsonb) || jsonb_build_object('outcome', (SELECT outcome FROM told))
    || CASE WHEN event IN ({CHARGED}) THEN jsonb_strip_nulls(jsonb_build_object(
    'failures', failures, 'max_retries', max_retries, 'permanent', CAST(:permanent AS boolean),
    'retry_in_s', round(retry_in_s, 1))) ELSE '{{}}' END
    || {by_member("incarnation = :incarnation AND :for_all")}"""

# `decided` is the table of the design, top to bottom. A corrupt checkpoint fails the operation when it was chosen by
# hand or when the lineage has no other. Backoff doubles per failure and is spread over ±50 %.
# While others of its gang hold the attempt, a finish that is not `for_all` ends its own hold and moves nothing. The
# last one moves it by the leader's word: that one published what there is, or saved where it stopped.
FINISH = statement(f"""
    WITH {LOCK_HOLDS}, target AS MATERIALIZED (
        SELECT id, kind, status, attempt, failures, max_retries, resume_checkpoint_id, resume_explicit,
               forked_from_checkpoint_id
          FROM operations
         WHERE id = :id AND attempt = :attempt AND status IN ('running', 'cancelling')
           AND (SELECT bool_or(incarnation = :incarnation AND last_seq = :seq - 1) AND (:for_all OR count(*) = 1)
                  FROM locked)
           FOR NO KEY UPDATE
    ), told AS MATERIALIZED (
        SELECT CASE WHEN :for_all THEN :outcome ELSE coalesce(min(outcome), :outcome) END AS outcome
          FROM every WHERE first_rank = 0 AND incarnation <> :incarnation
    ), closed AS (
        UPDATE attempts a SET ended_at = now(), outcome = told.outcome, error = :error
          FROM target t, told WHERE a.operation_id = t.id AND a.number = t.attempt
        RETURNING a.checkpoint_id
    ), decided AS MATERIALIZED (
        SELECT t.*, CASE
            WHEN told.outcome = 'completed' THEN 'complete'
            WHEN t.status = 'cancelling' THEN 'stop'
            WHEN told.outcome = 'planned' AND t.kind = 'study' THEN 'plan'
            WHEN told.outcome IN ('preempted', 'cancelled') THEN 'preempt'
            WHEN told.outcome = 'checkpoint_corrupt' THEN 'checkpoint_corrupt'
            WHEN :permanent OR t.failures >= t.max_retries THEN 'fail'
            ELSE 'retry' END AS event,
            t.resume_explicit AND t.resume_checkpoint_id = closed.checkpoint_id OR NOT EXISTS (
                SELECT FROM checkpoints c
                 WHERE {continues("t")} AND c.id IS DISTINCT FROM closed.checkpoint_id) AS nothing_before
          FROM target t, closed, told
    ), marked AS (
        UPDATE checkpoints c SET status = 'corrupt'
          FROM closed, target WHERE :outcome = 'checkpoint_corrupt' AND c.id = closed.checkpoint_id
    ), moved AS (
        UPDATE operations o
           SET status = n.status, event_seq = o.event_seq + 1,
               failures = o.failures + (d.event IN ({CHARGED}))::int,
               not_before = CASE d.event WHEN 'retry' THEN now() + make_interval(secs =>
                   (0.5 + random()) * least({MAX_BACKOFF_S}, :backoff_s * 2.0 ^ least(o.failures, 30))) END,
               resume_checkpoint_id = CASE :outcome WHEN 'checkpoint_corrupt' THEN NULL ELSE o.resume_checkpoint_id END,
               exit_unconfirmed = n.status = 'cancelled' AND (SELECT count(*) FROM locked) > 1,
               error = CASE WHEN n.status = 'completed' THEN NULL ELSE coalesce(:error, o.error) END,
               ended_at = CASE WHEN n.status NOT IN ('pending', 'waiting') THEN now() END
          FROM decided d
          CROSS JOIN LATERAL (SELECT CASE
            WHEN d.event = 'complete' THEN 'completed'
            WHEN d.event = 'plan' THEN 'waiting'
            WHEN d.event = 'stop' THEN 'cancelled'
            WHEN d.event = 'fail' OR d.event = 'checkpoint_corrupt' AND d.nothing_before THEN 'failed'
            ELSE 'pending' END AS status) n
         WHERE o.id = d.id
        RETURNING o.id, o.event_seq, o.attempt, d.status AS from_status, o.status, d.event, o.failures, o.max_retries,
                  extract(epoch FROM o.not_before - now()) AS retry_in_s
    ), ended AS (
        UPDATE holds h
           SET ended_at = now(), last_seq = CASE h.incarnation WHEN :incarnation THEN :seq ELSE h.last_seq END
          FROM moved, locked
         WHERE h.operation_id = moved.id AND h.attempt = moved.attempt AND h.incarnation = locked.incarnation
    ), left_to_others AS (
        UPDATE holds h SET ended_at = now(), last_seq = :seq, outcome = :outcome
          FROM locked
         WHERE h.operation_id = :id AND h.attempt = :attempt AND h.incarnation = :incarnation
           AND locked.incarnation = :incarnation AND locked.last_seq = :seq - 1
           AND NOT :for_all AND (SELECT count(*) FROM locked) > 1
        RETURNING h.operation_id
    ), recorded AS (
        {record("event", FINISH_DETAIL)}
        RETURNING to_status
    )
    SELECT to_status FROM recorded
     UNION ALL SELECT o.status FROM left_to_others l JOIN operations o ON o.id = l.operation_id
""")

LOST_DETAIL = f"CAST(:detail AS jsonb) || {by_member('every.ended_at IS NULL AND lease_expires_at < now()')}"

# A lost attempt made progress when it committed a checkpoint past its start: else the next one redoes the same.
LOST = statement(f"""
    WITH {LOCK_HOLDS}, target AS MATERIALIZED (
        SELECT id, status FROM operations
         WHERE id = :id AND attempt = :attempt AND status IN ('running', 'cancelling')
           AND (SELECT bool_or(lease_expires_at < now()) FROM locked)
           AND NOT EXISTS (SELECT FROM service WHERE grace_until > now())
           FOR NO KEY UPDATE
    ), closed AS (
        UPDATE attempts a SET ended_at = now(), outcome = 'lost', error = :error
          FROM target t WHERE a.operation_id = t.id AND a.number = :attempt
        RETURNING a.started_at IS NOT NULL AS started,
                  coalesce((SELECT max(checkpoint_step) FROM every) > a.start_step, false) AS progressed
    ), decided AS MATERIALIZED (
        SELECT t.id, t.status, CASE WHEN closed.progressed THEN 0
            ELSE o.lost_without_progress + closed.started::int END AS lost_without_progress
          FROM target t JOIN operations o USING (id), closed
    ), moved AS (
        UPDATE operations o
           SET status = n.status, event_seq = o.event_seq + 1,
               lost_without_progress = d.lost_without_progress,
               exit_unconfirmed = n.status = 'cancelled',
               error = CASE n.status WHEN 'failed' THEN CAST(:gave_up AS jsonb) ELSE o.error END,
               ended_at = CASE n.status WHEN 'pending' THEN NULL ELSE now() END
          FROM decided d
          CROSS JOIN LATERAL (SELECT CASE
            WHEN d.status = 'cancelling' THEN 'cancelled'
            WHEN d.lost_without_progress >= {MAX_LOST_WITHOUT_PROGRESS} THEN 'failed'
            ELSE 'pending' END AS status) n
         WHERE o.id = d.id
        RETURNING o.id, o.event_seq, o.attempt, d.status AS from_status, o.status
    ), ended AS (
        UPDATE holds h SET ended_at = now()
          FROM moved, locked
         WHERE h.operation_id = moved.id AND h.attempt = moved.attempt AND h.incarnation = locked.incarnation
    )
    {record("'lost'", LOST_DETAIL)}
    RETURNING to_status
""")


def cancelling(target: str) -> TextClause:
    """Cancels the rows of `target`, which yields id, status and force: pending ones at once, others when they stop."""
    return statement(f"""
    WITH target AS MATERIALIZED ({target}), moved AS (
        UPDATE operations o
           SET status = CASE t.status WHEN 'pending' THEN 'cancelled' ELSE 'cancelling' END,
               ended_at = CASE t.status WHEN 'pending' THEN now() END,
               event_seq = o.event_seq + 1, cancel_force = t.force, not_before = NULL,
               cancel_reason = coalesce(CAST(:cancel_reason AS text), o.cancel_reason)
          FROM target t WHERE o.id = t.id
        RETURNING o.id, o.event_seq, o.attempt, t.status AS from_status, o.status, o.cancel_force AS force
    ), told AS (
        {record("CASE from_status WHEN 'cancelling' THEN 'force' ELSE 'cancel' END")}
    )
    SELECT moved.id, moved.status, moved.attempt, moved.force, w.incarnation, w.url, w.secret
      FROM moved
      LEFT JOIN holds h ON h.operation_id = moved.id AND h.attempt = moved.attempt AND h.ended_at IS NULL
      LEFT JOIN workers w ON w.incarnation = h.incarnation
""")


REQUEST_CANCEL = cancelling("""
        SELECT id, status, CAST(:force AS boolean) AS force FROM operations
         WHERE id = :id AND (status IN ('pending', 'running', 'waiting')
                             OR status = 'cancelling' AND :force AND NOT cancel_force)
           FOR NO KEY UPDATE""")

RESUME_DETAIL = """coalesce((SELECT jsonb_build_object(
    'checkpoint_id', id, 'step', step, 'accept_changes', CAST(:accept_changes AS boolean)) FROM pinned), '{}')"""

OF_CANCELLED_STUDY = """
    SELECT FROM operations s WHERE s.id = o.parent_id AND s.status IN ('cancelling', 'cancelled')"""

# Without a choice of the caller's: the checkpoint of an earlier resume that no attempt has gone past yet, else the
# newest of the lineage. An abandoned branch cannot be resumed, only forked: its steps no longer count. A command may
# have none, a measurement has none, and both run again; a study plans again, and what has its result is not run again.
# A child of a study that was cancelled would be cancelled at once.
RESUME = statement(f"""
    WITH target AS MATERIALIZED (
        SELECT id, kind, status, resume_checkpoint_id, forked_from_checkpoint_id FROM operations o
         WHERE id = :id AND status IN ('failed', 'cancelled') AND NOT EXISTS ({OF_CANCELLED_STUDY})
           FOR NO KEY UPDATE
    ), chosen AS MATERIALIZED (
        SELECT c.id
          FROM checkpoints c JOIN target t ON {continues("t")}
         WHERE (CAST(:checkpoint_id AS uuid) IS NULL OR c.id = :checkpoint_id)
         ORDER BY coalesce(c.id = t.resume_checkpoint_id, false) DESC, {NEWEST_FIRST}
         LIMIT 1
    ), pinned AS (
        UPDATE checkpoints c SET pinned_at = now()
          FROM chosen WHERE c.id = chosen.id AND c.status = 'committed'
        RETURNING c.id, c.checkpoint_type, c.created_at, c.epoch, c.step
    ), moved AS (
        UPDATE operations o
           SET status = 'pending', event_seq = o.event_seq + 1, failures = 0, lost_without_progress = 0,
               not_before = NULL, error = NULL, ended_at = NULL,
               cancel_force = false, cancel_reason = NULL, exit_unconfirmed = false,
               resume_checkpoint_id = pinned.id, resume_explicit = CAST(:checkpoint_id AS uuid) IS NOT NULL,
               accept_changes = :accept_changes, phase = CASE t.kind WHEN 'study' THEN 'plan' END
          FROM target t LEFT JOIN pinned ON true
         WHERE o.id = t.id
           AND (pinned.id IS NOT NULL OR t.kind IN ('command', 'measurement', 'study')
                                         AND CAST(:checkpoint_id AS uuid) IS NULL AND NOT EXISTS (SELECT FROM chosen))
        RETURNING o.id, o.event_seq, o.attempt, t.status AS from_status, o.status
    ), told AS (
        {record("'resume'", RESUME_DETAIL)}
    )
    SELECT moved.id AS operation_id, moved.status, pinned.id AS checkpoint_id, pinned.checkpoint_type,
           pinned.created_at, pinned.epoch, pinned.step
      FROM moved LEFT JOIN pinned ON true
""")

EXPLAIN = statement(f"""
    SELECT o.status, o.parent_id, EXISTS ({OF_CANCELLED_STUDY}) AS of_cancelled_study,
           EXISTS (SELECT FROM checkpoints c
                    WHERE (c.operation_id = o.id OR c.id = o.forked_from_checkpoint_id) AND c.status = 'committed'
                      AND (CAST(:checkpoint_id AS uuid) IS NULL OR c.id = :checkpoint_id)) AS has_checkpoint,
           EXISTS (SELECT FROM checkpoints c
                    WHERE {continues("o")}
                      AND (CAST(:checkpoint_id AS uuid) IS NULL OR c.id = :checkpoint_id)) AS in_lineage
      FROM operations o WHERE o.id = :id
""")


@dataclass(frozen=True)
class CancelPush:
    """Whom to tell at once that its attempt is cancelled; the heartbeat tells it anyway."""

    incarnation: UUID
    attempt: int
    url: str
    secret: str


@dataclass(frozen=True)
class Cancelled:
    status: Status
    pushes: list[CancelPush]


async def finish_if_held(
    session: AsyncSession, id: UUID, attempt: int, incarnation: UUID, seq: int, finish: Finish, backoff_s: float
) -> Status | None:
    """End the attempt with its worker's own word, guarded by its live hold and the order of its reports.

    Gives where that leaves the operation: where it was, while others of the gang hold the attempt and this one had no
    fault. None: not accepted.
    """
    error = plain(finish.error) if finish.error else None
    status = await session.scalar(
        FINISH,
        {
            "id": id,
            "attempt": attempt,
            "incarnation": incarnation,
            "seq": seq,
            "outcome": finish.outcome,
            "permanent": finish.permanent,
            "error": error,
            "for_all": finish.error is not None or finish.outcome not in IN_ORDER,
            "detail": {"error": error} if error else {},
            "backoff_s": backoff_s,
        },
    )
    return Status(status) if status else None


async def lose_if_expired(session: AsyncSession, id: UUID, attempt: int) -> Status | None:
    """End an attempt whose lease ran out, unless the reaper is in grace."""
    error = {
        "code": "lost",
        "message": "the worker stopped renewing its lease: its host, agent or network died",
        "details": {},
    }
    gave_up = error | {
        "message": f"{MAX_LOST_WITHOUT_PROGRESS} attempts were lost one after the other without a new checkpoint: what "
        "it runs may take its worker down. Look at those workers (`ops attempts`), then resume it"
    }
    values = {"id": id, "attempt": attempt, "error": error, "gave_up": gave_up, "detail": {"error": error}}
    status = await session.scalar(LOST, values)
    return Status(status) if status else None


async def cancel_if_live(session: AsyncSession, id: UUID, reason: str, force: bool) -> Cancelled | None:
    """Move pending → cancelled, running and waiting → cancelling; with force also tell a cancelling one to hurry."""
    detail: dict[str, Any] = {"force": force} | ({"reason": reason} if reason else {})
    values = {"id": id, "force": force, "cancel_reason": reason or None, "detail": detail}
    rows = (await session.execute(REQUEST_CANCEL, values)).all()
    if not rows:
        return None
    return Cancelled(Status(rows[0].status), [push for row in rows if (push := push_of(row))])


def push_of(row: Row[Any]) -> CancelPush | None:
    """Of a row of `cancelling`; None where nobody runs it."""
    return None if row.incarnation is None else CancelPush(row.incarnation, row.attempt, row.url, row.secret)


async def resume_if_ended(
    session: AsyncSession, id: UUID, from_checkpoint: UUID | None, accept_changes: bool = False
) -> ResumeAccepted | None:
    """Move failed, cancelled → pending from a checkpoint, which is pinned in the same statement."""
    values = {"id": id, "checkpoint_id": from_checkpoint, "accept_changes": accept_changes}
    row = (await session.execute(RESUME, values)).mappings().one_or_none()
    if row is None:
        return None
    resumed_from = None
    if row["checkpoint_id"] is not None:
        resumed_from = of_row(ResumedFrom, row)
    return ResumeAccepted(operation_id=row["operation_id"], status=row["status"], resumed_from=resumed_from)


async def explain_cancel(session: AsyncSession, id: UUID) -> OpsError:
    """Why `cancel_if_live` moved nothing."""
    row = (await session.execute(EXPLAIN, {"id": id, "checkpoint_id": None})).one_or_none()
    if row is None:
        return not_found(id)
    hint = "it is stopping already; force kills it at once" if row.status == Status.CANCELLING else "it has ended"
    return OpsError(
        ErrorCode.NOT_CANCELLABLE,
        f"operation is {row.status}: {hint}; only {_words(CANCELLABLE)} ones can be cancelled",
        status=row.status,
    )


async def explain_resume(session: AsyncSession, id: UUID, from_checkpoint: UUID | None) -> OpsError:
    """Why `resume_if_ended` moved nothing."""
    row = (await session.execute(EXPLAIN, {"id": id, "checkpoint_id": from_checkpoint})).one_or_none()
    if row is None:
        return not_found(id)
    if row.status not in RESUMABLE:
        return OpsError(
            ErrorCode.NOT_RESUMABLE,
            f"operation is {row.status}; only {_words(RESUMABLE)} ones can be resumed",
            status=row.status,
        )
    if row.of_cancelled_study:
        message = (
            f"its study was cancelled: resume that (`ops resume {row.parent_id}`), which goes on with this one too"
        )
        return OpsError(ErrorCode.NOT_RESUMABLE, message, status=row.status, parent_id=str(row.parent_id))
    if not row.has_checkpoint:
        what = "this operation has no such checkpoint" if from_checkpoint else "this operation has no checkpoint"
        return OpsError(ErrorCode.NO_CHECKPOINT, f"{what}; submit it again to start over", status=row.status)
    return OpsError(
        ErrorCode.NOT_RESUMABLE,
        "this checkpoint is on a branch that a later resume left behind; choose one with in_lineage true",
        status=row.status,
    )


def not_found(id: UUID) -> OpsError:
    return OpsError(ErrorCode.NOT_FOUND, f"no operation {id}", operation_id=str(id))


def _words(statuses: frozenset[Status]) -> str:
    *others, last = sorted(statuses)
    return f"{', '.join(others)} and {last}"
