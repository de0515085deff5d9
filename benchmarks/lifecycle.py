"""How many no-ops a second go from submit to completed: ours, and procrastinate's defer → run → succeeded.

Ours are submitted over HTTP by several clients, claimed by the dispatcher of a real API process, and POSTed to a
simulated worker of so many slots. That does as an agent whose trainer has nothing to do: it confirms its new holds by a
heartbeat, then sends each one's started and finish as `delivery.py` sends all that waits, in one request. Procrastinate
has as many clients, each of which waits for a job before it defers the next one, and a real worker process with a
concurrency of so many; its jobs are coroutines that do nothing. Both keep what was done, with their events, on the same
embedded Postgres, fsync and synchronous_commit as they are by default. A turn is over when the database says that all
are done; what ours does after it for each (the files of `logs/`) is waited for, beside the clock.

    .venv/bin/python benchmarks/lifecycle.py
"""

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import lines
import peers
import servers
import uvloop
from filling import connect
from speaking import COMPLETED, STARTED, Connection, answers, credential_of, registration
from sqlalchemy import make_url

PROCRASTINATE = ("procrastinate==3.10.0", "psycopg[binary,pool]==3.3.4")
JOB = json.dumps({"workload": "toy", "execution": {"accelerator": "cpu"}, "max_retries": 0})
DONE_S = 60.0
OURS_DONE = "SELECT count(*) FROM operations WHERE status = 'completed'"
OURS_LOGGED = "SELECT count(*) FROM operations WHERE logged_event_seq = event_seq"
Hold = tuple[str, int]  # an operation and its attempt
Work = Callable[["SimulatedWorker", Hold], Coroutine[Any, Any, None]]
THEIRS_DONE = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="at most, and none is begun after 120 s")
    parser.add_argument("--operations", type=int, default=200, help="of each turn")
    parser.add_argument("--clients", type=int, default=8, help="that submit, each one at a time")
    parser.add_argument("--slots", type=int, default=8, help="what runs at a time")
    lines.add_option(parser)
    given = parser.parse_args()
    servers.end_in_order()
    with tempfile.TemporaryDirectory() as directory, servers.postgres(Path(directory)) as (url, _):
        found = uvloop.run(measure(given, url, Path(directory)))
    what = "lifecycle of a no-op over HTTP: submit, claim, start, finish"
    against = "procrastinate: defer, run, succeeded"
    line = lines.ratio(what, against, found["ours"], found["procrastinate"], "operations/s", "≥", 1.0)
    print(
        f"{given.operations} operations a turn, {given.clients} clients, {given.slots} slots; "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(f"\n{lines.table([line])}")
    lines.write(given.lines, [line])


async def measure(given: argparse.Namespace, url: str, directory: Path) -> dict[str, list[float]]:
    """Operations a second, a value a round."""
    found: dict[str, list[float]] = {"ours": [], "procrastinate": []}
    jobs = await servers.database(url, "jobs")
    with servers.ours(url, directory) as api, procrastinate(given, jobs, directory) as client:
        async with simulated_worker(api, given.slots, SimulatedWorker.finish):
            began_s = time.monotonic()
            for round in range(-1, given.rounds):  # the first one warms both
                if time.monotonic() - began_s > 120:
                    break
                for name in sorted(found, reverse=bool(round % 2)):
                    turn = ours(given, api, url) if name == "ours" else theirs(given, client, jobs)
                    rate = await turn
                    if round >= 0:
                        found[name].append(rate)
    return found


async def ours(given: argparse.Namespace, api: servers.Api, url: str) -> float:
    connection = await connect(url)
    until = given.operations + await connection.fetchval(OURS_DONE)
    numbers = iter(range(given.operations))

    async def submit() -> None:
        http = Connection(api.port, api.token)
        for _ in numbers:
            status, _, answer = await http.request("POST", "/operations", JOB)
            assert status == 201, answer
        http.close()

    began_s = time.monotonic()
    await asyncio.gather(*(submit() for _ in range(given.clients)), reached(connection, OURS_DONE, until))
    lasted_s = time.monotonic() - began_s
    await reached(connection, OURS_LOGGED, until)
    await connection.close()
    return float(given.operations / lasted_s)


async def theirs(given: argparse.Namespace, client: Any, url: str) -> float:
    connection = await connect(url)
    until = given.operations + await connection.fetchval(THEIRS_DONE)
    began_s = time.monotonic()
    print(json.dumps({"jobs": given.operations}), file=client.stdin, flush=True)
    await reached(connection, THEIRS_DONE, until)
    lasted_s = time.monotonic() - began_s
    await asyncio.to_thread(servers.said, client)
    await connection.close()
    return float(given.operations / lasted_s)


async def reached(connection: Any, count: str, until: int) -> None:
    async with asyncio.timeout(DONE_S):
        while await connection.fetchval(count) < until:  # noqa: ASYNC110 - the database tells nobody
            await asyncio.sleep(0.02)


@contextmanager
def procrastinate(given: argparse.Namespace, url: str, directory: Path) -> Iterator[Any]:
    """Its worker works; what it yields defers so many jobs for a line."""
    python = str(peers.python_of("procrastinate", *PROCRASTINATE))
    conninfo = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    script, log = str(Path(__file__).with_name("procrastinate_peer.py")), directory / "procrastinate.log"
    with servers.process([python, script, "client", conninfo, str(given.clients)], log) as client:
        servers.said(client)
        command = [*servers.GUARDED, python, script, "worker", conninfo, str(given.slots)]
        with servers.process(command, log) as worker:
            servers.said(worker)
            yield client


# ---- the simulated worker


@asynccontextmanager
async def simulated_worker(api: servers.Api, slots: int, work: Work) -> AsyncIterator["SimulatedWorker"]:
    simulated = SimulatedWorker(api, work)
    server = await asyncio.start_server(answers(simulated.take), "127.0.0.1", 0)
    await simulated.register(server.sockets[0].getsockname()[1], slots)
    beating = asyncio.create_task(simulated.beat())
    try:
        yield simulated
    finally:
        server.close()
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating


class SimulatedWorker:
    """A worker of several slots; `work` is given each hold as soon as it is confirmed."""

    def __init__(self, api: servers.Api, work: Work) -> None:
        self._api = api
        self._work = work
        self.incarnation = uuid4()
        self.credential = credential_of(self.incarnation)
        self._http: list[Connection] = []
        self._held: dict[Hold, bool] = {}  # and whether it is confirmed
        self._beat_now = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def register(self, port: int, slots: int) -> None:
        offer = registration(self.incarnation, port)
        offer["slots"] = [{"index": n, "device": "cpu", "cores": 1} for n in range(slots)]
        status, _, answer = await self._request("/workers", json.dumps(offer), self._api.token)
        assert status == 201, answer
        self._heartbeat_s: float = json.loads(answer)["heartbeat_s"]

    def take(self, order: dict[str, Any]) -> int:
        """A start; the next beat confirms it."""
        self._held[order["operation_id"], order["attempt"]] = False
        self._beat_now.set()
        return 202

    async def beat(self) -> None:
        """At the service's interval, and at once for a hold that is new."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._beat_now.wait()
            self._beat_now.clear()
            named = list(self._held)
            body = json.dumps({"holds": [{"operation_id": id, "attempt": attempt} for id, attempt in named]})
            status, _, answer = await self._request(f"/workers/{self.incarnation}/heartbeat", body)
            assert status == 200, answer
            for hold in named:
                if self._held.get(hold) is False:
                    self._held[hold] = True
                    task = asyncio.create_task(self._work(self, hold))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    async def finish(self, hold: Hold) -> None:
        """Its work was nothing."""
        id, attempt = hold
        body = f'{{"incarnation":"{self.incarnation}","first_seq":1,"reports":[{STARTED},{COMPLETED}]}}'
        status, _, answer = await self._request(f"/operations/{id}/attempts/{attempt}/reports", body)
        assert status == 200, answer
        del self._held[hold]

    async def _request(self, path: str, body: str, token: str = "") -> tuple[int, dict[str, str], bytes]:
        http = self._http.pop() if self._http and not token else Connection(self._api.port, token or self.credential)
        answer = await http.request("POST", path, body)
        if token:
            http.close()
        else:
            self._http.append(http)
        return answer


if __name__ == "__main__":
    main()
