"""Trainings in processes of their own that tests may kill, and the backend's view of them."""

import multiprocessing
import os
import random
import signal
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal
from uuid import UUID, uuid4

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import Tensor, nn

from ops_contract.agents import CheckpointRef, FailureRecord, StartTraining
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Outcome, Phase
from ops_contract.pipe import Mark
from ops_contract.reports import CheckpointSaved, Finish, Metrics, Progress, Report, Started
from ops_worker.ptycho.workload import Ptycho
from ops_worker.workloads.bytelm import ByteLM
from ops_worker.workloads.digits import Digits
from relight.training import loop
from relight.training.attempt import Attempt, Site
from relight.training.checkpoint import restore
from relight.training.codec import digests, encode
from relight.training.reporting import Reporter
from relight.training.saving import Saver
from relight.training.state import Cursor, Live
from relight.workload import MapDataset, Workload

reports = TypeAdapter[Report](Report)

# One process imports torch and scikit-learn; every child is a fork of it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["torch._inductor", "sklearn.datasets", "relight.training.attempt", "ops_worker.workloads.bytelm"]
)


class ZooConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    scheduler: Literal["plateau", "multistep", "onecycle", "knobs"] = "plateau"
    samples: int = 45
    random: bool = True
    norm: Literal["batch", "layer", "none"] = "batch"
    tied: bool = True
    average: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"


class Zoo(Workload[ZooConfig]):
    """Every kind of randomness and of state at once: each is a way to resume wrongly."""

    Config = ZooConfig
    reports: ClassVar[dict[str, Literal["min", "max"]]] = {"val_loss": "min", "val_noise": "min"}

    def data(self) -> tuple[MapDataset, MapDataset]:
        items = RandomItems if self.config.random else FixedItems
        return items(self.config.samples), items(10)

    def data_digest(self) -> str:
        return f"{self.config.samples} random items"

    def collate(self, items: list[Tensor]) -> Tensor:
        noise = 0.01 * torch.randn(()) if self.config.random else 0.0
        return (torch.stack(items) + noise).to(getattr(torch, self.config.dtype))

    def model(self) -> nn.Module:
        self.net = ZooNet(self.config).to(getattr(torch, self.config.dtype))
        return self.net

    def scheduler(self, optimizer: Any, knobs: Execution, steps_total: int) -> Any:
        from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR, ReduceLROnPlateau

        if self.config.scheduler == "plateau":
            return ReduceLROnPlateau(optimizer, patience=0, threshold=0.5), "val_loss"
        if self.config.scheduler == "multistep":
            return MultiStepLR(optimizer, [1, 2], gamma=0.3), "epoch"
        if self.config.scheduler == "onecycle":
            return OneCycleLR(optimizer, max_lr=0.1, total_steps=steps_total + 1), "step"
        return super().scheduler(optimizer, knobs, steps_total)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        noise = random.random() + float(np.random.rand()) if self.config.random else 0.0
        return model(batch).square().mean() * (1 + 0.01 * noise), {"scale": self.net.scale}

    def after_step(self, model: nn.Module, step: int) -> None:
        if not self.config.average:
            return
        self.net.average.lerp_(self.net.scale.detach(), 0.1 + 0.01 * random.random())
        self.history.update(step)

    def evaluate(self, model: nn.Module, loader: Iterable[Tensor]) -> dict[str, float]:
        losses = [(float(model(batch).square().mean()), float(torch.rand(()))) for batch in loader]
        return {"val_loss": sum(a for a, _ in losses), "val_noise": sum(b for _, b in losses)}

    def state(self) -> dict[str, Any]:
        self.history = History()
        return {"history": self.history} if self.config.average else {}


class RandomItems:
    """Draws from all three generators, and a sum whose bits depend on the number of threads."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        noise = random.random() + float(np.random.rand())
        return torch.randn(8) * noise + index / self.n + torch.rand(70_000).sum() / 1e5


class FixedItems(RandomItems):
    """The same items in every epoch."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(8, generator=torch.Generator().manual_seed(index)) + index / self.n


class ZooNet(nn.Module):
    """Tied weights, BatchNorm, dropout, a transposed parameter, and a buffer that `state_dict` leaves out."""

    average: Tensor

    def __init__(self, config: ZooConfig) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        if config.tied:
            self.second.weight = self.first.weight
        self.norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}[config.norm](8)
        self.dropout = nn.Dropout(0.2 if config.random else 0.0)
        self.transposed = nn.Parameter(torch.randn(8, 4).t())
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("average", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        out = self.dropout(self.second(hidden))
        return self.scale * out @ self.transposed.t() + self.average


class History:
    """State that is no tensor."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[float, ...]] = {}
        self.numbers = np.zeros((2, 3), dtype=">f4")
        self.best = float("inf")

    def update(self, step: int) -> None:
        self.steps[step] = (random.random(), float("-inf"))
        self.numbers[step % 2] += np.float32(random.random())
        self.best = min(self.best, self.steps[step][0])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": OrderedDict(self.steps), "numbers": self.numbers, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = dict(state["steps"])
        self.numbers, self.best = state["numbers"], state["best"]


class Finishing(Digits):
    """Leaves what it draws, and what it finds."""

    def finish(self, model: nn.Module, out: Path) -> dict[str, float]:
        (out / "deep").mkdir()
        (out / "deep" / "drawn.txt").write_text(str(float(torch.rand(()))))
        found = 2 * model.training + torch.is_grad_enabled()
        model.eval()[-1].bias.zero_()  # type: ignore[index]
        return {"drawn": random.random(), "found": found}


WORKLOADS: dict[str, type[Workload[Any]]] = {
    "digits": Digits,
    "ptycho": Ptycho,
    "bytelm": ByteLM,
    "zoo": Zoo,
    "finishing": Finishing,
}


@dataclass
class Operation:
    """One operation as the backend keeps it: takes attempts' reports, answers with the curve of its lineage."""

    root: Path
    workload: str
    config: dict[str, Any] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)
    record: FailureRecord = field(default_factory=FailureRecord)
    id: UUID = field(default_factory=uuid4)
    attempts: int = 0
    checkpoints: list[CheckpointSaved] = field(default_factory=list)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)
    forked_from: "tuple[Operation, CheckpointSaved] | None" = None
    accept_changes: bool = False
    until_step: int | None = None

    def fork(self, at: CheckpointSaved, config: dict[str, Any] | None = None, **execution: Any) -> "Operation":
        """One that begins at a checkpoint of this one."""
        return Operation(
            root=self.root,
            workload=self.workload,
            config=self.config | (config or {}),
            execution=Execution.model_validate(self.execution.model_dump() | execution),
            forked_from=(self, at),
        )

    def run(
        self,
        kill_at: Callable[[int, Report], bool] = lambda n, report: False,
        stop_after_polls: int | None = None,
        **harm: Any,
    ) -> Outcome | None:
        """One attempt from the newest checkpoint; None when it was killed. `kill_at` sees each report and its number.

        With `stop_after_polls` that many questions whether to stop are answered by no, and the next by yes. `harm` is
        done to the child: see Harm.
        """
        receiver, sender = processes.Pipe(duplex=False)
        start = self.start()
        child = processes.Process(
            target=_child, args=(start.model_dump_json(), str(self.root), sender, stop_after_polls, Harm(**harm))
        )
        child.start()
        sender.close()
        try:
            outcome = self._listen(receiver, lambda n, report: child.kill() if kill_at(n, report) else None)
        except BaseException:
            child.kill()  # a test that times out leaves nothing running
            raise
        finally:
            child.join()
        assert outcome is not None or child.exitcode == -9, f"the child ended with {child.exitcode}"
        return outcome

    def start(self) -> StartTraining:
        self.attempts += 1
        parent, fork_point = self.forked_from or (None, None)
        newest = self.checkpoints[-1] if self.checkpoints else fork_point
        return StartTraining(
            incarnation=uuid4(),
            operation_id=self.id,
            attempt=self.attempts,
            slots=[0],
            deadline_s=60,
            job=self.job(),
            checkpoint=ref_of(newest) if newest else None,
            parent_job=parent.job() if parent and newest is fork_point else None,
            accept_changes=self.accept_changes,
            record=self.record,
        )

    def job(self) -> Job:
        return Job(
            kind=Kind.TRAINING,
            workload=self.workload,
            config=self.config,
            execution=self.execution,
            until_step=self.until_step,
        )

    def accept(self, report: Report) -> None:
        self.reports.append(report)
        if isinstance(report, Started):
            # Its predecessors count for the steps before it only.
            self.curves = {
                name: {step: value for step, value in curve.items() if step < report.start_step}
                for name, curve in self.curves.items()
            }
        elif isinstance(report, Metrics):
            for series in report.series:
                curve = self.curves.setdefault(series.name, {})
                assert not curve.keys() & set(series.steps), f"{series.name} of {series.steps} was reported twice"
                curve.update(zip(series.steps, series.floats(), strict=True))
        elif isinstance(report, CheckpointSaved):
            first = self.forked_from[1].step if self.forked_from else 0
            missing = set(range(first, report.step)) - self.curves.get("loss", {}).keys()
            assert not missing, f"the checkpoint of step {report.step} came before the losses of {missing}"
            self.checkpoints.append(report)

    def bits(self) -> dict[str, dict[int, str]]:
        """The curves, every bit of them."""
        return {
            name: {step: struct.pack(">d", value).hex() for step, value in sorted(curve.items())}
            for name, curve in self.curves.items()
        }

    def final_state(self) -> dict[str, str]:
        """Digests of model, optimizer, scheduler, registered state, monitor and cursor in the newest checkpoint."""
        return digests(encode(restore(self.root, ref_of(self.checkpoints[-1]))[1]))

    def differences(self, reference: "Operation") -> list[str]:
        """What does not have the same bits: names of curves with their first such step, and paths of the state."""
        mine, theirs = self.bits(), reference.bits()
        curves = [
            f"{name} from step {min(step for step, _ in mine.get(name, {}).items() ^ theirs.get(name, {}).items())}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]
        state, expected = self.final_state(), reference.final_state()
        return curves + sorted({path for path, _ in state.items() ^ expected.items()})

    def _listen(self, receiver: Connection, seen: Callable[[int, Report], None]) -> Outcome | None:
        for n in count():
            try:
                report = reports.validate_json(receiver.recv_bytes())
            except (EOFError, ConnectionResetError):
                return None
            if isinstance(report, Finish):
                assert report.error is None, report.error
                return Outcome(report.outcome)
            self.accept(report)
            seen(n, report)
        raise AssertionError


def ref_of(saved: CheckpointSaved) -> CheckpointRef:
    return CheckpointRef(
        checkpoint_id=saved.checkpoint_id,
        path=saved.path,
        step=saved.step,
        epoch=saved.epoch,
        phase=Phase(saved.phase),
        size_bytes=saved.size_bytes,
        manifest_sha256=saved.manifest_sha256,
    )


@dataclass
class Listed:
    """A sink that keeps what it gets."""

    reports: list[Report] = field(default_factory=list)
    progresses: list[Progress] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def progress(self, progress: Progress) -> None:
        self.progresses.append(progress)

    def mark(self, mark: Mark) -> None:
        self.marks.append(mark)


class _ConnectionSink(Listed):
    def __init__(self, connection: Connection, die_unreported: int | None) -> None:
        super().__init__()
        self.die_unreported = die_unreported
        self.connection = connection
        self.sending = Lock()

    def report(self, report: Report) -> None:
        if isinstance(report, CheckpointSaved) and report.step == self.die_unreported:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.sending:
            self.connection.send_bytes(report.model_dump_json().encode())


def ticking() -> Callable[[], float]:
    """A clock by which every flush is due: each step reports by itself."""
    ticks = count()
    return lambda: float(next(ticks))


def stopping_after(polls: int | None) -> Callable[[], Literal["cancelled"] | None]:
    asked = count()
    return lambda: "cancelled" if polls is not None and next(asked) >= polls else None


@dataclass(frozen=True)
class Harm:
    """SIGKILL at the n-th poll whether to stop (before each step, each batch of an evaluation), or the n-th fsync of
    a save, from 0; where the checkpoint of a step, published already, would be reported; a mutant of the engine.

    With `waits` training waits for every save: none is passed over.
    """

    die_at_poll: int | None = None
    die_at_fsync: int | None = None
    die_unreported: int | None = None
    waits: bool = False
    mutant: str | None = None


def _child(start_json: str, root: str, connection: Connection, stop_after_polls: int | None, harm: Harm) -> None:
    start = StartTraining.model_validate_json(start_json)
    sink = _ConnectionSink(connection, harm.die_unreported)
    site = Site(Path(root), "cpu", cores=1)
    should_stop = _dying(harm.die_at_poll, stopping_after(stop_after_polls))
    os.fsync = _dying(harm.die_at_fsync, os.fsync)
    if harm.waits:
        Saver._memory = lambda self, encoded: None
    if harm.mutant is not None:
        _mutate(MUTANTS[harm.mutant])
    outcome = Attempt(WORKLOADS[start.job.workload], start, site, sink, should_stop, ticking()).run()
    sink.report(Finish(outcome=outcome))


def _dying(at: int | None, do: Callable[..., Any]) -> Callable[..., Any]:
    calls = count()

    def dying(*args: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(*args)

    return dying


Mutant = Callable[[dict[str, Any], Live], None]


def _mutate(mutant: Mutant) -> None:
    """What is put back is first spoiled; a run that does not resume is as ever."""
    put_back = Attempt._put_back

    def spoiled(self: Attempt, tree: dict[str, Any], live: Live, reporter: Reporter) -> Cursor:
        mutant(tree, live)
        return put_back(self, tree, live, reporter)

    Attempt._put_back = spoiled


def _unseeded(tree: dict[str, Any], live: Live) -> None:
    loop.seed_everything = lambda value: None


def _steps_back(tree: dict[str, Any], live: Live) -> None:
    for state in tree["optimizer"]["state"].values():
        state["step"] = state["step"] - 1


MUTANTS: dict[str, Mutant] = {
    "none": lambda tree, live: None,
    "scheduler not restored": lambda tree, live: tree.update(scheduler=live.capture()["scheduler"]),
    "generators not reseeded": _unseeded,
    "BatchNorm buffer skipped": lambda tree, live: tree["model"].update({"norm.running_var": torch.ones(8)}),
    "hidden buffer skipped": lambda tree, live: tree["model"].update(average=torch.zeros(())),
    "one weight skipped": lambda tree, live: tree["model"].update(scale=torch.ones(())),
    "optimizer step counter off by one": _steps_back,
    "moments forgotten": lambda tree, live: tree["optimizer"]["state"].clear(),
    "one batch skipped": lambda tree, live: tree["cursor"].update(
        samples_in_epoch=tree["cursor"]["samples_in_epoch"] + 5
    ),
    "order of another epoch": lambda tree, live: tree["cursor"].update(epoch=tree["cursor"]["epoch"] - 1),
    "registered state forgotten": lambda tree, live: tree.update(state=live.capture()["state"]),
    "units counted from the resume": lambda tree, live: tree["cursor"].update(units=0),
    "monitor forgotten": lambda tree, live: tree.update(monitor=live.capture()["monitor"]),
}
