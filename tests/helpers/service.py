"""The whole service as real processes on a real Postgres: API, agents, trainers. Tests kill what they like."""

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx

from helpers.openapi import OpenAPI
from ops_cli.child import Child
from ops_cli.up import free_port
from ops_contract.history import AttemptView, CheckpointView, MetricPoints
from ops_contract.operations import Operation
from ops_contract.wire import API_PREFIX
from relight.client import Client

T = TypeVar("T")
WAIT_S = 180.0
LEASE_S = 3.0
LONG = {"max_epochs": 12}  # of digits, enough to be stopped in the middle
LONG_STEPS = 576  # of a few milliseconds


class Service:
    """One API and its workers, each of one core; `client` speaks to it as users do, `http` as curl does.

    Whatever the two are answered has to be as the server's OpenAPI document says.
    """

    def __init__(
        self,
        directory: Path,
        database_url: str,
        lease_s: float = LEASE_S,
        agent: str = "ops_worker",
        server: Mapping[str, str] | None = None,
    ) -> None:
        """`agent` is the module that its workers run; `server` are more variables of the API."""
        self.server_settings = dict(server or {})
        self.directory = directory
        self.token = secrets.token_hex(16)
        self.storage = directory / "storage"
        self._database_url = database_url
        self._lease_s = lease_s
        self._module = agent
        self.server = Child("server", ("ops_backend", "server"), self._server_environ, directory / "server.log")
        self.workers: list[Child] = []
        self._url = ""
        self._open: list[Client | httpx.Client] = []

    @property
    def url(self) -> str:
        return self._url

    def start(self, workers: int) -> None:
        self._port = free_port()
        self.restart_server()
        self.connect(self._url)
        self.have_workers(workers)

    def connect(self, url: str) -> None:
        """The address that users and new workers have from now on."""
        self._hang_up()
        self._url = url
        self.client = Client(url, self.token)
        self.openapi = OpenAPI(lambda: httpx.get(f"{url}/openapi.json", trust_env=False, timeout=WAIT_S).json())
        self.http = httpx.Client(
            base_url=url + API_PREFIX,
            headers={"Authorization": f"Bearer {self.token}"},
            trust_env=False,
            timeout=WAIT_S,
        )
        self._open = [self.client, self.http]
        for http in (self.client._http, self.http):
            self.openapi.watch(http)

    def replica(self) -> Child:
        """A second API on the same database, at an address of its own, which is in `ready`."""
        environ = self._server_environ() | {"OPS_PORT": "0"}
        replica = Child("replica", ("ops_backend", "server"), lambda: environ, self.directory / "replica.log")
        replica.start()
        eventually(lambda: replica.ready, "the replica is ready", self.logs)
        return replica

    def restart_server(self) -> None:
        """At the address that its workers know."""
        self.server.start()
        self._url = eventually(lambda: self.server.ready, "the API is ready", self.logs)["url"]

    def have_workers(self, number: int) -> None:
        """Replace those that a test has killed."""
        for worker in self.workers:
            if not worker.running:
                worker.close()
        self.workers = [worker for worker in self.workers if worker.running]
        fresh = [self._worker() for _ in range(number - len(self.workers))]
        start(*fresh)

    def only_worker(self, **settings: str) -> Child:
        """Kill all others."""
        for worker in self.workers:
            worker.kill()
        worker = self._worker(**settings)
        start(worker)
        return worker

    def stop(self) -> None:
        for child in (*self.workers, self.server):
            child.kill()
            child.close()
        self._hang_up()

    def _hang_up(self) -> None:
        while self._open:
            self._open.pop().close()

    def worker_of(self, attempt: AttemptView) -> Child:
        return next(worker for worker in self.workers if worker.name == attempt.worker)

    def submit(self, workload: str = "digits", **execution: Any) -> UUID:
        config, max_retries = execution.pop("config", {}), execution.pop("max_retries", 3)
        defaults = {"learning_rate": 0.01, "checkpoint_every": {"steps": 20}}
        job = {"workload": workload, "config": config, "execution": defaults | execution, "max_retries": max_retries}
        return self.client.submit(job).id

    def get(self, id: UUID) -> Operation:
        return self.client.get(id)

    def wait(self, id: UUID, *statuses: str) -> Operation:
        return self.until(id, lambda o: o.status in statuses, f"is {' or '.join(statuses)}")

    def until(self, id: UUID, met: Callable[[Operation], bool], what: str, wait_s: float = WAIT_S) -> Operation:
        def look() -> Operation | None:
            operation = self.get(id)
            return operation if met(operation) else None

        return eventually(look, f"operation {what}", lambda: f"{self.get(id)}\n{self.logs()}", wait_s)

    def until_logged(self, id: UUID) -> Operation:
        return self.until(id, lambda o: o.logs is not None, "has its files in logs/")

    def until_step(self, id: UUID, step: int) -> Operation:
        def there(operation: Operation) -> bool:
            return operation.status == "running" and (operation.progress.step or 0) >= step  # type: ignore[union-attr]

        return self.until(id, there, f"has run {step} steps")

    def until_saved(self, id: UUID, attempt: int, number: int = 1) -> list[CheckpointView]:
        """So many checkpoints of an attempt past step 0; when they come, the writer beside the training decides."""

        def look() -> list[CheckpointView] | None:
            found = [c for c in self.client.checkpoints(id) if c.attempt == attempt and c.step > 0]
            return found if len(found) >= number else None

        return eventually(look, f"{number} checkpoints are committed", lambda: f"{self.get(id)}\n{self.logs()}")

    def attempts(self, id: UUID) -> list[AttemptView]:
        return self.client.attempts(id)

    def checkpoints(self, id: UUID) -> list[CheckpointView]:
        return [c for c in self.client.checkpoints(id) if c.in_lineage]

    def curves(self, id: UUID) -> dict[str, list[tuple[int, float]]]:
        return {name: self.metric(id, name).points for name in self.client.metric_names(id)}

    def metric(self, id: UUID, name: str) -> MetricPoints:
        return self.client.metrics(id, name)

    def events(self, id: UUID) -> list[str]:
        return [event.name for event in self.client.events(id)]

    def logs(self) -> str:
        parts = [f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.directory.glob("*.log"))]
        return "\n".join(parts)

    def _worker(self, **settings: str) -> Child:
        name = f"worker-{len(list(self.directory.glob('worker-*.log'))) + 1}"
        log = self.directory / f"{name}.log"
        log.touch()
        environ = self._environ() | {
            "OPS_API_URL": self._url,
            "OPS_WORKER_NAME": name,
            "OPS_WORKER_STATE_DIR": str(self.directory / name),
            "OPS_CPU_CORES": "1",
            "OPS_USER_CODE": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
            **settings,
        }
        worker = Child(name, (self._module,), lambda: environ, log)
        self.workers.append(worker)
        return worker

    def _server_environ(self) -> dict[str, str]:
        return self._environ() | {
            "OPS_DATABASE_URL": self._database_url,
            "OPS_PORT": str(self._port),
            "OPS_API_URL": f"http://127.0.0.1:{self._port}",
            "OPS_LEASE_S": str(self._lease_s),
            "OPS_RETRY_BACKOFF_S": "0.2",
            **self.server_settings,
        }

    def _environ(self) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("OPS_")}
        return inherited | {"OPS_API_TOKEN": self.token, "OPS_STORAGE_ROOT": str(self.storage)}


@contextmanager
def running_service(
    directory: Path, database_url: str, workers: int, lease_s: float = LEASE_S, agent: str = "ops_worker"
) -> Iterator[Service]:
    service = Service(directory, database_url, lease_s, agent)
    service.storage.mkdir()
    try:
        service.start(workers)
        yield service
    finally:
        service.stop()


def start(*workers: Child) -> None:
    for worker in workers:
        worker.start()
    for worker in workers:
        eventually(lambda w=worker: w.ready, f"{worker.name} is ready")


def eventually(look: Callable[[], T | None], what: str, told: Callable[[], str] = str, wait_s: float = WAIT_S) -> T:
    """What `look` finds, within a bound that only a failure reaches."""
    until_s = time.monotonic() + wait_s
    while True:
        if found := look():
            return found
        assert time.monotonic() < until_s, f"not within {wait_s:g} s: {what}\n{told()}"
        time.sleep(0.02)


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@contextmanager
def frozen(*pids: int | None) -> Iterator[None]:
    for pid in pids:
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            assert pid is not None
            os.kill(pid, signal.SIGCONT)
