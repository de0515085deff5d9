"""Reads every meter on a thread of its own, and answers what a device used between two moments."""

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ops_contract.energy import DeviceNow, Source
from ops_worker.energy.meters import Measured, Meter, MeterLost, Reading
from ops_worker.energy.nvml import THROTTLE_REASONS, Gpu, Look, others
from ops_worker.energy.track import KEEP_S, STUCK_S, Point, Slowed, Span, States, Track, state_of

log = logging.getLogger(__name__)

INTERVAL_S = 0.1
# Temperature, clocks, utilisation and memory; their sensors are no faster.
THOROUGH_S = 1.0
# Who else computes on it: the driver takes its time to tell.
OTHERS_S = 5.0
# After its work a GPU stays in its high clocks for some seconds.
SETTLE_S = 10.0
BASELINE_S = 10.0
STOP_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """What one device showed. `energy_j` is cumulative, None where its meter did not answer; `look` is of a GPU."""

    at_s: float
    device: str
    energy_j: float | None
    power_w: float | None
    look: Look


class Sampler:
    """Reads every meter every `interval_s` on a thread of its own; keeps the readings of a bounded time.

    `gpus` are whole ones, whose state is watched too. `clock` is CLOCK_MONOTONIC, in seconds. All is kept for `keep_s`,
    then only some of it.
    """

    def __init__(
        self,
        meters: Sequence[Meter],
        gpus: Sequence[Gpu] = (),
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        keep_s: float = KEEP_S,
    ) -> None:
        self._tracks = {meter.device: Track(meter, keep_s) for meter in meters}
        self._watches = {gpu.uuid: Watch(gpu, keep_s) for gpu in gpus}
        self._baselines = {meter.device: Baseline() for meter in meters if meter.source is not Source.ESTIMATE}
        self._holders: Counter[str] = Counter()
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._recording: list[Sample] | None = None
        self._seen_s: float | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Where there is nothing to read, no thread."""
        if self._tracks or self._watches:
            # A daemon: a call that never returns must not keep the process.
            self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
            self._thread.start()

    def stop(self) -> bool:
        """Whether it has ended, so that what it reads may be closed; not while a call hangs."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(STOP_S)
        return self._thread is None or not self._thread.is_alive()

    def between(self, device: str, since_s: float, until_s: float) -> Measured | None:
        """What it used between two moments of CLOCK_MONOTONIC. None: not yet, no reading lies after `until_s`."""
        with self._lock:
            measured = self._tracks[device].between(since_s, until_s, self._clock())
            span = self._watches[device].states.between(since_s, until_s) if device in self._watches else None
        if measured is None or span is None:
            return measured
        return dataclasses.replace(measured, shared=span.shared, state=state_of(span))

    def counter(self, device: str, at_s: float) -> float | None:
        """The hardware's own counter at that moment, in joules, for who comes after this process.

        None where there is none, or none that can be told after its wrap. It starts anew with the driver or the host.
        """
        with self._lock:
            track = self._tracks[device]
            return None if track.meter.counter() is None else track.at(at_s)

    def baseline_w(self, device: str) -> float | None:
        """What it takes when nobody uses it; None until that was seen."""
        with self._lock:
            baseline = self._baselines.get(device)
            return baseline.power_w if baseline else None

    def note_busy(self, device: str) -> None:
        """A hold has it: no baseline is learnt."""
        with self._lock:
            self._holders[device] += 1

    def note_idle(self, device: str) -> None:
        """That hold has ended."""
        with self._lock:
            self._holders[device] -= 1

    def now(self) -> list[DeviceNow]:
        """The GPUs, as last read; for the heartbeat."""
        with self._lock:
            return [watch.now(self._clock()) for watch in self._watches.values()]

    def ticks(self, device: str, since_s: float, until_s: float) -> int | None:
        """How often its counter was seen to move within `keep_s`; None where it has none that moves in ticks."""
        with self._lock:
            return self._tracks[device].ticks(since_s, until_s)

    def slowed(self, device: str, since_s: float, until_s: float) -> list[Slowed] | None:
        """When that GPU was slowed within `keep_s`; None where it does not say."""
        with self._lock:
            return self._watches[device].states.slowed(since_s, until_s)

    def power_w(self, device: str) -> float | None:
        """As last read."""
        with self._lock:
            return self._power_w(device)

    @property
    def seen_s(self) -> float | None:
        """All that was before this moment was read; None before the first time."""
        with self._lock:
            return self._seen_s

    def record(self) -> None:
        """Keep every sample from here on, for `recorded`."""
        with self._lock:
            self._recording = []

    def recorded(self) -> list[Sample]:
        """Since `record`, which ends here."""
        with self._lock:
            samples, self._recording = self._recording or [], None
            return samples

    def sample(self) -> None:
        """Read everything once."""
        began_s = self._clock()
        readings = {device: self._read(track) for device, track in self._tracks.items()}
        for watch in self._watches.values():
            watch.look(self._clock, self._lock)
        with self._lock:
            now_s, self._seen_s = self._clock(), began_s
            if self._recording is not None:
                devices = self._tracks | self._watches
                self._recording += [self._sample(device, readings.get(device), now_s) for device in devices]
            for device, baseline in self._baselines.items():
                baseline.learn(self._tracks[device].last if self._idle(device) else None, now_s)

    def _idle(self, device: str) -> bool:
        shared = device in self._watches and self._watches[device].shared
        return self._holders[device] == 0 and self._tracks[device].lost is None and not shared

    def _sample(self, device: str, reading: Reading | None, now_s: float) -> Sample:
        look = self._watches[device].fresh(now_s) if device in self._watches else Look()
        at_s, energy_j = (reading.at_s, reading.energy_j) if reading else (now_s, None)
        return Sample(at_s, device, energy_j, self._power_w(device), look)

    def _power_w(self, device: str) -> float | None:
        """A GPU's own word, or else what its meter has moved by."""
        shown = self._watches[device].fresh(self._clock()).power_w if device in self._watches else None
        return self._tracks[device].power_w if shown is None and device in self._tracks else shown

    def _read(self, track: Track) -> Reading | None:
        try:
            reading = track.meter.read()  # it may take its time: not under the lock
        except MeterLost as loss:
            with self._lock:
                news = track.fail(loss, self._clock())
            if news:
                log.error("%s is not measured: %s", track.meter.device, loss)
            return None
        with self._lock:
            back = track.lost
            track.add(reading)
        if back is not None:
            log.info("%s is measured again", track.meter.device)
        return reading

    def _run(self) -> None:
        due_s = self._clock()
        while not self._stopping.wait(max(0.0, due_s - self._clock())):
            try:
                self.sample()
            except Exception:
                log.exception("reading the meters failed; trying again")
                self._stopping.wait(STUCK_S)
            # After a pause nothing is made up for.
            due_s = max(due_s + self._interval_s, self._clock())


class Watch:
    """One GPU's state."""

    def __init__(self, gpu: Gpu, keep_s: float = KEEP_S) -> None:
        self.states = States(keep_s)
        self.shared = False
        self._gpu = gpu
        self._look = Look()
        self._looked_at_s: float | None = None
        self._thorough_at_s = self._others_at_s = float("-inf")

    def look(self, clock: Callable[[], float], lock: threading.Lock) -> None:
        began_s = clock()
        thorough = began_s - self._thorough_at_s >= THOROUGH_S
        if thorough:
            self._thorough_at_s = began_s
        if began_s - self._others_at_s >= OTHERS_S:
            self._others_at_s = began_s
            self.shared = bool(others(self._gpu.processes()))
        look, at_s = self._gpu.look(thorough), clock()
        with lock:
            before_s, self._look, self._looked_at_s = self._looked_at_s, look, at_s
            # The state at the end of an interval stands for all of it, unless it was long: then nobody knows.
            if before_s is not None and 0 < at_s - before_s <= STUCK_S:
                self.states.add(Span.of(before_s, at_s, look, self.shared))

    def now(self, now_s: float) -> DeviceNow:
        gpu, look = self._gpu, self.fresh(now_s)
        return DeviceNow(
            device=gpu.uuid,
            name=gpu.name,
            power_w=look.power_w,
            power_limit_w=gpu.power_limit_w,
            temperature_c=look.temperature_c,
            utilization_percent=look.utilization_percent,
            memory_used_bytes=look.memory_used_bytes,
            memory_total_bytes=gpu.memory_total_bytes,
            throttle=[name for bit, name in THROTTLE_REASONS.items() if (look.throttle or 0) & bit],
        )

    def fresh(self, now_s: float) -> Look:
        """What it said last; nothing while it hangs, for what it said before is not how it is."""
        hangs = self._looked_at_s is None or now_s - self._looked_at_s > STUCK_S
        return Look() if hangs else self._look


class Baseline:
    """What a device takes when nobody uses it: the mean of its idle time, once it has come to rest."""

    def __init__(self) -> None:
        self.power_w: float | None = None
        self._idle_since_s: float | None = None
        self._begin: Point | None = None

    def learn(self, point: Point | None, now_s: float) -> None:
        """`point` is the newest reading; None while it is not idle."""
        if point is None or point.unknown:
            self._idle_since_s = self._begin = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        elif point.at_s - self._idle_since_s < SETTLE_S:
            return
        elif self._begin is None:
            self._begin = point
        elif point.at_s - self._begin.at_s >= BASELINE_S:
            self.power_w = (point.energy_j - self._begin.energy_j) / (point.at_s - self._begin.at_s)
