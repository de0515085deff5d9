"""A database that is slow, locked, frozen, cut off or silent after a commit: 503 to users, nothing lost or doubled."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from helpers.loops import stop_loops
from helpers.openapi import openapi_of_this_code
from helpers.postgres_proxy import PostgresProxy, postgres_proxy
from helpers.store import Held, Store, at_once, losses, no_wake, saved, shown_by, started
from ops_backend.app import create_app
from ops_backend.reaper import Reaper
from ops_backend.settings import Settings
from ops_backend.store import polls
from ops_backend.telemetry import Telemetry
from ops_contract.agents import ReportBatch
from ops_contract.errors import ErrorBody
from ops_contract.lifecycle import Outcome, Status
from ops_contract.reports import Finish, Report
from ops_worker.heartbeats import BEAT_RETRY_LEASES

TOKEN = "a token of the tests"
STORAGE = tempfile.TemporaryDirectory()
BUSY = (503, "unavailable", "1")
LEASE_S = 60.0


def api_on(url: str, **settings: Any) -> FastAPI:
    defaults = {"api_token": TOKEN, "storage_root": Path(STORAGE.name), "lease_s": LEASE_S}
    return create_app(Settings(database_url=url, **defaults | settings))


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test/api/v1", headers=headers) as client,
    ):
        openapi_of_this_code().watch_async(client)
        yield client


@pytest.fixture
async def proxied(database_url: str) -> AsyncIterator[tuple[PostgresProxy, str]]:
    with tempfile.TemporaryDirectory(prefix="pg") as directory:
        async with postgres_proxy(database_url, Path(directory)) as found:
            yield found


@pytest.fixture(autouse=True)
def no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would claim what a test claims itself."""
    stop_loops(monkeypatch)


async def report(api: httpx.AsyncClient, held: Held, *reports: Report) -> httpx.Response:
    batch = ReportBatch(incarnation=held.incarnation, first_seq=held.seq, reports=list(reports))
    path = f"/operations/{held.operation_id}/attempts/{held.attempt}/reports"
    return await api.post(path, content=batch.model_dump_json(), headers=shown_by(held.incarnation))


def beat(api: httpx.AsyncClient, held: Held) -> Any:
    listed = [{"operation_id": str(held.operation_id), "attempt": held.attempt}]
    return api.post(
        f"/workers/{held.incarnation}/heartbeat", json={"holds": listed}, headers=shown_by(held.incarnation)
    )


def said(answer: httpx.Response) -> tuple[int, str, str | None]:
    return *refusal(answer), answer.headers.get("retry-after")


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, ErrorBody.model_validate(answer.json()).error.code


async def wait_for_lock(store: Store) -> None:
    sql = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with asyncio.timeout(30):
        while not await store.fetch(sql):
            pass


async def test_a_report_that_waits_for_a_lock_too_long_is_a_503_and_counts_once_when_it_is_sent_again(
    store: Store, database_url: str
) -> None:
    await store.worker()
    run = await store.running()
    async with serving(api_on(database_url, lease_s=2)) as api:
        async with store.sessions.begin() as somebody:
            await somebody.execute(text("SELECT 1 FROM holds FOR UPDATE"))
            refused = await report(api, run, started(), losses((0, 1.0)))
        accepted = [await report(api, run, started(), losses((0, 1.0))) for _ in range(2)]

    assert said(refused) == BUSY
    assert [(a.status_code, a.json()["last_seq"]) for a in accepted] == [(200, 2)] * 2
    assert len(await store.fetch("SELECT 1 FROM metrics")) == 1


async def test_requests_that_take_all_connections_keep_no_heartbeat_waiting(store: Store, database_url: str) -> None:
    await store.worker()
    run = await store.running()
    app = api_on(database_url, lease_s=8, db_pool_size=1)
    async with serving(app) as api:
        app.state.sessions._transaction_s = 60.0  # the requests wait two seconds, on any machine
        async with app.state.sessions.begin() as slow_request:
            await slow_request.execute(text("SELECT 1"))
            refused = await asyncio.gather(api.get("/operations"), report(api, run, started()))
            beaten = await beat(api, run)
        answers = [await api.get("/operations"), await report(api, run, started())]

    assert [said(answer) for answer in refused] == [BUSY] * 2
    assert (beaten.status_code, beaten.json()["ended"]) == (200, [])
    assert [answer.status_code for answer in answers] == [200] * 2


async def test_an_api_that_is_broken_off_leaves_no_task_and_no_connection(store: Store, database_url: str) -> None:
    others = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
    before, connected = asyncio.all_tasks(), len(await store.fetch(others))
    with suppress(ZeroDivisionError):
        async with serving(api_on(database_url)) as api:
            assert (await api.get("/operations")).status_code == 200
            raise ZeroDivisionError

    assert asyncio.all_tasks() <= before
    async with asyncio.timeout(30):  # Postgres notices it a moment later
        while len(await store.fetch(others)) > connected:
            pass


async def test_a_frozen_database_is_a_503_and_when_it_goes_on_so_does_all(
    store: Store, proxied: tuple[PostgresProxy, str]
) -> None:
    """It accepts, and answers nothing: only the API itself can end that."""
    proxy, url = proxied
    await store.worker()
    run = await store.running()
    async with serving(api_on(url, lease_s=2)) as api:
        assert (await beat(api, run)).status_code == 200
        proxy.running.clear()
        refused = await asyncio.gather(api.get("/operations"), beat(api, run), report(api, run, started()))
        proxy.running.set()
        answers = [await api.get("/operations"), await beat(api, run), await report(api, run, started())]

    assert [said(answer) for answer in refused] == [BUSY] * 3
    assert [answer.status_code for answer in answers] == [200] * 3


async def test_nobody_is_refused_because_a_restart_had_ended_the_connections(
    store: Store, proxied: tuple[PostgresProxy, str]
) -> None:
    """Scenario 18: terminated by the database, and cut on the way."""
    proxy, url = proxied
    await store.worker()
    run = await store.running()
    calls = ("GET", "/operations"), ("GET", f"/operations/{run.operation_id}")
    async with serving(api_on(url)) as api:
        for end in (proxy.cut_all, None):
            await asyncio.gather(*(api.request(*call) for call in calls), beat(api, run))
            if end is not None:
                end()
            else:
                sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                await store.execute(f"{sql} AND datname = current_database()")
            answers = await asyncio.gather(*(api.request(*call) for call in calls), beat(api, run))
            assert [answer.status_code for answer in answers] == [200] * 3


async def test_whatever_ends_the_query_of_one_status_is_a_503(store: Store, proxied: tuple[PostgresProxy, str]) -> None:
    """It is sent through the driver itself, whose errors are no DBAPIError."""
    proxy, url = proxied
    await store.worker()
    run = await store.running()
    refused = []

    async def rows_after_a_close(driver: Any, ids: list[UUID]) -> Any:
        await driver.close()
        return await polls.rows(driver, ids)

    async with serving(api_on(url, lease_s=2)) as api:
        for end in ("terminated", "cut", "out of patience"):
            async with store.sessions.begin() as somebody:
                await somebody.execute(text("LOCK TABLE operations IN ACCESS EXCLUSIVE MODE"))
                look = asyncio.create_task(api.get(f"/operations/{run.operation_id}"))
                await wait_for_lock(store)
                if end == "terminated":
                    sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                    await store.execute(f"{sql} AND datname = current_database()")
                elif end == "cut":
                    proxy.cut_all()
                refused.append((end, *said(await look)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ops_backend.status_reads.polls", SimpleNamespace(rows=rows_after_a_close))
            refused.append(("closed", *said(await api.get(f"/operations/{run.operation_id}"))))
        answer = await api.get(f"/operations/{run.operation_id}")

    assert refused == [(end, *BUSY) for end in ("terminated", "cut", "out of patience", "closed")]
    assert answer.status_code == 200


class Ambiguous:
    """Calls of which the first is carried out and not answered, and what the second one says."""

    def __init__(self, api: httpx.AsyncClient, proxy: PostgresProxy) -> None:
        self.api = api
        self.proxy = proxy

    async def __call__(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        async def call() -> httpx.Response:
            content = body if isinstance(body, str) else None
            headers["Content-Type"] = "application/json"
            return await self.api.post(path, content=content, json=None if content else body, headers=headers)

        before, self.proxy.lose_commit = self.proxy.lost_commits, 1
        assert said(await call()) == BUSY
        assert self.proxy.lost_commits == before + 1
        return await call()


async def test_what_was_committed_and_not_answered_is_safe_to_repeat(
    store: Store, proxied: tuple[PostgresProxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenarios 16 and 18: the connection dies during each COMMIT, after Postgres has done it."""
    monkeypatch.setattr("ops_backend.identities.KNOWN_S", float("inf"))  # else finding out who calls is a COMMIT too
    proxy, url = proxied
    await store.worker()
    async with serving(api_on(url)) as api:
        again = Ambiguous(api, proxy)
        made = await again("/operations", {"workload": "toy", "max_retries": 0}, **{"Idempotency-Key": "k"})
        id = UUID(made.json()["id"])
        claim = await store.claim()
        assert claim is not None
        of = f"/operations/{id}"
        run = Held(id, 1, claim.members[0].incarnation)
        assert (await beat(api, run)).status_code == 200
        progress = started(), losses((0, float("nan"))), saved(run, 0)
        batch = ReportBatch(incarnation=run.incarnation, first_seq=1, reports=list(progress)).model_dump_json()
        reported = await again(f"{of}/attempts/1/reports", batch, **shown_by(run.incarnation))
        cancelled = await again(f"{of}/cancel")
        end = [Finish(outcome=Outcome.CANCELLED)]
        batch = ReportBatch(incarnation=run.incarnation, first_seq=4, reports=list(end)).model_dump_json()
        finished = await again(f"{of}/attempts/1/reports", batch, **shown_by(run.incarnation))
        resumed = await again(f"{of}/resume")
        forked = await again(f"{of}/fork", {}, **{"Idempotency-Key": "f"})

    assert made.status_code == 200
    assert (reported.status_code, reported.json()["last_seq"]) == (200, 3)
    assert (*refusal(cancelled), cancelled.json()["error"]["details"]["status"]) == (
        409,
        "not_cancellable",
        "cancelling",
    )
    assert (finished.status_code, finished.json()["last_seq"]) == (200, 4)
    assert (*refusal(resumed), resumed.json()["error"]["details"]["status"]) == (409, "not_resumable", "pending")
    assert forked.status_code == 200
    events = await store.fetch("SELECT name FROM events WHERE operation_id = :id ORDER BY seq", id=id)
    assert [event.name for event in events] == ["submit", "claim", "cancel", "stop", "resume"]
    assert len(await store.fetch("SELECT 1 FROM operations")) == 2
    assert len(await store.fetch("SELECT 1 FROM metrics")) == len(await store.fetch("SELECT 1 FROM checkpoints")) == 1


async def test_a_request_that_is_given_up_in_the_middle_leaves_nothing_behind(store: Store, database_url: str) -> None:
    """Its first statement done, its second waiting: neither half a transaction nor a connection that is lost."""
    await store.worker()
    run = await store.running()
    async with serving(api_on(database_url, db_pool_size=1)) as api:
        async with store.sessions.begin() as somebody:
            await somebody.execute(text("SELECT 1 FROM operations FOR UPDATE"))
            finish = Finish(outcome=Outcome.FAILED)
            given_up = asyncio.create_task(report(api, run, started(), losses((0, 1.0)), finish))
            await wait_for_lock(store)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
        assert await store.fetch("SELECT 1 FROM metrics") == []
        assert (await store.get(run.operation_id)).status == Status.RUNNING

        again = await report(api, run, started(), losses((0, 1.0)), finish)
    assert again.status_code == 200
    assert len(await store.fetch("SELECT 1 FROM metrics")) == 1


class TestClocks:
    """Scenario 28, by the rows that a sleep or a step of the clock leaves."""

    @pytest.fixture
    async def living_and_dead(self, store: Store) -> tuple[Held, Held]:
        """One that will beat again, one that will not."""
        await store.worker("living")
        living = await store.running()
        await store.worker("dead")
        dead = await store.running()
        await store.tick()
        await store.execute("UPDATE service SET grace_until = NULL")
        return living, dead

    @pytest.mark.parametrize("hours", [1, -1])
    async def test_a_sleep_or_a_stepped_clock_takes_no_living_one_and_spares_no_dead_one(
        self, store: Store, living_and_dead: tuple[Held, Held], hours: int
    ) -> None:
        living, dead = living_and_dead
        reapers = [Reaper(store.sessions, LEASE_S, 1.0, Telemetry("test"), no_wake) for _ in range(2)]
        await advance(store, hours * 3600)

        await at_once(*(reaper.reap() for reaper in reapers))
        assert await statuses(store, living, dead) == ["running", "running"]
        await store.heartbeat(living.incarnation, living)
        # No gap that would give another grace.
        await advance(store, LEASE_S / 2 - 1)
        await at_once(*(reaper.reap() for reaper in reapers))
        await store.heartbeat(living.incarnation, living)
        await advance(store, LEASE_S / 2 - 1)
        await at_once(*(reaper.reap() for reaper in reapers))
        await store.heartbeat(living.incarnation, living)
        await advance(store, 3)
        await at_once(*(reaper.reap() for reaper in reapers))

        assert await statuses(store, living, dead) == ["running", "pending"]
        assert len(await store.fetch("SELECT 1 FROM events WHERE name = 'lost'")) == 1

    async def test_what_was_to_wait_a_while_does_not_wait_for_hours_when_the_clock_went_back(
        self, store: Store
    ) -> None:
        await store.worker()
        run = await store.running(max_retries=1)
        await store.tick()
        await store.execute("UPDATE operations SET status = 'pending', not_before = now() + interval '9 s'")
        await store.execute("UPDATE slots SET rests_until = now() + interval '9 s'")
        await store.execute("UPDATE holds SET ended_at = now()")
        await advance(store, -3600)

        await store.tick()

        claim = await store.claim()
        assert claim is not None
        assert claim.operation_id == run.operation_id


async def advance(store: Store, by_s: float) -> None:
    """The database's clock, by moving what it has written the other way."""
    for table, columns in {
        "service": ("last_tick_at", "grace_until"),
        "holds": ("lease_expires_at",),
        "operations": ("not_before",),
        "slots": ("rests_until",),
        "workers": ("last_seen_at",),
    }.items():
        moved = ", ".join(f"{column} = {column} - make_interval(secs => {by_s})" for column in columns)
        await store.execute(f"UPDATE {table} SET {moved}")


async def statuses(store: Store, *runs: Held) -> list[str]:
    return [(await store.get(run.operation_id)).status for run in runs]


async def test_two_reapers_take_each_lost_attempt_once(store: Store) -> None:
    """Scenario 25."""
    await store.worker(slots=8)
    runs = [await store.running() for _ in range(8)]
    await store.tick()
    await store.execute("UPDATE service SET grace_until = NULL")
    await store.execute("UPDATE holds SET lease_expires_at = now() - interval '1 s'")
    await store.execute("UPDATE service SET last_tick_at = now() + interval '1 s'")  # began later, was first

    answers = await at_once(
        *(Reaper(store.sessions, LEASE_S, 1.0, Telemetry("test"), no_wake).reap() for _ in range(3))
    )
    assert answers == [None] * 3

    assert await statuses(store, *runs) == ["pending"] * 8
    assert len(await store.fetch("SELECT 1 FROM events WHERE name = 'lost'")) == 8


async def test_an_api_that_was_away_too_shortly_for_a_grace_reaps_nobody_who_beats_again(store: Store) -> None:
    """Scenario 28: away just after the tick before a beat was due, back just before the reaper would notice."""
    terms = Settings(database_url="postgres://x", api_token=TOKEN, storage_root=Path("/"), lease_s=LEASE_S)
    reaper = Reaper(store.sessions, LEASE_S, 1.0, Telemetry("test"), no_wake)
    await store.worker()
    run = await store.running()
    await store.tick()
    await store.execute("UPDATE service SET grace_until = NULL")
    await store.heartbeat(run.incarnation, run)
    for later_s in (terms.heartbeat_s, LEASE_S / 2 - 1, LEASE_S * BEAT_RETRY_LEASES):
        await advance(store, later_s)
        await reaper.reap()

    assert await statuses(store, run) == ["running"]
    assert (await store.heartbeat(run.incarnation, run)).ended == []
