"""One training of `find_optimal`: the engine's attempt, in this process, with its checkpoints in a directory."""

import gc
import json
import random
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from ops_contract.agents import StartTraining
from ops_contract.jobs import Accelerator, Job
from ops_contract.lifecycle import Kind, Outcome, Status
from ops_contract.plans import ChildPlan, ChildResult, TrainingResult
from ops_contract.reports import Note, Report, Result
from ops_contract.study_results import SweepRow
from ops_studies import isoflop
from relight.manifest import Manifest
from relight.training.attempt import Attempt, Site
from relight.training.directory import Directory, say
from relight.training.faults import TrainingFault
from relight.workload import Workload

# As its job calls what is trained.
WORKLOAD = "relight.optimal:Named"
_NOT_MEASURED = "nobody measures joules within this process; `ops sweep run` on the service does"
_PREEMPTED = 128 + 15  # as a shell calls an end by SIGTERM


class RunDirectory(Directory):
    """Of one training. What there is to tell, at most once, is in `notes`; `training` is its result."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.resumes = bool(self._index.checkpoints)
        self.notes: dict[str, None] = {}
        self.training: TrainingResult | None = None

    def say(self, message: str) -> None:
        if message:
            self.notes[message] = None

    def _told(self, found: Manifest | None) -> str:
        return ""  # there are many of them

    def report(self, report: Report) -> None:
        if isinstance(report, Result) and isinstance(report.content, TrainingResult):
            self.training = report.content
        if isinstance(report, Note) and not report.inexact:
            return  # how often it saves
        super().report(report)

    def last(self, name: str) -> float | None:
        """The newest value of a metric, which an attempt before may have reported."""
        with open(self.metrics) as file:
            found = [step[name] for step in map(json.loads, file) if name in step]
        return float(found[-1]) if found else None


@contextmanager
def opened(root: Path) -> Iterator[RunDirectory]:
    """Anew where its index cannot be read."""
    try:
        place = RunDirectory(root)
    except TrainingFault as error:
        if error.code != "index_damaged":
            raise
        say(f"{error}: it begins anew")
        shutil.rmtree(root)
        place = RunDirectory(root)
    try:
        yield place
    finally:
        place.close()


def run(workload_type: type[Workload[Any]], child: ChildPlan, place: RunDirectory, device: str) -> SweepRow:
    """What became of it; what fails is a row too.

    Raises KeyboardInterrupt or SystemExit when a first SIGINT or SIGTERM came, once it has saved.
    """
    begun_at_s, outcome, error = time.monotonic(), None, None
    try:
        outcome = _attempt(workload_type, child, place, device)
    except (Exception, SystemExit) as raised:  # SystemExit: of the user's code
        error = _told(raised)
    if device != "cpu":
        gc.collect()  # a model is a nest of cycles, and the next one needs the room
    if outcome in (Outcome.CANCELLED, Outcome.PREEMPTED):
        say(f"{child.name} is stopped; the same call goes on from there")
        raise KeyboardInterrupt if outcome is Outcome.CANCELLED else SystemExit(_PREEMPTED)
    # Of the attempts before it nobody knows how long they ran.
    ran_s = None if place.resumes else time.monotonic() - begun_at_s
    return _row(child, place, error, ran_s)


@contextmanager
def as_it_was() -> Iterator[None]:
    """Threads, determinism and generators of the process are afterwards what its owner made them."""
    cudnn, torch_state = torch.backends.cudnn, torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    python, numpy = random.getstate(), np.random.get_state()
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    of_cudnn = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        cudnn.deterministic, cudnn.benchmark = of_cudnn
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        np.random.set_state(numpy)


def device_for(accelerator: Accelerator) -> str:
    """As torch names it. Raises ValueError for one that is not here."""
    has_cuda = torch.cuda.is_available()
    if accelerator is Accelerator.AUTO:
        return "cuda" if has_cuda else "cpu"
    if accelerator is Accelerator.CUDA and not has_cuda:
        raise ValueError("execution.accelerator is cuda, and torch finds no such device here; give auto or cpu")
    if accelerator is Accelerator.MPS and not torch.backends.mps.is_available():
        raise ValueError("execution.accelerator is mps, and torch finds no such device here; give auto or cpu")
    return accelerator.value


def _attempt(workload_type: type[Workload[Any]], child: ChildPlan, place: RunDirectory, device: str) -> Outcome:
    place.restored()
    job = Job(kind=Kind.TRAINING, workload=WORKLOAD, config=child.config, execution=child.execution)
    start = StartTraining(
        incarnation=uuid4(),
        operation_id=place.operation_id,
        attempt=place.attempt,
        slots=[0],
        deadline_s=60.0,
        job=job,
        checkpoint=place.newest(),
        record=place.record,
    )
    site = Site(place.root, device, torch.get_num_threads())
    return Attempt(workload_type, start, site, place, place.should_stop).run()


def _row(child: ChildPlan, place: RunDirectory, error: str | None, ran_s: float | None) -> SweepRow:
    """Without a loss where it failed: then it is tried again. One that diverged would do so again."""
    monitor = child.execution.checkpoint_monitor
    assert monitor is not None
    loss = None if error else place.last(monitor)
    came_to = ChildResult(
        key=child.key,
        position=0,
        operation_id=place.operation_id,
        name=child.name,
        status=Status.FAILED if error else Status.COMPLETED,
        about=child.about,
        final={} if loss is None else {monitor: loss},
        training=place.training,
        running_s=ran_s,
        energy_reason=_NOT_MEASURED,
        error=error,
        ended_at=datetime.now(UTC),
    )
    (row,) = isoflop.rows([came_to], monitor)
    status = Status.FAILED if row.error_message else row.status
    return row.model_copy(update={"operation_id": None, "status": status})


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
