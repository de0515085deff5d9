"""How large a workload's model is, what its data are, and what a unit of them costs: before anything is trained."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ops_contract.jobs import Execution
from relight.training.faults import TrainingFault
from relight.training.order import Batch, DataOrder, to_device
from relight.training.randomness import Stream, derive, seed_everything
from relight.training.resolving import checked_config
from relight.training.source import source_digest, source_files
from relight.workload import AnyWorkload, Env, LoopWorkload, Workload

_SAMPLES = 32  # of the batch that units are counted in, at most
# What may be run for real where it does not run on the meta device, with a batch of two: BatchNorm refuses one.
_SMALL_PARAMS = 20_000_000
_SMALL_SAMPLES = 2
# Where a model is built, and whether after data(), of which it may want to know something. The first that works counts:
# on the meta device nothing has memory, however large.
_WAYS = (("meta", False), ("meta", True), ("cpu", True))

T = TypeVar("T")


@dataclass(frozen=True)
class DataFacts:
    """`samples` are one epoch's. `units_per_sample` is the mean over the first batch, exact where all have as many."""

    samples: int
    units_per_sample: float
    validates: bool
    data_digest: str | None
    code_digest: str | None


@dataclass(frozen=True)
class ModelSize:
    """As `count_parameters` has it. FLOPs are of forward and backward pass; `flops_reason` says why they are None.

    `notes` are for people: what had to be done otherwise, or looks wrong.
    """

    params: int
    embedding_params: int
    flops_per_unit: float | None
    flops_reason: str | None
    notes: tuple[str, ...]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The distinct ones, frozen ones too, and those among them of nn.Embedding modules: a head that is tied to one
    counts once, as an embedding."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embeddings = {parameter for table in tables for parameter in table.parameters()}
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in embeddings)


class Sizer:
    """The data are built once, under `config`, which may be that of any size; a model for each one that is asked for.

    Seeds the global generators. Raises TrainingFault: permanent for a config or a workload that cannot be sized up,
    else for what the user's code raised.
    """

    def __init__(self, workload_type: AnyWorkload, config: dict[str, Any], execution: Execution) -> None:
        if issubclass(workload_type, LoopWorkload):
            what = "loop, model and data of a LoopWorkload are its own: nothing can be said of them before it runs"
            raise TrainingFault("not_sizable", f"{what}; give a relight.Workload", permanent=True)
        self._workload_type: type[Workload[Any]] = workload_type
        self._seed = execution.seed
        checked = checked_config(workload_type, config)
        workload = _users("__init__()", lambda: self._workload(checked, "cpu"))
        training, validation = _users("data()", workload.data)
        if len(training) == 0:
            raise TrainingFault("no_data", "the workload's training data is empty", permanent=True)
        self._order = DataOrder(training, workload.collate, self._seed, min(_SAMPLES, execution.batch_size), 0)
        self._batch = _first(self._order)
        self._units = _units(workload, self._batch)
        self.data = DataFacts(
            samples=len(training),
            units_per_sample=self._units / self._batch.samples,
            validates=validation is not None and len(validation) > 0,
            data_digest=_users("data_digest()", workload.data_digest),
            code_digest=source_digest(source_files(*_users("sources()", workload.sources))),
        )

    def model(self, config: dict[str, Any], count_flops: bool) -> ModelSize:
        checked = checked_config(self._workload_type, config)
        model, notes = self._built(checked)
        params, embedding_params = count_parameters(model)
        notes += own_count(model, params, embedding_params)
        flops, reason = self._flops_per_unit(checked, params, notes) if count_flops else (None, "they were not counted")
        return ModelSize(params, embedding_params, flops, reason, tuple(notes))

    def _built(self, config: BaseModel) -> tuple[nn.Module, list[str]]:
        first: Exception | None = None
        for device, with_data in _WAYS:
            try:
                model = self._model(self._workload(config, device), device, with_data)
            except Exception as error:
                first, last = first or error, error
                continue
            if first is None or device == "meta":
                return model, []
            return model, [f"the model is built on the CPU; on the meta device: {_said(first)}"]
        raise _fault("model()", last) from last

    def _flops_per_unit(self, config: BaseModel, params: int, notes: list[str]) -> tuple[float | None, str | None]:
        """Attention counts as the two products that it is, whichever kernel a device has, the masked half too."""
        reason = ""
        for device, with_data in _WAYS:
            small = device == "cpu"
            if small and params > _SMALL_PARAMS:
                return None, f"{reason}; on the CPU they are counted of models up to {_SMALL_PARAMS:,} parameters"
            try:
                workload = self._workload(config, device)
                model = self._model(workload, device, with_data).train()
                batch = self._few() if small else self._batch
                units = _units(workload, batch) if small else self._units
                with torch.device(device), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                    loss, _ = workload.loss(model, to_device(batch.data, torch.device(device)))
                    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            except Exception as error:
                reason = f"loss() on {'the CPU' if small else 'the meta device'}: {_said(error)}"
                continue
            if small:
                notes.append(f"FLOPs are counted on the CPU; {reason}")
            flops = counter.get_total_flops()
            return (flops / units, None) if flops else (None, "torch counts no FLOPs for its operators")
        return None, reason

    def _workload(self, config: BaseModel, device: str) -> Workload[Any]:
        """Nothing of it may be seen by another one: a model may be built once only."""
        seed_everything(derive(self._seed, Stream.BUILD))
        env = Env(device=torch.device(device), rank=0, world_size=1, seed=self._seed)
        return self._workload_type(config, env)

    def _model(self, workload: Workload[Any], device: str, with_data: bool) -> nn.Module:
        if with_data:
            workload.data()
        with torch.device(device):
            return workload.model().to(device)

    def _few(self) -> Batch:
        return _first(replace(self._order, batch_size=min(_SMALL_SAMPLES, self._order.batch_size)))


def _first(order: DataOrder) -> Batch:
    """As a training begins with it."""
    return _users("the data", lambda: next(order.training(0, 0)))


def _units(workload: Workload[Any], batch: Batch) -> int:
    units = int(_users("units()", lambda: workload.units(batch.data)))
    if units < 1:
        what = f"units() says {units} of a batch of {batch.samples} samples: return its tokens or samples"
        raise TrainingFault("not_sizable", what, permanent=True)
    return units


def own_count(model: nn.Module, params: int, embedding_params: int) -> list[str]:
    """What is counted is N, for that is what a training reports of itself; a model that says otherwise is told."""
    if not callable(own := getattr(model, "num_params", None)):
        return []
    try:
        said = own()
    except Exception as error:
        return [f"num_params() is not heeded: {_said(error)}"]
    if said in (params, params - embedding_params):
        return []
    counted = f"{params:,} parameters are counted, {embedding_params:,} of them in embeddings"
    return [f"num_params() says {said}, but {counted}: N is what is counted"]


def _users(name: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except TrainingFault:
        raise
    except Exception as error:
        raise _fault(name, error) from error


def _fault(name: str, error: Exception) -> TrainingFault:
    trace = "".join(traceback.format_exception(error))
    return TrainingFault("exception", f"{name} of the workload: {_said(error)}", permanent=False, traceback=trace)


def _said(error: Exception) -> str:
    """In one line: torch's own errors go on with stacks."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
