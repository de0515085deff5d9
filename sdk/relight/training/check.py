"""Runs the contract against a workload class, without a server: what would break exactness, and how to mend it.

`python -m relight.training.check module:Class [--config JSON] [--execution JSON] [--steps N]` prints a line per check
and exits with 1 when one fails. Every run is a process of its own, as every attempt is.
"""

import argparse
import json
import multiprocessing
import os
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from ops_contract.agents import CheckpointRef, StartTraining
from ops_contract.jobs import CheckpointEvery, Execution, Job, Strategy
from ops_contract.lifecycle import Kind
from ops_contract.reports import CheckpointSaved, Metrics, Note, Report
from relight.training import numerics
from relight.training.attempt import Attempt, Site
from relight.training.check_class import CHECKS, workload_class
from relight.training.checkpoint import ref_to, restore
from relight.training.codec import digests, encode
from relight.training.faults import TrainingFault

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
    for name, look in CHECKS.items():
        problem = _in_child(look, path, config, execution)
        yield Finding(name, problem)
        if problem is not None and name != "items":
            return
    with tempfile.TemporaryDirectory(prefix="relight-check-") as root:
        yield from _runs(_Runs(Path(root), path, config, execution, steps))


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
        Attempt(workload_class(start.job.workload), start, Site(root, "cpu", cores=1), sink, lambda: None).run()
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
