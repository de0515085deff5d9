"""From an accepted POST to the first step of its training: ours on an idle service, the same training started cold.

Ours is the service as `ops up` starts it, of one worker with one slot, whose trainer is warm: by the CPU time of its
process it waits. The workload is installed beside the agent, as a package of workloads is; it writes the monotonic
clock to a file when its first update is done, so that the moment is told by who knows it. The time runs from the answer
(201) to that. Cold is `python train.py` in the same environment, with the same model, data and
threads: from its spawn to its first update, torch's import included, with every file of it in memory. A round is a
few jobs, each when the service is idle, and a cold start.

    .venv/bin/python benchmarks/dispatch.py
"""

import argparse
import os
import platform
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from uuid import UUID

import httpx
import lines
import psutil

from ops_cli.stack import Stack, StackSettings
from ops_cli.up import free_port
from ops_contract.wire import API_PREFIX
from relight.client import Client

P50_MS, P99_MS = 50.0, 200.0
WAIT_S = 60.0
STILL_S = 0.3
STEPS = 20
BATCH = 32

# What both train, in a module of its own: who lists the workloads imports no torch.
TRAINING = """
import os
import struct
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


def data():
    inputs = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def model():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 2))


def loss(model, batch, pause_s):
    time.sleep(pause_s)
    inputs, labels = batch
    return cross_entropy(model(inputs), labels)


class Told:
    def __init__(self, path):
        self.file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def done(self, step):
        os.write(self.file, struct.pack("qqq", os.getpid(), step, time.monotonic_ns()))
"""

WORKLOAD = """
from pydantic import BaseModel

from relight import Workload


class Config(BaseModel):
    out: str
    pause_s: float = 0.0


class Small(Workload[Config]):
    "A small network on random numbers, which writes when a step is done."

    Config = Config
    reports = {}

    def data(self):
        import training

        return training.data(), None

    def model(self):
        import training

        self.told = training.Told(self.config.out)
        return training.model()

    def loss(self, model, batch):
        import training

        return training.loss(model, batch, self.config.pause_s), {}

    def after_step(self, model, step):
        self.told.done(step)
"""

SCRIPT = """
import os
import sys

import torch
from torch.utils.data import DataLoader

import training

out, steps, batch, pause_s, threads, state, every = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
model = training.model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
done = 0
if os.path.exists(state):
    saved = torch.load(state)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    done = saved["done"]
told = training.Told(out)
loader = DataLoader(training.data(), batch_size=int(batch), shuffle=True)


def save():
    with open(state + ".tmp", "wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(state + ".tmp", state)


while done < int(steps):
    for values in loader:
        optimizer.zero_grad()
        training.loss(model, values, float(pause_s)).backward()
        optimizer.step()
        told.done(done)
        done += 1
        if done % int(every) == 0:
            save()
        if done == int(steps):
            break
"""


@dataclass(frozen=True)
class Step:
    """An update that is done. `at_s` is monotonic."""

    pid: int
    number: int
    at_s: float


class Steps:
    """What trainings write of their steps; of one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._form = struct.Struct("qqq")

    def read(self) -> list[Step]:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole = raw[: len(raw) // self._form.size * self._form.size]
        return [Step(pid, number, at_ns / 1e9) for pid, number, at_ns in self._form.iter_unpack(whole)]

    def first(self, is_it: Callable[[Step], bool] = lambda step: True) -> Step:
        found: Step = eventually(lambda: next(filter(is_it, self.read()), None), "a step is done")
        return found

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Package:
    """A workload, `module:Class`, and the modules that come with it."""

    workload: str
    entry: str
    modules: Mapping[str, str]

    def install(self, directory: Path) -> None:
        """As pip would, into a directory of modules."""
        about = directory / f"{self.workload}-1.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self.workload}\nVersion: 1\n")
        (about / "entry_points.txt").write_text(f"[relight.workloads]\n{self.workload} = {self.entry}\n")
        for name, text in self.modules.items():
            (directory / f"{name}.py").write_text(text)


SMALL = Package("small", "small:Small", {"training": TRAINING, "small": WORKLOAD, "train": SCRIPT})


class Service:
    """All that `ops up` starts, with a workload installed beside it; children that end are started again by `turn`."""

    def __init__(self, directory: Path, package: Package, workers: int, cores: int, environ: Mapping[str, str]) -> None:
        self.workload = package.workload
        self.steps = Steps(directory / "steps")
        self.code = directory / "code"
        package.install(self.code)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OPS_")}
        token = "of-a-benchmark-alone"
        settings = StackSettings(
            data_dir=directory / "data",
            token=token,
            port=free_port(),
            workers=workers,
            cores=cores,
            environ={**inherited, "PYTHONPATH": str(self.code), **environ},
        )
        self.stack = Stack(settings)
        self.client = Client(settings.url, token)
        headers = {"Authorization": f"Bearer {token}"}
        self.http = httpx.Client(base_url=settings.url + API_PREFIX, headers=headers, trust_env=False)

    def submit(self, config: Mapping[str, Any], **execution: Any) -> tuple[UUID, float]:
        """The operation, and when its answer was here."""
        knobs = {"optimizer": "adamw", "learning_rate": 1e-3, "batch_size": BATCH, "max_epochs": 10**6} | execution
        job = {"workload": self.workload, "config": dict(config), "execution": knobs}
        answer = self.http.post("/operations", json=job)
        at_s = time.monotonic()
        assert answer.status_code == 201, answer.text
        return UUID(answer.json()["id"]), at_s

    def cancel(self, id: UUID) -> None:
        """Without what it would save."""
        self.http.post(f"/operations/{id}/cancel", json={"force": True}).raise_for_status()
        self.wait(id, "cancelled")

    def wait(self, id: UUID, *statuses: str) -> None:
        eventually(lambda: self.client.get(id).status in statuses, f"operation is {' or '.join(statuses)}", self.turn)

    def wait_warm(self, trainers: int) -> None:
        """Until so many trainers stand still, as the rest of the service does."""

        def busy_s() -> dict[int, float]:
            return {process.pid: sum(process.cpu_times()[:2]) for process in self.trainers()}

        def still() -> bool:
            before = busy_s()
            time.sleep(STILL_S)
            after = busy_s()
            # What has not even begun stands still too.
            begun = all(used_s > 0.5 for used_s in after.values())
            return len(after) == trainers and begun and all(after[pid] - before.get(pid, 0.0) < 0.02 for pid in after)

        eventually(still, f"{trainers} trainers are warm", self.turn)

    def trainers(self) -> list[psutil.Process]:
        found = []
        for worker in self.stack.workers:
            try:
                children = psutil.Process(worker.pid).children() if worker.running else []
                found += [child for child in children if "--in-fd" in child.cmdline()]
            except psutil.NoSuchProcess:
                pass
        return found

    def turn(self) -> None:
        self.stack.turn()


@contextmanager
def service(
    package: Package = SMALL, workers: int = 1, cores: int = 1, environ: Mapping[str, str] = {}
) -> Iterator[Service]:
    """In a directory of its own, all of which is gone afterwards, by SIGTERM too."""
    signal.signal(signal.SIGTERM, _leave)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        running = Service(Path(directory), package, workers, cores, environ)
        try:
            running.stack.start()
            yield running
        finally:
            running.client.close()
            running.http.close()
            running.stack.stop()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def command(service: Service, out: Path, steps: int, pause_s: float, state: Path, every: int) -> Sequence[str]:
    """That of the script: the same training without us."""
    given = (out, steps, BATCH, pause_s, service.stack.settings.cores, state, every)
    return [sys.executable, str(service.code / "train.py"), *map(str, given)]


def eventually(look: Callable[[], Any], what: str, meanwhile: Callable[[], object] = lambda: None) -> Any:
    """What `look` finds, within a bound that only a failure reaches."""
    until_s = time.monotonic() + WAIT_S
    while not (found := look()):
        if time.monotonic() > until_s:
            raise SystemExit(f"not within {WAIT_S:g} s: {what}")
        meanwhile()
        time.sleep(0.01)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="at most, and none is begun after --seconds")
    parser.add_argument("--jobs", type=int, default=3, help="of a round")
    parser.add_argument("--seconds", type=float, default=160.0)
    lines.add_option(parser)
    given = parser.parse_args()
    with service() as running:
        warm_ms, cold_ms = measured(running, given)
    of_rounds = [statistics.median(each) for each in warm_ms]
    every = [ms for each in warm_ms for ms in each]
    p99_ms = statistics.quantiles(every, n=100, method="inclusive")[98]
    found = [
        lines.limit("POST accepted → first step, p50", every, "ms", P50_MS),
        lines.limit("POST accepted → first step, p99", [p99_ms], "ms", P99_MS),
        lines.ratio("POST accepted → first step", "started cold", of_rounds, cold_ms, "ms", "≤", 1.0),
    ]
    print(
        f"{len(every)} dispatches on an idle service, {len(cold_ms)} cold starts; {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}; load {os.getloadavg()[0]:.1f}\n"
    )
    print(lines.table(found))
    lines.write(given.lines, found)


def measured(running: Service, given: argparse.Namespace) -> tuple[list[list[float]], list[float]]:
    """In ms: the dispatches of each round, and its cold start."""
    warm_ms: list[list[float]] = []
    cold_ms: list[float] = []
    dispatched_ms(running)  # connections, plans of statements, the files of a first attempt
    cold_started_ms(running)
    until_s = time.monotonic() + given.seconds
    while len(warm_ms) < given.rounds and time.monotonic() < until_s:
        warm_ms.append([dispatched_ms(running) for _ in range(given.jobs)])
        running.wait_warm(1)
        cold_ms.append(cold_started_ms(running))
    return warm_ms, cold_ms


def dispatched_ms(running: Service) -> float:
    running.wait_warm(1)
    running.steps.forget()
    id, accepted_s = running.submit({"out": str(running.steps.path)}, max_steps=STEPS)
    first = running.steps.first()
    running.wait(id, "completed")
    return (first.at_s - accepted_s) * 1e3


def cold_started_ms(running: Service) -> float:
    running.steps.forget()
    unsaved = running.code / "none"
    began_s = time.monotonic()
    subprocess.run(command(running, running.steps.path, STEPS, 0.0, unsaved, 10**9), check=True)
    return (running.steps.first().at_s - began_s) * 1e3


if __name__ == "__main__":
    main()
