"""A Postgres of its own that is killed, cut off and frozen under the whole service; and the API in two replicas."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest

from helpers.balancer import balancing
from helpers.databases import Databases, connect, embedded_postgres
from helpers.history import violations
from helpers.service import LEASE_S, Service, eventually, running_service
from ops_cli.child import Child

pytestmark = pytest.mark.slow

LONG = {"max_epochs": 60}  # 2880 steps: it outlasts every fault here
ASLEEP_S = 2 * LEASE_S


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_postgres(tmp_path_factory.mktemp("own-postgres")) as url:
        yield asyncio.run(Databases(url).fresh())


@pytest.fixture(scope="module")
def service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service"), database, workers=1) as service:
        yield service


class Users:
    """Read and write all the time, and keep what they are answered. 0: no answer."""

    def __init__(self, service: Service) -> None:
        self.statuses: set[int] = set()
        self._service = service
        self._enough = threading.Event()

    def run(self) -> None:
        while not self._enough.is_set():
            self._call("GET", "/operations")
            # One operation, however often: the worker has other things to do.
            job = {"workload": "digits", "execution": {"max_steps": 1}}
            self._call("POST", "/operations", json=job, headers={"Idempotency-Key": "load"})

    def _call(self, *call: str, **body: Any) -> None:
        try:
            answer = self._service.http.request(*call, **body, timeout=30)
            self.statuses.add(answer.status_code)
            assert answer.status_code != 503 or answer.headers["Retry-After"]
        except httpx.TransportError:
            self.statuses.add(0)

    @contextmanager
    def busy(self) -> Iterator[None]:
        with ThreadPoolExecutor(3) as threads:
            running = [threads.submit(self.run) for _ in range(3)]
            try:
                yield
            finally:
                self._enough.set()
        for one in running:
            one.result()


def test_postgres_may_be_killed_and_cut_off_under_load(service: Service, database: str) -> None:
    """Scenario 18."""
    users = Users(service)
    id = service.submit(**LONG)
    service.until_step(id, 30)
    with users.busy():
        asyncio.run(terminate_all(database))
        os.kill(postmaster(database).pid, signal.SIGQUIT)
        eventually(lambda: 503 in users.statuses, "somebody was told to try again", service.logs)
        users.statuses.discard(200)
        eventually(lambda: 200 in users.statuses, "it has recovered", service.logs)

    finished(service, database, id)
    assert users.statuses <= {200, 201, 503}


def test_nobody_is_reaped_for_a_database_that_was_frozen_for_longer_than_a_lease(
    service: Service, database: str
) -> None:
    """Scenario 28."""
    id = service.submit(**LONG)
    service.until_step(id, 30)
    with frozen(family(postmaster(database))):
        answer = service.http.get("/operations", timeout=30)
        time.sleep(ASLEEP_S)  # the fault itself

    finished(service, database, id)
    assert answer.status_code == 503


def test_nobody_is_reaped_for_having_slept_with_the_whole_machine(service: Service, database: str) -> None:
    """Scenario 28."""
    id = service.submit(**LONG)
    service.until_step(id, 30)
    ours = [psutil.Process(child.pid) for child in (service.server, *service.workers)]
    with frozen([*family(postmaster(database)), *(each for process in ours for each in family(process))]):
        time.sleep(ASLEEP_S)  # the fault itself

    finished(service, database, id)


def test_of_two_replicas_either_serves_and_one_is_enough(databases: Databases, tmp_path: Path) -> None:
    """Scenario 25: both run all loops; workers know one address, behind which one replica dies."""
    url = asyncio.run(databases.fresh())
    with balancing() as (address, ports), running_service(tmp_path, url, workers=0) as service:
        replica = service.replica()
        try:
            ports += [port(service.server), port(replica)]
            service.connect(address)
            service.have_workers(2)
            ids = [service.submit(**LONG) for _ in range(2)]
            quick = [service.submit(max_steps=1) for _ in range(10)]
            for id in ids:
                service.until_step(id, 30)
            service.server.kill()
            ports.remove(port(service.server))
            service.connect(address)  # a connection to the dead one would say so once
            service.client.cancel(ids[0])
            service.wait(ids[0], "cancelled")
            service.client.resume(ids[0])
            for id in (*ids, *quick):
                service.wait(id, "completed")
            assert [service.get(id).attempt for id in (*ids, *quick)] == [2] + [1] * 11
            assert asyncio.run(violated(url, service)) == []
        finally:
            replica.kill()
            replica.close()


def port(server: Child) -> int:
    assert server.ready is not None
    return httpx.URL(server.ready["url"]).port or 0


def finished(service: Service, database: str, id: UUID) -> None:
    """By its one attempt, and nothing else went wrong either."""
    operation = service.client.wait(id)
    assert (operation.status, operation.attempt, operation.failures) == ("completed", 1, 0)
    assert service.events(id) == ["submit", "claim", "note", "complete"]
    for other in service.client.list():
        service.wait(other.id, "completed")
    assert asyncio.run(violated(database, service)) == []


async def violated(url: str, service: Service) -> list[str]:
    connection = await connect(url)
    try:
        return await violations(connection, service.storage)
    finally:
        await connection.close()


async def terminate_all(url: str) -> None:
    connection = await connect(url)
    try:
        sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        await connection.execute(f"{sql} AND pid <> pg_backend_pid()")
    finally:
        await connection.close()


def postmaster(url: str) -> psutil.Process:
    async def pid() -> int:
        connection = await connect(url)
        try:
            return int(await connection.fetchval("SELECT split_part(pg_read_file('postmaster.pid'), chr(10), 1)"))
        finally:
            await connection.close()

    return psutil.Process(asyncio.run(pid()))


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


@contextmanager
def frozen(processes: list[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()
