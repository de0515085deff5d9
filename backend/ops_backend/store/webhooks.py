"""Webhooks and their deliveries. The events are the outbox: an end that is not announced yet becomes deliveries.

At least once: a try that nobody recorded the answer of is made again.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.children import COUNTS
from ops_backend.store.queries import events, summary
from ops_backend.store.sql import statement
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import EventView
from ops_contract.operations import OperationSummary
from ops_contract.webhooks import (
    Deliveries,
    DeliveryState,
    DeliveryView,
    WebhookAnswer,
    WebhookCreated,
    WebhookFormat,
    WebhookRequest,
    Webhooks,
    WebhookView,
)

ANNOUNCED_AT_ONCE = 100
KEPT = 1000
SHOWN = 100
GONE = 410

ADD = statement("""
    INSERT INTO webhooks (id, url, format, statuses, label, description, secret)
    VALUES (:id, :url, :format, :names, :label, :description, :secret)
    ON CONFLICT (url, format, statuses, label) DO NOTHING RETURNING id
""")

FIND_EQUAL = statement("""
    SELECT id FROM webhooks WHERE (url, format, statuses, label) = (:url, :format, :names, :label)
""")

REMOVE = statement("DELETE FROM webhooks WHERE id = :id RETURNING id")

FIND = statement("SELECT id, url, format, secret FROM webhooks WHERE id = :id")

LIST = statement("""
    SELECT w.id, w.url, w.format, w.statuses, nullif(w.label, '') AS label, w.description, w.created_at, w.stopped_at,
           count(d.id) FILTER (WHERE d.state <> 'delivered' AND d.tries > 0) AS failures,
           min(d.next_try_at) AS next_try_at,
           (array_agg(d.id ORDER BY d.last_try_at DESC) FILTER (WHERE d.tries > 0))[1] AS last_id
      FROM webhooks w LEFT JOIN deliveries d ON d.webhook_id = w.id
     GROUP BY w.id ORDER BY w.created_at, w.id
""")

DELIVERIES = statement(f"""
    SELECT d.id, d.operation_id, e.to_status AS status, d.state, d.tries, d.created_at, d.last_try_at, d.next_try_at,
           d.http_status, d.answer
      FROM deliveries d JOIN events e ON e.operation_id = d.operation_id AND e.seq = d.event_seq
     WHERE d.webhook_id = :webhook_id OR d.id = ANY (:ids)
     ORDER BY d.created_at DESC, d.id DESC LIMIT {SHOWN} + cardinality(:ids)
""")

# Marked and told in one statement, each event by one backend. A webhook that is being removed is waited for.
ANNOUNCE = statement(f"""
    WITH due AS MATERIALIZED (
        SELECT operation_id, seq FROM events
         WHERE NOT announced AND from_status <> to_status AND to_status IN ('completed', 'failed', 'cancelled')
         ORDER BY at LIMIT {ANNOUNCED_AT_ONCE} FOR NO KEY UPDATE SKIP LOCKED
    ), announced AS (
        UPDATE events e SET announced = true FROM due
         WHERE e.operation_id = due.operation_id AND e.seq = due.seq
        RETURNING e.operation_id, e.seq, e.to_status
    ), listening AS MATERIALIZED (
        SELECT id, statuses, split_part(label, '=', 1) AS key, substr(label, strpos(label || '=', '=') + 1) AS value
          FROM webhooks WHERE stopped_at IS NULL FOR KEY SHARE
    ), told AS (
        INSERT INTO deliveries (id, webhook_id, operation_id, event_seq)
        SELECT gen_random_uuid(), w.id, a.operation_id, a.seq
          FROM announced a
          JOIN operations o ON o.id = a.operation_id
          JOIN listening w ON a.to_status = ANY (w.statuses)
           AND CASE WHEN w.key = '' THEN true WHEN w.value = '' THEN o.labels ? w.key
                    ELSE o.labels->>w.key = w.value END
        RETURNING webhook_id
    )
    SELECT (SELECT count(*) FROM announced) AS events, ARRAY(SELECT DISTINCT webhook_id FROM told) AS webhooks
""")

PRUNE = statement(f"""
    DELETE FROM deliveries d
     USING (SELECT id, row_number() OVER (PARTITION BY webhook_id ORDER BY created_at DESC, id DESC) AS nth
              FROM deliveries WHERE webhook_id = ANY (:ids)) counted
     WHERE d.id = counted.id AND counted.nth > {KEPT} AND d.state <> 'due'
""")

# The next try is set before this one: should nobody live to record an answer, it is made again.
CLAIM = statement("""
    UPDATE deliveries d SET tries = d.tries + 1, last_try_at = now(),
                            next_try_at = now() + make_interval(secs => :claim_s)
      FROM webhooks w
     WHERE w.id = d.webhook_id AND d.id = (
        SELECT x.id FROM deliveries x
         WHERE x.state = 'due' AND x.next_try_at <= now() AND x.webhook_id <> ALL (:ids)
         ORDER BY x.next_try_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
    RETURNING d.id, d.webhook_id, d.operation_id, d.event_seq, d.tries, d.last_try_at, w.url, w.format, w.secret
""")

# As it was at that end: a resume that came since has cleared error and end of the operation's own row.
ENDED = statement(f"""
    SELECT o.id, o.name, o.kind, o.workload, o.labels, o.submitted_by, o.priority, o.created_at, o.started_at,
           e.to_status AS status, e.at AS ended_at, e.attempt, a.start_step,
           told.attempt AS told_attempt, told.progress, o.parent_id, {COUNTS} AS children,
           CASE WHEN e.to_status = 'completed' THEN NULL WHEN o.ended_at = e.at THEN o.error ELSE a.error END AS error
      FROM events e
      JOIN operations o ON o.id = e.operation_id
      LEFT JOIN attempts a ON a.operation_id = e.operation_id AND a.number = e.attempt
      LEFT JOIN LATERAL (
        SELECT h.attempt, h.progress FROM holds h
         WHERE h.operation_id = e.operation_id AND h.attempt <= e.attempt AND h.progress IS NOT NULL
         ORDER BY h.attempt DESC, h.first_rank LIMIT 1) told ON true
     WHERE e.operation_id = :id AND e.seq = :seq
""")

RECORD = statement("""
    UPDATE deliveries SET state = :state, http_status = :http_status, answer = :answer,
           next_try_at = CASE WHEN :state = 'due' THEN now() + make_interval(secs => :retry_in_s) END
     WHERE id = :id AND tries = :tries AND state = 'due'
    RETURNING state
""")

# The webhook before its deliveries, as a removal locks them.
STOP = statement("UPDATE webhooks SET stopped_at = now() WHERE id = :id AND stopped_at IS NULL")

GIVE_UP = statement("""
    UPDATE deliveries SET state = 'given_up', next_try_at = NULL,
           answer = CASE WHEN answer = '' THEN 'not sent: its receiver is gone' ELSE answer END
     WHERE webhook_id = :id AND state = 'due'
""")


@dataclass(frozen=True)
class Hook:
    """Where and how one is sent."""

    id: UUID
    url: str
    format: WebhookFormat
    secret: str


@dataclass(frozen=True)
class Due:
    """A delivery that this backend sends now, as its `tries`-th try at `at`."""

    id: UUID
    hook: Hook
    tries: int
    at: datetime
    operation_id: UUID
    event_seq: int


async def add(session: AsyncSession, wish: WebhookRequest, secret: str) -> WebhookCreated:
    """Raises 409 naming the one that is the same."""
    same = {"url": str(wish.url), "format": wish.format, "names": sorted(wish.statuses), "label": wish.label or ""}
    values = same | {"id": uuid4(), "description": wish.description, "secret": secret}
    id = await session.scalar(ADD, values)
    if id is None:
        first = await session.scalar(FIND_EQUAL, same)
        message = f"webhook {first} is the same; for a new secret remove it first: ops webhooks remove {first}"
        raise OpsError(ErrorCode.WEBHOOK_EXISTS, message, id=str(first))
    return WebhookCreated(id=id, secret=secret)


async def remove(session: AsyncSession, id: UUID) -> None:
    """With its deliveries, those still due too. Raises 404."""
    if await session.scalar(REMOVE, {"id": id}) is None:
        raise _unknown(id)


async def find(session: AsyncSession, id: UUID) -> Hook:
    """Raises 404."""
    row = (await session.execute(FIND, {"id": id})).one_or_none()
    if row is None:
        raise _unknown(id)
    return Hook(row.id, row.url, WebhookFormat(row.format), row.secret)


async def list_all(session: AsyncSession) -> Webhooks:
    rows = (await session.execute(LIST)).mappings().all()
    ids = [row["last_id"] for row in rows if row["last_id"]]
    last = {row.id: _view(row) for row in await session.execute(DELIVERIES, {"webhook_id": None, "ids": ids})}
    fields = WebhookView.model_fields.keys() - {"last"}
    return Webhooks(items=[WebhookView(**{f: row[f] for f in fields}, last=last.get(row["last_id"])) for row in rows])


async def deliveries(session: AsyncSession, id: UUID) -> Deliveries:
    """The newest. Raises 404."""
    await find(session, id)
    return Deliveries(items=[_view(row) for row in await session.execute(DELIVERIES, {"webhook_id": id, "ids": []})])


async def announce(session: AsyncSession) -> bool:
    """Make deliveries of ends that have none yet; whether there may be more."""
    row = (await session.execute(ANNOUNCE)).one()
    if row.webhooks:
        await session.execute(PRUNE, {"ids": row.webhooks})
    return bool(row.events == ANNOUNCED_AT_ONCE)


async def claim_due(session: AsyncSession, claim_s: float, but: list[UUID]) -> Due | None:
    """One whose time has come, to be sent and recorded within `claim_s`; none of the webhooks `but`."""
    row = (await session.execute(CLAIM, {"claim_s": claim_s, "ids": but})).one_or_none()
    if row is None:
        return None
    hook = Hook(row.webhook_id, row.url, WebhookFormat(row.format), row.secret)
    return Due(row.id, hook, row.tries, row.last_try_at, row.operation_id, row.event_seq)


async def ended(session: AsyncSession, due: Due) -> tuple[OperationSummary, EventView]:
    """What there is to tell. Raises 404 when it has been deleted since."""
    [event, *_] = (await events(session, due.operation_id, due.event_seq - 1)).items
    row = (await session.execute(ENDED, {"id": due.operation_id, "seq": due.event_seq})).one()
    return OperationSummary(**summary(row)), event


async def record(
    session: AsyncSession, due: Due, answer: WebhookAnswer, retry_in_s: float | None
) -> DeliveryState | None:
    """What became of it; None when it was removed, or another try has begun since. 410 ends the webhook itself."""
    gone = answer.http_status == GONE
    state = DeliveryState.GIVEN_UP if gone or retry_in_s is None else DeliveryState.DUE
    values = {"id": due.id, "tries": due.tries, "http_status": answer.http_status, "answer": answer.answer}
    values |= {"state": DeliveryState.DELIVERED if answer.delivered else state, "retry_in_s": retry_in_s or 0.0}
    if gone:
        await session.execute(STOP, {"id": due.hook.id})
    recorded = await session.scalar(RECORD, values)
    if gone:
        await session.execute(GIVE_UP, {"id": due.hook.id})
    return DeliveryState(recorded) if recorded else None


def _view(row: Row[Any]) -> DeliveryView:
    return DeliveryView(**row._mapping)


def _unknown(id: UUID) -> OpsError:
    return OpsError(ErrorCode.NOT_FOUND, f"no webhook {id}; see `ops webhooks list`")
