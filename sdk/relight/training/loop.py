"""The training loop. A step: update, evaluate, scheduler, early stop, checkpoint.

What lasts is in `Live` and `Cursor`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ops_contract.energy import Use
from ops_contract.jobs import Execution
from ops_contract.lifecycle import CheckpointType, Phase
from relight.pipe import Why
from relight.training.interval import Pace
from relight.training.marks import Marks
from relight.training.order import Batch, DataOrder, to_device
from relight.training.parallel import Alone
from relight.training.randomness import Stream, derive, seed_everything
from relight.training.reporting import Reporter
from relight.training.saving import Saves
from relight.training.state import Cursor, Live
from relight.training.team import Team, agreed_wish
from relight.workload import Env, Workload

STOPPED_BY: dict[Why, CheckpointType] = {"cancelled": CheckpointType.CANCEL, "preempted": CheckpointType.PREEMPT}
_AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}


class Interrupted(BaseException):
    """The run is to stop here. Not an Exception: evaluate() must not take it for an error of its own."""

    def __init__(self, why: Why) -> None:
        super().__init__(why)
        self.why: Why = why


@dataclass
class Loop:
    """One attempt's steps from `cursor` to `until_step`. `scheduler_steps` is when the scheduler does.

    A replay ends before `steps_total`, which evaluation and schedules go by. The ranks of a gang run it in step: they
    agree on stops and on what goes by time before each step, and everything else follows from what they share.
    """

    workload: Workload[Any]
    env: Env
    knobs: Execution
    live: Live
    scheduler_steps: str | None
    training: DataOrder
    validation: DataOrder | None
    steps_total: int
    until_step: int
    cursor: Cursor
    reporter: Reporter
    marks: Marks
    saver: Saves
    pace: Pace
    should_stop: Callable[[], Why | None]
    team: Team
    parallel: Alone
    inexact: Callable[[str], None]
    _flush_ordered: bool = False  # by rank 0's clock, for the end of the step that begins
    _save_ordered: bool = False
    _round_trip_checked: bool = False
    _monitored: float | None = None  # measured on the weights as they are now

    def run(self) -> Why | None:
        """None when the last step is done, else why it stopped; the very boundary where it stopped is then saved."""
        self.marks.epoch = self.cursor.epoch
        try:
            if self.cursor.phase is Phase.EVALUATE:
                self._end_step()
            while not self._is_over():
                self._epoch()
        except Interrupted as stop:
            self._save(STOPPED_BY[stop.why])
            return stop.why
        return None

    def _epoch(self) -> None:
        """The rest of the cursor's epoch, or of the run."""
        self.live.model.train()
        self.marks.epoch = self.cursor.epoch
        for window in self._windows():
            self.saver.raise_failure()
            units = [0 if batch.idle else self.workload.units(batch.data) for batch in window]
            self._update(window, units, self._agreed(sum(units)))
            self._end_step()
            if self._is_over():
                return

    def _is_over(self) -> bool:
        return self.cursor.step >= self.until_step or self.live.monitor.exhausted

    def _windows(self) -> Iterator[list[Batch]]:
        """The batches of one update each. All are fetched before the first runs: their units weigh its gradient."""
        window: list[Batch] = []
        for batch in self.training.training(self.cursor.epoch, self.cursor.samples_in_epoch):
            window.append(batch)
            if len(window) == self.knobs.accumulate_grad_batches:
                yield window
                window = []
        if window:
            yield window

    def _agreed(self, units: int) -> int:
        """Those of all ranks. Raises Interrupted where one is to stop: all do, here."""
        if not self.team.is_gang:
            self._poll()
            return units
        by_time = (self.reporter.is_due(), self.pace.goes_by_time and self.pace.is_due()) if self.team.leads else (0, 0)
        total, flush, save = self._poll(units, *by_time)
        self._flush_ordered, self._save_ordered = bool(flush), bool(save)
        return total

    def _update(self, window: list[Batch], units: list[int], total: int) -> None:
        """`units` are of this rank's parts of the micro-batches, `total` of the whole window on all ranks."""
        model, optimizer, scaler, step = self.live.model, self.live.optimizer, self.live.scaler, self.cursor.step
        optimizer.zero_grad(set_to_none=True)
        for micro, batch in enumerate(window):
            seed_everything(derive(self.env.seed, Stream.TRAIN, step, micro, self.env.rank))
            with self._autocast():
                on_device = to_device(batch.data, self.env.device)
                loss, extras = self.parallel.loss(on_device, last=micro == len(window) - 1)
            # What torch takes of the ranks' gradients is their mean.
            weight = self.team.world_size * units[micro] / total
            part = loss if weight == 1 else loss * weight
            (part if scaler is None else scaler.scale(part)).backward()  # type: ignore[no-untyped-call]  # torch's own
            self.reporter.add_micro_batch(step, units[micro], loss, extras)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self.knobs.gradient_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.knobs.gradient_clip)
        samples = sum(batch.samples for batch in window)
        self.marks.add(total if self.team.leads else 0)
        self.reporter.add_step(step, self.cursor.epoch, float(optimizer.param_groups[0]["lr"]), samples)
        self.saver.seal()
        changed = self._apply()
        if self.team.is_gang:  # every rank has drawn from its own stream
            seed_everything(derive(self.env.seed, Stream.TRAIN, step, len(window), 0))
        self.workload.after_step(model, step)
        self.parallel.updated()
        self.cursor = self.cursor.after(samples, int(total))._replace(phase=Phase.EVALUATE)
        if changed and not self._round_trip_checked:
            self.parallel.check_round_trip(self.live)
            self._round_trip_checked = True
            self._compare_registered()

    def _compare_registered(self) -> None:
        """Each rank has its own, and all resume from that of rank 0."""
        if not (self.team.is_gang and self.live.registered):
            return
        mine, *others = [set(each.items()) for each in self.team.gathered(self.parallel.registered(self.live))]
        if differing := sorted({path for other in others for path, _ in mine ^ other}):
            self.inexact(f"state() is not the same on every rank, in {', '.join(differing[:3])}: a resume has rank 0's")

    def _apply(self) -> bool:
        """One update. False when gradients overflowed: then it was skipped, and the scale is halved."""
        optimizer, scaler = self.live.optimizer, self.live.scaler
        if scaler is None:
            optimizer.step()
            return True
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale() >= scale

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = _AUTOCAST.get(self.knobs.precision)
        return nullcontext() if dtype is None else torch.autocast(self.env.device.type, dtype)

    def _end_step(self) -> None:
        """What follows an update, up to the next one's boundary."""
        cursor = self.cursor
        epoch_ends = cursor.samples_in_epoch == len(self.training.dataset)
        last = cursor.step + 1 == self.steps_total
        self._monitored = None
        measured = self._evaluate(self.validation) if self.validation and (epoch_ends or last) else {}
        self._schedule(epoch_ends, measured)
        self._monitored = self.live.monitor.judge(measured)
        self.cursor = cursor._replace(
            step=cursor.step + 1,
            epoch=cursor.epoch + epoch_ends,
            samples_in_epoch=0 if epoch_ends else cursor.samples_in_epoch,
            phase=Phase.UPDATE,
        )
        if self.live.monitor.exhausted and not last:
            self.reporter.end_at(self.cursor.step, self.live.monitor.verdict)
        if self._flush_if_due() or epoch_ends:
            self.marks.mark(self.cursor)
        if self._is_over():
            self._save(CheckpointType.FINAL)
        elif self._save_is_due(epoch_ends) or self._is_best():
            self._save(CheckpointType.PERIODIC)

    def _flush_if_due(self) -> bool:
        if not self.team.is_gang:
            return self.reporter.flush_if_due(self.cursor)
        if self._flush_ordered:
            self.reporter.flush(self.cursor)
        return self._flush_ordered

    def _save_is_due(self, epoch_ends: bool) -> bool:
        if self.team.is_gang and self.pace.goes_by_time:
            return self._save_ordered
        return self.pace.is_due_at(self.cursor.step, self.cursor.epoch, epoch_ends)

    def _evaluate(self, validation: DataOrder) -> dict[str, float]:
        self.reporter.flush(self.cursor)
        self.live.model.eval()
        with self.marks.doing(Use.EVALUATE, self.cursor), torch.no_grad(), self._autocast():
            measured = self.workload.evaluate(self.live.model, _ValidationLoader(self, validation))
            self.parallel.passed()
            if self.team.is_gang:
                measured = self.team.told({name: float(value) for name, value in measured.items()})
        self.reporter.add_evaluation(self.cursor.step, measured)
        return measured

    def _schedule(self, epoch_ends: bool, measured: dict[str, float]) -> None:
        scheduler, when = self.live.scheduler, self.scheduler_steps
        if isinstance(scheduler, ReduceLROnPlateau):
            if when in measured:
                scheduler.step(measured[when])
        elif scheduler is not None and (when == "step" or (when == "epoch" and epoch_ends)):
            scheduler.step()

    def _is_best(self) -> bool:
        """Top-k keeps the best state that was measured, whether or not a periodic checkpoint falls there."""
        wanted = (self.knobs.checkpoint_save_top_k or 0) > 0 and self._monitored is not None
        return wanted and self.live.monitor.is_best

    def _save(self, why: CheckpointType) -> None:
        # Everything before the checkpoint's step is sent before the checkpoint: what it resumes from is complete.
        self.reporter.flush(self.cursor)
        reported = self.reporter.newest(self.cursor.step) if self.cursor.phase is Phase.EVALUATE else {}
        self.saver.save(why, self.cursor, reported, self._monitored)

    def _poll(self, *numbers: int) -> list[int]:
        """Their sums over the ranks. Raises Interrupted where one is to stop."""
        why, sums = agreed_wish(self.team, self.should_stop(), *numbers)
        if why is not None:
            raise Interrupted(why)
        return sums


class _ValidationLoader:
    """The validation batches, each under its own seed; the run may stop before any of them."""

    def __init__(self, loop: Loop, order: DataOrder) -> None:
        self._loop = loop
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Any]:
        env, step = self._loop.env, self._loop.cursor.step
        for i, batch in enumerate(self._order.validation()):
            self._loop._poll()
            # After the fetch: in this process it drew from the same generators, in a loader process it did not.
            seed_everything(derive(env.seed, Stream.EVALUATE, step, i, 0))
            yield to_device(batch.data, env.device)
