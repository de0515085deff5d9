"""Runs the contract against a workload class, without a server: what would break exactness, and how to mend it.

`python -m relight.training.check module:Class [--config JSON] [--execution JSON] [--steps N]` prints a line per check
and exits with 1 when one fails. Every run is a process of its own, as every attempt is.
"""

import argparse
import json
import math
import multiprocessing
import os
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from ops_contract.agents import CheckpointRef, StartTraining
from ops_contract.jobs import CheckpointEvery, Execution, Job, Strategy
from ops_contract.lifecycle import Kind
from ops_contract.reports import CheckpointSaved, Metrics, Note, Report
from relight.importing import config_problems, import_workload
from relight.training import numerics
from relight.training.attempt import Attempt, Site
from relight.training.checkpoint import ref_to, restore
from relight.training.codec import digests, encode
from relight.training.faults import TrainingFault
from relight.training.finishing import finish
from relight.training.order import to_device
from relight.training.randomness import Stream, derive, seed_everything
from relight.workload import Env, LoopWorkload, MapDataset, Workload

_ITEMS_TRIED = 5
_NAMED = 3
_RARELY = CheckpointEvery(steps=1_000_000_000)


@dataclass(frozen=True)
class Finding:
    """`problem` says what is wrong and how to mend it; None when all is well."""

    check: str
    problem: str | None = None


def check(path: str, config: dict[str, Any], execution: Execution, steps: int = 3) -> Iterator[Finding]:
    """Findings as they come; after a failed one those that build on it are left out."""
    numerics.warm_up()  # once, and not in every process
    for name, look in (("config", _config), ("data", _data), ("items", _items), ("loss", _loss), ("finish", _finish)):
        problem = _in_child(look, path, config, execution)
        yield Finding(name, problem)
        if problem is not None and name != "items":
            return
    with tempfile.TemporaryDirectory(prefix="relight-check-") as root:
        yield from _runs(_Runs(Path(root), path, config, execution, steps))


# ---- what can be seen of the class itself


def _config(path: str, config: dict[str, Any], execution: Execution) -> str | None:
    workload_type = _imported(path)
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


def _imported(path: str) -> type[Workload[Any]]:
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
    workload_type = _imported(path)
    env = Env(device=torch.device("cpu"), rank=0, world_size=1, seed=execution.seed)
    return workload_type(workload_type.Config.model_validate(config), env)


# ---- what only runs of the engine show


@dataclass
class Run:
    """What an attempt reported, or why it failed. `state` are digests of its last checkpoint, by path."""

    curves: dict[str, dict[int, str]] = field(default_factory=dict)
    checkpoint: CheckpointRef | None = None
    state: dict[str, str] = field(default_factory=dict)
    inexact: list[str] = field(default_factory=list)
    fault: str | None = None


@dataclass(frozen=True)
class _Runs:
    root: Path
    path: str
    config: dict[str, Any]
    execution: Execution
    steps: int

    def run(self, until_step: int, checkpoint: CheckpointRef | None = None, **execution: Any) -> Run:
        length = {"max_steps": 2 * self.steps, "max_epochs": 2 * self.steps, "max_samples": None}
        whole = length | {"checkpoint_every": _RARELY, "devices": 1, "strategy": Strategy.DDP}
        knobs = Execution.model_validate(self.execution.model_dump() | whole | execution)
        job = Job(kind=Kind.TRAINING, workload=self.path, config=self.config, execution=knobs, until_step=until_step)
        start = StartTraining(
            incarnation=uuid4(),
            operation_id=uuid4(),
            attempt=1,
            slots=[0],
            deadline_s=60,
            job=job,
            checkpoint=checkpoint,
        )
        run: Run = _in_child(_attempt, start, self.root)
        return run


def _runs(runs: _Runs) -> Iterator[Finding]:
    steps = runs.steps
    straight = runs.run(2 * steps)
    yield Finding("state", straight.fault)
    if straight.fault:
        return
    yield Finding("kernels", _kernels(straight.inexact))
    first = runs.run(steps)
    differs = first.fault or _differing(first, straight, "the first run")
    yield Finding(
        "repeat",
        differs
        and f"two runs with one seed are not the same: {differs}. Something draws outside torch, random and numpy's "
        "global generators, or goes by time, the host, a set's order, or files that change",
    )
    if not differs:
        resumed = runs.run(2 * steps, checkpoint=first.checkpoint)
        differs = resumed.fault or _differing(resumed, straight, f"{2 * steps} steps in one go")
        yield Finding(
            "resume",
            differs
            and f"{steps} steps, a new process, and {steps} more are not {2 * steps} steps: {differs}. Something that "
            "lasts from step to step is neither in the model's parameters and buffers, nor in optimizer or "
            "scheduler: give it state_dict() and load_state_dict(), and return it from state()",
        )
    loading = runs.run(2 * steps, num_workers=2)
    differs = loading.fault or _differing(loading, straight, "num_workers 0")
    yield Finding(
        "workers",
        differs
        and f"num_workers 2 is not num_workers 0: {differs}. The data set or collate() keeps something between calls, "
        "or shares it with the training process: make items pure in their index",
    )


def _kernels(inexact: Sequence[str]) -> str | None:
    if not inexact:
        return None
    return f"{'; '.join(inexact)}: a resume is best effort only. Use another operator in model or loss"


def _differing(run: Run, reference: Run, name: str) -> str | None:
    """The first step and metric that is not the reference's, as far as the run goes; else the state at its end."""
    wrong = [
        (step, metric)
        for metric, curve in run.curves.items()
        for step, value in curve.items()
        if reference.curves.get(metric, {}).get(step) != value
    ]
    if wrong:
        step, metric = min(wrong)
        return f"{metric} of step {step} differs from that of {name}"
    if run.checkpoint and reference.checkpoint and run.checkpoint.step == reference.checkpoint.step:
        paths = sorted({path for path, _ in run.state.items() ^ reference.state.items()})
        if paths:
            return f"the state after the last step differs from that of {name} in {', '.join(paths[:_NAMED])}"
    return None


class _Sink:
    """Takes the attempt's reports as its agent would."""

    def __init__(self) -> None:
        self.run = Run()

    def report(self, report: Report) -> None:
        if isinstance(report, Metrics):
            for series in report.series:
                values = [struct.pack(">d", value).hex() for value in series.floats()]
                self.run.curves.setdefault(series.name, {}).update(zip(series.steps, values, strict=True))
        elif isinstance(report, CheckpointSaved):
            self.run.checkpoint = ref_to(report)
        elif isinstance(report, Note) and report.inexact:
            self.run.inexact.append(report.inexact)

    def progress(self, progress: object) -> None:
        pass

    def mark(self, mark: object) -> None:
        pass


def _attempt(start: StartTraining, root: Path) -> Run:
    sink = _Sink()
    try:
        Attempt(_imported(start.job.workload), start, Site(root, "cpu", cores=1), sink, lambda: None).run()
    except TrainingFault as fault:
        return Run(fault=fault.message)
    assert sink.run.checkpoint is not None
    sink.run.state = digests(encode(restore(root, sink.run.checkpoint)[1]))
    return sink.run


# ---- processes


class CheckFailed(Exception):
    """The user's code raised, or ended its process; the message has the traceback."""


def _in_child(do: Callable[..., Any], *arguments: Any) -> Any:
    """Its result, of a process in which nothing of the user's was imported before. Raises CheckFailed."""
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_child, args=(sender, do, arguments))
    child.start()
    sender.close()
    try:
        failed, result = receiver.recv()
    except EOFError:
        child.join()
        raise CheckFailed(f"the process ended with code {child.exitcode}") from None
    child.join()
    if failed:
        raise CheckFailed(result)
    return result


def _child(sender: Connection, do: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.dup2(2, 1)  # what the user's code prints is not the findings
    try:
        sender.send((False, do(*arguments)))
    except TrainingFault as fault:
        sender.send((True, fault.message + (f"\n{fault.traceback}" if fault.traceback else "")))
    except BaseException as error:
        sender.send((True, "".join(traceback.format_exception(error))))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m relight.training.check")
    parser.add_argument("workload", metavar="MODULE:CLASS")
    parser.add_argument("--config", type=json.loads, default={})
    parser.add_argument("--execution", type=json.loads, default={})
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    ok = True
    try:
        for finding in check(given.workload, given.config, Execution.model_validate(given.execution), given.steps):
            ok = ok and finding.problem is None
            print(f"{'ok' if finding.problem is None else 'BROKEN':7} {_TITLES[finding.check]}", flush=True)
            if finding.problem is not None:
                print(f"        {finding.problem}", flush=True)
    except (CheckFailed, ValidationError) as error:
        print(f"FAILED  {error}", flush=True)
        return 1
    print("A resume of this workload is exact." if ok else "Not yet: mend what is BROKEN and check again.", flush=True)
    return 0 if ok else 1


_TITLES = {
    "config": "it imports, and its Config takes the config",
    "data": "there are data to train on, by index",
    "items": "data items follow from their index alone",
    "loss": "the loss is a finite mean",
    "finish": "finish() works on a model that is not trained yet, and what it leaves can be kept",
    "state": "it trains, and its state survives a round trip through a checkpoint",
    "kernels": "every operator has a deterministic kernel",
    "repeat": "a second run is the same, bit for bit",
    "resume": "a resume in a new process is the same, bit for bit",
    "workers": "num_workers 0 and 2 are the same, bit for bit",
}


if __name__ == "__main__":
    sys.exit(main())
