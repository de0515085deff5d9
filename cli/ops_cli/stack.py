"""The whole service as child processes: Postgres, API, workers."""

import http.client
import os
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ops_cli import show
from ops_cli.child import Child, rotate
from ops_contract.tokens import workers_token
from relight.private import make_private

QUICK_FAILURES = 5
STEADY_S = 10.0
LAST_LINES = 12
BACKOFF_S = 0.5
BACKOFF_LIMIT_S = 30.0
SLOW_START_S = 20.0
TURN_S = 0.05
SERVER_GRACE_S = 10.0
DATABASE_GRACE_S = 70.0  # its own limit for a clean shutdown is 60 s
HURRIED_GRACE_S = 5.0
HEALTH_S = 5.0

# Meant for a single server or worker; here the stack decides, and only who needs the database learns its password.
# What systemd says to us is for us.
DROPPED = ("OPS_DATABASE_URL", "OPS_WORKER_PORT", "OPS_WORKER_URL", "NOTIFY_SOCKET")


def stop_limit_s(worker_grace_s: float) -> float:
    """The longest that `Stack.stop` takes."""
    return worker_grace_s + SERVER_GRACE_S + DATABASE_GRACE_S


class StackError(Exception):
    """A part of the service does not start or keeps ending; the message shows the end of its log."""


@dataclass(frozen=True)
class StackSettings:
    """`database_url` None: an embedded Postgres under `data_dir`. `environ` is what the children inherit.

    `worker_grace_s`: how long a worker may take to have its trainings save a checkpoint and to hand them back.
    """

    data_dir: Path
    token: str = field(repr=False)
    port: int
    host: str = "127.0.0.1"
    workers: int = 1
    cores: int = 1
    worker_grace_s: float = 40.0
    database_url: str | None = field(default=None, repr=False)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)

    @property
    def url(self) -> str:
        """For clients on this machine."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"


class Stack:
    """`start`, then `turn` now and then, then `stop`; all from one thread, the main one.

    `pause(duration_s)` waits, and may raise to give up a start. `say` gets lines of progress, `complain` of trouble.
    """

    def __init__(
        self,
        settings: StackSettings,
        pause: Callable[[float], None] = time.sleep,
        say: Callable[[str], None] = lambda line: None,
        complain: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.settings = settings
        self._pause = pause
        self._say = say
        self._complain = complain
        database = self._child("db", "ops_backend", "db", "--data-dir", str(settings.data_dir))
        self.database = None if settings.database_url else database
        self.server = self._child("server", "ops_backend", "server")
        self.workers = [self._child(f"worker-{n}", "ops_worker") for n in range(1, settings.workers + 1)]
        self._started: list[Child] = []
        self._failures: Counter[Child] = Counter()
        self._start_again_at_s: dict[Child, float] = {}

    def start(self) -> None:
        """Returns when the API is ready and every worker has registered. Raises StackError."""
        make_private(self.settings.data_dir / "logs")
        make_private(self.settings.data_dir / "storage")
        # First, as they take longest: they look at their workloads meanwhile, and try to register until it answers.
        self._start(self.workers)
        if self.database:
            self._start([self.database])
            self._await([self.database], "database  embedded Postgres")
        self._start([self.server])
        self._await([self.server], f"server    {self.settings.url}", self._healthy)
        self._await(self.workers, f"workers   {len(self.workers)}, each with {show.cores(self.settings.cores)}")

    def turn(self) -> None:
        """Start again what has ended. Raises StackError when one keeps ending."""
        for child in self._started:
            if child.running:
                continue
            if child not in self._start_again_at_s:
                self._note_end(child)
            elif time.monotonic() >= self._start_again_at_s[child]:
                del self._start_again_at_s[child]
                child.start()

    def stop(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """Workers, API, Postgres, in this order; each is killed when its grace is over."""
        self._started.clear()
        self._stop(self.workers, self.settings.worker_grace_s, hurried)
        self._stop([self.server], SERVER_GRACE_S, hurried)
        if self.database:
            self._stop([self.database], DATABASE_GRACE_S, hurried)

    def kill(self, worker: Child) -> None:
        """For good: it is not started again."""
        self._started.remove(worker)
        worker.kill()

    def _start(self, children: Sequence[Child]) -> None:
        for child in children:
            rotate(child.log)
            child.start()
            self._started.append(child)

    def _await(self, children: Sequence[Child], what: str, healthy: Callable[[], bool] = lambda: True) -> None:
        began_s, told = time.monotonic(), False
        while not (all(child.ready for child in children) and healthy()):
            self._pause(TURN_S)
            self.turn()
            if not told and time.monotonic() - began_s > SLOW_START_S:
                told = True
                self._say(f"  still waiting for {children[0].name}; its log is {children[0].log}")
        self._say(f"  {what}")

    def _healthy(self) -> bool:
        # Not by httpx, whose import takes as long as Postgres to start. A proxy knows nothing of this host.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.settings.url}/health/ready", timeout=HEALTH_S) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def _note_end(self, child: Child) -> None:
        lasted_s = time.monotonic() - child.started_at_s
        self._failures[child] = 1 if lasted_s > STEADY_S else self._failures[child] + 1
        reason = child.last_lines(LAST_LINES)
        if self._failures[child] >= QUICK_FAILURES:
            times = f"{child.name} {child.ending}, {QUICK_FAILURES} times in a row"
            raise StackError("\n    ".join([f"{times}. The end of {child.log}:", *reason]))
        backoff_s = min(BACKOFF_S * 2 ** (self._failures[child] - 1), BACKOFF_LIMIT_S)
        self._start_again_at_s[child] = time.monotonic() + backoff_s
        ending = ": ".join([f"{child.name} {child.ending}", *reason[-1:]])
        self._complain(f"{ending}; starting it again in {backoff_s:g} s")

    def _stop(self, children: Sequence[Child], grace_s: float, hurried: Callable[[], bool]) -> None:
        for child in children:
            child.signal(signal.SIGTERM)
        until_s, hurrying = time.monotonic() + grace_s, False
        while any(child.running for child in children) and time.monotonic() < until_s:
            time.sleep(TURN_S)
            if hurried() and not hurrying:
                hurrying, until_s = True, time.monotonic() + HURRIED_GRACE_S
                for child in children:
                    child.signal(signal.SIGTERM)
        for child in children:
            if child.running:
                self._complain(f"{child.name} did not end in time and is killed")
                child.kill()
            child.close()

    def _child(self, name: str, *module: str) -> Child:
        log = self.settings.data_dir / "logs" / f"{name}.log"
        return Child(name, module, lambda: self._environ(name), log)

    def _environ(self, name: str) -> dict[str, str]:
        settings = self.settings
        # What jobs call secret is the workers' alone.
        dropped = DROPPED if name.startswith("worker") else (*DROPPED, "OPS_SECRET")
        environ = {key: value for key, value in settings.environ.items() if not key.startswith(dropped)}
        environ |= {"OPS_API_TOKEN": settings.token, "OPS_STORAGE_ROOT": str(settings.data_dir / "storage")}
        if name == "server":
            url = settings.database_url or str(self.database and self.database.ready and self.database.ready["url"])
            environ |= {"OPS_DATABASE_URL": url, "OPS_HOST": settings.host, "OPS_PORT": str(settings.port)}
        if name.startswith("worker"):
            state = settings.data_dir / "workers" / name
            # Code that runs beside an agent finds nothing that submits, or deletes.
            environ |= {"OPS_API_TOKEN": workers_token(settings.token)}
            environ |= {"OPS_API_URL": settings.url, "OPS_WORKER_NAME": name, "OPS_WORKER_STATE_DIR": str(state)}
            environ |= {"OPS_CPU_CORES": str(settings.cores), "OPS_USER_CODE": "1"}
            environ |= {"OPS_GPU_SHARE": f"{name.removeprefix('worker-')}/{settings.workers}"}
        return environ
