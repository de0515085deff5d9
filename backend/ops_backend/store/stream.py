"""What is new of operations since a position, as the messages of a stream.

Why no gap can appear: events of an operation are numbered under the lock of its row, and reports under that of their
hold, each kept until the commit; a later attempt begins only where the hold of the one before has ended. So whoever
sees a number sees all before it, whenever they look.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.queries import event_view
from ops_backend.store.sql import statement
from ops_contract.history import AttemptPoints, SeriesPoints
from ops_contract.wire import Wire

# Of one operation in one reading. A report is never cut, so one may be longer.
PAGE_SERIES = 200
PAGE_POINTS = 20_000
PAGE_EVENTS = 200


class Position(NamedTuple):
    """Up to where a reader has got everything: the events, and the reports (attempt, seq)."""

    event_seq: int
    attempt: int
    seq: int

    @property
    def report(self) -> tuple[int, int]:
        return self.attempt, self.seq

    def covers(self, other: "Position") -> bool:
        return self.event_seq >= other.event_seq and self.report >= other.report

    def __str__(self) -> str:
        return f"{self.event_seq}.{self.attempt}.{self.seq}"


class Mark(NamedTuple):
    """How far an operation is, and where its newest attempt begins; None while it has none."""

    position: Position
    start_step: int | None


class Wanted(NamedTuple):
    """All after `since` until `until.position`, which has been seen in the database."""

    id: UUID
    since: Mark
    until: Mark


class Message(NamedTuple):
    """`position` is the reader's once it has this."""

    position: Position
    event: str
    data: str


@dataclass(frozen=True)
class News:
    """`reached` is before the end where a page ends."""

    messages: list[Message]
    reached: Mark


# One snapshot, so that an event of an end is never ahead of the reports before it. Of a gang, its leader reports.
MARKS = statement("""
    SELECT o.id, o.event_seq, o.attempt, coalesce(h.last_seq, 0) AS seq, a.start_step
      FROM operations o
      LEFT JOIN attempts a ON a.operation_id = o.id AND a.number = o.attempt
      LEFT JOIN holds h ON h.operation_id = o.id AND h.attempt = o.attempt AND h.incarnation = a.incarnation
     WHERE o.id = ANY (:ids)
""")

STARTS = statement("""
    SELECT a.operation_id, a.number, a.start_step
      FROM unnest(:ids, :attempts, :until_attempts) AS w (id, since, until)
      JOIN attempts a ON a.operation_id = w.id AND a.number BETWEEN w.since AND w.until
     ORDER BY a.operation_id, a.number
""")

# In the order of the primary key. `fetched` tells of rows that were too many points.
REPORTS = statement("""
    SELECT w.operation_id, m.*
      FROM unnest(:ids, :attempts, :seqs, :until_attempts, :until_seqs)
           AS w (operation_id, attempt, seq, until_attempt, until_seq)
     CROSS JOIN LATERAL (
        SELECT x.*, count(*) OVER () AS fetched, dense_rank() OVER upto AS nth,
               sum(cardinality(x.steps)) OVER upto AS points
          FROM (SELECT attempt, seq, name, steps, values FROM metrics
                 WHERE operation_id = w.operation_id AND (attempt, seq) > (w.attempt, w.seq)
                   AND (attempt, seq) <= (w.until_attempt, w.until_seq)
                 ORDER BY attempt, seq FETCH FIRST (:page_series) ROWS WITH TIES) x
        WINDOW upto AS (ORDER BY x.attempt, x.seq)) m
     WHERE m.nth = 1 OR m.points <= :page_points
     ORDER BY w.operation_id, m.attempt, m.seq, m.name
""")

EVENTS = statement("""
    SELECT e.*, o.submitted_by, k.name AS worker, a.start_step, a.checkpoint_id
      FROM unnest(:ids, :seqs, :until_seqs) AS w (id, since, until)
      JOIN operations o ON o.id = w.id
     CROSS JOIN LATERAL (
        SELECT * FROM events WHERE operation_id = w.id AND seq > w.since AND seq <= w.until
         ORDER BY seq LIMIT :page_events) e
      LEFT JOIN attempts a ON a.operation_id = e.operation_id AND a.number = e.attempt
      LEFT JOIN workers k USING (incarnation)
     ORDER BY e.operation_id, e.seq
""")


async def marks(session: AsyncSession, ids: Sequence[UUID]) -> dict[UUID, Mark]:
    """Of those that there are."""
    rows = await session.execute(MARKS, {"ids": list(ids)})
    return {r.id: Mark(Position(r.event_seq, r.attempt, r.seq), r.start_step) for r in rows}


async def news(session: AsyncSession, wanted: Sequence[Wanted]) -> dict[UUID, News]:
    """A page of each, in three statements. Reports come first: who hears of an end has heard of all before it."""
    spans: dict[str, Any] = {
        "ids": [w.id for w in wanted],
        "attempts": [w.since.position.attempt for w in wanted],
        "until_attempts": [w.until.position.attempt for w in wanted],
    }
    starts = _by_operation((await session.execute(STARTS, spans)).all())
    spans |= {"seqs": [w.since.position.seq for w in wanted], "until_seqs": [w.until.position.seq for w in wanted]}
    page = {"page_series": PAGE_SERIES, "page_points": PAGE_POINTS}
    reports = _by_operation((await session.execute(REPORTS, spans | page)).all())
    told = {
        "ids": spans["ids"],
        "seqs": [w.since.position.event_seq for w in wanted],
        "until_seqs": [w.until.position.event_seq for w in wanted],
        "page_events": PAGE_EVENTS,
    }
    events = _by_operation((await session.execute(EVENTS, told)).all())
    return {w.id: _woven(w, starts.get(w.id, []), reports.get(w.id, []), events.get(w.id, [])) for w in wanted}


def _by_operation(rows: Sequence[Row[Any]]) -> dict[UUID, list[Row[Any]]]:
    return {id: list(its) for id, its in groupby(rows, key=lambda row: row.operation_id)}


def _woven(wanted: Wanted, starts: list[Row[Any]], series: list[Row[Any]], events: list[Row[Any]]) -> News:
    until = wanted.until
    cut = bool(series) and (len(series) < series[0].fetched or len(series) >= PAGE_SERIES)
    report = (series[-1].attempt, series[-1].seq) if cut else until.position.report
    messages: list[Message] = []
    reached = wanted.since
    for start in starts:
        if start.number <= report[0]:
            messages += _attempt(reached, start, [row for row in series if row.attempt == start.number])
            reached = Mark(Position(reached.position.event_seq, start.number, 0), start.start_step)
    reached = Mark(Position(reached.position.event_seq, *report), reached.start_step)
    if cut:
        return News(messages, reached)
    for event in events:
        position = Position(event.seq, *report)
        messages.append(_message(position, "event", event_view(event)))
    whole = len(events) < PAGE_EVENTS
    event_seq = until.position.event_seq if whole else events[-1].seq
    return News(messages, Mark(Position(event_seq, *report), reached.start_step))


def _attempt(reached: Mark, start: Row[Any], series: list[Row[Any]]) -> Iterator[Message]:
    """Its beginning, unless that was told, and its reports."""
    event_seq, attempt, seq = reached.position
    if (start.number, start.start_step) != (attempt, reached.start_step):
        position = Position(event_seq, start.number, seq if start.number == attempt else 0)
        yield _message(position, "metrics", _points(start, []))
    for number, report in groupby(series, key=lambda row: row.seq):
        yield _message(Position(event_seq, start.number, number), "metrics", _points(start, report))


def _points(start: Row[Any], report: Iterable[Row[Any]]) -> AttemptPoints:
    series = [SeriesPoints(name=r.name, points=list(zip(r.steps, r.values, strict=True))) for r in report]
    return AttemptPoints(attempt=start.number, start_step=start.start_step, series=series)


def _message(position: Position, event: str, body: Wire) -> Message:
    return Message(position, event, body.model_dump_json())
