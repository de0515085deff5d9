"""One attempt of a training: build or restore it, run the loop, say how it ended."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch.amp import GradScaler

from ops_contract.agents import CheckpointRef, StartTraining
from ops_contract.energy import Use
from ops_contract.jobs import Execution, Strategy
from ops_contract.lifecycle import CheckpointType, Outcome, Phase
from ops_contract.pipe import Rank
from ops_contract.plans import TrainingResult
from ops_contract.reports import Note, Result
from relight.manifest import Manifest
from relight.pipe import Why
from relight.training import beginning, changes, numerics
from relight.training.checkpoint import SHARDS, restore
from relight.training.faults import TrainingFault
from relight.training.final import publish_model
from relight.training.finishing import finish, finish_together
from relight.training.fork import check_samples_left, forked_tree
from relight.training.interval import Pace
from relight.training.loop import Loop
from relight.training.marks import Marks
from relight.training.monitor import Monitor
from relight.training.order import DataOrder
from relight.training.parallel import divide, parallel
from relight.training.randomness import Stream, derive, seed_everything
from relight.training.reporting import Reporter, Sink, Unheard
from relight.training.resolving import checked_config, resolved, resolved_knobs
from relight.training.saving import Saver, Saves
from relight.training.saving_together import SaverTogether
from relight.training.sizing import count_parameters
from relight.training.source import source_files
from relight.training.state import Cursor, Live
from relight.training.team import agreed_wish, check_ranks, join
from relight.workload import Env, MapDataset, Workload


@dataclass(frozen=True)
class Site:
    """Where it runs; `device` as torch names it."""

    storage_root: Path
    device: str
    cores: int


class Attempt:
    """`clock` is monotonic, in seconds; it decides when metrics are sent and when to save by time, nothing else.

    `rank` is which of a gang's processes this is; on rank 0 `listening_fd` is a socket that listens for the others.
    """

    def __init__(
        self,
        workload_type: type[Workload[Any]],
        start: StartTraining,
        site: Site,
        sink: Sink,
        should_stop: Callable[[], Why | None],
        clock: Callable[[], float] = time.monotonic,
        rank: Rank | None = None,
        listening_fd: int | None = None,
    ) -> None:
        self._workload_type = workload_type
        self._start = start
        self._knobs = resolved_knobs(workload_type, start.job)
        self._site = site
        self._rank = rank
        self._listening_fd = listening_fd
        number, world_size = (rank.rank, rank.world_size) if rank else (0, 1)
        self._env = Env(torch.device(site.device), number, world_size, self._knobs.seed)
        self._sink = Unheard(sink) if number else sink
        self._marks = Marks(sink, self._env.device)
        self._should_stop = should_stop
        self._clock = clock
        self._inexact: list[str] = []

    def run(self) -> Outcome:
        """COMPLETED, CANCELLED or PREEMPTED; of a gang all ranks end with the same, and none before what is saved.

        Raises TrainingFault, CheckpointMissing, CheckpointCorrupt, and whatever the workload raises; in a gang also
        what `is_peer_lost`.
        """
        check_ranks(self._start.job, self._workload_type, self._rank is not None)
        name = f"{self._start.operation_id}-{self._start.attempt}"
        self._team = join(self._rank, name, self._site.device, self._listening_fd)
        outcome = self._run()
        self._team.leave()
        return outcome

    def _run(self) -> Outcome:
        ref = self._start.checkpoint
        if ref is not None and (why := agreed_wish(self._team, self._should_stop())[0]):
            return Outcome(why)  # what it would restore is where it stops
        config = checked_config(self._workload_type, self._start.job.config)
        begun_at_s = self._clock()
        before, tree = self._restored(ref) if ref is not None else (None, None)
        restored_s = self._clock() - begun_at_s
        threads = beginning.threads(self._knobs.threads, before, self._site.cores)
        numerics.configure(threads, self._knobs.deterministic)
        with numerics.operators_noted(self._note_inexact):
            loop = self._build(config, before, tree, restored_s)
            with loop.saver:
                if tree is None:
                    loop.saver.save(CheckpointType.INITIAL, loop.cursor, {})
                else:
                    self._marks.mark(loop.cursor, then=Use.TRAIN)
                why = loop.run()
            if why is None and self._start.job.until_step is None:  # a replay leaves nothing
                self._finish(loop)
            return Outcome(why or Outcome.COMPLETED)

    def _finish(self, loop: Loop) -> None:
        """By every attempt that comes to the end, one that had no step left too: the one before may have died here."""
        self._marks.mark(loop.cursor, then=Use.FINISH)
        model, root = loop.live.model, self._site.storage_root
        where = self._start.operation_id, self._start.attempt, loop.cursor.step
        state = None
        if self._is_divided:
            from relight.training.sharding import whole_state

            reports = finish_together(self._team, loop.workload, model, root, *where)
            loop.parallel.passed()
            state = whole_state(model, kept=self._team.leads)
        elif self._team.leads:
            reports = finish(loop.workload, model, root, *where)
        else:
            reports = []
        for report in reports:
            self._sink.report(report)
        if self._team.leads:
            self._sink.report(publish_model(root, *where, model, state))
            self._sink.report(Result(content=_result(loop)))
        self._marks.mark(loop.cursor)

    @property
    def _is_divided(self) -> bool:
        return self._team.is_gang and self._knobs.strategy is Strategy.FSDP

    def _restored(self, ref: CheckpointRef) -> tuple[Manifest, Any]:
        with self._marks.doing(Use.RESTORE, Cursor(step=ref.step)):
            return restore(self._site.storage_root, ref, self._team)

    def _note(self, message: str) -> None:
        self._sink.report(Note(message=message))

    def _note_inexact(self, reason: str) -> None:
        """It may come before the attempt says that it started, or after."""
        self._inexact.append(reason)
        self._sink.report(beginning.inexact_operator(reason))

    def _build(
        self, config: BaseModel, before: Manifest | None, tree: dict[str, Any] | None, restored_s: float
    ) -> Loop:
        """Everything under the build seed, then the restored state in place of the initial one."""
        seed_everything(derive(self._env.seed, Stream.BUILD))
        workload = self._workload_type(config, self._env)
        training, validation = (self._order(workload, dataset) for dataset in workload.data())
        if training is None:
            raise TrainingFault("no_data", "the workload's training data is empty", permanent=True)
        about = self._about(workload, len(training.dataset))
        accepting = changes.accepting_resume(self._start.operation_id)
        accepted = changes.accepted(before, about, self._start.accept_changes, accepting) if before else []
        begins_at = Cursor() if tree is None else Cursor.from_tree(tree["cursor"])
        if self._start.parent_job:
            check_samples_left(begins_at, training.samples, self._start.job)
        steps_total = _steps_total(self._knobs, training.samples, begins_at)
        until_step = min(steps_total, self._start.job.until_step or steps_total)
        live, scheduler_steps = self._live(workload, steps_total)
        if tree is not None and (parent := self._start.parent_job):
            tree = forked_tree(tree, live, scheduler_steps, parent, self._start.job)
        live.monitor.check(evaluates=validation is not None)
        both = parallel(workload, live.model, self._knobs.strategy, self._team)
        reporter = Reporter(self._sink, until_step, self._clock, self._team)
        cursor = Cursor() if tree is None else self._put_back(tree, live, reporter)
        self._tell_started(about, before, accepted, cursor)
        saver = self._saver(about, live, cursor if before else None, restored_s)
        return Loop(
            workload=workload,
            env=self._env,
            knobs=self._knobs,
            live=live,
            scheduler_steps=scheduler_steps,
            training=training,
            validation=validation,
            steps_total=steps_total,
            until_step=until_step,
            cursor=cursor,
            reporter=reporter,
            marks=self._marks,
            saver=saver,
            pace=Pace(self._knobs.checkpoint_every, self._start.record, saver.times, self._clock, self._note),
            should_stop=self._should_stop,
            team=self._team,
            parallel=both,
            inexact=self._note_inexact,
        )

    def _saver(self, about: Manifest, live: Live, saved: Cursor | None, restored_s: float) -> Saves:
        root, sink, marks, clock = self._site.storage_root, self._sink, self._marks, self._clock
        if self._is_divided:
            return SaverTogether(root, about, live, sink, marks, self._team, saved, clock, restored_s)
        if not self._team.leads:
            return Saves()
        return Saver(root, about, live, sink, marks, saved=saved, clock=clock, restored_s=restored_s)

    def _put_back(self, tree: dict[str, Any], live: Live, reporter: Reporter) -> Cursor:
        cursor = Cursor.from_tree(tree["cursor"])
        with self._marks.doing(Use.RESTORE, cursor):
            live.restore(self._put_in(tree, live))
        reporter.add_again(cursor.step, tree["reported"])
        return cursor

    def _put_in(self, tree: dict[str, Any], live: Live) -> dict[str, Any]:
        ref = self._start.checkpoint
        shards = self._site.storage_root / (ref.path if ref else "") / SHARDS
        if not self._is_divided and not shards.is_dir():
            return tree
        from relight.training.sharding import put_in

        placed: dict[str, Any] = put_in(tree, shards, live)
        return placed

    def _order(self, workload: Workload[Any], dataset: MapDataset | None) -> DataOrder | None:
        if dataset is None or len(dataset) == 0:
            return None
        knobs = self._knobs
        return DataOrder(
            dataset,
            workload.collate,
            knobs.seed,
            knobs.batch_size,
            knobs.num_workers,
            max_samples=knobs.max_samples,
            rank=self._env.rank,
            world_size=self._env.world_size,
        )

    def _about(self, workload: Workload[Any], training_samples: int) -> Manifest:
        of_gang = numerics.of_gang(self._team, self._knobs.strategy, self._env.device)
        return beginning.manifest(
            source_files(*workload.sources()),
            operation_id=self._start.operation_id,
            attempt=self._start.attempt,
            workload=self._start.job.workload,
            data_digest=workload.data_digest(),
            training_samples=training_samples,
            numerics=numerics.fingerprint(self._env.device) | of_gang,
        )

    def _live(self, workload: Workload[Any], steps_total: int) -> tuple[Live, str | None]:
        model = workload.model().to(self._env.device)
        if self._is_divided:
            divide(model, self._env.device, self._team)
        optimizer = workload.optimizer(model, self._knobs)
        scheduled = workload.scheduler(optimizer, self._knobs, steps_total)
        scheduler, when = scheduled or (None, None)
        return Live(model, optimizer, scheduler, workload.state(), Monitor(self._knobs), self._scaler()), when

    def _scaler(self) -> GradScaler | None:
        if self._knobs.precision != "16":
            return None
        # A first update that is skipped looks to torch like a scheduler that steps before the optimizer.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
        return GradScaler(self._env.device.type)

    def _tell_started(self, about: Manifest, before: Manifest | None, accepted: list[str], cursor: Cursor) -> None:
        self._sink.report(
            beginning.started(
                about,
                before,
                cursor.step,
                self._knobs,
                self._env.device,
                inexact=accepted + self._inexact,
                more={"data_digest": about.data_digest},
                resolved=resolved(self._workload_type, self._start.job, self._knobs),
            )
        )


def _steps_total(knobs: Execution, samples_per_epoch: int, at: Cursor) -> int:
    """Those that are done at the cursor, and those that are left from there: a fork may begin where its parent's last
    batch was cut, off the batches of a run that was never cut.
    """

    def steps(samples: int) -> int:
        """The last window of an epoch, or of the run, may be short; it still is a step."""
        return -(-samples // (knobs.batch_size * knobs.accumulate_grad_batches))

    most = samples_per_epoch * knobs.max_epochs
    epochs, rest = divmod(min(most, knobs.max_samples or most), samples_per_epoch)
    if at.epoch == epochs:
        left = steps(rest - at.samples_in_epoch)
    else:
        whole = epochs - at.epoch - 1
        left = steps(samples_per_epoch - at.samples_in_epoch) + whole * steps(samples_per_epoch) + steps(rest)
    total = at.step + (at.phase is Phase.EVALUATE) + left
    return min(total, knobs.max_steps or total)


def _result(loop: Loop) -> TrainingResult:
    cursor, (params, embedding_params) = loop.cursor, count_parameters(loop.live.model)
    return TrainingResult(
        steps=cursor.step,
        samples=cursor.samples(loop.training.samples),
        units=cursor.units,
        params=params,
        embedding_params=embedding_params,
    )
