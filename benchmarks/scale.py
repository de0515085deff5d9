"""How far the control plane goes: many simulated workers and many stored operations against real API processes.

The API (one process, then two), Postgres (the embedded one, with fsync) and HTTP are real. Workers are simulated by a
process of its own: each registers, beats at the service's interval, takes starts, reports metrics as `delivery.py` does
(one request at a time, with all that waits; again after a pause, not before the API's `Retry-After`), commits rows of
checkpoints, finishes; some trainings fail, some workers die, so that their leases run out. Another process polls
statuses and lists, at a steady rate. Stored operations are rows written by SQL, with attempts, holds, events, and of
every tenth metrics and a checkpoint. What the simulation took of the cores is in the table.

    .venv/bin/python benchmarks/scale.py --into docs/performance.md    # 15 minutes at most
    .venv/bin/python benchmarks/scale.py --quick                       # less than one
"""

import argparse
import asyncio
import json
import os
import platform
import random
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import document
import filling
import psutil
import uvloop
from sqlalchemy import make_url

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.databases import connect
from ops_backend.database import Sessions, migrate
from ops_backend.store import workers
from ops_backend.store.claims import claim_next
from ops_contract.agents import CREDENTIAL_PREFIX, WorkerRegistration, WorkloadOffer
from ops_contract.reports import Exactness, Finish, Metrics, Progress, Series, Started
from ops_contract.wire import API_PREFIX

LEASE_S = 15.0
LONG_LEASE_S = 60.0  # with which a large fleet beats a quarter as often
RAMP_S = 45.0  # until the wished share of the workers trains, at most
FILL_AND_START_S = 60.0  # what a step takes at most beside its window
RETRY_CAP_S = 2.0
BUSY = 0.8
FAILING = 0.05
DYING_A_MINUTE = 0.02  # of all workers
READS_A_SECOND = 40.0
LISTS_A_SECOND = 2.0
IDLE_CLOSE_S = 4.5  # a little less than the API keeps a connection
LISTS = {
    "newest": "",
    "status": "&status=running",
    "label": "&label=team%3Dt7",
    "q": "&q=train-77",
    "rare status": "&status=cancelling",
    "no label": "&label=team%3Dnobody",
    "no q": "&q=nowhere",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test in less than a minute")
    parser.add_argument("--stored", type=int, nargs="+", default=[1_000, 1_000_000], help="operations, rising")
    parser.add_argument("--workers", type=int, nargs="+", default=[250, 500, 1000], help="rising")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each window")
    parser.add_argument("--settle-s", type=float, default=6.0, help="before each window")
    parser.add_argument("--minutes", type=float, default=15.0, help="no step begins that would end later")
    parser.add_argument("--into", type=Path, help="a file whose part between two marks becomes what was measured")
    parser.add_argument("--report-s", type=float, default=5.0, help="between two reports of a training")
    parser.add_argument("--training-s", type=float, default=90.0, help="how long a training takes")
    parser.add_argument("--backends", type=int, nargs="+", default=[1, 2], help="API processes")
    parser.add_argument("--pending", type=int, default=100_000, help="that wait while a claim finds nothing")
    parser.add_argument("--role", choices=["workers", "readers"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if given.role:
        role = Fleet if given.role == "workers" else Readers
        return uvloop.run(role(json.loads(sys.stdin.readline())).run())
    if given.quick:
        given.stored, given.workers, given.seconds, given.pending = [1_000, 10_000], [50], 4.0, 5_000
        given.training_s, given.settle_s, given.minutes = 5.0, 1.0, 5.0
    with tempfile.TemporaryDirectory() as directory, postgres(Path(directory)) as (url, pid):
        asyncio.run(Benchmark(given, url, pid, Path(directory)).run())


# ---- the processes


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


class Child:
    """A process of this benchmark: a line in, a line out."""

    def __init__(self, role: str, about: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--role", role]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._say(about)

    async def ask(self, **wish: Any) -> dict[str, Any]:
        self._say(wish)
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        if not line:
            raise RuntimeError(f"{self.process.args} has ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self.process.stdin, flush=True)


async def wishes() -> AsyncIterator[dict[str, Any]]:
    """What the benchmark asks its child for."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        yield json.loads(line)


# ---- the course


@dataclass
class Benchmark:
    given: argparse.Namespace
    url: str
    postgres_pid: int
    directory: Path
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    rows: list[dict[str, Any]] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    lost: int = 0
    began_s: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        await migrate(self._driver_url)
        self.tell_machine()
        stored = 0
        for wanted in self.given.stored:
            took_s = await filling.fill(self.url, stored, wanted)
            stored = wanted
            self.say(f"\n{stored:,} stored operations (written in {took_s:.0f} s)\n")
            self.say(f"{await self.sizes(stored)}\n\n{HEADER}")
            few = self.given.workers[:1] if wanted != self.given.stored[-1] else self.given.workers
            await self.climb(1, few)
        if self.given.backends[1:]:
            self.say(f"\n{HEADER}")
        for backends in self.given.backends[1:]:
            await self.climb(backends, self.given.workers[len(self.given.workers) // 2 :])
        self.say(f"\n{HEADER}")
        for backends in self.given.backends:
            await self.climb(backends, self.given.workers[-1:], LONG_LEASE_S)
        await self.tell_growth()
        await self.tell_claims()
        self.say(f"\nThe whole took {time.monotonic() - self.began_s:.0f} s.")
        if self.given.into:
            document.replace_between(self.given.into, "scale.py", "\n".join(self.said))

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.said.append(text)

    def has_time_for_a_step(self) -> bool:
        needed_s = self.given.seconds + FILL_AND_START_S
        return time.monotonic() - self.began_s + needed_s < self.given.minutes * 60

    @property
    def _driver_url(self) -> str:
        return make_url(self.url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)

    async def climb(self, backends: int, numbers: Sequence[int], lease_s: float = LEASE_S) -> None:
        """More and more workers."""
        with self.servers(backends, lease_s) as (ports, processes):
            about = {"ports": ports, "token": self.token, "training_s": self.given.training_s}
            about |= {"report_s": self.given.report_s, "settle_s": self.given.settle_s, "lease_s": lease_s}
            fleet = Child("workers", about)
            readers = Child("readers", about)
            try:
                for number in numbers:
                    if not self.has_time_for_a_step():
                        self.say(f"\n{number:,} workers: left out, there was no time for it.")
                        break
                    row = await self.step(number, fleet, readers, [process.pid for process in processes])
                    row |= {"backends": backends, "lease, s": lease_s}
                    self.rows.append(row)
                    self.say(table_row(row))
                self.dead += (await fleet.ask(seconds=0))["dead"]
            finally:
                readers.close()
                fleet.close()
        await self.forget_live()

    async def step(self, number: int, fleet: Child, readers: Child, servers: list[int]) -> dict[str, Any]:
        await fleet.ask(workers=number)
        pids = {
            "backend": servers,
            "postgres": [self.postgres_pid],
            "simulation": [fleet.process.pid, readers.process.pid],
        }
        before, began_s = {name: cpu_s(each) for name, each in pids.items()}, time.monotonic()
        ran, read = await asyncio.gather(fleet.ask(seconds=self.given.seconds), readers.ask(seconds=self.given.seconds))
        lasted_s = time.monotonic() - began_s
        cores = os.cpu_count() or 1
        used = {f"{name} cores": (cpu_s(each) - before[name]) / lasted_s / cores for name, each in pids.items()}
        used["requests/s"] = ran.pop("requests/s") + read.pop("requests/s")
        lost = await self.value(
            "SELECT count(*) FROM attempts a WHERE a.outcome = 'lost' AND NOT a.incarnation = ANY ($1::uuid[])",
            self.dead + ran.pop("dead"),
        )
        lost, self.lost = lost - self.lost, lost
        return {"workers": number, "stored": await self.count(), "wrongly lost": lost} | ran | read | used

    @contextmanager
    def servers(self, number: int, lease_s: float) -> Iterator[tuple[list[int], list[subprocess.Popen[bytes]]]]:
        storage = self.directory / "files"
        storage.mkdir(exist_ok=True)
        environ = os.environ | {"OPS_DATABASE_URL": self.url, "OPS_API_TOKEN": self.token, "OPS_PORT": "0"}
        environ |= {"OPS_STORAGE_ROOT": str(storage), "OPS_LEASE_S": str(lease_s)}
        command = [sys.executable, "-m", "ops_backend", "server", "--json"]
        with (self.directory / "server.log").open("ab") as log:
            running = [
                subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log) for _ in range(number)
            ]
        try:
            yield [int(json.loads(p.stdout.readline())["url"].rpartition(":")[2]) for p in running], running  # type: ignore[union-attr]
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.communicate()

    # ---- rows

    async def forget_live(self) -> None:
        """What the last fleet left: it is gone."""
        connection = await connect(self.url)
        await connection.execute("SET session_replication_role = replica")
        await connection.execute(
            "UPDATE operations SET status = 'cancelled', ended_at = now(), logged_event_seq = event_seq"
            " WHERE status IN ('pending', 'running', 'cancelling')"
        )
        await connection.execute("UPDATE holds SET ended_at = now() WHERE ended_at IS NULL")
        await connection.execute("UPDATE workers SET last_seen_at = now() - interval '2 days' WHERE NOT draining")
        await connection.close()

    async def count(self) -> int:
        return int(await self.value("SELECT reltuples FROM pg_class WHERE oid = 'operations'::regclass"))

    async def value(self, sql: str, *values: Any) -> Any:
        connection = await connect(self.url)
        try:
            return await connection.fetchval(sql, *values)
        finally:
            await connection.close()

    async def sizes(self, stored: int) -> str:
        connection = await connect(self.url)
        rows = await connection.fetch(SIZES)
        await connection.close()
        lines = ["| table | rows | bytes a row | its indexes, bytes a row |", "|---|---|---|---|"]
        lines += [
            f"| {r['name']} | {r['rows']:,} | {r['table_bytes'] / r['rows']:.0f} | {r['index_bytes'] / r['rows']:.0f} |"
            for r in rows
        ]
        whole = sum(r["table_bytes"] + r["index_bytes"] for r in rows)
        return "\n".join([*lines, f"\nAll together: {whole / 1e9:.2f} GB, {whole / stored:,.0f} bytes an operation."])

    # ---- what is said

    def tell_machine(self) -> None:
        self.say(
            f"{os.cpu_count()} cores, {platform.machine()}, {psutil.virtual_memory().total / 1e9:.0f} GB, "
            f"Python {platform.python_version()}, uvloop {uvloop.__version__}; load {os.getloadavg()[0]:.1f}; "
            f"windows of {self.given.seconds:g} s; {BUSY:.0%} of the workers train, for "
            f"{self.given.training_s:g} s, and report every {self.given.report_s:g} s; {FAILING:.0%} of them fail, "
            f"{DYING_A_MINUTE:.0%} of the workers die a minute; {READS_A_SECOND:g} polls and {LISTS_A_SECOND:g} lists "
            "a second. Times in ms; *cores* are shares of all cores; *simulation* is what this benchmark took itself."
        )

    async def tell_growth(self) -> None:
        least = (1, self.given.workers[0], LEASE_S)
        ones = [row for row in self.rows if (row["backends"], row["workers"], row["lease, s"]) == least]
        if len(ones) < 2:
            return
        few, many = ones[0], ones[-1]
        self.say(f"\n| median, ms | {few['stored']:,} stored | {many['stored']:,} stored | ratio |\n|---|---|---|---|")
        names = ["poll p50", "dispatch p50", "beat p50", *(f"list {name}" for name in LISTS)]
        for name in names:
            self.say(f"| {name} | {few[name]:.1f} | {many[name]:.1f} | {many[name] / max(few[name], 0.01):.1f}× |")

    async def tell_claims(self) -> None:
        """What a claim costs that finds nothing: it is made after every finish, and twice a second."""
        sessions = Sessions(self._driver_url, 2)
        connection = await connect(self.url)
        await filling.wait(connection, self.given.pending)
        await connection.execute("VACUUM ANALYZE operations")
        self.say(f"\n| {self.given.pending:,} operations wait, 100 live workers: one claim | ms |\n|---|---|")
        for about, slots in CLAIMS.items():
            async with sessions.begin() as session:
                for _ in range(100):
                    offer = registration(uuid4(), 1, cores=slots["cores"])
                    await workers.register(session, WorkerRegistration.model_validate(offer), LEASE_S, offer["url"])
            await connection.execute(slots["then"])
            took_ms = []
            for _ in range(3):
                async with sessions.begin() as session:
                    began_s = time.monotonic()
                    found = await claim_next(session, 3600.0)  # nobody beats for these workers
                    took_ms.append((time.monotonic() - began_s) * 1e3)
                    await session.rollback()
            self.say(f"| {about}{' (claimed)' if found else ''} | {statistics.median(took_ms):.0f} |")
            await connection.execute("UPDATE workers SET last_seen_at = now() - interval '2 days'")
        await connection.execute("SET session_replication_role = replica")
        await connection.execute("DELETE FROM operations WHERE status = 'pending'")
        await connection.close()
        await sessions.dispose()


def cpu_s(pids: Sequence[int]) -> float:
    """Of these and of all below them, those that have ended too."""
    total = 0.0
    for pid in pids:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                total += times.user + times.system
                total += times.children_user + times.children_system if each is process else 0.0
    return total


COLUMNS = {
    "backends": "d",
    "lease, s": "g",
    "workers": "d",
    "requests/s": ".0f",
    "beats/s": ".0f",
    "beat p99": ".0f",
    "beats late": "d",
    "wrongly lost": "d",
    "deaths": "d",
    "reports/s": ".0f",
    "starts/s": ".1f",
    "dispatch p50": ".0f",
    "dispatch p99": ".0f",
    "poll p50": ".0f",
    "poll p99": ".0f",
    "304": ".0%",
    "list p99": ".0f",
    "errors": "d",
    "failed reads": "d",
    "backend cores": ".0%",
    "postgres cores": ".0%",
    "simulation cores": ".0%",
}
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def table_row(row: dict[str, Any]) -> str:
    return f"| {' | '.join(format(row[name], form) for name, form in COLUMNS.items())} |"


CLAIMS: dict[str, dict[str, Any]] = {
    "every slot is taken": {
        "cores": 1,
        "then": "UPDATE slots SET rests_until = now() + interval '1 h'",
    },
    "slots are free, and fit none": {
        "cores": 1,
        "then": "UPDATE operations SET job = jsonb_set(job, '{resources,cores}', '2') WHERE status = 'pending'",
    },
    "slots are free, and fit the first": {"cores": 2, "then": "SELECT 1"},
}
SIZES = """
    SELECT c.relname AS name, greatest(c.reltuples, 1)::bigint AS rows, pg_table_size(c.oid) AS table_bytes,
           pg_indexes_size(c.oid) AS index_bytes
      FROM pg_class c
     WHERE c.relkind = 'r' AND c.relname IN ('operations', 'attempts', 'holds', 'events', 'metrics', 'checkpoints')
     ORDER BY pg_total_relation_size(c.oid) DESC
"""


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
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=2048)
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

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What the API calls: starts."""
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
                order = json.loads(await reader.readexactly(length) or b"{}")
                status = self._take(order) if "operation_id" in order else 404
                writer.write(b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\n" % status)
                writer.write(b"Content-Length: 2\r\n\r\n{}")
        writer.close()

    def _take(self, order: dict[str, Any]) -> int:
        worker = self.workers.get(UUID(order["incarnation"]))
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


# ---- readers


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
            "poll p50": quantile(polled, 50),
            "poll p99": quantile(polled, 99),
            "304": self.seen["304"] / max(len(polled), 1),
            "list p99": quantile(listed, 99),
            "failed reads": self.seen["failed"],
        } | {f"list {name}": quantile(self.took_ms[name], 50) for name in LISTS}

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


def quantile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    main()
