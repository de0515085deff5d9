"""GET …/stream: nothing missed, nothing twice, one reader for all; on real Postgres, mostly through a real server."""

import asyncio
import itertools
import os
import random
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event as sql_event
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from helpers.loops import stop_loops
from helpers.postgres_proxy import postgres_proxy
from helpers.sse import Dashboard, Said, aread
from helpers.store import Held, Store, held, losses, saved, started
from ops_backend import streams
from ops_backend.app import create_app
from ops_backend.database import Sessions
from ops_backend.serving import Server
from ops_backend.settings import Settings
from ops_backend.store import curves as curves_of
from ops_backend.store import stream
from ops_backend.store.deletion import delete_if_ended
from ops_backend.store.stream import Position
from ops_backend.streams import Streams
from ops_contract.errors import ErrorBody, OpsError
from ops_contract.lifecycle import Outcome
from ops_contract.reports import LogChunk, Metrics, Progress, Series

TOKEN = "a token of the tests"
STORAGE = tempfile.TemporaryDirectory()
MISSING = "00000000-0000-0000-0000-000000000000"
START = Position(0, 0, 0)
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would claim what a test claims itself."""
    stop_loops(monkeypatch, but=("Streams",))


def api_on(database_url: str, **settings: Any) -> FastAPI:
    defaults = {"api_token": TOKEN, "storage_root": Path(STORAGE.name), "poll_s": 0.02}
    return create_app(Settings(database_url=database_url, **defaults | settings))


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """By a real server; one that the test has not ended is ended after it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a slow client is noticed soon
        port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        server = Server(app, app.state.settings, port, as_json=False)
        app.state.server = server
        serve = asyncio.create_task(server.serve([listener]))
        await until(lambda: server.started)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=url + "/api/v1", headers=headers, trust_env=False) as client:
            yield client
        server.should_exit = True
        await serve


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(api_on(database_url)) as client:
        yield client


@pytest.fixture
async def hub(store: Store) -> Streams:
    """Reads when it is told to."""
    return Streams(store.sessions, poll_s=0.0, limit=1000)


@asynccontextmanager
async def watching(api: httpx.AsyncClient, id: UUID, **how: Any) -> AsyncIterator[AsyncIterator[Said]]:
    async with api.stream("GET", f"/operations/{id}/stream", **how) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield aread(answer.aiter_text())


async def pending(store: Store) -> UUID:
    await store.worker()
    return await store.submit()


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)


async def written(store: Store, dice: random.Random) -> None:
    """The life of an operation, by the worker that has it: several attempts, each from a checkpoint of the last."""
    attempts = dice.randint(2, 4)
    for number in range(1, attempts + 1):
        claim = await store.claim()
        assert claim is not None
        step = claim.checkpoint.step if claim.checkpoint else 0
        run = await store.report(held(claim), started(step))
        for _ in range(dice.randint(0, 12)):
            step += dice.randint(1, 3)
            run = await store.report(run, *_reports(run, step, dice), progress=Progress(step=step))
            await asyncio.sleep(dice.choice([0, 0, 0.01]))
        if number == attempts:
            await store.finish(run, Outcome.COMPLETED)
        elif dice.random() < 0.5:
            await store.finish(run, Outcome.PREEMPTED)
        else:
            await store.expire(run)
            await store.lose(run)


def _reports(run: Held, step: int, dice: random.Random) -> list[Any]:
    value = dice.choice([dice.random(), float("nan"), float("inf")])
    metrics = Metrics(series=[Series.of(n, [(step - 1, value), (step, 0.5)]) for n in dice.sample(["a", "b", "c"], 2)])
    late = losses((step // 2, 7.0), name="evaluated")  # of a step before those that were reported
    checkpoint = [saved(run, step)] if dice.random() < 0.4 else []
    return [metrics, *checkpoint, *([late] if dice.random() < 0.3 else [])]


async def rows(store: Store, id: UUID) -> tuple[list[int], list[tuple[int, int]], str]:
    """What a reader of the tables finds: events, reports with metrics, curves."""
    events = [row.seq for row in await store.fetch("SELECT seq FROM events WHERE operation_id = :id ORDER BY 1", id=id)]
    sql = "SELECT DISTINCT attempt, seq FROM metrics WHERE operation_id = :id ORDER BY 1, 2"
    reports = [tuple(row) for row in await store.fetch(sql, id=id)]
    async with store.sessions.begin() as session:
        names = (await curves_of.names(session, id)).names
        curves = {name: (await curves_of.read(session, id, name)).points for name in names}
    return events, reports, repr(curves)  # NaN is equal to NaN in it


def seen(dashboard: Dashboard) -> tuple[list[int], list[tuple[int, int]], str]:
    return [event["seq"] for event in dashboard.events], dashboard.reports, repr(dashboard.curves())


@pytest.mark.parametrize("seed", range(2))
async def test_a_reader_that_is_cut_off_at_any_message_has_every_row_once_and_the_curves_of_the_lineage(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for size, number in (("PAGE_SERIES", 3), ("PAGE_POINTS", 6), ("PAGE_EVENTS", 2)):
        monkeypatch.setattr(stream, size, number)
    dice, dashboard = random.Random(seed), Dashboard()
    await store.worker()
    id = await store.submit(max_retries=9)

    # Two backends: each connection comes to one of them, and neither knows what the other has read.
    async with serving(api_on(database_url)) as one, serving(api_on(database_url, poll_s=0.05)) as other:
        writer = asyncio.create_task(written(store, dice))
        while dashboard.progress.get("status") != "completed":
            position = dashboard.position
            how = dice.choice([{"headers": {"Last-Event-ID": position}}, {"params": {"after": position}}])
            left = itertools.count(dice.randint(1, 12), -1)
            async with watching(dice.choice([one, other]), id, **how) as messages, asyncio.timeout(PATIENCE_S):
                async for said in messages:
                    dashboard.take(said)
                    if not next(left) or dashboard.progress.get("status") == "completed":
                        break
        await writer

    assert seen(dashboard) == await rows(store, id)


async def test_who_comes_without_a_position_gets_the_state_and_then_only_what_is_new(
    store: Store, api: httpx.AsyncClient
) -> None:
    await store.worker()
    run = await store.running()
    run = await store.report(run, started(), losses((0, 1.0)))

    async with watching(api, run.operation_id) as messages:
        first = await anext(messages)
        run = await store.report(run, losses((1, float("nan"))), progress=Progress(step=1))
        then = [await anext(messages) for _ in range(2)]

    assert (first.id, first.event, first.data["status"]) == ("2.1.2", "progress", "running")
    series = [{"name": "loss", "points": [[1, "NaN"]]}]
    assert then[0] == Said("2.1.3", "metrics", {"attempt": 1, "start_step": 0, "series": series})
    assert (then[1].event, then[1].data["progress"]["step"]) == ("progress", 1)


async def test_where_a_command_begins_is_told_again_when_it_says_so_itself(store: Store, hub: Streams) -> None:
    await store.worker(user_code=True)
    run = await store.running(command=["true"])
    run = await store.report(run, started(0), losses(*[(step, 0.0) for step in range(9)]))
    await store.finish(run, Outcome.PREEMPTED)
    claim = await store.claim()
    assert claim is not None
    again = await store.report(held(claim), started(0))
    live, cut = Dashboard(), Dashboard()
    watched = await opened(hub, run.operation_id, START)
    await take(watched, live, "progress")
    cut_off = await opened(hub, run.operation_id, START)
    await take(cut_off, cut, "progress")

    await store.report(again, started(5))
    await hub.tick()
    await take(watched, live, "metrics")
    back = await opened(hub, run.operation_id, Position(*map(int, cut.position.split("."))))
    await take(back, cut, "progress")

    assert live.curves() == cut.curves() == {"loss": [(step, 0.0) for step in range(5)]}


async def test_who_comes_from_a_backend_that_was_ahead_gets_nothing_twice(store: Store, hub: Streams) -> None:
    await store.worker()
    run = await store.report(await store.running(), started())
    dashboard = Dashboard()
    behind = await opened(hub, run.operation_id)
    await take(behind, Dashboard(), "progress")

    run = await store.report(run, losses((0, 1.0)))
    ahead = Streams(store.sessions, poll_s=0.0, limit=1)
    await take(await opened(ahead, run.operation_id, START), dashboard, "progress")
    back = await opened(hub, run.operation_id, Position(*map(int, dashboard.position.split("."))))
    await take(back, dashboard, "progress")
    run = await store.report(run, losses((1, 1.0)))
    await hub.tick()
    await take(back, dashboard, "metrics")

    assert dashboard.reports == [(1, 2), (1, 3)]


async def opened(hub: Streams, id: UUID, after: Position | None = None) -> AsyncIterator[Said]:
    frames = (await hub.open(id, after)).frames()
    return aread(frame.decode() async for frame in frames)


async def take(messages: AsyncIterator[Said], dashboard: Dashboard, last: str) -> None:
    """Up to and with the next of that kind."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            said = await anext(messages)
            dashboard.take(said)
            if said.event == last:
                return


async def test_that_it_is_completed_is_told_when_all_before_it_has_been_told(
    store: Store, hub: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PAGE_SERIES", 2)
    await store.worker()
    run = await store.report(await store.running(), started())
    watched, dashboard = await opened(hub, run.operation_id), Dashboard()
    await take(watched, dashboard, "progress")
    run = await store.report(run, losses((0, 1.0)))
    marks = stream.marks

    async def completed_then(*asked: Any) -> dict[UUID, stream.Mark]:
        found = await marks(*asked)
        monkeypatch.setattr(stream, "marks", marks)
        reports = [losses((step, 1.0)) for step in range(1, 6)]
        await store.finish(await store.report(run, *reports, progress=Progress(step=5)), Outcome.COMPLETED)
        return found

    monkeypatch.setattr(stream, "marks", completed_then)
    for _ in range(5):
        await hub.tick()
    told = []
    while dashboard.progress["status"] != "completed":
        dashboard.take(said := await anext(watched))
        told.append(said.event)

    assert told == [*["metrics"] * 6, "event", "progress"]


async def test_so_many_streams_cost_as_many_statements_as_one(store: Store, hub: Streams) -> None:
    await store.worker(slots=10)
    runs = [await store.report(await store.running(), started()) for _ in range(10)]
    counts: list[tuple[int, int]] = []
    for number in (1, 50):
        watched = itertools.islice(itertools.cycle(runs), number)
        dashboards = [(run, Dashboard(), await opened(hub, run.operation_id)) for run in watched]
        for _, dashboard, messages in dashboards:
            await take(messages, dashboard, "progress")
        runs = [await store.report(run, losses((0, 1.0))) for run in runs]
        counts.append((await statements(store, hub), await statements(store, hub)))
        for run, dashboard, messages in dashboards:
            await take(messages, dashboard, "metrics")
            assert dashboard.reports == [(1, next(r.seq for r in runs if r.operation_id == run.operation_id) - 1)]

    assert counts == [(5, 1)] * 2  # with news, and without


async def statements(store: Store, hub: Streams) -> int:
    """How many one reading takes."""
    number = 0

    def count(*_: Any) -> None:
        nonlocal number
        number += 1

    engine = store.sessions._engine.sync_engine
    sql_event.listen(engine, "before_cursor_execute", count)
    await hub.tick()
    sql_event.remove(engine, "before_cursor_execute", count)
    return number


async def test_streams_hold_no_connection_while_they_wait_or_their_client_is_slow(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PAGE_SERIES", 1)
    await store.worker()
    run = await store.running()
    run = await store.report(run, started(), *[losses((step, 1.0)) for step in range(5)])
    sessions = Sessions(database_url, pool_size=1)
    hub = Streams(sessions, poll_s=0.0, limit=9)
    waiting, catching_up = await opened(hub, run.operation_id), await opened(hub, run.operation_id, START)
    await take(waiting, Dashboard(), "progress")
    await take(catching_up, behind := Dashboard(), "metrics")

    run = await store.report(run, losses((5, 1.0)))
    await hub.tick()
    await take(waiting, Dashboard(), "metrics")
    await take(catching_up, behind, "progress")

    assert behind.reports == [(1, seq) for seq in range(2, 8)]
    await sessions.dispose()


async def test_a_stream_with_nothing_to_say_keeps_its_connection_open(
    store: Store, hub: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "COMMENT_S", 0.01)
    frames = (await hub.open(await pending(store), None)).frames()

    said = [await anext(frames) for _ in range(4)]

    assert [frame.split(b":")[0] for frame in said] == [b"retry", b"id", b"", b""]


async def test_a_client_that_does_not_read_is_dropped_and_the_others_get_everything(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "WAITING_BYTES", 1000)
    await store.worker()
    run = await store.report(await store.running(), started())
    app, dashboard = api_on(database_url), Dashboard()
    async with serving(app) as api:
        deaf = await a_deaf_client(api, run.operation_id)
        await until(lambda: open_streams(app) == 1)
        async with watching(api, run.operation_id) as messages:
            await take(messages, dashboard, "progress")
            step = 0
            while open_streams(app) == 2:
                step += 1
                run = await store.report(run, losses(*[(1000 * step + i, 0.1) for i in range(1000)]))
                await take(messages, dashboard, "metrics")
            run = await store.report(run, losses((1000 * (step + 1), 0.1)))
            await take(messages, dashboard, "metrics")
        deaf.close()

    assert dashboard.reports == [(1, seq) for seq in range(2, run.seq)]


async def a_deaf_client(api: httpx.AsyncClient, id: UUID) -> socket.socket:
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(deaf, (api.base_url.host, api.base_url.port))
    head = f"GET /api/v1/operations/{id}/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    await loop.sock_sendall(deaf, head.encode())
    return deaf


def open_streams(app: FastAPI) -> int:
    return sum(len(watched.streams) for watched in app.state.streams._watched.values())


async def test_a_client_that_goes_is_watched_for_no_longer(store: Store, database_url: str) -> None:
    id = await pending(store)
    app = api_on(database_url)
    async with serving(app) as api:
        async with watching(api, id) as messages:
            await anext(messages)
            assert open_streams(app) == 1
        await until(lambda: not app.state.streams._watched)


async def test_a_client_that_goes_in_the_middle_of_a_reading_keeps_no_connection_to_the_database(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await pending(store)
    app, reading = api_on(database_url, db_pool_size=1), asyncio.Event()

    async def slow(session: AsyncSession, _: Any) -> dict[UUID, stream.News]:
        reading.set()
        await session.execute(text("SELECT pg_sleep(3600)"))
        raise AssertionError

    async with serving(app) as api:
        with monkeypatch.context() as patch:
            patch.setattr(stream, "news", slow)
            async with watching(api, id, params={"after": "0.0.0"}):
                await reading.wait()
            await until(lambda: not app.state.streams._watched)
        listed = await api.get("/operations")

    assert listed.status_code == 200


async def test_an_api_that_ends_ends_its_streams_in_order_and_takes_no_new_one(store: Store, database_url: str) -> None:
    """Uvicorn would wait for them until its limit, and then cut them off in the middle."""
    id = await pending(store)
    app = api_on(database_url)
    async with serving(app) as api, watching(api, id) as messages:
        await anext(messages)
        app.state.server.should_exit = True
        rest = [said async for said in messages]  # raises where the body has no end
        with pytest.raises(OpsError, match="ending"):
            await app.state.streams.open(id, None)

    assert rest == []


async def test_a_database_that_is_away_ends_no_stream(
    store: Store, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await store.worker()
    run = await store.report(await store.running(), started(), losses((0, 1.0)))
    dashboard = Dashboard()
    with tempfile.TemporaryDirectory(prefix="pg") as directory:
        async with (
            postgres_proxy(database_url, Path(directory)) as (proxy, url),
            serving(api_on(url)) as api,
            watching(api, run.operation_id) as messages,
        ):
            await take(messages, dashboard, "progress")
            there, away = f"{directory}/.s.PGSQL.5432", f"{directory}/away"
            os.rename(there, away)
            proxy.cut_all()
            await store.report(run, losses((1, 1.0)))
            refused = await api.get(f"/operations/{run.operation_id}/stream")
            await until(lambda: "trying again" in caplog.text)
            os.rename(away, there)
            await take(messages, dashboard, "metrics")

    assert refused.status_code == 503
    assert dashboard.reports == [(1, 3)]


async def test_a_catch_up_goes_on_where_it_was_when_the_database_is_back(
    store: Store, hub: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PAGE_SERIES", 1)
    await store.worker()
    run = await store.running()
    run = await store.report(run, started(), *[losses((step, 1.0)) for step in range(3)])
    read, away, dashboard = hub.read, [False, True, True, False, True, False, False], Dashboard()

    async def read_if_there(wanted: stream.Wanted) -> stream.News:
        if away and away.pop(0):
            raise OSError("away")
        return await read(wanted)

    monkeypatch.setattr(hub, "read", read_if_there)
    await take(await opened(hub, run.operation_id, START), dashboard, "progress")

    assert not away
    assert seen(dashboard) == await rows(store, run.operation_id)


async def test_the_end_of_a_deleted_operation_is_told_and_then_there_is_none(
    store: Store, api: httpx.AsyncClient
) -> None:
    id = await pending(store)
    await store.cancel(id)
    async with watching(api, id) as messages:
        await anext(messages)
        async with store.sessions.begin() as session:
            assert await delete_if_ended(session, id)
        rest = [said async for said in messages]
    gone = await api.get(f"/operations/{id}/stream")

    assert [(said.event, said.data) for said in rest] == [("deleted", {"id": str(id)})]
    assert gone.status_code == 404


async def test_a_stream_that_cannot_be_is_refused_with_its_reason(store: Store, database_url: str) -> None:
    id = await pending(store)
    async with serving(api_on(database_url, max_streams=1)) as api:
        path = f"/operations/{id}/stream"
        for position in ("1", "1.0.0.0", "1.-1.0", "1.0.x", "2.0.0", "1.1.0", "0.0.9999999999999999999", "１.0.0"):
            for how in ({"params": {"after": position}}, {"headers": {b"Last-Event-ID": position.encode()}}):
                answer = await api.get(path, **how)  # type: ignore[arg-type]
                assert refusal(answer) == (422, "invalid"), position
        assert refusal(await api.get(f"/operations/{MISSING}/stream")) == (404, "not_found")
        assert refusal(await api.get(path, headers={"Authorization": "Bearer x"})) == (401, "unauthenticated")
        async with watching(api, id) as messages:
            await anext(messages)
            full = await api.get(path)
        assert refusal(full) == (503, "unavailable")
        assert full.headers["retry-after"] == "1"


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, ErrorBody.model_validate(answer.json()).error.code


async def test_headers_keep_proxies_from_collecting_and_the_first_words_say_when_to_come_back(
    store: Store, api: httpx.AsyncClient
) -> None:
    id = await pending(store)
    async with api.stream("GET", f"/operations/{id}/stream") as answer:
        first = await anext(answer.aiter_lines())

    assert first == "retry: 1000"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    described = (await api.get("../../openapi.json")).json()["paths"]["/api/v1/operations/{id}/stream"]["get"]
    assert list(described["responses"]["200"]["content"]) == ["text/event-stream"]


async def test_other_reports_move_the_position_and_say_nothing(store: Store, hub: Streams) -> None:
    await store.worker()
    run = await store.report(await store.running(), started())
    watched = await opened(hub, run.operation_id)
    await take(watched, Dashboard(), "progress")

    run = await store.report(run, LogChunk.of(b"words\n"), losses((0, 1.0)), LogChunk.of(b"more\n"))
    await hub.tick()
    said = await anext(watched)
    back = await opened(hub, run.operation_id, Position(2, 1, run.seq - 1))

    assert (said.id, said.event) == ("2.1.3", "metrics")
    assert [(await anext(back)).event for _ in range(2)] == ["metrics", "progress"]
