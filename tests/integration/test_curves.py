"""Metrics as they are read: along the lineage, in pages, since a cursor, with few points."""

import asyncio
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

import httpx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from test_api import TOKEN, refusal, serving

from helpers.databases import Databases
from helpers.store import Store, held, losses, started
from ops_backend.database import Sessions
from ops_backend.store import curves
from ops_contract.errors import OpsError
from ops_contract.history import MetricPoints
from ops_contract.lifecycle import Outcome
from ops_contract.pipe import Mark
from ops_contract.reports import Metrics, Progress, Report
from relight import AsyncClient
from relight.training.reporting import Reporter
from relight.training.state import Cursor

Points = list[tuple[int, float]]

VALUES = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324]), st.floats(-2.0, 2.0))
POLL = ("poll", None)
REPORT = st.lists(st.tuples(st.integers(1, 3), VALUES), min_size=2, max_size=9).map(lambda points: [("report", points)])
REWIND = st.integers(0, 20).map(lambda back: [("attempt", back)])
# A command's attempt that says where it began only after a reader has seen it.
LATE = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda n: [("attempt", n[0]), POLL, ("begin", n[1])])
ACTIONS = st.lists(st.one_of(REPORT, REPORT, REWIND, LATE, st.just([POLL])), min_size=4, max_size=16).map(
    lambda parts: [action for part in parts for action in part]
)

ATTEMPT = text("""
    INSERT INTO attempts (operation_id, number, incarnation, start_step) VALUES (:id, :attempt, :incarnation, :step)
""")
BEGIN = text("UPDATE attempts SET start_step = :step WHERE operation_id = :id AND number = :attempt")
INSERT = text("""
    INSERT INTO metrics (operation_id, attempt, seq, name, first_step, steps, values)
    SELECT :id, :attempt, :seq, name, :first_step, :steps, :values
      FROM unnest(ARRAY['a', 'loss', 'z']) AS name
""")


@dataclass
class History:
    """What the attempts of one operation reported, in the database and beside it."""

    session: AsyncSession
    id: UUID
    incarnation: UUID
    starts: list[int] = field(default_factory=list)
    rows: list[tuple[int, Points]] = field(default_factory=list)

    async def attempt(self, back: int) -> None:
        """Begins so many steps before the end of what there is."""
        self.starts.append(max(0, self._next_step() - back))
        await self.session.execute(ATTEMPT, self._newest() | {"incarnation": self.incarnation, "step": self.starts[-1]})

    async def begin(self, step: int) -> None:
        """As a command says it, before its first value."""
        if self.starts and not any(attempt == len(self.starts) for attempt, _ in self.rows):
            self.starts[-1] = step
            await self.session.execute(BEGIN, self._newest() | {"step": step})

    async def report(self, gaps: Points) -> None:
        if not self.starts:
            await self.attempt(0)
        points, step = [], self._next_step() - 1
        for gap, value in gaps:
            step += gap
            points.append((step, value))
        self.rows.append((len(self.starts), points))
        values = {
            "seq": len(self.rows),
            "first_step": points[0][0],
            "steps": [s for s, _ in points],
            "values": [v for _, v in points],
        }
        await self.session.execute(INSERT, self._newest() | values)

    def counted(self) -> Points:
        return [
            (step, value)
            for attempt, points in self.rows
            for step, value in points
            if all(step < start for start in self.starts[attempt:])
        ]

    def _newest(self) -> dict[str, object]:
        return {"id": self.id, "attempt": len(self.starts)}

    def _next_step(self) -> int:
        mine = [points[-1][0] + 1 for attempt, points in self.rows if attempt == len(self.starts)]
        return mine[-1] if mine else self.starts[-1] if self.starts else 0


@dataclass
class Reader:
    """Folds answers by the rule of the contract and by nothing else."""

    points: Points = field(default_factory=list)
    cursor: str | None = None

    def take(self, answer: MetricPoints) -> None:
        if answer.replaces_from is not None:
            self.points = [point for point in self.points if point[0] < answer.replaces_from]
        self.points += answer.points
        self.cursor = answer.cursor


@contextmanager
def on(database_url: str) -> Iterator[tuple[asyncio.Runner, Sessions]]:
    with asyncio.Runner() as runner:
        sessions = Sessions(database_url, pool_size=2)
        try:
            yield runner, sessions
        finally:
            runner.run(sessions.dispose())


def test_what_a_reader_folds_is_what_a_whole_read_gives_whatever_the_attempts_do(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "PAGE_POINTS", 5)
    examples = settings(
        max_examples=40, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    with on(asyncio.run(databases.fresh())) as (runner, sessions):
        store = Store(sessions)
        incarnation = runner.run(store.worker())
        id = runner.run(store.submit())

        @examples
        @given(ACTIONS, st.integers(10, 16), st.integers(-1, 20), st.integers(0, 60))
        def holds(actions: list[tuple[str, object]], max_points: int, after_step: int, until_step: int) -> None:
            runner.run(play(sessions, id, incarnation, actions, max_points, (after_step, until_step)))

        holds()


async def play(
    sessions: Sessions,
    id: UUID,
    incarnation: UUID,
    actions: list[tuple[str, object]],
    max_points: int,
    zoom: tuple[int, int],
) -> None:
    after_step, until_step = zoom
    async with sessions.begin() as session:
        history, reader = History(session, id, incarnation), Reader()
        for action, drawn in [*actions, ("poll", None)]:
            if action != "poll":
                await getattr(history, action)(drawn)
                continue
            answer = await curves.read(session, id, "loss", cursor=reader.cursor)
            reader.take(answer)
            if not answer.more:
                assert bits(reader.points) == bits(history.counted())

        while (answer := await curves.read(session, id, "loss", cursor=reader.cursor)).more:
            reader.take(answer)
        reader.take(answer)
        counted = history.counted()
        assert bits(reader.points) == bits(counted)
        wanted = [(step, value) for step, value in counted if step > after_step]
        few = await curves.read(session, id, "loss", after_step, max_points)
        assert bits(few.points) == bits(drawn_with(wanted, max_points))
        assert (await curves.read(session, id, "loss", after_step, max_points, few.cursor)).points == []
        part = await curves.read(session, id, "loss", after_step, max_points, until_step=until_step)
        assert bits(part.points) == bits(drawn_with([p for p in wanted if p[0] <= until_step], max_points))
        whole = await curves.read(session, id, "loss", max_points=10_000, cursor=part.cursor)
        assert bits(whole.points) == bits(drawn_with(counted, 10_000))  # a part leaves nothing out for good
        [summary] = [each for each in (await curves.names(session, id)).metrics if each.name == "loss"] or [None]
        assert bits([summary.first, summary.last] if summary and summary.first and summary.last else []) == bits(
            [counted[0], counted[-1]] if counted else []
        )
        await session.rollback()


def drawn_with(points: Points, max_points: int) -> Points:
    """Of each bucket of steps the lowest, the highest, the first NaN; and both ends."""
    if len(points) <= max_points:
        return points
    first, last = points[0], points[-1]
    width = (last[0] - first[0]) // ((max_points - 2) // 3) + 1
    buckets: dict[int, Points] = {}
    for point in points:
        buckets.setdefault((point[0] - first[0]) // width, []).append(point)
    kept = {first[0]: first[1], last[0]: last[1]}
    for bucket in buckets.values():
        if numbers := [(value, step) for step, value in bucket if value == value]:
            low, high = min(numbers)[1], min(numbers, key=lambda p: (-p[0], p[1]))[1]
            kept |= {step: value for step, value in bucket if step in (low, high)}
        kept |= dict([point for point in bucket if point[1] != point[1]][:1])
    return sorted(kept.items())


def bits(points: Points) -> list[tuple[int, str]]:
    """NaN is any NaN: JSON has one."""
    return [(step, "nan" if value != value else struct.pack(">d", value).hex()) for step, value in points]


class Sink:
    def __init__(self) -> None:
        self.reports: list[Report] = []

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def progress(self, progress: Progress) -> None: ...

    def mark(self, mark: Mark) -> None: ...


async def test_every_value_survives_from_the_trainer_to_the_reader_whichever_way_it_is_read(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [0.1 + 0.2, math.nan, math.inf, -math.inf, -0.0, 5e-324, *(1.0 / (n + 3) for n in range(14))]
    sink = Sink()
    reporter = Reporter(sink, None, lambda: 0.0)
    for step, value in enumerate(values):
        reporter.add_micro_batch(step, 1, torch.tensor(value, dtype=torch.float64), {})
        if step % 3 == 0:
            reporter.flush(Cursor(step=step))
    reporter.flush(Cursor(step=len(values)))
    await store.worker()
    run = await store.running()
    sent = [Metrics.model_validate_json(report.model_dump_json()) for report in sink.reports]
    run = await store.report(run, started(), *sent)
    monkeypatch.setattr(curves, "PAGE_POINTS", 4)

    async with serving(database_url) as api, client_of(api) as client:
        whole = await client.metrics(run.operation_id, "loss")
        few = await client.metrics(run.operation_id, "loss", max_points=11)
        answer = await api.get(f"/operations/{run.operation_id}/metrics?name=loss&max_points=11")
        page = (await api.get(f"/operations/{run.operation_id}/metrics?name=loss")).json()

    assert bits(list(whole.points)) == bits(list(enumerate(values)))
    assert bits(list(few.points)) == bits(drawn_with(list(enumerate(values)), 11))
    assert [value for _, value in few.points[1:4]] == pytest.approx([math.nan, math.inf, -math.inf], nan_ok=True)
    assert '[1,"NaN"],[2,"Infinity"],[3,"-Infinity"]' in answer.text
    assert (page["more"], page["points"]) == (True, [[0, 0.1 + 0.2], [1, "NaN"], [2, "Infinity"], [3, "-Infinity"]])


def client_of(api: httpx.AsyncClient) -> AsyncClient:
    """The SDK on the very same app."""
    loop = asyncio.get_running_loop()

    def carry(request: httpx.Request) -> httpx.Response:
        asked = api.request(request.method, request.url, headers=request.headers, content=request.content)
        answer = asyncio.run_coroutine_threadsafe(asked, loop).result()
        return httpx.Response(answer.status_code, content=answer.content)

    return AsyncClient("http://test", TOKEN, transport=httpx.MockTransport(carry))


async def test_a_reader_of_a_command_is_given_all_again_where_it_says_late_that_it_went_on(
    store: Store, database_url: str
) -> None:
    await store.worker(user_code=True)
    run = await store.running(command=["train"], workload=None, kind="command", max_retries=1)
    run = await store.report(run, started(), losses((0, 3.0), (1, 2.0)))
    await store.finish(run, Outcome.FAILED)
    again = await store.claim()
    assert again is not None
    reader = Reader()
    path = f"/operations/{run.operation_id}/metrics?name=loss"

    async with serving(database_url) as api, client_of(api) as client:
        reader.take(MetricPoints.model_validate((await api.get(path)).json()))
        assert reader.points == [], "it seems to begin anew"
        await store.report(held(again), started(), started(1), losses((1, 1.5)))
        answer = await client.metrics(run.operation_id, "loss", cursor=reader.cursor)

    assert answer.replaces_from == 0
    reader.take(answer)
    assert reader.points == [(0, 3.0), (1, 1.5)]


async def test_a_query_that_means_nothing_is_refused(store: Store, database_url: str) -> None:
    await store.worker()
    path = f"/operations/{await store.submit()}/metrics"
    cursors = ["", "x", "1.2.3", "1.1.9.0", "9999999999.1.1.0"]
    limits = ["max_points=9", "max_points=10001", "after_step=-2", "after_step=9223372036854775808"]
    limits += ["until_step=5", "until_step=-1&max_points=10", "until_step=5&max_points=10&cursor=0.0.0.0"]
    async with serving(database_url) as api:
        for query in (*(f"cursor={cursor}" for cursor in cursors), *limits):
            assert refusal(await api.get(f"{path}?name=loss&{query}")) == (422, "invalid"), query
        for query in ("cursor=0.0.0.0", "max_points=100", "after_step=5", "until_step=5"):
            assert refusal(await api.get(f"{path}?{query}")) == (422, "invalid"), query


async def test_a_reader_is_told_nothing_twice(store: Store) -> None:
    await store.worker()
    run = await store.report(await store.running(), started(), losses((0, 1.0)))
    async with store.sessions.begin() as session:
        first = await curves.read(session, run.operation_id, "loss")
        again = await curves.read(session, run.operation_id, "loss", cursor=first.cursor)
    assert (again.points, again.more, again.replaces_from) == ([], False, None)
    with pytest.raises(OpsError, match="not one that this operation's metrics gave"):
        async with store.sessions.begin() as session:
            await curves.read(session, await store.submit(), "loss", cursor=first.cursor)
