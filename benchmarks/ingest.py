"""How many points of metrics a second get into Postgres: ours over HTTP, COPY of rows, MLflow's log-batch.

So many writers at a time, each for a training of its own, send what they have and wait until it is committed. Ours are
an agent's reports to a real API process, with the credential of a registered worker; a report is packed as the trainer
packs it (`relight.training.reporting`), each of the loop's three metrics as one series. A full report has `MAX_WAITING`
points: so the trainer sends it when its steps take microseconds. A small one has what `FLUSH_S` holds of a training of
40 steps a second. The agent sends what is there (`ops_worker.delivery`): one report when the API keeps up, and
`BATCH_REPORTS` at once of those that have waited. COPY is asyncpg's `copy_records_to_table` into a table keyed by
operation, name and step, through the socket that our API has too, with the same points in a transaction. MLflow's
tracking server, with its defaults and the same Postgres behind it, gets 1000 metrics a request, which is the most that
it takes. Every writer makes what it sends from the same values, within the clock.

    .venv/bin/python benchmarks/ingest.py
"""

import argparse
import asyncio
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import lines
import servers
import uvloop
from filling import connect
from lifecycle import JOB, Hold, SimulatedWorker, simulated_worker
from speaking import STARTED, Connection

from ops_contract.reports import Metrics, Progress, Series
from ops_worker.delivery import BATCH_REPORTS
from relight.training.reporting import FLUSH_S, MAX_WAITING

NAMES = ("epoch", "learning_rate", "loss")
WRITERS = 4
MLFLOW_POINTS = 1000


@dataclass(frozen=True)
class Batch:
    """What a request of ours carries, and a transaction of COPY."""

    reports: int
    steps: int  # of a report

    @property
    def points(self) -> int:
        return self.reports * self.steps * len(NAMES)


FULL, SMALL = math.ceil(MAX_WAITING / len(NAMES)), round(40 * FLUSH_S)
BATCHES = {
    "a full report": Batch(1, FULL),
    "small reports that have waited": Batch(BATCH_REPORTS, SMALL),
    "one small report": Batch(1, SMALL),
}
VALUES = [random.random() for _ in range(max(batch.points for batch in BATCHES.values()))]
POINTS = """
    CREATE TABLE points (operation_id uuid, name text, step bigint, value float8, at timestamptz,
                         PRIMARY KEY (operation_id, name, step))
"""

PEERS = (
    ("COPY", "asyncpg's COPY of rows into a keyed table", 1.0),
    ("MLflow", f"MLflow's log-batch of {MLFLOW_POINTS} metrics", 20.0),
)

# One writer's: sends its next points, waits until they are committed, and says how many those were.
# MLflow's is always as large as it may be.
Send = Callable[[Any], Awaitable[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="at most, and none is begun after 100 s")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    lines.add_option(parser)
    given = parser.parse_args()
    servers.end_in_order()
    with tempfile.TemporaryDirectory() as directory, servers.postgres(Path(directory)) as (url, _):
        found = uvloop.run(measure(given, url, Path(directory)))
    told = [
        lines.ratio(
            f"metrics ingest over HTTP, {name}: {batch.points:,} points a request",
            against,
            found["ours", name],
            found[peer, name],
            "points/s",
            "≥",
            goal,
        )
        for name, batch in BATCHES.items()
        for peer, against, goal in PEERS
    ]
    print(
        f"{WRITERS} writers, turns of {given.seconds:g} s; {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}, asyncpg {asyncpg.__version__}, {servers.MLFLOW[0]}; "
        f"load {os.getloadavg()[0]:.1f}\n\n{lines.table(told)}"
    )
    lines.write(given.lines, told)


async def measure(given: argparse.Namespace, url: str, directory: Path) -> dict[tuple[str, str], list[float]]:
    """Points a second by way and batch, a value a round."""
    copied, tracked = await servers.database(url, "copied"), await servers.database(url, "mlflow")
    async with AsyncExitStack() as stack:
        api = stack.enter_context(servers.ours(url, directory))
        address = stack.enter_context(servers.mlflow(tracked, directory))
        ours = await stack.enter_async_context(holds(api))
        rows = await stack.enter_async_context(tables(copied))
        theirs = await stack.enter_async_context(mlflow_runs(address))
        ways = [(who, name) for name in BATCHES for who in ("ours", "COPY")] + [("MLflow", "")]
        sends = {"ours": ours, "COPY": rows, "MLflow": theirs}
        found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for who, name in ways:
            await rate(sends[who], BATCHES.get(name), given.seconds / 4)  # the first ones are slower
        began_s = time.monotonic()
        for round in range(given.rounds):
            if time.monotonic() - began_s > 100:
                break
            for i in range(len(ways)):
                who, name = ways[(i + round) % len(ways)]
                await checkpoint(url)
                found[who, name].append(await rate(sends[who], BATCHES.get(name), given.seconds))
    return found | {("MLflow", name): found["MLflow", ""] for name in BATCHES}


async def checkpoint(url: str) -> None:
    """So that no turn pays for another's pages."""
    connection = await connect(url)
    await connection.execute("CHECKPOINT")
    await connection.close()


async def rate(sends: list[Send], batch: Batch | None, seconds: float) -> float:
    """Points a second, of what was begun before the time was over."""
    began_s = time.monotonic()

    async def write(send: Send) -> int:
        points = 0
        while time.monotonic() - began_s < seconds:
            points += await send(batch)
        return points

    points = sum(await asyncio.gather(*(write(send) for send in sends)))
    return points / (time.monotonic() - began_s)


def series_of(first: int, steps: int) -> dict[str, list[tuple[int, float]]]:
    """As the trainer's reporter has them at a flush."""
    numbers = range(first, first + steps)
    learning_rate = [(step, 0.001) for step in numbers]
    loss = list(zip(numbers, VALUES, strict=False))
    return dict(zip(NAMES, ([(step, float(step // 1000)) for step in numbers], learning_rate, loss), strict=True))


# ---- ours


@asynccontextmanager
async def holds(api: servers.Api) -> AsyncIterator[list[Send]]:
    """Trainings that a worker has begun, each with a connection of its own, as each has a sender in the agent."""
    began: asyncio.Queue[Hold] = asyncio.Queue()

    async def begin(_: SimulatedWorker, hold: Hold) -> None:
        await began.put(hold)

    async with simulated_worker(api, WRITERS, begin) as worker:
        http = Connection(api.port, api.token)
        for _ in range(WRITERS):
            status, _, answer = await http.request("POST", "/operations", JOB)
            assert status == 201, answer
        http.close()
        async with asyncio.timeout(30):
            sends = [await reports_of(worker, api, *await began.get()) for _ in range(WRITERS)]
        yield sends


async def reports_of(worker: SimulatedWorker, api: servers.Api, id: str, attempt: int) -> Send:
    http = Connection(api.port, worker.credential)
    sent, step = 0, 0

    async def report(reports: list[str], progress: str) -> None:
        nonlocal sent
        body = (
            f'{{"incarnation":"{worker.incarnation}","first_seq":{sent + 1},'
            f'"progress":{progress},"reports":[{",".join(reports)}]}}'
        )
        status, _, answer = await http.request("POST", f"/operations/{id}/attempts/{attempt}/reports", body)
        assert status == 200, answer
        sent += len(reports)

    async def send(batch: Batch) -> int:
        nonlocal step
        reports = []
        for _ in range(batch.reports):
            series = [Series.of(name, points) for name, points in series_of(step, batch.steps).items()]
            reports.append(Metrics(series=series).model_dump_json())
            step += batch.steps
        progress = Progress(step=step, steps_total=10**9, loss=0.5)
        await report(reports, progress.model_dump_json())
        return batch.points

    await report([STARTED], "null")
    return send


# ---- COPY


@asynccontextmanager
async def tables(url: str) -> AsyncIterator[list[Send]]:
    connections = [await connect(url) for _ in range(WRITERS)]
    await connections[0].execute(POINTS)
    yield [copy(connection) for connection in connections]
    for connection in connections:
        await connection.close()


def copy(connection: Any) -> Send:
    id, step = uuid4(), 0

    async def send(batch: Batch) -> int:
        nonlocal step
        at, steps = datetime.now(UTC), batch.reports * batch.steps
        series = series_of(step, steps)
        step += steps
        rows = [(id, name, n, value, at) for name, points in series.items() for n, value in points]
        await connection.copy_records_to_table("points", records=rows)
        return len(rows)

    return send


# ---- MLflow


@asynccontextmanager
async def mlflow_runs(address: str) -> AsyncIterator[list[Send]]:
    async with httpx.AsyncClient(base_url=f"{address}/api/2.0/mlflow", timeout=60, trust_env=False) as http:
        yield [batches_of(id, http) for id in await servers.mlflow_runs(address, WRITERS)]


def batches_of(id: str, http: httpx.AsyncClient) -> Send:
    step = 0

    async def send(_: None) -> int:
        nonlocal step
        steps = math.ceil(MLFLOW_POINTS / len(NAMES))
        at_ms = time.time_ns() // 1_000_000
        metrics = [
            {"key": name, "value": value, "timestamp": at_ms, "step": n}
            for name, points in series_of(step, steps).items()
            for n, value in points
        ][:MLFLOW_POINTS]
        step += steps
        await servers.mlflow_post(http, "/runs/log-batch", {"run_id": id, "metrics": metrics})
        return len(metrics)

    return send


if __name__ == "__main__":
    main()
