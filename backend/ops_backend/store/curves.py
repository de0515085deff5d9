"""Metrics along the lineage: whole in pages, drawn with few points, or what has come since a cursor."""

import re
from dataclasses import dataclass
from typing import Any, Self
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.lineage import lineage, starts_of
from ops_backend.store.sql import statement
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import MetricNames, MetricPoints, MetricSummary
from ops_contract.operations import LineageEntry

PAGE_POINTS = 50_000
LAST_STEP = 2**63 - 1

# One probe of the index a name, where DISTINCT reads every row; of the rows of a name only the first and the last.
SUMMARIES = statement("""
    WITH RECURSIVE names AS (
        (SELECT name FROM metrics WHERE operation_id = :id ORDER BY name LIMIT 1)
        UNION ALL
        SELECT (SELECT m.name FROM metrics m WHERE m.operation_id = :id AND m.name > names.name ORDER BY m.name LIMIT 1)
          FROM names WHERE names.name IS NOT NULL
    )
    SELECT names.name, first.step AS first_step, first.value AS first_value, last.step AS last_step,
           last.value AS last_value
      FROM names
      LEFT JOIN LATERAL (
        SELECT m.first_step AS step, m.values[1] AS value FROM metrics m
         WHERE m.operation_id = :id AND m.name = names.name AND m.first_step <= (:last_steps)[m.attempt]
         ORDER BY m.attempt, m.first_step LIMIT 1
      ) first ON true
      LEFT JOIN LATERAL (
        SELECT m.steps[c.upto] AS step, m.values[c.upto] AS value
          FROM metrics m CROSS JOIN LATERAL (SELECT width_bucket((:last_steps)[m.attempt], m.steps) AS upto) c
         WHERE m.operation_id = :id AND m.name = names.name AND m.first_step <= (:last_steps)[m.attempt]
         ORDER BY m.attempt DESC, m.first_step DESC LIMIT 1
      ) last ON true
     WHERE names.name IS NOT NULL ORDER BY names.name
""")

# The rows after the cursor, and which part of them counts: attempts are numbered from 1, so `last_steps` is read by
# number, and an attempt newer than the lineage has none. Steps rise within a row, so `width_bucket` searches by halves;
# OFFSET keeps it from being done anew, with the row's array unpacked, wherever it is used.
_COUNTED = """
    counted AS NOT MATERIALIZED (
        SELECT m.attempt, m.seq, m.steps, m.values, c.skipped, c.upto
          FROM metrics m
         CROSS JOIN LATERAL (SELECT width_bucket(:after_step, m.steps) AS skipped,
                                    width_bucket(least((:last_steps)[m.attempt], :until_step), m.steps) AS upto
                             OFFSET 0) c
         WHERE m.operation_id = :id AND m.name = :name AND (m.attempt, m.seq) > (:attempt, :seq)
           AND m.first_step <= least((:last_steps)[m.attempt], :until_step) AND c.skipped < c.upto
    )"""

# Which rows make a page is decided without their values, most of which stay where they are.
PAGE = statement(f"""
    WITH {_COUNTED}, sized AS (
        SELECT attempt, seq, skipped, upto, upto - skipped AS size,
               sum(upto - skipped) OVER (ORDER BY attempt, seq) AS until, sum(upto - skipped) OVER () AS points
          FROM counted
    )
    SELECT s.attempt, s.seq, m.steps[s.skipped + 1 : s.upto] AS steps, m.values[s.skipped + 1 : s.upto] AS values,
           s.until < s.points AS more
      FROM sized s JOIN metrics m USING (attempt, seq)
     WHERE s.until - s.size < :page_points AND m.operation_id = :id AND m.name = :name ORDER BY s.attempt, s.seq
""")

# A bucket gives its lowest and highest point and its first NaN, which Postgres holds for higher than Infinity; arrays
# compare by their first element, then by the second: of equal values the first counts. Steps are in them as float64,
# from the first one on, exact up to 2^53. Two points are for the ends.
FEW = statement(f"""
    WITH {_COUNTED}, cut AS MATERIALIZED (
        SELECT *, steps[skipped + 1] AS first, steps[upto] AS last FROM counted
    ), bounds AS MATERIALIZED (
        SELECT min(first) AS first, max(last) AS last, sum(upto - skipped) AS points, max(ARRAY[attempt, seq]) AS newest
          FROM cut
    ), points AS NOT MATERIALIZED (
        SELECT unnest(steps[skipped + 1 : upto]) AS step, unnest(values[skipped + 1 : upto]) AS value FROM cut
    ), offsets AS NOT MATERIALIZED (
        SELECT step - (SELECT first FROM bounds) AS since, value FROM points
         WHERE (SELECT points FROM bounds) > :max_points
    ), buckets AS (
        SELECT min(ARRAY[value, since]) FILTER (WHERE value <> 'NaN') AS low,
               max(ARRAY[value, -since]) FILTER (WHERE value <> 'NaN') AS high,
               min(since) FILTER (WHERE value = 'NaN') AS nan
          FROM offsets GROUP BY since / (SELECT (last - first) / ((:max_points - 2) / 3) + 1 FROM bounds)
    ), kept AS (
        SELECT step, value FROM points WHERE (SELECT points FROM bounds) <= :max_points
         UNION SELECT first, values[skipped + 1] FROM cut WHERE first = (SELECT first FROM bounds)
         UNION SELECT last, values[upto] FROM cut WHERE last = (SELECT last FROM bounds)
         UNION SELECT first + CAST(low[2] AS bigint), low[1] FROM buckets, bounds WHERE low IS NOT NULL
         UNION SELECT first - CAST(high[2] AS bigint), high[1] FROM buckets, bounds WHERE high IS NOT NULL
         UNION SELECT first + nan, 'NaN' FROM buckets, bounds WHERE nan IS NOT NULL
    )
    SELECT kept.step, kept.value, newest FROM kept, bounds ORDER BY step
""")


@dataclass(frozen=True)
class Cursor:
    """How far a reader is: the row that it had last, and the newest attempt that it was told of, with its start."""

    attempt: int = 0
    seq: int = 0
    newest: int = 0
    start_step: int = 0

    @classmethod
    def read(cls, text: str | None) -> Self:
        """Raises 422 for one that is not of ours."""
        if text is None:
            return cls()
        if found := re.fullmatch(r"(\d{1,9})\.(-?\d{1,18})\.(\d{1,9})\.(\d{1,19})", text, re.ASCII):
            return cls(*map(int, found.groups()))
        raise _not_ours()

    def __str__(self) -> str:
        return f"{self.attempt}.{self.seq}.{self.newest}.{self.start_step}"


async def names(session: AsyncSession, id: UUID) -> MetricNames:
    """Raises 404."""
    values = {"id": id, "last_steps": _last_steps(lineage(await starts_of(session, id)))}
    rows = (await session.execute(SUMMARIES, values)).all()
    summaries = [
        MetricSummary(name=r.name)
        if r.last_step is None
        else MetricSummary(name=r.name, first=(r.first_step, r.first_value), last=(r.last_step, r.last_value))
        for r in rows
    ]
    return MetricNames(names=[row.name for row in rows], metrics=summaries)


async def read(
    session: AsyncSession,
    id: UUID,
    name: str,
    after_step: int = -1,
    max_points: int | None = None,
    cursor: str | None = None,
    until_step: int = LAST_STEP,
) -> MetricPoints:
    """What counts of a metric: each attempt's points from its start until a later one starts.

    Raises 404, 422 for a cursor that is none of this operation, or a part of a curve that is not drawn.
    """
    is_part = until_step != LAST_STEP
    if is_part and (max_points is None or cursor is not None):
        raise OpsError(ErrorCode.INVALID, "until_step: goes with max_points, and with no cursor")
    starts = await starts_of(session, id)
    had, replaces_from = _since(Cursor.read(cursor), starts)
    entries = lineage(starts)
    wanted = {"id": id, "name": name, "after_step": after_step, "last_steps": _last_steps(entries)}
    wanted |= {"attempt": had.attempt, "seq": had.seq, "until_step": until_step}
    if max_points is None:
        points, last, more = await _page(session, wanted)
    else:
        points, last = await _few(session, wanted | {"max_points": max_points})
        more = False
    if is_part:
        last = None  # a row may have points after it: whoever goes on from here begins anew
    reached = Cursor(*(last or (had.attempt, had.seq)), len(starts), starts[-1] if starts else 0)
    return MetricPoints(
        name=name,
        points=points,
        attempt_starts=[(e.start_step, e.attempt) for e in entries if e.end_step is None or e.start_step < e.end_step],
        more=more,
        cursor=str(reached),
        replaces_from=replaces_from,
    )


def _since(cursor: Cursor, starts: list[int]) -> tuple[Cursor, int | None]:
    """Where to go on, and from which step on the reader has to forget what it has."""
    if not cursor.newest:
        return Cursor(), None
    if cursor.newest > len(starts):
        raise _not_ours()
    if starts[cursor.newest - 1] != cursor.start_step:
        # A command says where it began only after its attempt did: points that did not count may do so now.
        return Cursor(), 0
    return cursor, min(starts[cursor.newest :], default=None)


def _last_steps(entries: list[LineageEntry]) -> list[int]:
    """The last step that counts, by attempt."""
    return [LAST_STEP if entry.end_step is None else entry.end_step - 1 for entry in entries]


async def _page(
    session: AsyncSession, wanted: dict[str, Any]
) -> tuple[list[tuple[int, float]], tuple[int, int] | None, bool]:
    """Whole rows, about PAGE_POINTS points of them; attempt and seq of the last; whether there are more."""
    rows = (await session.execute(PAGE, wanted | {"page_points": PAGE_POINTS})).all()
    points = [point for row in rows for point in zip(row.steps, row.values, strict=True)]
    return (points, (rows[-1].attempt, rows[-1].seq), rows[-1].more) if rows else ([], None, False)


async def _few(session: AsyncSession, wanted: dict[str, Any]) -> tuple[list[tuple[int, float]], tuple[int, int] | None]:
    """At most `max_points` points, which the database picks; attempt and seq of the newest row."""
    rows = (await session.execute(FEW, wanted)).all()
    return [(row.step, row.value) for row in rows], tuple(rows[0].newest) if rows else None


def _not_ours() -> OpsError:
    return OpsError(ErrorCode.INVALID, "cursor: not one that this operation's metrics gave; start without it")
