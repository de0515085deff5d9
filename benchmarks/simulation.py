"""Simulated workers, who also submit their work, and simulated readers: each a process of `scale.py`."""

import asyncio
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import lines
from speaking import (
    COMPLETED,
    FAILED,
    STARTED,
    Connection,
    answers,
    checkpoint_at,
    credential_of,
    is_for_later,
    metrics_at,
    pause,
    registration,
)

from ops_contract.reports import Progress

RAMP_S = 45.0  # until the wished share of the workers trains, at most
BUSY = 0.8
FAILING = 0.05
DYING_A_MINUTE = 0.02  # of all workers
READS_A_SECOND = 40.0
LISTS_A_SECOND = 2.0
LISTS = {
    "newest": "",
    "status": "&status=running",
    "label": "&label=team%3Dt7",
    "q": "&q=train-77",
    "rare status": "&status=cancelling",
    "no label": "&label=team%3Dnobody",
    "no q": "&q=nowhere",
}


async def wishes() -> AsyncIterator[dict[str, Any]]:
    """What the benchmark asks its child for."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        yield json.loads(line)


class Refused(Exception):
    pass


@dataclass
class Counts:
    """Of a window."""

    beat_ms: list[float] = field(default_factory=list)
    dispatch_ms: list[float] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)


class Fleet:
    """The process of all simulated workers, which submits their work too."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.ports: list[int] = about["ports"]
        self.token: str = about["token"]
        self.training_s: float = about["training_s"]
        self.report_s: float = about["report_s"]
        self.settle_s: float = about["settle_s"]
        self.lease_s: float = about["lease_s"]
        self.counts = Counts()
        self.workers: dict[UUID, SimulatedWorker] = {}
        self.dead: list[UUID] = []
        self.submitted_s: dict[str, float] = {}
        self.began_s: dict[str, float] = {}
        self.running = 0
        self.wanted = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        server = await asyncio.start_server(answers(self._take), "127.0.0.1", 0, backlog=2048)
        self.port: int = server.sockets[0].getsockname()[1]
        keepers = [asyncio.create_task(self._submit()), asyncio.create_task(self._kill())]
        async for wish in wishes():
            if "workers" in wish:
                await self._have(wish["workers"])
                answer = {"workers": len(self.workers)}
            else:
                answer = await self._window(wish["seconds"])
            print(json.dumps(answer), flush=True)
        for task in (*keepers, *self.tasks):
            task.cancel()

    def spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _have(self, number: int) -> None:
        turns = asyncio.Semaphore(8)

        async def register() -> None:
            async with turns:
                await self._register()

        await asyncio.gather(*(register() for _ in range(number - len(self.workers))))
        self.wanted = round(BUSY * number)
        until_s = time.monotonic() + RAMP_S
        while self.running < 0.9 * self.wanted and time.monotonic() < until_s:  # noqa: ASYNC110 - not worth an event
            await asyncio.sleep(0.2)
        await asyncio.sleep(self.settle_s)

    async def _register(self) -> None:
        incarnation = uuid4()
        port = self.ports[len(self.workers) % len(self.ports)]
        connection, body = Connection(port, self.token), json.dumps(registration(incarnation, self.port))
        failures = 0
        while True:
            status, headers, answer = 503, {}, b""
            with suppress(OSError, TimeoutError):
                status, headers, answer = await connection.request("POST", "/workers", body)
            if not is_for_later(status):
                break
            failures += 1
            self.counts.seen["errors"] += 1
            await pause(failures, headers)
        connection.close()
        if status != 201:
            raise Refused(answer.decode())
        worker = SimulatedWorker(self, incarnation, port, json.loads(answer)["heartbeat_s"])
        self.workers[incarnation] = worker
        worker.beating = self.spawn(worker.beat())

    async def _window(self, seconds: float) -> dict[str, Any]:
        self.counts = counts = Counts()
        began_s, asked = time.monotonic(), Connection.asked
        await asyncio.sleep(seconds)
        lasted_s = max(time.monotonic() - began_s, 1e-3)
        seen = counts.seen
        return {
            "requests/s": (Connection.asked - asked) / lasted_s,
            "beats/s": len(counts.beat_ms) / lasted_s,
            "beat p50": lines.quantile(counts.beat_ms, 50),
            "beat p99": lines.quantile(counts.beat_ms, 99),
            "beats late": seen["late"],
            "reports/s": seen["reports"] / lasted_s,
            "starts/s": len(counts.dispatch_ms) / lasted_s,
            "dispatch p50": lines.quantile(counts.dispatch_ms, 50),
            "dispatch p99": lines.quantile(counts.dispatch_ms, 99),
            "errors": seen["errors"],
            "deaths": seen["deaths"],
            "dead": [str(id) for id in self.dead],
        }

    async def _submit(self) -> None:
        """So that `wanted` trainings run, and no more wait than could begin at once."""
        connections = [Connection(port, self.token) for port in self.ports]
        body = json.dumps(
            {"workload": "toy", "execution": {"accelerator": "cpu"}, "max_retries": 0, "labels": {"team": "t7"}}
        )
        number = failures = 0
        while True:
            await asyncio.sleep(0.005)
            if self.running + len(self.submitted_s) >= self.wanted or len(self.submitted_s) >= 50:
                continue
            number += 1
            status, headers, answer = 503, {}, b""
            with suppress(OSError, TimeoutError):
                status, headers, answer = await connections[number % len(connections)].request(
                    "POST", "/operations", body
                )
            if status != 201:
                self.counts.seen["errors"] += 1
                failures += 1
                await pause(failures, headers)
                continue
            failures = 0
            id = json.loads(answer)["id"]
            if self.began_s.pop(id, None) is not None:
                self.counts.dispatch_ms.append(0.0)  # its start was here before the answer
            else:
                self.submitted_s[id] = time.monotonic()
            for id, at_s in list(self.submitted_s.items()):
                if time.monotonic() - at_s > 120:
                    del self.submitted_s[id]

    async def _kill(self) -> None:
        while True:
            await asyncio.sleep(1)
            busy = [worker for worker in self.workers.values() if worker.training]
            if len(busy) > 10 and random.random() < DYING_A_MINUTE / 60 * len(self.workers):
                victim = random.choice(busy)
                victim.die()
                del self.workers[victim.incarnation]
                self.dead.append(victim.incarnation)
                self.counts.seen["deaths"] += 1
                with suppress(OSError, TimeoutError, Refused):
                    await self._register()

    def _take(self, order: dict[str, Any]) -> int:
        worker = self.workers.get(UUID(order["incarnation"])) if "operation_id" in order else None
        if worker is None or worker.training:
            return 409
        if (at_s := self.submitted_s.pop(order["operation_id"], None)) is not None:
            self.counts.dispatch_ms.append((time.monotonic() - at_s) * 1e3)
        elif order["attempt"] == 1:
            self.began_s[order["operation_id"]] = time.monotonic()
        worker.training = (order["operation_id"], order["attempt"])
        worker.working = self.spawn(worker.train())
        return 202


class SimulatedWorker:
    def __init__(self, fleet: Fleet, incarnation: UUID, port: int, heartbeat_s: float) -> None:
        self.incarnation = incarnation
        self.training: tuple[str, int] | None = None
        self.beating: asyncio.Task[None] | None = None
        self.working: asyncio.Task[None] | None = None
        self._fleet = fleet
        self._heartbeat_s = heartbeat_s
        self._beats = Connection(port, credential_of(incarnation))
        self._reports = Connection(port, credential_of(incarnation))
        self._failures = 0

    def die(self) -> None:
        for task in (self.beating, self.working):
            if task:
                task.cancel()
        self._beats.close()
        self._reports.close()

    async def beat(self) -> None:
        await asyncio.sleep(random.random() * self._heartbeat_s)
        heard_s = time.monotonic()
        while True:
            pause_s = self._heartbeat_s
            began_s = time.monotonic()
            try:
                await self._beat()
                self._fleet.counts.beat_ms.append((time.monotonic() - began_s) * 1e3)
                if time.monotonic() - heard_s > self._fleet.lease_s:
                    self._fleet.counts.seen["late"] += 1
                heard_s = time.monotonic()
            except (OSError, TimeoutError, Refused):
                self._fleet.counts.seen["errors"] += 1
                self._fleet.counts.seen["late"] += time.monotonic() - heard_s > self._fleet.lease_s
                pause_s = self._fleet.lease_s / 12
            await asyncio.sleep(pause_s)

    async def _beat(self) -> None:
        listed = [{"operation_id": self.training[0], "attempt": self.training[1]}] if self.training else []
        path = f"/workers/{self.incarnation}/heartbeat"
        status, _, answer = await self._beats.request(
            "POST", path, json.dumps({"holds": listed}), timeout_s=self._fleet.lease_s / 3
        )
        if status != 200:
            raise Refused(answer.decode())
        if json.loads(answer)["ended"] and self.working:
            self.working.cancel()

    async def train(self) -> None:
        """Reports as an agent does: one request at a time, all that waits in it."""
        assert self.training is not None
        fleet, (id, attempt) = self._fleet, self.training
        fleet.running += 1
        try:
            until_s = time.monotonic() + fleet.training_s * random.uniform(0.1, 1.9)  # so that some end in every window
            seq, step, waiting = 1, 0, [STARTED]
            due_s = time.monotonic()
            while time.monotonic() < until_s:
                while due_s <= time.monotonic():
                    due_s += fleet.report_s
                    step += 10
                    waiting.append(metrics_at(step))
                    if step % 100 == 0:
                        waiting.append(checkpoint_at(id, attempt, step))
                seq, waiting = await self._send(id, attempt, seq, waiting, step)
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            waiting.append(FAILED if random.random() < FAILING else COMPLETED)
            while waiting:
                seq, waiting = await self._send(id, attempt, seq, waiting, step)
        except Refused as refusal:
            print(f"refused: {refusal}", file=sys.stderr)
            fleet.counts.seen["errors"] += 1
        finally:
            fleet.running -= 1
            self.training = None

    async def _send(self, id: str, attempt: int, seq: int, waiting: list[str], step: int) -> tuple[int, list[str]]:
        """The next number, and what still waits."""
        if not waiting:
            return seq, waiting
        progress = Progress(step=step, loss=0.5, steps_total=10_000).model_dump_json()
        body = (
            f'{{"incarnation":"{self.incarnation}","first_seq":{seq},"progress":{progress},'
            f'"reports":[{",".join(waiting)}]}}'
        )
        status, headers, answer = 503, {}, b""
        with suppress(OSError, TimeoutError):
            path = f"/operations/{id}/attempts/{attempt}/reports"
            status, headers, answer = await self._reports.request("POST", path, body)
        if status == 200:
            self._fleet.counts.seen["reports"] += 1
            self._failures = 0
            return seq + len(waiting), []
        if not is_for_later(status):
            raise Refused(answer.decode())
        self._fleet.counts.seen["errors"] += 1
        self._failures += 1
        await pause(self._failures, headers)
        return seq, waiting


class Readers:
    """The process that polls and lists, each at its time whatever the answers take."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.ports: list[int] = about["ports"]
        self.token: str = about["token"]
        self.took_ms: dict[str, list[float]] = defaultdict(list)
        self.seen: Counter[str] = Counter()
        self.free: list[Connection] = []
        self.tags: dict[str, str] = {}
        self.asked = 0

    async def run(self) -> None:
        async for wish in wishes():
            print(json.dumps(await self._window(wish["seconds"])), flush=True)

    async def _window(self, seconds: float) -> dict[str, Any]:
        self.took_ms, self.seen = defaultdict(list), Counter()
        ids: list[str] = []
        for failures in range(5):
            status, headers, answer = 503, {}, b""
            with suppress(OSError, TimeoutError):
                first = Connection(self.ports[0], self.token)
                status, headers, answer = await first.request("GET", "/operations?limit=50")
                first.close()
            if status == 200:
                ids = [item["id"] for item in json.loads(answer)["items"]]
                break
            await pause(failures, headers)
        asked = Connection.asked
        began_s, tasks = time.monotonic(), []
        lists = list(LISTS.items())
        polls = [(n / READS_A_SECOND, ids[n % len(ids)], None) for n in range(int(READS_A_SECOND * seconds)) if ids]
        pages = [
            (n / LISTS_A_SECOND, lists[n % len(lists)][0], lists[n % len(lists)][1])
            for n in range(int(LISTS_A_SECOND * seconds))
        ]
        for at_s, what, query in sorted([*polls, *pages], key=lambda each: each[0]):
            await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
            tasks.append(asyncio.create_task(self._poll(what) if query is None else self._list(what, query)))
        await asyncio.gather(*tasks)
        polled, listed = self.took_ms["poll"], [ms for name in LISTS for ms in self.took_ms[name]]
        return {
            "requests/s": (Connection.asked - asked) / max(time.monotonic() - began_s, seconds, 1e-3),
            "poll p50": lines.quantile(polled, 50),
            "poll p99": lines.quantile(polled, 99),
            "304": self.seen["304"] / max(len(polled), 1),
            "list p99": lines.quantile(listed, 99),
            "failed reads": self.seen["failed"],
        } | {f"list {name}": lines.quantile(self.took_ms[name], 50) for name in LISTS}

    async def _poll(self, id: str) -> None:
        status, headers = await self._get("poll", f"/operations/{id}", self.tags.get(id, ""))
        self.seen[str(status)] += 1
        if status == 200:
            self.tags[id] = headers.get("etag", "")

    async def _list(self, name: str, query: str) -> None:
        await self._get(name, f"/operations?limit=50{query}")

    async def _get(self, name: str, path: str, tag: str = "") -> tuple[int, dict[str, str]]:
        self.asked += 1
        connection = self.free.pop() if self.free else Connection(self.ports[self.asked % len(self.ports)], self.token)
        began_s = time.monotonic()
        try:
            status, headers, _ = await connection.request("GET", path, tag=tag)
        except (OSError, TimeoutError):
            status, headers = 0, {}
        self.took_ms[name].append((time.monotonic() - began_s) * 1e3)
        self.seen["failed"] += status not in (200, 304)
        self.free.append(connection)
        return status, headers
