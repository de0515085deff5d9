"""Windows of energy: counted once each, and read as sums. What they mean is `ops_backend.store.ledger`'s."""

import base64
import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.ledger import LIVE, MICRO, UNMEASURED, joules, of_attempt
from ops_backend.store.ledger_views import EPOCHS, Account, Rates, whole
from ops_backend.store.lineage import starts_of
from ops_backend.store.paging import not_a_cursor
from ops_backend.store.sql import statement
from ops_backend.store.transitions import not_found
from ops_contract.energy import EnergyBatch, EnergyWindow
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.ledger import BookedWindow, EnergyLedger, EnergyWindows, Shares

_SUMMED = ("windows", "unknown", "without_error", "energy_uj", "error_uj", "duration_us", "steps", "units")
_KEY = ("attempt", "incarnation", "device", "source", "quality", "use")
_WINDOW_KEY = ", ".join(f"w.{column}" for column in _KEY)
# Of windows `w`: the columns of `_SUMMED`, in their order, and why some are unknown.
_SUMS = """count(*) AS windows, count(*) - count(w.energy_uj) AS unknown,
           count(w.energy_uj) - count(w.error_uj) AS without_error, coalesce(sum(w.energy_uj), 0)::bigint AS energy_uj,
           coalesce(sum(w.error_uj), 0)::bigint AS error_uj, sum(w.duration_us)::bigint AS duration_us,
           sum(w.until_step - w.first_step)::bigint AS steps, sum(w.units)::bigint AS units, min(w.reason) AS reason"""

# The operation is locked first, as a deletion does: either it finds these windows, or they find no hold any more.
# The hold may have ended: a fenced attempt changes only its own joules. Of the same batch twice at once the second
# waits where the first inserts, inserts nothing, and moves no sum. In one order, so that two batches do not deadlock.
BOOK = statement(f"""
    WITH hold AS MATERIALIZED (
        SELECT w.name FROM operations o
          JOIN holds h ON h.operation_id = o.id AND h.attempt = :attempt AND h.incarnation = :incarnation
          JOIN workers w ON w.incarnation = h.incarnation
         WHERE o.id = :id FOR KEY SHARE OF o
    ), fresh AS (
        INSERT INTO energy_windows (operation_id, attempt, incarnation, device, index, source, quality, use, epoch,
                                    first_step, until_step, units, duration_us, energy_uj, error_uj, reason,
                                    baseline_w, state)
        SELECT :id, :attempt, :incarnation, x.*
          FROM hold, jsonb_to_recordset(:windows) AS x (
               device text, index bigint, source text, quality text, use text, epoch bigint, first_step bigint,
               until_step bigint, units bigint, duration_us bigint, energy_uj bigint, error_uj bigint, reason text,
               baseline_w float8, state jsonb)
         ORDER BY x.device, x.index
        ON CONFLICT DO NOTHING
        RETURNING *
    ), totals AS MATERIALIZED (
        SELECT device, source, quality, use, {_SUMS} FROM fresh w
         GROUP BY device, source, quality, use ORDER BY device, source, quality, use
    ), summed AS (
        INSERT INTO energy_sums AS s (operation_id, attempt, incarnation, device, source, quality, use,
                                      {", ".join(_SUMMED)}, reason)
        SELECT :id, :attempt, :incarnation, * FROM totals
        ON CONFLICT (operation_id, {", ".join(_KEY)}) DO UPDATE
           SET {", ".join(f"{column} = s.{column} + excluded.{column}" for column in _SUMMED)},
               reason = least(s.reason, excluded.reason)
    )
    SELECT hold.name AS worker, totals.device, totals.quality, totals.use, totals.energy_uj
      FROM hold LEFT JOIN totals ON true
""")

# Of operation `o`: of each attempt the step from which on a later one does again what it did.
_CUTS = """
    SELECT number AS attempt, min(start_step) OVER later AS evaluate_cut,
           min(start_step + starts_at_evaluation::int) OVER later AS train_cut
      FROM attempts WHERE operation_id = o.id
    WINDOW later AS (ORDER BY number ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING)"""

# How many of the steps of window `w` a later attempt did again (`cuts`), and of how many.
_AGAIN = """
    CROSS JOIN LATERAL (SELECT CASE w.use WHEN 'train' THEN cuts.train_cut WHEN 'evaluate' THEN cuts.evaluate_cut
                               END AS step) cut
    CROSS JOIN LATERAL (SELECT CASE WHEN w.until_step <= cut.step OR cut.step IS NULL THEN 0
                                    WHEN w.first_step >= cut.step THEN 1 ELSE w.until_step - cut.step END AS again,
                               CASE WHEN w.first_step < cut.step AND cut.step < w.until_step
                                    THEN w.until_step - w.first_step ELSE 1 END AS whole) part"""


def _share(column: str) -> str:
    """Of what a window has, what was done again; of one that a cut goes through by its steps."""
    return f"div(w.{column}::numeric * part.again, part.whole)"


# Of a window that a cut goes through nobody knows on which side its energy was used: the larger part may be wrong.
_LOST = f"""
    count(*) FILTER (WHERE part.again > 0) AS lost_windows,
    count(*) FILTER (WHERE part.again > 0 AND w.energy_uj IS NULL) AS lost_unknown,
    count(*) FILTER (WHERE part.again > 0 AND w.energy_uj IS NOT NULL AND w.error_uj IS NULL) AS lost_without_error,
    coalesce(sum({_share("energy_uj")}), 0)::bigint AS lost_energy_uj,
    coalesce(sum(w.error_uj) FILTER (WHERE part.again > 0 AND part.whole = 1), 0)::bigint AS lost_error_uj,
    coalesce(sum({_share("duration_us")}), 0)::bigint AS lost_duration_us,
    coalesce(sum(CASE WHEN part.again = 0 THEN 0 WHEN part.whole = 1 THEN w.until_step - w.first_step
                      ELSE part.again END), 0)::bigint AS lost_steps,
    coalesce(sum({_share("units")}), 0)::bigint AS lost_units,
    count(*) FILTER (WHERE part.whole > 1) AS split_windows,
    count(*) FILTER (WHERE part.whole > 1 AND w.energy_uj IS NULL) AS split_unknown,
    coalesce(sum(greatest({_share("energy_uj")}, w.energy_uj - {_share("energy_uj")}) + coalesce(w.error_uj, 0))
             FILTER (WHERE part.whole > 1), 0)::bigint AS split_error_uj"""

_AGAIN_COLUMNS = (*(f"lost_{column}" for column in _SUMMED), "split_windows", "split_unknown", "split_error_uj")


# What later attempts did again, of every row of sums. Nothing else of the windows is read: OFFSET 0 keeps the planner
# from joining by a hash of all of them.
_BEHIND = f"""
    SELECT {_WINDOW_KEY}, {_LOST}
      FROM ({_CUTS}) cuts
     CROSS JOIN LATERAL (
        SELECT * FROM energy_windows
         WHERE operation_id = o.id AND attempt = cuts.attempt AND use IN ('train', 'evaluate')
           AND until_step > cuts.evaluate_cut OFFSET 0) w
     {_AGAIN}
     WHERE part.again > 0
     GROUP BY {_WINDOW_KEY}"""


def entries(*by: str) -> str:
    """Of operation `o` a jsonb array, one for each of these columns of the key: the sums, and what was done again.

    `partly_shared`: of a device that was in the sums at other times of the same hold.
    """
    keys = ", ".join(by)
    return f"""
        (SELECT jsonb_agg(to_jsonb(entry) ORDER BY {keys}, partly_shared) FROM (
            SELECT {keys}, partly_shared, min(reason) AS reason,
                   {", ".join(f"coalesce(sum({column}), 0)::bigint AS {column}" for column in _SUMMED + _AGAIN_COLUMNS)}
              FROM (SELECT {", ".join(_KEY)}, reason, {", ".join(_SUMMED)},
                           quality = 'upper_bound' AND bool_or(quality IN ('measured', 'estimated'))
                               OVER (PARTITION BY attempt, incarnation, device) AS partly_shared
                      FROM energy_sums WHERE operation_id = o.id) summed
              LEFT JOIN ({_BEHIND}) behind USING ({", ".join(_KEY)})
             GROUP BY {keys}, partly_shared) entry)"""


# In the order of their numbers.
OUTCOMES = f"""
    (SELECT array_agg(CASE WHEN x.ended_at IS NULL THEN '{LIVE}' ELSE coalesce(x.outcome, '') END ORDER BY x.number)
       FROM attempts x WHERE x.operation_id = o.id)"""

ACCOUNT = statement(f"""
    SELECT o.status, {OUTCOMES} AS outcomes, {entries(*_KEY)} AS entries FROM operations o WHERE o.id = :id
""")

BY_ATTEMPT = statement(f"""
    SELECT {OUTCOMES} AS outcomes, {entries("attempt", "quality", "use")} AS entries
      FROM operations o WHERE o.id = :id
""")

# What the sums do not have is read from the windows themselves.
BY_EPOCH = statement(f"""
    SELECT w.epoch, w.attempt, w.incarnation, w.device, w.quality, w.use, {_SUMS}, {_LOST}
      FROM operations o, LATERAL ({_CUTS}) cuts
      JOIN energy_windows w USING (attempt)
     {_AGAIN}
     WHERE o.id = :id AND w.operation_id = o.id
       AND w.epoch > (SELECT max(epoch) FROM energy_windows WHERE operation_id = o.id) - {EPOCHS}
     GROUP BY w.epoch, w.attempt, w.incarnation, w.device, w.quality, w.use
     ORDER BY w.epoch, w.attempt
""")

BY_DEVICE = statement(f"""
    SELECT w.device, k.name AS worker, w.incarnation, w.source, w.quality, {_SUMS},
           sum(w.duration_us) FILTER (WHERE w.energy_uj IS NOT NULL)::bigint AS known_us,
           max((w.state->>'power_max_w')::float8) AS power_max_w, max(w.baseline_w) AS baseline_w,
           max((w.state->>'temperature_max_c')::float8) AS temperature_max_c,
           max((w.state->>'memory_used_max_bytes')::bigint) AS memory_used_max_bytes,
           (sum(round((w.state->>'sm_clock_mean_mhz')::numeric * w.duration_us))
            / nullif(sum(w.duration_us) FILTER (WHERE w.state->>'sm_clock_mean_mhz' IS NOT NULL), 0))::float8
             AS sm_clock_mean_mhz,
           (sum(round((w.state->>'utilization_mean_percent')::numeric * w.duration_us))
            / nullif(sum(w.duration_us) FILTER (WHERE w.state->>'utilization_mean_percent' IS NOT NULL), 0))::float8
             AS utilization_mean_percent,
           bool_or(jsonb_typeof(w.state) = 'object') AS has_state,
           sum(round(w.baseline_w * w.duration_us)) FILTER (WHERE w.energy_uj IS NOT NULL AND w.use <> 'unattributed')
             ::bigint AS baseline_uj,
           count(w.energy_uj) FILTER (WHERE w.baseline_w IS NULL AND w.use <> 'unattributed') AS without_baseline
      FROM energy_windows w JOIN workers k USING (incarnation)
     WHERE w.operation_id = :id
     GROUP BY w.device, k.name, w.incarnation, w.source, w.quality
     ORDER BY w.device, k.name, w.incarnation, w.source, w.quality
""")

# Windows of an index lie between the same two marks on every device of a hold: the longest tells for how long at least.
# Whole microseconds, so that the order in which they are added does not count.
THROTTLED = statement("""
    SELECT device, incarnation, source, quality, reason, sum(throttled_us)::bigint AS throttled_us,
           sum(longest_us) AS longest_us
      FROM (SELECT w.device, w.incarnation, w.source, w.quality, t.key AS reason,
                   round(t.value::numeric * 1000000) AS throttled_us,
                   CASE WHEN row_number() OVER each = 1 THEN round(t.value::numeric * 1000000) ELSE 0 END AS longest_us
              FROM energy_windows w, jsonb_each_text(w.state->'throttled_s') t
             WHERE w.operation_id = :id AND jsonb_typeof(w.state) = 'object'
            WINDOW each AS (PARTITION BY w.attempt, w.incarnation, w.index, t.key ORDER BY t.value::numeric DESC)
           ) slowed
     GROUP BY device, incarnation, source, quality, reason
     ORDER BY device, incarnation, source, quality, reason
""")

WINDOWS = statement(f"""
    SELECT w.*, {_share("energy_uj")}::bigint AS lost_uj
      FROM operations o, LATERAL ({_CUTS}) cuts
      JOIN energy_windows w USING (attempt)
     {_AGAIN}
     WHERE o.id = :id AND w.operation_id = o.id
       AND (w.attempt, w.incarnation, w.device, w.index) > (:attempt, :incarnation, :device, :index)
     ORDER BY w.attempt, w.incarnation, w.device, w.index
     LIMIT :limit
""")


@dataclass(frozen=True)
class Booked:
    """What a batch brought that was not there before, for who counts it; joules of what has any."""

    worker: str
    device: str
    quality: str
    use: str
    energy_j: float


async def book(session: AsyncSession, id: UUID, attempt: int, batch: EnergyBatch) -> list[Booked]:
    """Write the windows that are new. Raises 404 without such a hold; one that has ended books on."""
    values = {"id": id, "attempt": attempt, "incarnation": batch.incarnation}
    rows = (await session.execute(BOOK, values | {"windows": [_row(w) for w in batch.windows]})).all()
    if not rows:
        raise OpsError(ErrorCode.NOT_FOUND, "this worker has never held this attempt")
    return [Booked(r.worker, r.device, r.quality, r.use, r.energy_uj / MICRO) for r in rows if r.energy_uj]


async def ledger(session: AsyncSession, id: UUID, rates: Rates) -> EnergyLedger:
    """Raises 404."""
    found = (await session.execute(ACCOUNT, {"id": id})).one_or_none()
    if found is None:
        raise not_found(id)
    devices = (await session.execute(BY_DEVICE, {"id": id})).mappings().all()
    throttled = (await session.execute(THROTTLED, {"id": id})).all()
    epochs = (await session.execute(BY_EPOCH, {"id": id})).mappings().all()
    account = Account(id, found.status, found.outcomes or [], found.entries or [])
    return whole(account, devices, throttled, epochs, rates)


async def by_attempt(session: AsyncSession, id: UUID) -> list[Shares]:
    """Of each attempt, in their order. Raises 404."""
    found = (await session.execute(BY_ATTEMPT, {"id": id})).one_or_none()
    if found is None:
        raise not_found(id)
    entries, outcomes = found.entries or [], found.outcomes or []
    return [of_attempt(entries, number, outcome) for number, outcome in enumerate(outcomes, 1)]


async def windows(session: AsyncSession, id: UUID, limit: int, cursor: str | None) -> EnergyWindows:
    """A page of them. Raises 404, and 422 for a cursor that is not one of ours."""
    await starts_of(session, id)
    after = dict(zip(("attempt", "incarnation", "device", "index"), _read_cursor(cursor), strict=True))
    rows = (await session.execute(WINDOWS, after | {"id": id, "limit": limit + 1})).all()
    items = [_window(row) for row in rows[:limit]]
    return EnergyWindows(items=items, next_cursor=_cursor(rows[limit - 1]) if len(rows) > limit else None)


def _row(window: EnergyWindow) -> dict[str, Any]:
    plain = window.model_dump(mode="json", exclude={"duration_s", "energy_j", "error_j"})
    return plain | {
        "source": window.source or UNMEASURED,
        "quality": window.quality or UNMEASURED,
        "duration_us": round(window.duration_s * MICRO),
        "energy_uj": None if window.energy_j is None else round(window.energy_j * MICRO),
        "error_uj": None if window.error_j is None else round(window.error_j * MICRO),
    }


def _window(row: Row[Any]) -> BookedWindow:
    same = EnergyWindow.model_fields.keys() & row._mapping.keys()
    return BookedWindow(
        **{name: row._mapping[name] for name in same - {"source", "quality"}},
        source=None if row.source == UNMEASURED else row.source,
        quality=None if row.quality == UNMEASURED else row.quality,
        duration_s=row.duration_us / MICRO,
        energy_j=joules(row.energy_uj),
        error_j=joules(row.error_uj),
        attempt=row.attempt,
        worker_id=row.incarnation,
        lost_j=joules(row.lost_uj),
    )


def _cursor(row: Row[Any]) -> str:
    place = json.dumps([row.attempt, str(row.incarnation), row.device, row.index])
    return base64.urlsafe_b64encode(place.encode()).decode()


def _read_cursor(cursor: str | None) -> tuple[int, UUID, str, int]:
    if cursor is None:
        return 0, UUID(int=0), "", 0
    try:
        attempt, incarnation, device, index = json.loads(base64.urlsafe_b64decode(cursor))
        return int(attempt), UUID(incarnation), str(device), int(index)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):  # of base64, JSON, or the parts
        raise not_a_cursor() from None
