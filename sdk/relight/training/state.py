"""All that a training is between two steps, taken from the live objects and put back into them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ops_contract.lifecycle import Phase
from relight.training.codec import CodecError, decode, digests, encode
from relight.training.faults import TrainingFault
from relight.training.monitor import Monitor
from relight.workload import Stateful


class Cursor(NamedTuple):
    """What is next: the update of `step`, or with phase EVALUATE what follows that update.

    `epoch` counts from 0; `samples_in_epoch` are consumed. `units` are those of all updates so far, None where that is
    not known.
    """

    step: int = 0
    epoch: int = 0
    samples_in_epoch: int = 0
    phase: Phase = Phase.UPDATE
    units: int | None = 0

    def after(self, samples: int, units: int | None) -> Self:
        """Once so many more are consumed."""
        total = None if self.units is None or units is None else self.units + units
        return self._replace(samples_in_epoch=self.samples_in_epoch + samples, units=total)

    def samples(self, samples_per_epoch: int) -> int:
        """Those that are consumed, of all epochs."""
        return self.epoch * samples_per_epoch + self.samples_in_epoch

    def as_tree(self) -> dict[str, Any]:
        return {**self._asdict(), "phase": self.phase.value}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Self:
        """In a checkpoint of a version that did not count them the units are not known, but before the first update."""
        phase = Phase(tree["phase"])
        begun = tree["step"] > 0 or phase is Phase.EVALUATE
        return cls(**{"units": None if begun else 0, **tree, "phase": phase})


@dataclass(frozen=True)
class Live:
    """The objects whose state outlives a step; `registered` is `Workload.state()`."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | ReduceLROnPlateau | None
    registered: Mapping[str, Stateful]
    monitor: Monitor
    scaler: GradScaler | None = None

    def capture(self) -> dict[str, Any]:
        """Shares its tensors with the live objects: encode or copy it before the next step."""
        return {
            "model": _model_tensors(self.model),
            "modules": {name: module.get_extra_state() for name, module in _with_extra_state(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "state": {name: stateful.state_dict() for name, stateful in self.registered.items()},
            "monitor": self.monitor.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def restore(self, tree: dict[str, Any]) -> None:
        """Takes over `tree`: optimizers keep the tensors that they load."""
        _copy_into(_model_tensors(self.model), tree["model"])
        for name, module in _with_extra_state(self.model).items():
            module.set_extra_state(tree["modules"][name])
        self.optimizer.load_state_dict(tree["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(tree["scheduler"])
        for name, stateful in self.registered.items():
            stateful.load_state_dict(tree["state"][name])
        self.monitor.load_state_dict(tree["monitor"])
        # A fork may change the precision, and then begins with a fresh one. Older checkpoints have none.
        if self.scaler is not None and tree.get("scaler"):
            self.scaler.load_state_dict(tree["scaler"])


def _as_it_is(tree: Any, sample: Any = None) -> Any:
    return tree


def check_round_trip(
    live: Live, out: Callable[[Any], Any] = _as_it_is, back: Callable[[Any, Any], Any] = _as_it_is
) -> None:
    """Put the live state through the codec and back into the objects; every bit must be the same afterwards.

    `out` makes of it what the codec knows; `back` undoes that, given the live state as a sample.
    Raises a permanent TrainingFault naming what would be lost: better after one step than after the first failure.
    """
    try:
        captured = live.capture()
        before = encode(out(captured))
        expected = digests(before)
        live.restore(back(decode(before.document, before.tensors), captured))
        found = digests(encode(out(live.capture())))
    except CodecError as error:
        raise not_restorable(error) from error
    changed = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
    if changed:
        raise TrainingFault(
            "not_restorable",
            f"this run could not be resumed exactly: load_state_dict does not give back what state_dict gave for "
            f"{', '.join(changed[:5])}" + (f" and {len(changed) - 5} more" if len(changed) > 5 else ""),
            permanent=True,
        )


def not_restorable(error: CodecError) -> TrainingFault:
    return TrainingFault("not_restorable", f"this run could not be resumed: {error}", permanent=True)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name they have; also the buffers that `state_dict` leaves out."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    plain = nn.Module.get_extra_state
    return {name: module for name, module in model.named_modules() if type(module).get_extra_state is not plain}


def _copy_into(live: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if live.keys() != saved.keys():
        raise _other_model(f"it has or lacks {', '.join(sorted(live.keys() ^ saved.keys())[:5])}")
    with torch.no_grad():
        for name, tensor in live.items():
            if (tensor.shape, tensor.dtype) != (saved[name].shape, saved[name].dtype):
                was = f"{list(saved[name].shape)} {saved[name].dtype}"
                raise _other_model(f"{name} was {was} and is {list(tensor.shape)} {tensor.dtype}")
            tensor.copy_(saved[name])


def _other_model(difference: str) -> TrainingFault:
    return TrainingFault(
        "model_changed",
        f"the checkpoint is of another model: {difference}; restore the workload's code, or submit it anew",
        permanent=True,
    )
