"""One attempt of a LoopWorkload: its loop and files are its own, what is published of them is as ever."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops_contract.agents import CheckpointRef, StartTraining
from ops_contract.energy import Use
from ops_contract.jobs import Execution
from ops_contract.lifecycle import CheckpointType, Outcome
from ops_contract.reports import Note
from relight.manifest import Manifest, verify
from relight.pipe import Why
from relight.training import beginning, changes, numerics
from relight.training.attempt import Site
from relight.training.checkpoint import FILES, at, publish_files
from relight.training.faults import TrainingFault
from relight.training.final import publish_model
from relight.training.loop import STOPPED_BY
from relight.training.marks import Marks
from relight.training.randomness import Stream, derive, seed_everything
from relight.training.reporting import Reporter, Sink
from relight.training.resolving import checked_config, resolved, resolved_knobs
from relight.training.source import source_files
from relight.training.state import Cursor
from relight.training.team import check_ranks
from relight.workload import Env, LoopWorkload

_REASON = "loop and checkpoint files are the workload's own: a resume is as exact as they are"


class LoopAttempt:
    """`clock` is monotonic, in seconds; it decides when metrics are sent."""

    def __init__(
        self,
        workload_type: type[LoopWorkload[Any]],
        start: StartTraining,
        site: Site,
        sink: Sink,
        should_stop: Callable[[], Why | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workload_type = workload_type
        self._start = start
        self._knobs = resolved_knobs(workload_type, start.job)
        self._site = site
        self._env = Env(device=torch.device(site.device), rank=0, world_size=1, seed=self._knobs.seed)
        self._sink = sink
        self._should_stop = should_stop
        self._clock = clock

    def run(self) -> Outcome:
        """COMPLETED, CANCELLED or PREEMPTED.

        Raises TrainingFault, CheckpointMissing, CheckpointCorrupt, and whatever the workload raises.
        """
        check_ranks(self._start.job, self._workload_type, in_gang=False)
        if self._start.job.until_step is not None:
            what = "a LoopWorkload's steps cannot be redone by the engine; resume or fork it instead"
            raise TrainingFault("not_replayable", what, permanent=True)
        ref, root = self._start.checkpoint, self._site.storage_root
        config = checked_config(self._workload_type, self._start.job.config)
        marks = Marks(self._sink, self._env.device)
        before = None
        if ref is not None:
            with marks.doing(Use.RESTORE, Cursor(step=ref.step)):
                before = verify(root, ref)
        threads = beginning.threads(self._knobs.threads, before, self._site.cores)
        numerics.configure(threads, self._knobs.deterministic)
        about = self._about()
        self._tell_started(about, before)
        reporter = Reporter(self._sink, self._knobs.max_steps, self._clock)
        control = _Control(self._knobs, root, about, ref, before, reporter, marks, self._sink, self._should_stop)
        seed_everything(derive(self._knobs.seed, Stream.BUILD))
        model = self._workload_type(config, self._env).run(control)
        control.flush()
        control.mark(then=Use.FINISH)
        if control.why is not None:
            return Outcome(control.why)
        if model is not None:
            start = self._start
            self._sink.report(publish_model(root, start.operation_id, start.attempt, control.step, model))
        return Outcome.COMPLETED

    def _about(self) -> Manifest:
        return beginning.manifest(
            source_files(self._workload_type),
            operation_id=self._start.operation_id,
            attempt=self._start.attempt,
            workload=self._start.job.workload,
            data_digest=None,
            numerics=numerics.fingerprint(self._env.device),
        )

    def _tell_started(self, about: Manifest, before: Manifest | None) -> None:
        start = self._start
        accepting = changes.accepting_resume(start.operation_id)
        changed = changes.accepted(before, about, start.accept_changes, accepting) if before is not None else []
        self._sink.report(
            beginning.started(
                about,
                before,
                before.step if before else 0,
                self._knobs,
                self._env.device,
                inexact=[_REASON, *changed],
                resolved=resolved(self._workload_type, start.job, self._knobs),
            )
        )


class _Control:
    """`relight.LoopControl`; `ref` and `before` are of the save to go on from."""

    def __init__(
        self,
        knobs: Execution,
        root: Path,
        about: Manifest,
        ref: CheckpointRef | None,
        before: Manifest | None,
        reporter: Reporter,
        marks: Marks,
        sink: Sink,
        should_stop: Callable[[], Why | None],
    ) -> None:
        self.execution = knobs
        self.why: Why | None = None
        self._root = root
        self._about = about
        self._restored = root / ref.path / FILES if ref and before and before.files else None
        self._reporter = reporter
        self._marks = marks
        self._sink = sink
        self._should_stop = should_stop
        self._cursor = Cursor(step=ref.step, epoch=ref.epoch) if ref else Cursor()
        self._saved = self._cursor.step
        self._sent: dict[str, int] = {}
        self._waiting: dict[str, int] = {}
        self._told: set[str] = set()
        self._monitored: float | None = None
        if ref is None:
            self._publish(CheckpointType.INITIAL, lambda directory: None)  # makes everything resumable
        else:
            self.mark(then=Use.TRAIN)

    @property
    def step(self) -> int:
        return self._cursor.step

    def restored(self) -> Path | None:
        return self._restored

    def report(self, step: int, **metrics: Tensor | float) -> None:
        fresh = {name: value for name, value in metrics.items() if self._rises(name, step)}
        self._reporter.add(step, fresh)
        self._waiting |= dict.fromkeys(fresh, step)
        if (monitor := self.execution.checkpoint_monitor) in fresh:
            self._monitored = float(fresh[monitor])
        self._cursor = self._cursor._replace(step=max(self._cursor.step, step + 1))
        if self._reporter.flush_if_due(self._cursor):
            self.mark()
            self._note_sent()

    def should_stop(self) -> bool:
        self.why = self.why or self._should_stop()
        return self.why is not None

    def save(self, step: int, write: Callable[[Path], object], epoch: int = 0) -> None:
        if step < self._saved:
            raise ValueError(f"save() of step {step} after that of step {self._saved}: steps rise")
        if step == self._saved:
            return
        self._cursor = Cursor(step=step, epoch=epoch)
        # Everything before the checkpoint's step is sent before the checkpoint: what it resumes from is complete.
        self.flush()
        self._publish(STOPPED_BY[self.why] if self.why else CheckpointType.PERIODIC, write)
        self._saved, self._monitored = step, None

    def flush(self) -> None:
        self._reporter.flush(self._cursor)
        self._note_sent()

    def mark(self, then: Use | None = None) -> None:
        self._marks.mark(self._cursor, then)

    def _note_sent(self) -> None:
        self._sent |= self._waiting
        self._waiting = {}

    def _rises(self, name: str, step: int) -> bool:
        """Those of a name that are sent do; one that comes late is left out, which is said once."""
        newest = max(self._sent.get(name, -1), self._waiting.get(name, -1) - 1)
        if step <= newest and name not in self._told:
            self._told.add(name)
            self._sink.report(Note(message=f"{name} of step {step} came after that of step {newest}, and is left out"))
        return step > newest

    def _publish(self, why: CheckpointType, write: Callable[[Path], object]) -> None:
        cursor = self._cursor
        with self._marks.doing(Use.SAVE, cursor, Use.TRAIN, edge=True):
            published = publish_files(self._root, at(self._about, cursor), write)
            self._sink.report(published.saved(why, cursor, self._monitored))
