"""Simulated workers, the HTTP that they speak, and the database beside them: for benchmarks of the control plane."""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from ops_contract.agents import CREDENTIAL_PREFIX, WorkloadOffer
from ops_contract.reports import Exactness, Finish, Metrics, Progress, Series, Started
from ops_contract.wire import API_PREFIX

RAMP_S = 45.0  # until the wished share of the workers trains, at most
RETRY_CAP_S = 2.0
BUSY = 0.8
FAILING = 0.05
DYING_A_MINUTE = 0.02  # of all workers
IDLE_CLOSE_S = 4.5  # a little less than the API keeps a connection


@contextmanager
def postgres(directory: Path) -> Iterator[tuple[str, int]]:
    """As `ops up` runs it."""
    command = [sys.executable, "-m", "ops_backend", "db", "--data-dir", str(directory), "--json", "--exit-on-eof"]
    with (
        (directory / "db.log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        yield said["url"], said["pid"]
        process.communicate()


async def wishes() -> AsyncIterator[dict[str, Any]]:
    """What the benchmark asks its child for."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        yield json.loads(line)


# ---- HTTP, as cheap as it gets


class Refused(Exception):
    pass


class Connection:
    """One, kept while it is used; one request at a time."""

    asked = 0  # of all connections of this process

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._token = token
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used_s = 0.0
        self._turn = asyncio.Lock()

    async def request(
        self, method: str, path: str, body: str = "", tag: str = "", timeout_s: float = 30.0
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. Raises OSError, and TimeoutError."""
        async with self._turn:
            Connection.asked += 1
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._request(method, path, body, tag)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
        self._streams = None

    async def _request(self, method: str, path: str, body: str, tag: str) -> tuple[int, dict[str, str], bytes]:
        if self._streams and time.monotonic() - self._used_s > IDLE_CLOSE_S:
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        has = f"If-None-Match: {tag}\r\n" if tag else ""
        content = body.encode()
        head = f"{method} {API_PREFIX}{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self._token}\r\n{has}"
        if content:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        writer.write(f"{head}\r\n".encode() + content)
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            answer = await reader.readexactly(int(headers.get("content-length", 0)))
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("it was closed") from error
        self._used_s = time.monotonic()
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), headers, answer


def is_for_later(status: int) -> bool:
    """Says nothing of the request: an agent tries again."""
    return status in (408, 429) or status >= 500


async def pause(failures: int, headers: dict[str, str]) -> None:
    """As `ops_worker.waiting.Backoff`: longer after each failure in a row, and not before `Retry-After`, seconds."""
    said = headers.get("retry-after", "")
    backoff_s = min(RETRY_CAP_S, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)
    await asyncio.sleep(max(backoff_s, float(said) if said.isdecimal() else 0.0))


# ---- simulated workers


def answers(take: Callable[[dict[str, Any]], int]) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    """A server of what the API calls, which is starts: `take` gives the status of each."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
                status = take(json.loads(await reader.readexactly(length) or b"{}"))
                writer.write(b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\n" % status)
                writer.write(b"Content-Length: 2\r\n\r\n{}")
        writer.close()

    return serve


def registration(incarnation: UUID, port: int, cores: int = 1) -> dict[str, Any]:
    offer = WorkloadOffer(name="toy", config_schema={"type": "object"}, reports={"loss": "min"})
    return {
        "incarnation": str(incarnation),
        "credential": credential_of(incarnation),
        "secret": "s" * 43,
        "name": f"w-{incarnation.hex[:8]}",
        "host": f"h-{incarnation.hex[:8]}",
        "url": f"http://127.0.0.1:{port}",
        "slots": [{"index": 0, "device": "cpu", "cores": cores}],
        "workloads": [offer.model_dump()],
    }


def credential_of(incarnation: UUID) -> str:
    return CREDENTIAL_PREFIX + incarnation.hex + 11 * "0"


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
            "beat p50": quantile(counts.beat_ms, 50),
            "beat p99": quantile(counts.beat_ms, 99),
            "beats late": seen["late"],
            "reports/s": seen["reports"] / lasted_s,
            "starts/s": len(counts.dispatch_ms) / lasted_s,
            "dispatch p50": quantile(counts.dispatch_ms, 50),
            "dispatch p99": quantile(counts.dispatch_ms, 99),
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


STARTED = Started(
    trainer_pid=1,
    start_step=0,
    exactness=Exactness(promise="promised"),
    environment={"torch": "2.13.0", "python": "3.11"},
).model_dump_json()
COMPLETED = Finish.model_validate({"outcome": "completed"}).model_dump_json()
FAILED = Finish.model_validate(
    {"outcome": "failed", "permanent": True, "error": {"code": "exception", "message": "it raised"}}
).model_dump_json()
_VALUES = Series.of("loss", [(step, random.random()) for step in range(10)]).values


def metrics_at(step: int) -> str:
    steps = list(range(step - 9, step + 1))
    series = [Series(name=name, steps=steps, values=_VALUES) for name in ("epoch", "learning_rate", "loss")]
    return Metrics(series=series).model_dump_json()


def checkpoint_at(id: str, attempt: int, step: int) -> str:
    about = {
        "kind": "checkpoint",
        "checkpoint_id": str(uuid4()),
        "checkpoint_type": "periodic",
        "step": step,
        "epoch": 0,
    }
    about |= {"phase": "update", "path": f"{id}/{attempt}-{step}", "size_bytes": 1, "manifest_sha256": "0" * 64}
    return json.dumps(about)


def quantile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
