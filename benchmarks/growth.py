"""Whether the service stays as fast when much is stored: 10³ operations and 10⁵ points, beside 10⁶ and 10⁷.

Two databases of one cluster (the embedded one, with fsync), a real API process on each, and the same questions over
HTTP to both, in turn: rows cannot be taken away again, so a database that has grown is compared with one that has not,
at the same time. Stored operations are rows written by SQL, with attempts, holds, events and checkpoints; of every
tenth there are metrics. One in a hundred waits in the queue. Both have one live worker, which this process plays: it
takes starts, beats, reports.

Each block asks over a few connections, each of which sends its next request when it has an answer; the 99th percentile
of a block by that of the block beside it is the ratio. *Claim* is the time from sending a training's finish to the
arrival of the next start at the worker: the finish's transaction, the claim among all that waits, the start's delivery.
*Poll of any* takes any stored operation, *poll of the newest* what a first page shows, as those do who watch.

    .venv/bin/python benchmarks/growth.py                                         # the filling takes minutes
    .venv/bin/python benchmarks/growth.py --operations 20000 --points 200000      # a smaller one
"""

import argparse
import asyncio
import json
import os
import platform
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import md5
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import filling
import lines
import uvloop
from filling import connect
from lines import Line
from servers import postgres
from speaking import COMPLETED, STARTED, Connection, answers, credential_of, metrics_at, registration
from sqlalchemy import make_url

from ops_backend.database import migrate
from ops_contract.reports import Progress

FEW = (1_000, 100_000)
PENDING_SHARE = 100  # one in so many
SLOTS = 8
CONNECTIONS = 4
FILL_LIMIT_S = 900.0
BEAT_S = 4.0
GOAL = 1.5
SECONDS = {"claim": 4.0, "ingest": 3.0}  # of a block; else 2
LISTS = {"first page": "", "running": "&status=running", "failed": "&status=failed"}
JOB = json.dumps({"workload": "toy", "execution": {"accelerator": "cpu"}, "max_retries": 0, "priority": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--points", type=int, default=10_000_000)
    lines.add_option(parser)
    given = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f}; {CONNECTIONS} connections\n"
    )
    with tempfile.TemporaryDirectory() as directory, postgres(Path(directory)) as (url, _):
        measured = uvloop.run(measure(given, url, Path(directory)))
    print(f"\n{lines.table(measured)}")
    lines.write(given.lines, measured)


async def measure(given: argparse.Namespace, url: str, directory: Path) -> list[Line]:
    few, many = FEW, (given.operations, given.points)
    async with asyncio.timeout(FILL_LIMIT_S):
        urls = [await filled(url, f"of_{size[0]}", *size) for size in (few, many)]
    with servers(urls, directory) as (ports, token):
        sides = [Side(port, token, size[0]) for port, size in zip(ports, (few, many), strict=True)]
        async with asyncio.TaskGroup() as group:
            beating = [group.create_task(side.work()) for side in sides]
            for side in sides:
                await side.begin()
            took_ms = await rounds(given.rounds, sides)
            for task in beating:
                task.cancel()
    return tell(took_ms, few, many)


async def filled(url: str, name: str, operations: int, points: int) -> str:
    """A database of its own, with so much in it."""
    connection = await connect(url)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    address = make_url(url).set(database=name)
    await migrate(address.set(drivername="postgresql+asyncpg").render_as_string(hide_password=False))
    made = address.render_as_string(hide_password=False)
    with_points = -(-operations // 10)
    took_s = await filling.fill(made, 0, operations, round(points / with_points / filling.POINTS_A_ROW))
    connection = await connect(made)
    # Older than all else, so that the first page of a list has the same kind of operations on both sides.
    await filling.wait(connection, operations // PENDING_SHARE + SLOTS, timedelta(days=500))
    await connection.execute("VACUUM ANALYZE")
    await connection.execute("CHECKPOINT")
    rows = await connection.fetchrow(
        "SELECT (SELECT count(*) FROM operations), (SELECT sum(cardinality(steps)) FROM metrics),"
        " pg_database_size(current_database()) / 1e6"
    )
    await connection.close()
    print(f"{rows[0]:,} operations, {rows[1]:,} points, {rows[2]:,.0f} MB; written in {took_s:.0f} s", flush=True)
    return made


@contextmanager
def servers(urls: Sequence[str], directory: Path) -> Iterator[tuple[list[int], str]]:
    """Their ports, and the token of both."""
    token, storage, running = secrets.token_hex(16), directory / "files", list[subprocess.Popen[bytes]]()
    storage.mkdir()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OPS_")}
    environ |= {"OPS_API_TOKEN": token, "OPS_PORT": "0", "OPS_STORAGE_ROOT": str(storage)}
    command = [sys.executable, "-m", "ops_backend", "server", "--json"]
    with (directory / "server.log").open("ab") as log:
        try:
            for url in urls:
                its = environ | {"OPS_DATABASE_URL": url}
                running.append(subprocess.Popen(command, env=its, stdout=subprocess.PIPE, stderr=log))
            yield [int(json.loads(p.stdout.readline())["url"].rpartition(":")[2]) for p in running], token  # type: ignore[union-attr]
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.communicate()


@dataclass
class Side:
    """One server, and the worker that it has."""

    port: int
    token: str
    stored: int
    incarnation: UUID = field(default_factory=uuid4)
    held: list["Attempt"] = field(default_factory=list)
    starts: "asyncio.Queue[tuple[Attempt, float]]" = field(default_factory=asyncio.Queue)
    newest: list[str] = field(default_factory=list)

    async def work(self) -> None:
        """Take starts and beat, until cancelled."""
        server = await asyncio.start_server(answers(self._take), "127.0.0.1", 0)
        slots = [{"index": index, "device": "cpu", "cores": 1} for index in range(SLOTS)]
        offer = registration(self.incarnation, server.sockets[0].getsockname()[1]) | {"slots": slots}
        await self.ask(Connection(self.port, self.token), "POST", "/workers", json.dumps(offer), 201)
        connection = self.as_worker()
        while True:
            beat = {"holds": [{"operation_id": each.id, "attempt": each.number} for each in self.held]}
            await self.ask(connection, "POST", f"/workers/{self.incarnation}/heartbeat", json.dumps(beat))
            await asyncio.sleep(BEAT_S)

    async def begin(self) -> None:
        """Every slot has an attempt that has started."""
        connection = self.as_worker()
        async with asyncio.timeout(60.0):
            for _ in range(SLOTS):
                attempt, _ = await self.starts.get()
                await self.report(connection, attempt, STARTED)

    def as_worker(self) -> Connection:
        return Connection(self.port, credential_of(self.incarnation))

    async def report(self, connection: Connection, attempt: "Attempt", *reports: str) -> None:
        progress = Progress(step=attempt.step, loss=0.5, steps_total=10**6).model_dump_json()
        body = (
            f'{{"incarnation":"{self.incarnation}","first_seq":{attempt.seq},"progress":{progress},'
            f'"reports":[{",".join(reports)}]}}'
        )
        await self.ask(connection, "POST", f"/operations/{attempt.id}/attempts/{attempt.number}/reports", body)
        attempt.seq += len(reports)

    async def ask(self, connection: Connection, method: str, path: str, body: str = "", wished: int = 200) -> bytes:
        """Raises RuntimeError for any other answer: a benchmark of refusals would be a fast one."""
        status, _, answer = await connection.request(method, path, body)
        if status != wished:
            raise RuntimeError(f"{method} {path} was answered {status}: {answer.decode()}")
        return answer

    def _take(self, order: dict[str, Any]) -> int:
        attempt = Attempt(order["operation_id"], order["attempt"])
        self.held.append(attempt)
        self.starts.put_nowait((attempt, time.monotonic()))
        return 202


@dataclass
class Attempt:
    id: str
    number: int
    seq: int = 1
    step: int = 0


Block = Callable[[Side, Connection, list[float]], Awaitable[None]]


async def poll_of_the_newest(side: Side, connection: Connection, took_ms: list[float]) -> None:
    await timed(side, connection, f"/operations/{random.choice(side.newest)}", took_ms)


async def poll_of_any(side: Side, connection: Connection, took_ms: list[float]) -> None:
    id = UUID(md5(f"o{random.randrange(side.stored)}".encode()).hexdigest())
    await timed(side, connection, f"/operations/{id}", took_ms)


def listing(query: str) -> Block:
    async def page(side: Side, connection: Connection, took_ms: list[float]) -> None:
        await timed(side, connection, f"/operations?limit=50{query}", took_ms)

    return page


async def timed(side: Side, connection: Connection, path: str, took_ms: list[float]) -> None:
    began_s = time.monotonic()
    await side.ask(connection, "GET", path)
    took_ms.append((time.monotonic() - began_s) * 1e3)


async def ingest(side: Side, connection: Connection, took_ms: list[float]) -> None:
    """Three series of ten points each, of an attempt that no other connection reports for meanwhile."""
    attempt = side.held.pop(0)
    try:
        attempt.step += 10
        body, began_s = metrics_at(attempt.step), time.monotonic()
        await side.report(connection, attempt, body)
        took_ms.append((time.monotonic() - began_s) * 1e3)
    finally:
        side.held.append(attempt)


class Claims:
    """A finish frees a slot, so another one starts: which one of those that are under way, nobody can tell apart."""

    def __init__(self) -> None:
        self._finished_s: deque[float] = deque()

    async def __call__(self, side: Side, connection: Connection, took_ms: list[float]) -> None:
        user = Connection(side.port, side.token)
        # Before all that waits, which stays as much as it is; there is no slot for it yet.
        await side.ask(user, "POST", "/operations", JOB, 201)
        user.close()
        attempt = side.held.pop(0)
        self._finished_s.append(time.monotonic())
        await side.report(connection, attempt, COMPLETED)
        async with asyncio.timeout(30.0):
            successor, at_s = await side.starts.get()
        took_ms.append((at_s - self._finished_s.popleft()) * 1e3)
        await side.report(connection, successor, STARTED)


BLOCKS: dict[str, Block] = {
    "poll of the newest": poll_of_the_newest,
    "poll of any": poll_of_any,
    **{f"list, {name}": listing(query) for name, query in LISTS.items()},
    "ingest": ingest,
    "claim": Claims(),
}
Took = dict[str, tuple[list[list[float]], list[list[float]]]]


async def rounds(number: int, sides: Sequence[Side]) -> Took:
    """Times in ms, of each block of the few and of the many; another side begins each round. The first is a warm-up."""
    took_ms: Took = {name: ([], []) for name in BLOCKS}
    for round in range(number + 1):
        for name, block in BLOCKS.items():
            for i in range(len(sides)):
                which = (i + round) % len(sides)
                found = await run(sides[which], block, SECONDS.get(name, 2.0) if round else 0.5)
                if round:
                    took_ms[name][which].append(found)
    return took_ms


async def run(side: Side, block: Block, seconds: float) -> list[float]:
    page = json.loads(await side.ask(Connection(side.port, side.token), "GET", "/operations?limit=50"))
    side.newest = [item["id"] for item in page["items"]]
    took_ms: list[float] = []
    until_s = time.monotonic() + seconds

    async def one() -> None:
        agents = block is ingest or isinstance(block, Claims)
        connection = side.as_worker() if agents else Connection(side.port, side.token)
        while time.monotonic() < until_s:
            await block(side, connection, took_ms)
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(one())
    return took_ms


def tell(took_ms: Took, few: tuple[int, int], many: tuple[int, int]) -> list[Line]:
    print("\n| | asked | p50, ms, few | many | p99, ms, few | many |\n|---|---|---|---|---|---|")
    found = []
    for name, sides in took_ms.items():
        p50, p99 = ([[lines.quantile(block, percent) for block in side] for side in sides] for percent in (50, 99))
        asked = sum(len(block) for side in sides for block in side)
        cells = [lines.spread(each) for each in (*p50, *p99)]
        print(f"| {name} | {asked} | {' | '.join(cells)} |")
        what = f"{name}, p99 at {many[0]:.0e} operations and {many[1]:.0e} points"
        found.append(lines.ratio(what, f"at {few[0]:.0e} and {few[1]:.0e}", p99[1], p99[0], "ms", "≤", GOAL))
    return found


if __name__ == "__main__":
    main()
