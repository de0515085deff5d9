"""What a scrape reads: a constant number of statements, none of which looks at what has ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import IS_LIVE, PENDING_SINCE, statement
from ops_contract.operations import LiveCounts

# By partial indexes of the queue, live holds and studies: operations that have ended may be millions.
OPERATIONS = statement(f"""
    SELECT count(*) FILTER (WHERE status = 'pending') AS pending,
           count(*) FILTER (WHERE status = 'running') AS running,
           count(*) FILTER (WHERE status = 'waiting') AS waiting,
           count(*) FILTER (WHERE status = 'cancelling') AS cancelling,
           coalesce(max(due_s), 0)::float8 AS queue_oldest_s
      FROM (SELECT o.status, CASE WHEN coalesce(o.not_before <= now(), true)
                                  THEN extract(epoch FROM now() - greatest(o.not_before, {PENDING_SINCE})) END AS due_s
              FROM operations o
             WHERE o.status = 'pending'
            UNION ALL
            SELECT status, NULL FROM operations
             WHERE id IN (SELECT operation_id FROM holds WHERE ended_at IS NULL)
            UNION ALL
            SELECT status, NULL FROM operations o
             WHERE kind = 'study' AND status IN ('waiting', 'cancelling')
               AND NOT EXISTS (SELECT FROM holds h WHERE h.operation_id = o.id AND h.ended_at IS NULL)) live
""")

# By name: a worker that has been started again is the same one to who watches it, and two of a name are one series.
WORKERS = statement(f"""
    SELECT name, bool_or(live) AS live, coalesce(bool_and(going) FILTER (WHERE live), false) AS draining,
           extract(epoch FROM now() - max(last_seen_at))::float8 AS last_seen_s
      FROM (SELECT name, last_seen_at, draining OR drain IS NOT NULL AS going,
                   {IS_LIVE} AS live
              FROM workers w WHERE last_seen_at > now() - interval '1 hour') seen
     GROUP BY name ORDER BY name
""")

SLOTS = statement(f"""
    SELECT w.name, s.device, s.device_uuid, count(h.operation_id) AS busy, count(*) - count(h.operation_id) AS free
      FROM workers w
      JOIN slots s USING (incarnation)
      LEFT JOIN holds h ON h.operation_id = s.operation_id AND h.attempt = s.attempt
                       AND h.incarnation = s.incarnation AND h.ended_at IS NULL
     WHERE {IS_LIVE}
     GROUP BY w.name, s.device, s.device_uuid ORDER BY w.name, s.device, s.device_uuid
""")

# Of two workers of a name that tell of the same GPU, what the last said.
DEVICES = statement(f"""
    SELECT DISTINCT ON (w.name, d.device) w.name, d.*
      FROM workers w, jsonb_to_recordset(w.devices) AS d (
           device text, power_w float8, power_limit_w float8, temperature_c float8, utilization_percent float8,
           memory_used_bytes bigint, memory_total_bytes bigint, throttle jsonb)
     WHERE {IS_LIVE}
     ORDER BY w.name, d.device, w.last_seen_at DESC
""")


@dataclass(frozen=True)
class Gauges:
    """`workers`: name, live, draining, last_seen_s. `slots` of the live ones: name, device, device_uuid, busy, free.

    `devices`: GPUs of the live ones as their last heartbeat told them (`DeviceNow`); null is what they do not say.
    """

    operations: dict[str, int]
    queue_oldest_s: float
    workers: Sequence[Row[Any]]
    slots: Sequence[Row[Any]]
    devices: Sequence[Row[Any]]


async def counts(session: AsyncSession) -> LiveCounts:
    live = (await session.execute(OPERATIONS)).one()
    return LiveCounts(pending=live.pending, running=live.running, waiting=live.waiting, cancelling=live.cancelling)


async def read(session: AsyncSession, lease_s: float) -> Gauges:
    """Of one moment for each statement."""
    live = (await session.execute(OPERATIONS)).one()
    return Gauges(
        operations={status: getattr(live, status) for status in LiveCounts.model_fields},
        queue_oldest_s=max(0.0, live.queue_oldest_s),  # the clock may have been set back
        workers=(await session.execute(WORKERS, {"lease_s": lease_s})).all(),
        slots=(await session.execute(SLOTS, {"lease_s": lease_s})).all(),
        devices=(await session.execute(DEVICES, {"lease_s": lease_s})).all(),
    )
