"""What becomes of a claim when its delivery is taken, refused, or nobody can know: a real store, a scripted network."""

import asyncio
import contextlib
import gzip
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.store import LEASE_S, Held, Store, held, saved, started
from ops_backend.dispatcher import Dispatcher
from ops_backend.settings import Settings
from ops_backend.telemetry import Telemetry
from ops_backend.worker_calls import post
from ops_contract.lifecycle import Outcome, Status
from ops_contract.wire import Wire

Answer = Callable[[httpx.Request], httpx.Response]


class Deliveries:
    """Runs the dispatcher against a worker that answers as told, and keeps what it was sent."""

    def __init__(self, store: Store, database_url: str, answer: Answer) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self._answer = answer
        self._delivered = asyncio.Condition()
        settings = Settings(
            database_url=database_url,
            api_token="x" * 16,
            storage_root=Path("/"),
            lease_s=LEASE_S,
            poll_s=0.01,
        )
        self.telemetry = Telemetry("test")
        http = httpx.AsyncClient(transport=httpx.MockTransport(self._receive))
        self._dispatcher = Dispatcher(store.sessions, http, settings, self.telemetry)

    async def __aenter__(self) -> "Deliveries":
        self._loop = asyncio.create_task(self._dispatcher.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)

    async def settled(self, number: int) -> list[tuple[str, dict[str, Any]]]:
        """What was sent, when so many deliveries are over and done with."""
        async with asyncio.timeout(30), self._delivered:
            await self._delivered.wait_for(lambda: len(self.sent) >= number)
        await asyncio.gather(*self._dispatcher._deliveries)
        return self.sent

    async def _receive(self, request: httpx.Request) -> httpx.Response:
        async with self._delivered:
            self.sent.append((request.url.path, json.loads(request.content)))
            self._delivered.notify_all()
        return self._answer(request)


def answers(status: int, code: str = "") -> Answer:
    body = {"error": {"code": code, "message": "so it is", "details": {}}} if code else {}
    return lambda request: httpx.Response(status, json=body)


def fails(error: type[httpx.TransportError]) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error("on purpose", request=request)

    return answer


@pytest.mark.parametrize(
    ("answer", "status", "rests"),
    [
        (answers(202), Status.RUNNING, False),
        (answers(200), Status.RUNNING, False),
        (answers(409, "busy"), Status.PENDING, True),
        (answers(409, "stale"), Status.PENDING, True),
        (answers(409, "device_not_ready"), Status.PENDING, True),
        (answers(401), Status.PENDING, True),
        (fails(httpx.ConnectError), Status.PENDING, True),
        (fails(httpx.ConnectTimeout), Status.PENDING, True),
        # It may have arrived: only the lease can tell.
        (fails(httpx.ReadTimeout), Status.RUNNING, False),
        (fails(httpx.RemoteProtocolError), Status.RUNNING, False),
        (answers(500), Status.RUNNING, False),
        (answers(503, "unavailable"), Status.RUNNING, False),
    ],
)
async def test_only_a_definite_refusal_takes_the_claim_back(
    store: Store, database_url: str, answer: Answer, status: Status, rests: bool
) -> None:
    """Scenario 20."""
    await store.worker()
    id = await store.submit()
    async with Deliveries(store, database_url, answer) as deliveries:
        [(path, order)] = await deliveries.settled(1)

    operation = await store.get(id)
    assert (operation.status, operation.attempt, operation.failures) == (status, 1, 0)
    assert (path, order["attempt"], order["checkpoint"]) == ("/training/start", 1, None)
    [slot] = await store.fetch("SELECT coalesce(rests_until > now(), false) AS rests FROM slots")
    assert slot.rests is rests


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (answers(202), "accepted"),
        (answers(409, "busy"), "refused"),
        (fails(httpx.ConnectError), "refused"),
        (fails(httpx.ReadTimeout), "unanswered"),
        (answers(500), "unanswered"),
    ],
)
async def test_a_delivery_is_measured_from_the_moment_the_operation_was_due(
    store: Store, database_url: str, answer: Answer, outcome: str
) -> None:
    await store.worker()
    id = await store.submit()
    await store.execute("UPDATE events SET at = now() - interval '1 h'")
    await store.execute("UPDATE operations SET not_before = now() - interval '100 s' WHERE id = :id", id=id)
    async with Deliveries(store, database_url, answer) as deliveries:
        await deliveries.settled(1)

    text = deliveries.telemetry.render("", None)[0].decode()
    counted, total = (
        {line.split('"')[1]: float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{")}
        for name in ("relight_dispatch_seconds_count", "relight_dispatch_seconds_sum")
    )
    assert counted == {"accepted": 0, "refused": 0, "unanswered": 0} | {outcome: 1}
    assert 100 <= total[outcome] < 400


@pytest.mark.parametrize(
    ("http_status", "code", "told"),
    [(404, "no_checkpoint", "checkpoint_missing"), (422, "checkpoint_corrupt", "checkpoint_corrupt")],
)
async def test_a_checkpoint_that_the_worker_cannot_use_is_marked_and_the_one_before_is_sent(
    store: Store, database_url: str, http_status: int, code: str, told: str
) -> None:
    await store.worker()
    run = await store.running()
    await store.report(run, started(), saved(run, 0), saved(run, 7))
    await store.expire(run)
    await store.lose(run)

    def once(request: httpx.Request) -> httpx.Response:
        step = json.loads(request.content)["checkpoint"]["step"]
        return answers(http_status, code)(request) if step == 7 else httpx.Response(202)

    async with Deliveries(store, database_url, once) as deliveries:
        sent = await deliveries.settled(2)

    assert [(path, order["checkpoint"]["step"]) for path, order in sent] == [
        ("/training/resume", 7),
        ("/training/resume", 0),
    ]
    statuses = await store.fetch("SELECT step, status FROM checkpoints ORDER BY step")
    assert [tuple(row) for row in statuses] == [(0, "committed"), (7, "corrupt")]
    errors = await store.fetch("SELECT error->>'code' AS code FROM attempts WHERE outcome = 'checkpoint_corrupt'")
    assert [tuple(row) for row in errors] == [(told,)]


async def test_a_redirect_is_a_refusal_and_followed_nowhere(store: Store, database_url: str) -> None:
    await store.worker()
    id = await store.submit()
    elsewhere = {"Location": "http://169.254.169.254/latest/meta-data"}
    async with Deliveries(store, database_url, lambda _: httpx.Response(307, headers=elsewhere)) as deliveries:
        sent = await deliveries.settled(1)

    assert [path for path, _ in sent] == ["/training/start"]
    assert (await store.get(id)).status is Status.PENDING


async def test_of_an_endless_answer_a_little_is_read_and_the_lease_tells(store: Store, database_url: str) -> None:
    sent_bytes = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent_bytes
        while True:
            sent_bytes += 2**16
            yield b" " * 2**16

    await store.worker()
    id = await store.submit()
    async with Deliveries(store, database_url, lambda _: httpx.Response(409, content=endless())) as deliveries:
        await deliveries.settled(1)

    assert sent_bytes < 2**20
    assert (await store.get(id)).status is Status.RUNNING


async def test_a_packed_answer_is_not_unpacked(store: Store, database_url: str) -> None:
    def packed(_: httpx.Request) -> httpx.Response:
        refusal = gzip.compress(json.dumps({"error": {"code": "busy", "message": "so it is"}}).encode())
        return httpx.Response(409, headers={"Content-Encoding": "gzip"}, content=refusal)

    await store.worker()
    id = await store.submit()
    async with Deliveries(store, database_url, packed) as deliveries:
        await deliveries.settled(1)

    assert (await store.get(id)).status is Status.RUNNING


async def test_that_nobody_is_there_is_told_before_an_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is off answers nothing at all: its operation must not wait for the lease."""
    monkeypatch.setattr("ops_backend.worker_calls.CONNECT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        host, port = full.getsockname()
        with contextlib.ExitStack() as waiting:
            for _ in range(3):  # what is past the queue gets no answer from the kernel
                client = waiting.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex((host, port))
            async with httpx.AsyncClient() as http:
                with pytest.raises(httpx.ConnectTimeout):
                    await post(http, f"http://{host}:{port}", "secret", Wire(), timeout_s=30, max_bytes=1)


async def test_an_answer_that_drips_is_left_to_the_lease(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops_backend.dispatcher.ANSWER_S", 0.05)

    async def drips() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    await store.worker()
    id = await store.submit()
    async with Deliveries(store, database_url, lambda _: httpx.Response(409, content=drips())) as deliveries:
        await deliveries.settled(1)

    assert (await store.get(id)).status is Status.RUNNING


async def test_two_dispatchers_deliver_every_operation_once(store: Store, database_url: str) -> None:
    """Scenario 25."""
    await store.worker(slots=8)
    ids = [await store.submit() for _ in range(8)]
    seen: list[str] = []
    done = asyncio.Event()

    def take(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content)["operation_id"])
        if len(seen) >= len(ids):
            done.set()
        return httpx.Response(202)

    async with Deliveries(store, database_url, take), Deliveries(store, database_url, take), asyncio.timeout(30):
        await done.wait()

    assert sorted(seen) == sorted(map(str, ids))
    assert await store.claim() is None


async def test_a_start_whose_answer_was_lost_is_the_one_run(store: Store, database_url: str) -> None:
    """Scenario 20: the worker has it and reports; nobody sends it again."""
    worker = await store.worker()
    id = await store.submit()
    async with Deliveries(store, database_url, fails(httpx.ReadTimeout)) as deliveries:
        await deliveries.settled(1)
        run = await store.report(Held(id, 1, worker), started())
        assert (await store.heartbeat(worker, run)).ended == []
        await store.finish(run, Outcome.COMPLETED)
        await store.submit()
        sent = await deliveries.settled(2)

    assert [order["operation_id"] for _, order in sent].count(str(id)) == 1
    operation = await store.get(id)
    assert (operation.status, operation.attempt) == (Status.COMPLETED, 1)


async def test_the_slot_of_a_refused_start_is_given_to_nobody_while_it_rests(store: Store) -> None:
    await store.worker()
    await store.submit()
    claim = await store.claim()
    assert claim is not None
    await store.refuse(claim, rest_s=3600)
    assert await store.claim() is None
    assert held(claim).attempt == 1
