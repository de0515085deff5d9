"""What a poll of `GET /operations/{id}` costs: ours, a FastAPI route with a query each, a bare ASGI callable, MLflow.

The first three are served by uvicorn as `ops server` sets it up, and polled in turn by a process of its own over raw
sockets, while operations report. Pollers go round the operations, and each sends its next request when it has the
answer; with 304 they send the last tag back, as a dashboard does. The bare callable always answers the same, with our
headers. MLflow's tracking server, with its defaults and the same Postgres behind it, is asked for as many runs by
`runs/get` in the same way; it knows no 304.

    .venv/bin/python benchmarks/status_poll.py
"""

import argparse
import asyncio
import json
import os
import platform
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import uvicorn
import uvloop
from fastapi import FastAPI, Header, Response

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import lines
import servers as peer_servers

from helpers.databases import Databases
from helpers.store import Held, Store, losses, started
from ops_backend.app import create_app
from ops_backend.database import Sessions
from ops_backend.dependencies import CallerDep, SessionDep
from ops_backend.settings import Settings
from ops_backend.store import queries
from ops_backend.tags import Tagged
from ops_contract.reports import Progress

SERVERS = ("bare", "plain", "ours")
ANSWERS = {200: ("bare", "plain", "ours", "mlflow"), 304: SERVERS}
OF_BARE = {16: 0.4, 128: 0.65}
OF_MLFLOW = 20.0
REPORT_EVERY_S = 1.0
# A block of a slow server goes on until it has so many answers, or for so long.
FEWEST, LONGEST_S = 20, 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="at most, and none is begun after 60 s")
    parser.add_argument("--seconds", type=float, default=1.2, help="of each block")
    parser.add_argument("--pollers", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--operations", type=int, default=50, help="that report, once a second each, and are polled")
    lines.add_option(parser)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve)
    if given.load:
        return generate()
    peer_servers.end_in_order()
    with tempfile.TemporaryDirectory() as directory, peer_servers.postgres(Path(directory)) as (url, _):
        rates = asyncio.run(measure(given, url, directory))
    tell(given, rates)
    told = lines_of(given, rates)
    print(f"\n{lines.table(told)}")
    lines.write(given.lines, told)


@dataclass
class Block:
    """One way, polled for a while."""

    port: int
    path: str
    answer: int
    pollers: int
    ids: list[str]
    token: str
    seconds: float


Rates = dict[tuple[str, int, int], list[dict[str, float]]]


async def measure(given: argparse.Namespace, url: str, storage: str) -> Rates:
    """Rates by server, answer and number of pollers, a value a round."""
    tracked = await peer_servers.database(url, "mlflow")
    with peer_servers.mlflow(tracked, Path(storage)) as address:
        runs = await peer_servers.mlflow_runs(address, given.operations)
        return await in_turn(given, url, storage, int(address.rpartition(":")[2]), runs)


async def in_turn(given: argparse.Namespace, url: str, storage: str, mlflow_port: int, mlflow_runs: list[str]) -> Rates:
    rates: Rates = {}
    token = secrets.token_hex(16)
    environ = os.environ | {"OPS_DATABASE_URL": await Databases(url).fresh(), "OPS_API_TOKEN": token, "OPS_PORT": "0"}
    environ |= {"OPS_STORAGE_ROOT": storage}
    sessions = Sessions(environ["OPS_DATABASE_URL"], pool_size=4)
    store = Store(sessions)
    worker = await store.worker(slots=given.operations)
    runs = [await store.report(await store.running(), started()) for _ in range(given.operations)]
    with servers(environ) as ports, generator() as polled:
        ports["mlflow"] = mlflow_port
        began_s = time.monotonic()
        reporting = asyncio.create_task(report(store, worker, runs))
        ours = ("/api/v1/operations/", [str(run.operation_id) for run in runs])
        theirs = ("/api/2.0/mlflow/runs/get?run_id=", mlflow_runs)
        for round in range(given.rounds):
            if time.monotonic() - began_s > 60:
                break
            for answer, ways in ANSWERS.items():
                for pollers in given.pollers:
                    for i in range(len(ways)):
                        server = ways[(i + round) % len(ways)]
                        path, ids = theirs if server == "mlflow" else ours
                        block = Block(ports[server], path, answer, pollers, ids, token, given.seconds)
                        rates.setdefault((server, answer, pollers), []).append(await asyncio.to_thread(polled, block))
        reporting.cancel()
        with suppress(asyncio.CancelledError):
            await reporting
    await sessions.dispose()
    return rates


async def report(store: Store, worker: UUID, runs: list[Held]) -> None:
    """Every operation once in REPORT_EVERY_S, evenly, and heartbeats."""
    step = 0
    while True:
        await store.heartbeat(worker, *runs)
        for i, run in enumerate(runs):
            progress = Progress(step=step, loss=1 / (step + 1), steps_total=10**6)
            runs[i] = await store.report(run, losses((step, 1 / (step + 1))), progress=progress)
            await asyncio.sleep(REPORT_EVERY_S / len(runs))
        step += 1


@contextmanager
def generator() -> Iterator[Callable[[Block], dict[str, float]]]:
    """The process that polls: a line in is a block, a line out what came of it."""
    command = [sys.executable, __file__, "--load"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines_in, lines_out = process.stdin, process.stdout

        def polled(block: Block) -> dict[str, float]:
            print(json.dumps(vars(block)), file=lines_in, flush=True)
            found: dict[str, float] = json.loads(lines_out.readline())
            return found

        yield polled
        lines_in.close()


def generate() -> None:
    for line in sys.stdin:
        print(json.dumps(uvloop.run(load(Block(**json.loads(line))))), flush=True)


@contextmanager
def servers(environ: dict[str, str]) -> Iterator[dict[str, int]]:
    """Their ports, once they answer."""
    commands = {name: [sys.executable, __file__, "--serve", name] for name in SERVERS}
    commands["ours"] = [sys.executable, "-m", "ops_backend", "server", "--json"]
    running = {name: subprocess.Popen(commands[name], env=environ, stdout=subprocess.PIPE) for name in SERVERS}
    try:
        yield {name: json.loads(p.stdout.readline())["url"].rpartition(":")[2] for name, p in running.items()}  # type: ignore[union-attr]
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.communicate()


def serve(name: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    app = bare if name == "bare" else plain()
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
    uvicorn.Server(config).run(sockets=[listener])


_HEADERS = [(b"etag", b'"%s"' % (b"0" * 32)), (b"cache-control", b"no-cache")]
_BODY = b"x" * 2000  # about what an operation takes


async def bare(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    if scope["type"] != "http":
        return
    has_it = any(name == b"if-none-match" for name, _ in scope["headers"])
    whole = [(b"content-length", b"%d" % len(_BODY)), (b"content-type", b"application/json"), *_HEADERS]
    status, headers = (304, _HEADERS) if has_it else (200, whole)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if has_it else _BODY})


def plain() -> FastAPI:
    """The app with the route as one writes it."""
    ours = create_app(Settings.from_env())
    app = FastAPI(lifespan=ours.router.lifespan_context)
    app.state = ours.state

    @app.get("/api/v1/operations/{id}")
    async def get(id: UUID, session: SessionDep, _: CallerDep, if_none_match: str | None = Header(None)) -> Response:
        return Tagged(await queries.get(session, id)).answer(if_none_match)

    return app


async def load(block: Block) -> dict[str, float]:
    """Requests a second, the 99th percentile in ms, how many of them were answered as wished, our share of a core."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        pollers = [Poller(block, block.ids[n % len(block.ids)]) for n in range(block.pollers)]
        for poller in pollers:
            transport, _ = await loop.create_connection(lambda p=poller: p, "127.0.0.1", block.port)
            stack.callback(transport.close)
        for poller in pollers:
            poller.ask()
        await asyncio.sleep(0.2)
        for poller in pollers:
            poller.took_s.clear()
            poller.statuses.clear()
        began_s, cpu_s = time.monotonic(), time.process_time()
        await asyncio.sleep(block.seconds)
        while sum(len(poller.took_s) for poller in pollers) < FEWEST and time.monotonic() - began_s < LONGEST_S:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        lasted_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
        took_s = [s for poller in pollers for s in poller.took_s]
        wished = sum(poller.statuses.count(b"%d" % block.answer) for poller in pollers)
    return {
        "per_s": len(took_s) / lasted_s,
        "p99_ms": statistics.quantiles(took_s, n=100)[98] * 1e3 if len(took_s) > 1 else float("nan"),
        "wished": wished / max(len(took_s), 1),
        "generator": cpu_s / lasted_s,
    }


@dataclass
class Poller(asyncio.Protocol):
    """One connection, one request at a time."""

    block: Block
    id: str
    tag: bytes = b'"none yet"'
    took_s: list[float] = field(default_factory=list)
    statuses: list[bytes] = field(default_factory=list)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._received = b""
        head = f"GET {self.block.path}{self.id} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        head += f"Authorization: Bearer {self.block.token}\r\n"
        self._head = head.encode()

    def ask(self) -> None:
        self._sent_s = time.monotonic()
        has = b"If-None-Match: %s\r\n" % self.tag if self.block.answer == 304 else b""
        self._transport.write(b"%s%s\r\n" % (self._head, has))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        status = head[9:12]
        if not end or (status != b"304" and len(body) < int(_header(head, b"content-length"))):
            return
        self._received = b""
        self.took_s.append(time.monotonic() - self._sent_s)
        self.statuses.append(status)
        if status == b"200" and self.block.answer == 304:
            self.tag = _header(head, b"etag")
        self.ask()


def _header(head: bytes, name: bytes) -> bytes:
    return head.partition(b"\r\n" + name + b": ")[2].partition(b"\r\n")[0]


def lines_of(given: argparse.Namespace, rates: Rates) -> list[lines.Line]:
    """Of those numbers of pollers that have a goal."""
    told = []
    for answer, ways in ANSWERS.items():
        for pollers in given.pollers:
            per_s = {server: [block["per_s"] for block in rates[server, answer, pollers]] for server in ways}
            what = f"status poll, {answer}, {pollers} pollers"
            if pollers in OF_BARE:
                against, goal = "a bare ASGI callable", OF_BARE[pollers]
                told.append(lines.ratio(what, against, per_s["ours"], per_s["bare"], "answers/s", "≥", goal))
            if "mlflow" in ways:
                against, theirs = "MLflow's runs/get", per_s["mlflow"]
                if all(theirs):  # it may answer nobody of so many within a block
                    told.append(lines.ratio(what, against, per_s["ours"], theirs, "answers/s", "≥", OF_MLFLOW))
    return told


def tell(given: argparse.Namespace, rates: Rates) -> None:
    rounds = len(next(iter(rates.values())))
    print(
        f"{given.operations} operations report once in {REPORT_EVERY_S:g} s; {rounds} rounds, "
        f"blocks of {given.seconds:g} s; "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, uvicorn "
        f"{uvicorn.__version__}; load {os.getloadavg()[0]:.1f}\n"
    )
    print("| answer | pollers | server | answers/s | of bare | p99, ms | as wished | generator's core |")
    print("|---|---|---|---|---|---|---|---|")
    for answer, ways in ANSWERS.items():
        for pollers in given.pollers:
            for server in ways:
                blocks, bare = rates[server, answer, pollers], rates["bare", answer, pollers]
                ratio = [ours["per_s"] / its["per_s"] for ours, its in zip(blocks, bare, strict=True)]
                cells = [spread([b["per_s"] for b in blocks], "5.0f"), spread(ratio, ".2f")]
                cells += [f"{statistics.median(b[name] for b in blocks):{form}}" for name, form in _LAST]
                print(f"| {answer} | {pollers} | {server} | {' | '.join(cells)} |")


_LAST = (("p99_ms", ".1f"), ("wished", ".0%"), ("generator", ".0%"))


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
