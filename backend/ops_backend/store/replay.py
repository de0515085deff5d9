"""The replay check: what an attempt reports of a step is compared, bit for bit, with what was reported of it before."""

import struct
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import plain, record, statement
from ops_contract.history import Difference, ReplayCheck
from ops_contract.reports import Series

# Whose reports an attempt's are compared with: its predecessors', or, in a replay, those of the run that it replays.
BEFORE = """
    operations o JOIN holds h ON h.operation_id = coalesce(o.replay_of, o.id)
                             AND (o.replay_of IS NOT NULL OR h.attempt < :attempt)
    WHERE o.id = :id"""

# An attempt's rows of a metric follow one another: of those that begin at the first wanted step or before it, only the
# last can reach it. The attempts come in their order, so that the newest that reported a step is what counts.
REPORTED = statement(f"""
    SELECT wanted.n - 1 AS n, m.attempt, m.steps, m.values
      FROM unnest(:names, :first_steps, :last_steps) WITH ORDINALITY AS wanted (name, first_step, last_step, n)
     CROSS JOIN LATERAL (
        SELECT h.operation_id, h.attempt FROM {BEFORE}
           AND h.first_step <= wanted.last_step AND h.last_step >= wanted.first_step
     ) earlier
      JOIN metrics m
        ON m.operation_id = earlier.operation_id AND m.name = wanted.name AND m.attempt = earlier.attempt
       AND m.first_step <= wanted.last_step
       AND m.first_step >= coalesce((
               SELECT max(reaching.first_step) FROM metrics reaching
                WHERE reaching.operation_id = earlier.operation_id AND reaching.name = wanted.name
                  AND reaching.attempt = earlier.attempt AND reaching.first_step <= wanted.first_step), 0)
     ORDER BY m.attempt
""")

LOCK = statement("""
    SELECT replay FROM attempts WHERE operation_id = :id AND number = :attempt FOR NO KEY UPDATE
""")

RECORD = statement("UPDATE attempts SET replay = :replay WHERE operation_id = :id AND number = :attempt")

# What an attempt's environment says that decides no bit.
_FOR_PEOPLE = "'{python,executable,platform,host,cores}'::text[]"

# Its guard is what it takes away, the promise: so there is one such event an attempt. The promise is to the run whose
# checkpoint was restored; a value may have come from another attempt, on other hardware or of other code.
DIVERGE = statement(f"""
    WITH broken AS (
        UPDATE attempts a
           SET exactness = jsonb_build_object(
                   'promise', 'best_effort', 'reasons', a.exactness->'reasons' || to_jsonb(CAST(:reason AS text)))
          FROM operations o
          JOIN attempts earlier ON earlier.operation_id = coalesce(o.replay_of, o.id)
                               AND earlier.number = :earlier_attempt
         WHERE o.id = :id AND a.operation_id = :id AND a.number = :attempt AND a.exactness->>'promise' = 'promised'
           AND a.environment - {_FOR_PEOPLE} = earlier.environment - {_FOR_PEOPLE}
        RETURNING a.operation_id
    ), moved AS (
        UPDATE operations o SET event_seq = event_seq + 1
          FROM broken WHERE o.id = broken.operation_id AND o.attempt = :attempt
        RETURNING o.id, o.event_seq, o.attempt, o.status AS from_status, o.status
    )
    {record("'replay_diverged'")}
""")


async def compare(session: AsyncSession, id: UUID, attempt: int, reported: Sequence[Series]) -> None:
    """Add what is reported again to the attempt's record; the first difference breaks its promise of exactness."""
    check = _compared(reported, await _reported_before(session, id, attempt, reported))
    if not check.compared:
        return
    key = {"id": id, "attempt": attempt}
    recorded = await session.scalar(LOCK, key)
    whole = ReplayCheck.model_validate(recorded or {}) + check
    await session.execute(RECORD, key | {"replay": plain(whole)})
    if first := check.first_difference:
        # As text: jsonb knows no sign of a zero.
        detail = plain(first) | {"was": repr(first.was), "now": repr(first.now)}
        reason = f"replay diverged at step {first.step}: {first.name} was {first.was!r} and is {first.now!r}"
        values = {"detail": detail, "reason": reason, "earlier_attempt": first.earlier_attempt}
        await session.execute(DIVERGE, key | values)


async def _reported_before(
    session: AsyncSession, id: UUID, attempt: int, reported: Sequence[Series]
) -> list[dict[int, tuple[float, int]]]:
    """For each series the value of each step that has one already, and the attempt that reported it."""
    values = {
        "id": id,
        "attempt": attempt,
        "names": [series.name for series in reported],
        "first_steps": [series.steps[0] for series in reported],
        "last_steps": [series.steps[-1] for series in reported],
    }
    found: list[dict[int, tuple[float, int]]] = [{} for _ in reported]
    for row in await session.execute(REPORTED, values):
        found[row.n].update((s, (value, row.attempt)) for s, value in zip(row.steps, row.values, strict=True))
    return found


def _compared(reported: Sequence[Series], before: Sequence[dict[int, tuple[float, int]]]) -> ReplayCheck:
    pairs = [
        (series.name, step, now, *known[step])
        for series, known in zip(reported, before, strict=True)
        for step, now in zip(series.steps, series.floats(), strict=True)
        if step in known
    ]
    different = [_difference(*pair) for pair in pairs if _bits(pair[2]) != _bits(pair[3])]
    checks = [
        ReplayCheck(differing=1, first_difference=d, largest_difference=abs(d.was - d.now))
        for d in sorted(different, key=lambda d: d.step)
    ]
    return sum(checks, ReplayCheck(compared=len(pairs)))


def _difference(name: str, step: int, now: float, was: float, earlier_attempt: int) -> Difference:
    return Difference(
        name=name,
        step=step,
        earlier_attempt=earlier_attempt,
        was=was,
        now=now,
        was_bits=_bits(was),
        now_bits=_bits(now),
    )


def _bits(value: float) -> str:
    return struct.pack(">d", value).hex()
