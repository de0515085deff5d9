"""What memory the service takes under load, and whether it grows: the agent's process, and the backend's.

The service is what `ops up` runs, by the same supervisor: embedded Postgres, API, one worker. Real trainings run on it
one after another, some of them cancelled, and all the while operations are polled, listed, their metrics, events and
streams read. Every few seconds the memory of two processes is read: the agent's without its trainers, the backend's
without Postgres. It is the proportional share (PSS, where a page that n processes map counts as an nth) or, where the
kernel does not tell that, what is resident (RSS). What is held against the limits is the largest after a warm-up of a
quarter of the time; growth is the median of the last quarter by that of the second.

    .venv/bin/python benchmarks/memory.py
    .venv/bin/python benchmarks/memory.py --minutes 20      # the soak
"""

import argparse
import asyncio
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lines
from lines import Line
from speaking import Connection

from ops_cli.stack import Stack, StackSettings
from ops_cli.up import free_port
from ops_contract.wire import API_PREFIX

LIVE = 3  # operations that run or wait
POLLS_A_SECOND = 50.0
LISTS_A_SECOND = 2.0
READS_A_SECOND = 5.0
WATCHED_S = 5.0
CANCELLED = 5  # one in so many
LIMITS_MB = {"agent": 80.0, "backend": 150.0}
GROWTH = 1.02
SAMPLES = 120
MEASURED = "Pss" if Path("/proc/self/smaps_rollup").exists() else "VmRSS"
KIND = "PSS" if MEASURED == "Pss" else "RSS"
TRAINING = {
    "workload": "digits",
    "execution": {"accelerator": "cpu", "max_epochs": 4, "checkpoint_every": {"steps": 20}},
    "labels": {"team": "soak"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="20 for the soak")
    lines.add_option(parser)
    given = parser.parse_args()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OPS_", "PYTHON"))}
    # So that their bytecode is there: a process that compiles what it imports keeps some of the memory of that.
    subprocess.run([sys.executable, "-c", "import ops_backend.app, ops_worker.__main__"], env=environ, check=True)
    with tempfile.TemporaryDirectory() as directory:
        settings = StackSettings(
            data_dir=Path(directory),
            token=secrets.token_hex(16),
            port=free_port(),
            worker_grace_s=10.0,
            environ=environ,
        )
        stack = Stack(settings, complain=print)
        try:
            stack.start()
            soak = Soak(stack, given.minutes * 60)
            asyncio.run(soak.run())
        finally:
            stack.stop()
    tell(soak)
    measured = soak.lines()
    print(lines.table(measured))
    lines.write(given.lines, measured)


@dataclass
class Soak:
    stack: Stack
    lasts_s: float
    ids: list[str] = field(default_factory=list)
    live: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    samples_mb: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LIMITS_MB})
    resident_mb: dict[str, float] = field(default_factory=dict)  # at the end

    async def run(self) -> None:
        """Raises what any of its readers raises."""
        pids = {"agent": self.stack.workers[0].pid, "backend": self.stack.server.pid}
        until_s = time.monotonic() + self.lasts_s
        async with asyncio.TaskGroup() as group:
            users = [
                group.create_task(self._regularly(1.0, self._submit)),
                group.create_task(self._regularly(1 / POLLS_A_SECOND, self._poll)),
                group.create_task(self._regularly(1 / LISTS_A_SECOND, self._list)),
                group.create_task(self._regularly(1 / READS_A_SECOND, self._read)),
                group.create_task(self._regularly(1.0, self._watch)),
            ]
            while time.monotonic() < until_s:
                await asyncio.sleep(self.lasts_s / SAMPLES)
                self.stack.turn()
                if pids != {"agent": self.stack.workers[0].pid, "backend": self.stack.server.pid}:
                    raise RuntimeError("a process ended and was started again: this is no soak")
                for name, pid in pids.items():
                    self.samples_mb[name].append(memory_mb(pid, MEASURED))
            self.resident_mb = {name: memory_mb(pid, "VmRSS") for name, pid in pids.items()}
            for user in users:
                user.cancel()

    async def _regularly(self, every_s: float, ask: Callable[[Connection], Awaitable[None]]) -> None:
        connection = self._connection()
        due_s = time.monotonic()
        while True:
            await ask(connection)
            due_s = max(due_s + every_s, time.monotonic() - 1.0)  # what was missed is not made up for
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))

    def _connection(self) -> Connection:
        return Connection(self.stack.settings.port, self.stack.settings.token)

    async def _submit(self, connection: Connection) -> None:
        """So that there are LIVE of them."""
        running = []
        for id in self.live:
            found = await self._get(connection, "", f"/operations/{id}")
            running += [id] if found["status"] in ("pending", "running", "cancelling") else []
            self.seen[found["status"]] += id not in running
        self.live = running
        while len(self.live) < LIVE:
            status, _, answer = await connection.request("POST", "/operations", json.dumps(TRAINING))
            if status != 201:
                raise RuntimeError(f"a submit was answered {status}: {answer.decode()}")
            self.live.append(json.loads(answer)["id"])
            self.ids.append(self.live[-1])
            self.seen["submitted"] += 1
            if self.seen["submitted"] % CANCELLED == 0:
                await connection.request("POST", f"/operations/{self.live[0]}/cancel", "{}")

    async def _poll(self, connection: Connection) -> None:
        if self.live:
            await self._get(connection, "polls", f"/operations/{self._one_of(self.live)}")

    async def _list(self, connection: Connection) -> None:
        query = self._one_of(["", "&status=completed", "&label=team%3Dsoak", "&q=digits"])
        await self._get(connection, "lists", f"/operations?limit=50{query}")

    async def _read(self, connection: Connection) -> None:
        if self.ids:
            id = self._one_of(self.ids[-10:])
            names = ["/metrics", "/metrics?name=loss", "/events", "/attempts", "/checkpoints", "/energy"]
            await self._get(connection, "other reads", f"/operations/{id}{self._one_of(names)}")

    async def _watch(self, _: Connection) -> None:
        """One that looks for a while and goes."""
        if not self.live:
            return
        reader, writer = await asyncio.open_connection("127.0.0.1", self.stack.settings.port)
        path, token = f"{API_PREFIX}/operations/{self.live[-1]}/stream", self.stack.settings.token
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        with suppress(TimeoutError):
            async with asyncio.timeout(WATCHED_S):
                while read := await reader.read(65_536):
                    self.seen["messages of streams"] += read.count(b"\ndata: ")
        writer.close()
        self.seen["streams"] += 1

    async def _get(self, connection: Connection, what: str, path: str) -> dict[str, Any]:
        status, _, answer = await connection.request("GET", path)
        if status not in (200, 404):  # a metric that has no point yet
            raise RuntimeError(f"{path} was answered {status}: {answer.decode()}")
        self.seen[what or "polls"] += 1
        found: dict[str, Any] = json.loads(answer)
        return found

    def _one_of(self, things: Sequence[str]) -> str:
        return secrets.choice(things)

    def lines(self) -> list[Line]:
        found = []
        for name, limit_mb in LIMITS_MB.items():
            samples = self.samples_mb[name]
            steady, quarter = samples[len(samples) // 4 :], len(samples) // 4
            what = f"memory of the {name} under load, the largest ({KIND})"
            # Ours are all samples, so that their spread is seen; the largest is what is held against the limit.
            found.append(Line(what, "the goal itself", steady, [], "MB", [max(steady)], "MB", "≤", limit_mb))
            growth = statistics.median(samples[-quarter:]) / statistics.median(samples[quarter : 2 * quarter])
            found.append(lines.limit(f"memory of the {name}, last quarter by second", [growth], "×", GROWTH))
        return found


def memory_mb(pid: int, field: str) -> float:
    path = Path(f"/proc/{pid}/{'smaps_rollup' if field == 'Pss' else 'status'}")
    kib = next(line.split()[1] for line in path.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(kib) * 1024 / 1e6


def tell(soak: Soak) -> None:
    seen = ", ".join(f"{number} {what}" for what, number in soak.seen.items() if number)
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f}; {soak.lasts_s / 60:g} minutes: {seen}\n"
    )
    columns = (
        f"{KIND}, MB",
        "first",
        "after a quarter",
        "half",
        "three quarters",
        "last",
        "largest",
        "resident, at the end",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, samples in soak.samples_mb.items():
        quarters = [samples[min(len(samples) - 1, len(samples) * i // 4)] for i in range(5)]
        print(f"| {name} | {' | '.join(f'{mb:.1f}' for mb in (*quarters, max(samples), soak.resident_mb[name]))} |")
    print()


if __name__ == "__main__":
    main()
