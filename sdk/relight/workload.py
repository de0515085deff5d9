"""What to train. Importing this needs no torch; building a workload does."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel

from ops_contract.jobs import Execution, OptimizerName, SchedulerName

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

C = TypeVar("C", bound=BaseModel)

WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Env:
    """Where one rank of an attempt runs: of `world_size`, each a process with a device of its own."""

    device: torch.device
    rank: int
    world_size: int
    seed: int


class Stateful(Protocol):
    """Something with state across steps; tensors, numpy arrays and plain values are what the codec keeps."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class MapDataset(Protocol):
    """Map-style, as torch has them. An item is pure in (seed, epoch, index): torch, `random`, numpy are seeded so."""

    def __getitem__(self, index: int, /) -> Any: ...

    def __len__(self) -> int: ...


class Workload(ABC, Generic[C]):
    """One per attempt, built under the seed.

    State across steps lives in model, optimizer, scheduler and `state()` only; a resume loses what is kept elsewhere.
    """

    Config: ClassVar[type[BaseModel]]
    """`extra="forbid"`, importable without torch; its JSON Schema is advertised."""

    reports: ClassVar[dict[str, Literal["min", "max"]]] = {"val_loss": "min"}
    """What `evaluate` returns, and which way is better; empty without validation data."""

    def __init__(self, config: C, env: Env) -> None:
        self.config = config
        self.env = env

    @abstractmethod
    def data(self) -> tuple[MapDataset, MapDataset | None]:
        """Training data, and validation data if there is any."""

    @abstractmethod
    def model(self) -> nn.Module: ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the batch's units, a scalar, and further scalars to report; both stay on the device.

        On several devices it gets this rank's part of the batch. With strategy fsdp parameters are whole only while
        `model(...)` runs; with ddp the model may be used in any way.

        Parameters that the optimizer updates are left as they are, for a checkpoint may be copied beside this:
        `after_step` is the place to change them.
        """

    def data_digest(self) -> str | None:
        """Names the data: a run is not resumed on other data. Called after `data`."""
        return None

    def sources(self) -> Iterable[Any]:
        """Classes and functions whose files the code digest is of, with what these import of their own: this class."""
        return (type(self),)

    def collate(self, items: list[Any]) -> Any:
        """A batch of items, in their order. It may draw random numbers: it is pure in (seed, epoch, batch, rank)."""
        from torch.utils.data import default_collate

        return default_collate(items)

    def optimizer(self, model: nn.Module, knobs: Execution) -> Optimizer:
        """Adam, AdamW, or SGD with momentum 0.9, at the knobs' learning rate."""
        from torch.optim import SGD, Adam, AdamW

        match knobs.optimizer:
            case OptimizerName.SGD:
                return SGD(model.parameters(), lr=knobs.learning_rate, momentum=0.9)
            case OptimizerName.ADAM:
                return Adam(model.parameters(), lr=knobs.learning_rate)
            case OptimizerName.ADAMW:
                return AdamW(model.parameters(), lr=knobs.learning_rate)

    def scheduler(
        self, optimizer: Optimizer, knobs: Execution, steps_total: int
    ) -> tuple[LRScheduler | ReduceLROnPlateau, str] | None:
        """The scheduler and when it steps: "step", "epoch", or after an evaluation with the metric of this name."""
        from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau

        match knobs.scheduler:
            case SchedulerName.CONSTANT:
                return None
            case SchedulerName.COSINE:
                return LambdaLR(optimizer, WarmupCosine(steps_total)), "step"
            case SchedulerName.ONECYCLE:
                return OneCycleLR(optimizer, max_lr=knobs.learning_rate, total_steps=steps_total), "step"
            case SchedulerName.MULTISTEP:
                return MultiStepLR(optimizer, knobs.scheduler_milestones or [], gamma=0.1), "step"
            case SchedulerName.PLATEAU:
                plateau = ReduceLROnPlateau(optimizer, knobs.checkpoint_mode or "min", factor=0.1, patience=10)
                return plateau, knobs.checkpoint_monitor or ""

    def units(self, batch: Any) -> int:
        """Tokens or samples in a batch: the weight of its mean. By default the length of its first tensor."""
        return _first_length(batch)

    def after_step(self, model: nn.Module, step: int) -> None:
        """After each optimizer update, before evaluation: moving averages, clamps.

        On every rank, which draw the same here. With strategy fsdp parameters are DTensors, of which each has a part.
        """

    def evaluate(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
        """Metrics on the validation data, by default the unit-weighted mean loss as `val_loss`.

        The model is in eval mode and without gradients. It leaves model and `state()` as they were: an interrupted
        evaluation is done again whole. Every rank does it, on all validation data; what rank 0 measured counts.
        """
        total: Tensor | float = 0.0
        units = 0
        for batch in loader:
            loss, _ = self.loss(model, batch)
            total = total + loss.double() * self.units(batch)
            units += self.units(batch)
        return {"val_loss": float(total) / units}

    def state(self) -> Mapping[str, Stateful]:
        """Whatever else must survive; called once, after model, optimizer and scheduler are built.

        A checkpoint of several ranks has rank 0's, so it has to be the same on all: let it follow from the step, the
        parameters and `after_step`, not from a rank's own samples.
        """
        return {}

    def finish(self, model: nn.Module, out: Path) -> Mapping[str, float] | None:
        """Once the last step of a completed training is done: scores, and files of your own in the directory `out`.

        A score is the metric `final/<name>`; a file is an artifact, `files/<path>`. The model is in eval mode and
        without gradients, and is published afterwards, as this leaves it. Called again, whole, where an attempt died
        here or this raised. Of several ranks rank 0 alone, with strategy fsdp every one, of which rank 0's counts.
        """
        return None


class LoopControl(Protocol):
    """What a LoopWorkload's loop asks and tells. Steps count from 0; a save's step is the next to run."""

    execution: Execution
    """The job's knobs. Threads, `deterministic`, the device are set already; the others are the loop's to heed."""

    def restored(self) -> Path | None:
        """A directory with the files of the save to go on from, verified; to read only. None: begin anew."""

    def report(self, step: int, **metrics: Tensor | float) -> None:
        """Scalars of a step. Of each name steps rise."""

    def should_stop(self) -> bool:
        """To be asked after each step, as the sign of life too. True: save, and return from `run`."""

    def save(self, step: int, write: Callable[[Path], object], epoch: int = 0) -> None:
        """`write` fills the empty directory that it gets; afterwards that is a checkpoint, committed.

        A step that is on disk already is not written again.
        """


class LoopWorkload(ABC, Generic[C]):
    """A training whose loop and files are its own, as those of a trainer of another library.

    It can be resumed; how exactly is up to its files, so that exactness is best effort.
    """

    Config: ClassVar[type[BaseModel]]
    """`extra="forbid"`, importable without torch; its JSON Schema is advertised."""

    reports: ClassVar[dict[str, Literal["min", "max"]]] = {}
    """Metrics to monitor, and which way is better. A save has the value that was reported since the one before."""

    def __init__(self, config: C, env: Env) -> None:
        self.config = config
        self.env = env

    @abstractmethod
    def run(self, ctl: LoopControl) -> nn.Module | None:
        """Train from `ctl.restored()` to the end, or until `ctl.should_stop()`. The final model, to be published."""


AnyWorkload = type[Workload[Any]] | type[LoopWorkload[Any]]


class WarmupCosine:
    """Linear warm-up over 5 % of the steps, then half a cosine towards zero: a factor for `LambdaLR`.

    An object and not a closure, so that `LambdaLR.state_dict` holds its parameters instead of dropping them.
    """

    def __init__(self, steps_total: int) -> None:
        self.steps_total = steps_total
        self.warmup_steps = math.ceil(WARMUP_SHARE * steps_total)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps_total - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def _first_length(batch: Any) -> int:
    if isinstance(batch, Mapping):
        return _first_length(next(iter(batch.values())))
    if isinstance(batch, (tuple, list)):
        return _first_length(batch[0])
    return len(batch)
