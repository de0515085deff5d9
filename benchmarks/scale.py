"""How far the control plane goes: many simulated workers and many stored operations against real API processes.

The API (one process, then two), Postgres (the embedded one, with fsync) and HTTP are real. Workers are simulated by a
process of its own: each registers, beats at the service's interval, takes starts, reports metrics as `delivery.py` does
(one request at a time, with all that waits; again after a pause, not before the API's `Retry-After`), commits rows of
checkpoints, finishes; some trainings fail, some workers die, so that their leases run out. Another process polls
statuses and lists, at a steady rate. Stored operations are rows written by SQL, with attempts, holds, events, and of
every tenth metrics and a checkpoint. What the simulation took of the cores is in the table.

    .venv/bin/python benchmarks/scale.py --into docs/performance.md    # 15 minutes at most
    .venv/bin/python benchmarks/scale.py --quick                       # about one
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import document
import filling
import psutil
import uvloop
from servers import postgres
from simulation import BUSY, DYING_A_MINUTE, FAILING, LISTS, LISTS_A_SECOND, READS_A_SECOND, Fleet, Readers
from speaking import registration
from sqlalchemy import make_url

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.databases import connect
from ops_backend.database import Sessions, migrate
from ops_backend.store import workers
from ops_backend.store.claims import claim_next
from ops_contract.agents import WorkerRegistration

LEASE_S = 15.0
LONG_LEASE_S = 60.0  # with which a large fleet beats a quarter as often
FILL_AND_START_S = 60.0  # what a step takes at most beside its window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test of about a minute")
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


if __name__ == "__main__":
    main()
