"""The whole service twice over: a Postgres of its own that may be killed, two APIs, agents, a proxy between them."""

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import psutil

from chaos.proxy import Proxy
from helpers.databases import Databases, connect
from helpers.service import Service, eventually
from ops_cli.child import Child
from ops_cli.up import free_port
from ops_contract.wire import API_PREFIX
from relight.client import Client

DISK = "512m"
LEASE_S = 4.0
SLOTS = (1, 2)  # of each worker: a gang of three needs both
AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError)

# Module, statement, guard, and what stands in its place.
Mutant = list[str] | None
REVIVE_S = 0.3
MARK = "RELIGHT_CHAOS"
_RECORD = re.compile(r"^(?=\d{4}-\d\d-\d\d )", re.MULTILINE)  # of a log: a line, and the traceback below it


class Cluster(Service):
    """`revive` starts again what died, as a supervisor would: under its name, on its port, with its state directory."""

    def __init__(self, directory: Path, postgres: "OwnPostgres", seed: int, mutant: Mutant = None) -> None:
        self.database_url = asyncio.run(postgres.fresh_database())
        super().__init__(directory, self.database_url)
        self.postgres = postgres
        self.mark = uuid4().hex
        self.libfaketime = next(map(str, Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
        self.small_disk = False
        self._seed = seed
        self._down_until_s: dict[str, float] = {}
        self.ports = {f"api-{n}": free_port() for n in (1, 2)}
        self.apis = [self._api(name, mutant) for name in self.ports]

    def start(self, workers: int) -> None:
        names = [f"worker-{n}" for n in range(1, workers + 1)]
        agent_ports = {name: free_port() for name in names}
        self.proxy = Proxy(self.ports, agent_ports, self._seed)
        self.proxy.start()
        self.client = Client(self.proxy.url_for("test"), self.token)
        self.http = self.user("test")
        self.workers = [
            self._agent(name, port, slots) for (name, port), slots in zip(agent_ports.items(), SLOTS, strict=True)
        ]
        for child in (*self.apis, *self.workers):
            child.start()
        self.await_ready()

    def user(self, name: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(
            base_url=self.proxy.url_for(name) + API_PREFIX, headers=headers, timeout=15, trust_env=False
        )

    @property
    def children(self) -> list[Child]:
        return [*self.apis, *self.workers]

    def trainers(self) -> list[psutil.Process]:
        found = []
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(worker.pid).children() if worker.running else []
        return found

    def orphans(self) -> list[str]:
        """Processes of ours whose agent is gone."""
        parents = {child.pid for child in self.children if child.running} | {os.getpid(), self.postgres.keeper.pid}
        return [f"{p.pid} {p.cmdline()}" for p in self._marked() if p.pid not in parents and p.ppid() not in parents]

    def kill_child(self, child: Child, for_s: float) -> None:
        """Alone: what it started has to notice by itself."""
        self._down_until_s[child.name] = time.monotonic() + for_s
        child.signal(signal.SIGKILL)

    def revive(self) -> None:
        for child in self.children:
            if not child.running and time.monotonic() > self._down_until_s.get(child.name, 0):
                self._down_until_s[child.name] = time.monotonic() + REVIVE_S
                child.close()
                child.start()

    def await_ready(self) -> None:
        def ready() -> bool:
            self.revive()
            return all(child.running and child.ready for child in self.children)

        eventually(ready, "all parts are ready", self.logs)

    def unexpected(self) -> list[str]:
        """What the logs of the APIs say of answers 500."""
        logs = [(self.directory / f"{api.name}.log").read_text() for api in self.apis]
        records = [record for log in logs for record in _RECORD.split(log)]
        return [record for record in records if "Exception in ASGI application" in record or "of ours failed" in record]

    def query(self, sql: str) -> list[Any]:
        """Rows from the database itself. Raises what AWAY names."""
        return asyncio.run(_rows(self.database_url, sql))

    def step_clock(self, name: str, by_s: int) -> None:
        (self.directory / f"{name}.clock").write_text(f"{by_s:+d}\n")

    def shrink_disk(self) -> None:
        """To what is on it."""
        disk = os.statvfs(self.storage)
        self.resize_disk(f"{(disk.f_blocks - disk.f_bfree) * disk.f_frsize // 1024}k")

    def resize_disk(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.storage)], check=True, capture_output=True)

    def stop(self) -> None:
        for child in self.children:
            if child.running:
                child.signal(signal.SIGCONT)
                child.signal(signal.SIGKILL)
                child.close()
        self.client.close()
        self.http.close()
        self.proxy.stop()

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _api(self, name: str, mutant: Mutant) -> Child:
        # A mutant's zombie is to report: it must not fail for want of its directory.
        sweep_s = "600" if mutant else "3"
        own = {"OPS_PORT": str(self.ports[name]), "OPS_ORPHAN_SWEEP_S": sweep_s, "OPS_LEASE_S": str(LEASE_S)}
        if mutant:
            own |= {"RELIGHT_MUTANT": json.dumps(mutant), "PYTHONPATH": str(Path(__file__).parents[1])}
        module = "helpers.mutant_server" if mutant else "ops_backend"
        self._port = self.ports[name]
        return Child(
            name,
            (module, "server"),
            lambda: self._server_environ() | own | self._faked(name),
            self.directory / f"{name}.log",
        )

    def _agent(self, name: str, port: int, slots: int) -> Child:
        own = {
            "OPS_API_URL": self.proxy.url_for(name),
            "OPS_WORKER_URL": self.proxy.url_of(name),
            "OPS_WORKER_PORT": str(port),
            "OPS_WORKER_NAME": name,
            "OPS_WORKER_STATE_DIR": str(self.directory / name),
            "OPS_CPU_SLOTS": str(slots),
            "OPS_CPU_CORES": str(slots),
        }
        return Child(
            name, ("ops_worker",), lambda: self._environ() | own | self._faked(name), self.directory / f"{name}.log"
        )

    def _environ(self) -> dict[str, str]:
        return super()._environ() | {MARK: self.mark}

    def _faked(self, name: str) -> dict[str, str]:
        """Its clock is what a file says; monotonic ones, which no administrator can step, stay as they are."""
        if self.libfaketime is None:
            return {}
        self.step_clock(name, 0)
        return {
            "LD_PRELOAD": self.libfaketime,
            "FAKETIME_TIMESTAMP_FILE": str(self.directory / f"{name}.clock"),
            "FAKETIME_CACHE_DURATION": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }


async def _rows(url: str, sql: str) -> list[Any]:
    database = await connect(url)
    try:
        return list(await database.fetch(sql))
    finally:
        await database.close()


class OwnPostgres:
    """Started again by its keeper whenever it ends, as `ops up` has it."""

    def __init__(self, directory: Path) -> None:
        command = ("ops_backend", "db", "--data-dir", str(directory))
        self.keeper = Child("postgres", command, lambda: os.environ, directory / "db.log")

    def start(self) -> None:
        self.keeper.start()
        ready = eventually(lambda: self.keeper.ready, "Postgres is ready")
        self._databases = Databases(ready["url"])
        self._url = ready["url"]

    def stop(self) -> None:
        self.keeper.signal(signal.SIGCONT)
        self.keeper.close()

    def postmaster(self) -> psutil.Process | None:
        below = psutil.Process(self.keeper.pid).children(recursive=True)
        return next((p for p in below if p.status() != psutil.STATUS_ZOMBIE and "-D" in p.cmdline()), None)

    def remember_commits(self) -> None:
        """For the checker, from the next start on: in which order transactions committed."""
        asyncio.run(_rows(self._url, "ALTER SYSTEM SET track_commit_timestamp = on"))

    def answers(self) -> bool:
        try:
            return bool(asyncio.run(_rows(self._url, "SELECT 1")))
        except AWAY:
            return False

    async def fresh_database(self) -> str:
        return await self._databases.fresh()


@contextmanager
def cluster_at(
    directory: Path, postgres: OwnPostgres, seed: int, workers: int, mutant: Mutant = None
) -> Iterator[Cluster]:
    with small_disk(directory / "storage") as is_small:
        cluster = Cluster(directory, postgres, seed, mutant)
        cluster.small_disk = is_small
        try:
            cluster.start(workers)
            yield cluster
        finally:
            cluster.stop()


@contextmanager
def small_disk(storage: Path) -> Iterator[bool]:
    """Whether `storage` is a file system of its own, which can be full; that takes root."""
    storage.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(storage)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(storage)], check=True, capture_output=True)
