"""What a step costs beside its own work: our loop with everything on, the bare PyTorch loop, Lightning's Trainer.

All three train one small model with AdamW from a TensorDataset in batches of 32, on one thread; a step has so many
matrix products besides that it takes 1, 5 or 50 ms in the bare loop, which is found out at the beginning of the run. A
dataset of a class of one's own would cost ours a seed for each sample, about 15 µs, which the others do not set.

Ours is a training of the real service, started as `ops up` does: every step's metrics, progress, marks and checkpoints
as they are by default go through the pipe to the agent, its outbox and the API, and what those take of the machine is
in our time. Lightning has an environment of its own with the same torch. Its CSVLogger writes every 50th step's metrics
as it comes, we write every step's; its ModelCheckpoint saves every 30 s, about as often as `auto` does here.

Each way is one process, which runs blocks of steps when it is told to, in turn, and stands still in between: the
clock of a block runs from the beginning of its first step to that of the step after its last. What goes by time, as
our flush twice a second does, is then due once more in a block: that counts against us. (On a virtual machine that is
shared the CPU time of the training's thread spreads as much as its time by the clock: it would tell no more.)

    .venv/bin/python benchmarks/loop_overhead.py
"""

import argparse
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lines
import peers
from dispatch import BATCH, Package, Service, service

MOST = {1: 1.05, 5: 1.01, 50: 1.01}
WARM_UP_STEPS = 30
WAIT_S = 60.0
LIGHTNING = ("lightning==2.6.6", "torch==2.13.0")
AGAINST = {"bare": "the bare loop", "lightning": "Lightning, which logs every 50th step"}

# Of all ways: the data, the model, and the gate at the beginning of each step.
PACING = """
import os
import socket
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

def data():
    inputs = torch.randn(2**17, 64, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def model():
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))


class Gate:
    "Told how many steps to run, and how many products each has, it answers with the seconds that they took."

    def __init__(self, path, name):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        self.lines = connection.makefile("rw")
        self.matrix = torch.eye(128)
        self.left = 0
        self.began_s = None
        print(name, file=self.lines, flush=True)

    def step(self):
        if self.left == 0:
            self.next_block()
        self.left -= 1

    def next_block(self):
        if self.began_s is not None:
            print(time.perf_counter() - self.began_s, file=self.lines, flush=True)
        told = self.lines.readline().split()
        if not told:
            os._exit(0)
        self.left, self.products = map(int, told)
        self.began_s = time.perf_counter()

    def loss(self, model, batch):
        with torch.no_grad():
            product = self.matrix
            for _ in range(self.products):
                product = self.matrix @ product
        inputs, labels = batch
        return cross_entropy(model(inputs), labels)
"""

WORKLOAD = """
from pydantic import BaseModel

from relight import Workload


class Config(BaseModel):
    gate: str


class Paced(Workload[Config]):
    "Steps of a given cost, when it is told to."

    Config = Config
    reports = {}

    def data(self):
        import pacing

        return pacing.data(), None

    def model(self):
        import pacing

        self.gate = pacing.Gate(self.config.gate, "ours")
        return pacing.model()

    def loss(self, model, batch):
        self.gate.step()
        return self.gate.loss(model, batch), {}
"""

BARE = """
import sys

import torch
from torch.utils.data import DataLoader

import pacing

torch.set_num_threads(1)
torch.manual_seed(0)
model = pacing.model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
gate = pacing.Gate(sys.argv[1], "bare")
batches = DataLoader(pacing.data(), batch_size=int(sys.argv[-1]), shuffle=True)
while True:
    for batch in batches:
        gate.step()
        optimizer.zero_grad()
        gate.loss(model, batch).backward()
        optimizer.step()
"""

TRAINER = """
import sys
import warnings
from datetime import timedelta

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import pacing

_, path, directory, _ = sys.argv
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = pacing.model()
        self.gate = pacing.Gate(path, "lightning")

    def training_step(self, batch, index):
        self.gate.step()
        loss = self.gate.loss(self.model, batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


trainer = Trainer(
    accelerator="cpu",
    devices=1,
    max_epochs=-1,
    logger=CSVLogger(directory),
    callbacks=[ModelCheckpoint(directory, train_time_interval=timedelta(seconds=30))],
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Module(), DataLoader(pacing.data(), batch_size=int(sys.argv[-1]), shuffle=True))
"""


PACKAGE = Package(
    "paced", "paced:Paced", {"pacing": PACING, "paced": WORKLOAD, "bare": BARE, "with_lightning": TRAINER}
)


class Way:
    """One process that trains, at the other end of its gate."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("rw")
        self.name = self._lines.readline().strip()

    def block_ms(self, steps: int, products: int) -> float:
        """Of a step, over a block of so many."""
        print(steps, products, file=self._lines, flush=True)
        return float(self._lines.readline()) / steps * 1e3


Times = dict[int, dict[str, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="at most, and none is begun after --seconds")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--block", type=float, default=0.5, help="seconds of each")
    lines.add_option(parser)
    given = parser.parse_args()
    lightning = peers.python_of("lightning", *LIGHTNING, ours=True)
    with service(PACKAGE) as running, ways(running, lightning) as found:
        products = calibrated(found["bare"])
        times = measured(found, products, given)
    result = compared(times)
    print(
        f"{len(times[1]['ours'])} rounds, blocks of {given.block:g} s; products of a step: "
        f"{', '.join(f'{count} for {target_ms} ms' for target_ms, count in products.items())}; {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}, {', '.join(LIGHTNING)}; "
        f"load {os.getloadavg()[0]:.1f}\n"
    )
    print(lines.table(result))
    lines.write(given.lines, result)


@contextmanager
def ways(running: Service, lightning: Path) -> Iterator[dict[str, Way]]:
    """All of them, each at its gate, by name."""
    gate = running.code / "gate"
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(gate))
        listener.listen()
        listener.settimeout(WAIT_S)
        environ = os.environ | {"PYTHONPATH": str(running.code), "OMP_NUM_THREADS": "1"}
        for command in (
            [sys.executable, running.code / "bare.py", gate],
            [lightning, running.code / "with_lightning.py", gate, running.code / "logs"],
        ):
            process = subprocess.Popen([*map(str, command), str(BATCH)], env=environ)
            stack.callback(process.wait)
            stack.callback(process.kill)
        id, _ = running.submit({"gate": str(gate)})
        stack.callback(running.cancel, id)
        found = {}
        for _ in range(len(AGAINST) + 1):
            connection, _ = listener.accept()
            stack.enter_context(connection)
            way = Way(connection)
            found[way.name] = way
        yield found


def calibrated(bare: Way) -> dict[int, int]:
    """How many products a step has that takes so many ms."""
    bare.block_ms(WARM_UP_STEPS, 10)
    plain_ms = min(bare.block_ms(100, 0) for _ in range(7))  # the least is what a quiet moment gives
    product_ms = min(bare.block_ms(20, 100) - plain_ms for _ in range(7)) / 100
    return {target_ms: max(0, round((target_ms - plain_ms) / product_ms)) for target_ms in MOST}


def measured(found: Mapping[str, Way], products: Mapping[int, int], given: argparse.Namespace) -> Times:
    """In ms a step, by the wished cost and by way, a value a round."""
    times: Times = {target_ms: {name: [] for name in found} for target_ms in products}
    for way in found.values():
        way.block_ms(WARM_UP_STEPS, 10)
    names, until_s = sorted(found), time.monotonic() + given.seconds
    for round in range(given.rounds):
        if time.monotonic() > until_s:
            break
        for target_ms, count in products.items():
            for i in range(len(names)):
                name = names[(i + round) % len(names)]
                steps = max(1, int(given.block * 1e3 / target_ms))
                times[target_ms][name].append(found[name].block_ms(steps, count))
    return times


def compared(times: Times) -> list[lines.Line]:
    """At each cost with the bare loop, and with Lightning, below which we have to be."""
    found = []
    for target_ms, of_ways in times.items():
        for name, against in AGAINST.items():
            goal = MOST[target_ms] if name == "bare" else 1.0
            what = f"a step of {target_ms} ms"
            found.append(lines.ratio(what, against, of_ways["ours"], of_ways[name], "ms", "≤", goal))
    return found


if __name__ == "__main__":
    main()
