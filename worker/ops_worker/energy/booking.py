"""From marks and readings to windows: what each device of a slot used, and what for, while an attempt ran there."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ops_contract.agents import HoldRef
from ops_contract.energy import MOST_STEPS, EnergyWindow, Quality, Use
from ops_contract.pipe import Mark
from ops_worker.energy.meters import Measured, SlotMeter
from ops_worker.outbox import Booked, Outbox
from ops_worker.points import LARGEST_STEP
from ops_worker.waiting import first_of

# At least 50 ticks of a counter that moves every 100 ms: its edges are then wrong by a fiftieth at most. And no more
# than 12 rows a minute and device, but where a use, an epoch or a checkpoint ends.
SHORTEST_S = 5.0
POLL_S = 1.0
# How long the end of an attempt waits for a meter that is read late.
LATE_S = 1.0
_LATE_POLL_S = 0.05
# Two readings of the slowest sampler, and some.
COUNTER_S = 2.5
CPU = "cpu"
_MOST_UNITS = 10**15

log = logging.getLogger(__name__)


class Readings(Protocol):
    """What is asked of the sampler."""

    def between(self, device: str, since_s: float, until_s: float) -> Measured | None: ...

    def counter(self, device: str, at_s: float) -> float | None: ...

    def baseline_w(self, device: str) -> float | None: ...


@dataclass(frozen=True)
class Stretch:
    """Time of one use, in one epoch, with no edge within it."""

    since_s: float
    until_s: float
    use: Use
    first_step: int
    until_step: int
    epoch: int | None = None
    units: int = 0


class Stretches:
    """One attempt's marks, put together until they are worth a window. Whatever they say, each moment counts once."""

    def __init__(self, since_s: float, step: int) -> None:
        self._at_s = since_s
        self._step = step
        self._then: Use | None = None
        self._epoch: int | None = None
        self._open: Stretch | None = None

    def add(self, mark: Mark, now_s: float) -> list[Stretch]:
        """Those that are complete. A command's marks come from its own code: none lies in the past or the future."""
        at_s = max(self._at_s, min(mark.at_s, now_s))
        # An attempt that restores marks what it does before that; and no window may be of more than the API takes.
        first_step, units = max(min(self._step, mark.step), mark.step - MOST_STEPS), min(mark.units, _MOST_UNITS)
        new = Stretch(self._at_s, at_s, mark.use, first_step, mark.step, mark.epoch, units)
        self._at_s, self._step, self._then, self._epoch = at_s, mark.step, mark.then, mark.epoch
        complete = self._continue(new)
        if self._open and (mark.edge or self._open.until_s - self._open.since_s >= SHORTEST_S):
            complete.append(self._open)
            self._open = None
        return complete

    def end(self, at_s: float, in_order: bool) -> list[Stretch]:
        """The rest: of what it does when all is said, or of the step in flight."""
        use = self._then or Use.STARTUP
        if in_order and self._then is not None:
            use = Use.FINISH
        until_step = min(self._step + (use is Use.TRAIN), LARGEST_STEP)
        epoch = self._epoch if use in (Use.TRAIN, Use.EVALUATE) else None
        complete = self._continue(Stretch(self._at_s, max(self._at_s, at_s), use, self._step, until_step, epoch))
        return complete + ([self._open] if self._open else [])

    def _continue(self, new: Stretch) -> list[Stretch]:
        old = self._open
        if old is not None and (old.use, old.epoch) == (new.use, new.epoch):
            first_step = max(min(old.first_step, new.first_step), new.until_step - MOST_STEPS)
            units = min(old.units + new.units, _MOST_UNITS)
            self._open = replace(new, since_s=old.since_s, first_step=first_step, units=units)
            return []
        self._open = new
        return [old] if old is not None else []


class Booking:
    """One hold's windows, into the outbox; `news` is set when there are more. `step` is where the attempt begins.

    `begin` when the job is sent, `over` when the process is gone; `done` then waits for what is read late.
    """

    def __init__(
        self,
        ref: HoldRef,
        meters: Sequence[SlotMeter],
        readings: Readings,
        outbox: Outbox,
        news: asyncio.Event,
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ref = ref
        self._meters = meters
        self._readings = readings
        self._outbox = outbox
        self._news = news
        self._step = step
        self._clock = clock
        self._complete: deque[Stretch] = deque()
        self._booked: list[Booked] = []
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        at_s, boot = self._clock(), boot_id()
        self._stretches = Stretches(at_s, self._step)
        self._booked = [
            Booked(meter.device, meter.source, meter.quality, boot, at_s, self._step) for meter in self._meters
        ] or [Booked(CPU, None, None, boot, at_s, self._step)]
        self._task = asyncio.create_task(self._run())

    def mark(self, mark: Mark) -> None:
        self._add(self._stretches.add(mark, self._clock()))

    def over(self, gone_at_s: float, in_order: bool) -> None:
        """`in_order`: it said its end itself. What it did after its last mark is then none of a step's."""
        self._add(self._stretches.end(gone_at_s, in_order))
        self._over.set()

    async def done(self) -> None:
        """Until all is in the outbox. That something goes wrong with it is no trouble of the hold's."""
        if self._task is not None:
            try:
                await self._task
            except Exception:
                log.exception("not all energy is booked", extra=self._ref.model_dump())

    def stop(self) -> None:
        """What is not in the outbox by now is a gap for who comes after."""
        if self._task is not None:
            self._task.cancel()

    def _add(self, complete: list[Stretch]) -> None:
        if complete and not self._meters:  # there will be one window, of all of it
            stretches = [*self._complete, *complete]
            first, last = stretches[0], stretches[-1]
            steps, units = max(s.until_step for s in stretches), sum(s.units for s in stretches)
            complete = [Stretch(first.since_s, last.until_s, Use.TRAIN, self._step, steps, units=units)]
            self._complete.clear()
        self._complete += complete

    async def _run(self) -> None:
        await self._outbox.book(self._ref, [], self._booked)
        while not self._over.is_set():
            await first_of(self._over.wait(), asyncio.sleep(POLL_S))
            await self._book()
        until_s = self._clock() + LATE_S
        while self._complete and self._meters and self._clock() < until_s:
            await self._book()
            await asyncio.sleep(_LATE_POLL_S)
        await self._close()

    async def _book(self) -> None:
        """As much as was measured, in one transaction."""
        windows: list[EnergyWindow] = []
        while self._complete and self._meters:
            answers = [self._measure(meter, self._complete[0]) for meter in self._meters]
            measured = [answer for answer in answers if answer is not None]
            if len(measured) < len(answers):
                break
            stretch = self._complete.popleft()
            windows += [self._window(i, stretch, found) for i, found in enumerate(measured)]
        begins = [replace(b, counter_j=self._counter(b)) for b in self._booked]
        if windows or begins != self._booked:
            self._booked = begins
            await self._outbox.book(self._ref, windows, self._booked)
            self._news.set()

    async def _close(self) -> None:
        windows = [
            self._window(i, stretch, self._measure(meter, stretch) or _LATE)
            for stretch in self._complete
            for i, meter in enumerate(self._meters)
        ] or [_without_meter(stretch) for stretch in self._complete]
        await self._outbox.book(self._ref, windows, [])
        self._news.set()

    def _measure(self, meter: SlotMeter, stretch: Stretch) -> Measured | None:
        measured = self._readings.between(meter.device, stretch.since_s, stretch.until_s)
        return measured and measured.times(meter.times)

    def _window(self, i: int, stretch: Stretch, measured: Measured) -> EnergyWindow:
        before = self._booked[i]
        self._booked[i] = replace(
            before, index=before.index + 1, step=stretch.until_step, at_s=stretch.until_s, counter_j=None
        )
        return EnergyWindow(
            index=before.index + 1,
            device=before.device,
            source=before.source,
            quality=Quality.UPPER_BOUND if measured.shared else before.quality,
            use=stretch.use,
            epoch=stretch.epoch,
            first_step=stretch.first_step,
            until_step=stretch.until_step,
            units=stretch.units,
            duration_s=stretch.until_s - stretch.since_s,
            energy_j=measured.energy_j,
            error_j=measured.error_j,
            reason=measured.reason,
            baseline_w=self._readings.baseline_w(before.device),
            state=measured.state,
        )

    def _counter(self, booked: Booked) -> float | None:
        """Where the hardware's counter stood at the end of what is booked; it is known a little later."""
        if booked.counter_j is not None or booked.source is None:
            return booked.counter_j
        return self._readings.counter(booked.device, booked.at_s)


_LATE = Measured(None, reason="read_too_late")


def _without_meter(whole: Stretch) -> EnergyWindow:
    return EnergyWindow(
        index=1,
        device=CPU,
        source=None,
        quality=None,
        use=whole.use,
        first_step=whole.first_step,
        until_step=whole.until_step,
        units=whole.units,
        duration_s=whole.until_s - whole.since_s,
        energy_j=None,
        reason="no_meter",
    )


def gap(booked: Booked, counter_j: float | None, boot: str, now_s: float) -> EnergyWindow:
    """What a device used from the last that a dead agent had booked until its successor looked: nobody knows what for.

    `counter_j` is where the hardware's counter stands now, if it can be told.
    """
    energy_j, reason = None, None
    if booked.boot_id != boot:
        reason = "rebooted"
    elif booked.source is None:
        reason = "no_meter"
    elif booked.counter_j is None or counter_j is None:
        reason = "no_counter"
    elif counter_j < booked.counter_j:
        reason = "counter_reset"
    else:
        energy_j = counter_j - booked.counter_j
    return EnergyWindow(
        index=booked.index + 1,
        device=booked.device,
        source=booked.source,
        quality=booked.quality,
        use=Use.UNATTRIBUTED,
        first_step=booked.step,
        until_step=booked.step,
        # After a reboot nobody knows when it ended, and its clock began anew.
        duration_s=max(0.0, now_s - booked.at_s) if booked.boot_id == boot else 0.0,
        energy_j=energy_j,
        reason=reason,
    )


async def book_gaps(orphan: Outbox, readings: Readings, devices: Collection[str]) -> None:
    """Of the holds that a dead agent left in the middle; once, whatever becomes of us. `devices` are measured here."""
    for ref, booked in await orphan.unended():
        counters = [await _counter_now(readings, b.device) if b.device in devices else None for b in booked]
        boot, now_s = boot_id(), time.monotonic()
        windows = [gap(b, counter_j, boot, now_s) for b, counter_j in zip(booked, counters, strict=True)]
        log.info("what a killed agent had not booked: %s", _said(windows), extra=ref.model_dump())
        await orphan.book(ref, windows, [])


def _said(gaps: Sequence[EnergyWindow]) -> str:
    return ", ".join(f"{w.device} {w.reason if w.energy_j is None else f'{w.energy_j:.0f} J'}" for w in gaps)


async def _counter_now(readings: Readings, device: str) -> float | None:
    """A moment ago, which is known once it was read again. The sampler may only just begin, hence a second try."""
    for _ in range(2):
        at_s = time.monotonic()
        while time.monotonic() < at_s + COUNTER_S:
            await asyncio.sleep(_LATE_POLL_S)
            if (counter_j := readings.counter(device, at_s)) is not None:
                return counter_j
    return None


def boot_id() -> str:
    """Of this boot of the host: CLOCK_MONOTONIC and counters of hardware are of one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
