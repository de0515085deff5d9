"""What is wrong with a workload class, as far as that can be seen of the class itself: each check says it, or None."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from ops_contract.jobs import Execution
from relight.importing import config_problems, import_workload
from relight.training import numerics
from relight.training.codec import digests, encode
from relight.training.faults import TrainingFault
from relight.training.finishing import finish
from relight.training.order import to_device
from relight.training.randomness import Stream, derive, seed_everything
from relight.workload import Env, LoopWorkload, MapDataset, Workload

_ITEMS_TRIED = 5


def _config(path: str, config: dict[str, Any], execution: Execution) -> str | None:
    workload_type = workload_class(path)
    workload_type.Config.model_json_schema()
    if problems := config_problems(workload_type, config):
        said = "; ".join(f"{p.field}: {p.problem}" for p in problems)
        return f"the Config refuses it: {said}. Give other values: --set config.NAME=VALUE"
    if workload_type.Config.model_config.get("extra") != "forbid":
        return (
            "a mistyped setting would be ignored without a word; "
            'give the Config `model_config = ConfigDict(extra="forbid")`'
        )
    return None


def workload_class(path: str) -> type[Workload[Any]]:
    workload_type = import_workload(path)
    if issubclass(workload_type, LoopWorkload):
        raise TrainingFault(
            "import_failed",
            f"{path} is a LoopWorkload: loop and files are its own, so a resume is as exact as they are, and its "
            "operations say so (best_effort). Only a relight.Workload can be checked",
            permanent=True,
        )
    return workload_type


def _data(path: str, config: dict[str, Any], execution: Execution) -> str | None:
    for name, dataset in _datasets(path, config, execution).items():
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            return f"the {name} data need __len__ and __getitem__ (map-style): a resume skips to its place by index"
        if len(dataset) == 0 and name == "training":
            return "the training data are empty"
    return None


def _items(path: str, config: dict[str, Any], execution: Execution) -> str | None:
    for name, dataset in _datasets(path, config, execution).items():
        if impure := _impure(dataset, execution.seed):
            return (
                f"{name} item {impure}. An item must follow from its index alone: draw from torch, random or numpy's "
                "global generators within __getitem__ (they are seeded for each item), keep no generator, counter or "
                "clock between calls, and give a copy of what is changed"
            )
    return None


def _datasets(path: str, config: dict[str, Any], execution: Execution) -> dict[str, MapDataset]:
    training, validation = _built(path, config, execution).data()
    return {"training": training} | ({"validation": validation} if validation is not None else {})


def _impure(dataset: MapDataset, seed: int) -> str | None:
    """The first item that is another one in another order, or after other draws; its index and field."""
    n = len(dataset)
    indices = sorted({round(i * (n - 1) / (_ITEMS_TRIED - 1)) for i in range(_ITEMS_TRIED)}) if n else []
    first = {index: _frozen(_item(dataset, seed, index)) for index in indices}
    again = {index: _frozen(_item(dataset, seed, index)) for index in indices[:1]}
    torch.rand(7), np.random.rand(7)
    later = {index: _frozen(_item(dataset, seed, index)) for index in reversed(indices)}
    for when, items in (("asked for a second time", again), ("asked for in another order", later)):
        for index, item in items.items():
            if differs := _difference(first[index], item):
                return f"{index} is another one when {when}: {differs}"
    return None


def _item(dataset: MapDataset, seed: int, index: int) -> Any:
    seed_everything(derive(seed, Stream.SAMPLE, 0, index))
    return dataset[index]


def _frozen(item: Any) -> Any:
    """A copy: an item that is handed out again may be changed meanwhile."""
    return {path: _bytes(leaf) for path, leaf in _leaves(item, "")}


def _leaves(item: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(item, Mapping):
        for key, value in item.items():
            yield from _leaves(value, f"{path}[{key!r}]")
    elif isinstance(item, tuple | list):
        for index, value in enumerate(item):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, item


def _bytes(leaf: Any) -> tuple[str, bytes]:
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu()
        return f"{leaf.dtype} {tuple(leaf.shape)}", leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(leaf, np.ndarray):
        return f"{leaf.dtype} {leaf.shape}", leaf.tobytes()
    return type(leaf).__name__, repr(leaf).encode()


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    for path in sorted(a.keys() | b.keys()):
        if a.get(path) != b.get(path):
            field = f"its field {path}" if path else "its value"
            return f"{field} differs ({a[path][0] if path in a else 'not there'})"
    return None


def _loss(path: str, config: dict[str, Any], execution: Execution) -> str | None:
    workload = _built(path, config, execution)
    dataset = workload.data()[0]
    model = workload.model().to(workload.env.device).eval()
    items = [_item(dataset, execution.seed, i) for i in range(min(len(dataset), execution.batch_size))]
    before = digests(encode(dict(model.named_parameters())))
    loss = _of(workload, model, items)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        return f"loss() gives {found}: return the mean over the batch's units, a tensor without dimensions, first"
    once = loss.item()
    if not math.isfinite(once):
        return f"the first loss is {once}: look at the data's range, and at divisions and logarithms"
    if not loss.requires_grad:
        return "the loss does not depend on the model's parameters: is it detached, or under no_grad()?"
    if before != digests(encode(dict(model.named_parameters()))):
        return "loss() changes parameters, and a checkpoint may be copied meanwhile: do that in after_step()"
    twice = _of(workload, model, items + items).item()
    if math.isclose(twice, 2 * once, rel_tol=0.05) and not math.isclose(once, 0.0, abs_tol=1e-12):
        return (
            "the same batch twice over has twice the loss, so it is a sum: return the mean over units(batch), or "
            "batches of other sizes and accumulated ones weigh wrongly"
        )
    return None


def _finish(path: str, config: dict[str, Any], execution: Execution) -> str | None:
    workload = _built(path, config, execution)
    workload.data()
    with tempfile.TemporaryDirectory(prefix="relight-check-") as root:
        try:
            finish(workload, workload.model().to(workload.env.device), Path(root), uuid4(), attempt=1, step=1)
        except TrainingFault as fault:
            return fault.message
    return None


def _of(workload: Workload[Any], model: torch.nn.Module, items: list[Any]) -> Any:
    seed_everything(derive(workload.env.seed, Stream.COLLATE, 0, 0))
    return workload.loss(model, to_device(workload.collate(items), workload.env.device))[0]


def _built(path: str, config: dict[str, Any], execution: Execution) -> Workload[Any]:
    numerics.configure(execution.threads or 1, execution.deterministic)
    seed_everything(derive(execution.seed, Stream.BUILD))
    workload_type = workload_class(path)
    env = Env(device=torch.device("cpu"), rank=0, world_size=1, seed=execution.seed)
    return workload_type(workload_type.Config.model_validate(config), env)


# In this order: each builds on those before it, though none on `items`.
CHECKS = {"config": _config, "data": _data, "items": _items, "loss": _loss, "finish": _finish}
