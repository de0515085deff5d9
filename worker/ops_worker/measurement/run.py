"""One measurement, from preflight to result."""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from ops_contract.measurements import (
    DeviceUse,
    Figure,
    MeasurementConfig,
    MeasurementPhase,
    MeasurementProgress,
    MeasurementResult,
    ThermalThrottle,
    WarmupRecord,
)
from ops_worker.energy.meters import Measured
from ops_worker.energy.preflight import preflight_gpu
from ops_worker.energy.sampler import Sample
from ops_worker.measurement import warmup
from ops_worker.measurement.baseline import Baseline, Baselines, IdlePower
from ops_worker.measurement.engines import Engine, Generated
from ops_worker.measurement.environment import environment
from ops_worker.measurement.figures import METHODOLOGY, NO_METER, Counted, Found, figures
from ops_worker.measurement.instruments import Instruments
from ops_worker.measurement.timeseries import write_series
from ops_worker.measurement.window import Window, device_uses, thermal_throttle, use_warnings

log = logging.getLogger(__name__)

POLL_S = 0.1
# For a reading behind the end of an interval; a meter that hangs says so before.
LATE_S = 15.0

P = ParamSpec("P")
T = TypeVar("T")


class PreFlightError(Exception):
    """What keeps it from starting: all of it, so that it is mended at once."""

    def __init__(self, failures: Sequence[str], warnings: Sequence[str] = ()) -> None:
        super().__init__("; ".join(failures))
        self.failures = list(failures)
        self.warnings = list(warnings)


class BackendError(Exception):
    """The engine failed, in `phase`; `cause` is what it raised."""

    def __init__(self, phase: MeasurementPhase, cause: Exception) -> None:
        super().__init__(f"the engine failed in phase {phase}: {type(cause).__name__}: {cause}")
        self.phase = phase
        self.cause = cause


def _nothing(*_: object) -> None: ...


@dataclass(frozen=True)
class Step:
    """What the measuring thread is at, and since when."""

    phase: MeasurementPhase
    began_s: float
    began_beats: int
    total: float | None = None
    unit: Literal["prompts", "batches", "s"] | None = None


class Measurement:
    """`entered` is called when a phase begins, `stop` between batches and while waiting, in the window too: it must be
    cheap. What either raises ends the measurement. `wall` is the time of day, `clock` CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        config: MeasurementConfig,
        engine: Engine,
        instruments: Instruments,
        *,
        baselines: Path,
        series: Path,
        entered: Callable[[MeasurementPhase], None] = _nothing,
        stop: Callable[[], None] = _nothing,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.beats = 0
        self.tokens_out = 0  # in the window, once it is over
        self._config = config
        self._engine = engine
        self._instruments = instruments
        self._baselines = baselines
        self._series = series
        self._entered = entered
        self._stop = stop
        self._clock = clock
        self._wall = wall
        self._pause = pause
        self._step = Step(MeasurementPhase.PREFLIGHT, clock(), 0)
        self._phase_began_s: float | None = None
        self._phases_s: dict[MeasurementPhase, float] = {}
        self._warnings: list[str] = []

    def run(self) -> MeasurementResult:
        """Raises PreFlightError and BackendError, and whatever `entered` and `stop` raise."""
        self._enter(MeasurementPhase.PREFLIGHT)
        self._preflight()
        about = environment(self._instruments, self._asked(self._engine.environment))
        self._enter(MeasurementPhase.GAP)
        self._rest(self._config.gap_s)
        self._enter(MeasurementPhase.BASELINE)
        baseline = self._baseline()
        with self._loaded():
            warm = self._warm_up()
            window = self._window()
            first_token_s = self._first_tokens()
            self._enter(MeasurementPhase.COMPUTE)
            counted = self._count(window)
        return self._result(window, warm, baseline, first_token_s, counted, about)

    def progress(self) -> MeasurementProgress:
        """From any thread."""
        step, beats = self._step, self.beats
        done = float(beats - step.began_beats)
        if step.unit == "s":
            done = self._clock() - step.began_s
        elif step.unit == "prompts":
            done *= self._config.batch_size
        return MeasurementProgress(
            phase=step.phase,
            done=0 if step.unit is None or step.total is None else min(done, step.total),
            total=step.total,
            unit=step.unit,
            power_w=self._instruments.power_w(),
            temperature_c=self._instruments.temperature_c(),
        )

    def _preflight(self) -> None:
        failures, warnings = list(self._instruments.failures), list(self._instruments.warnings)
        for gpu in self._instruments.gpus:
            found = preflight_gpu(gpu)
            failures += found.failures
            warnings += found.warnings
        memory = next((gpu.memory() for gpu in self._instruments.gpus), None)
        checked = self._asked(self._engine.check, memory and memory[0])
        failures += checked.failures
        warnings += checked.warnings
        if failures:
            raise PreFlightError(failures, warnings)
        self._warnings += warnings

    def _baseline(self) -> Baseline:
        policy, meters = self._config.baseline, self._instruments.meters
        baseline = Baselines(policy, meters, self._baselines, self._measure_idle, self._wall).take()
        self._warnings += baseline.warnings
        return baseline

    def _measure_idle(self, duration_s: float) -> dict[str, IdlePower]:
        # The first reading must lie before it.
        self._await(lambda: self._instruments.sampler.seen_s is not None)
        begin_s = self._clock()
        self._rest(duration_s)
        end_s = self._clock()
        measured = self._measured(begin_s, end_s)
        return {device: IdlePower.of(found, end_s - begin_s) for device, found in measured.items()}

    @contextmanager
    def _loaded(self) -> Iterator[None]:
        self._enter(MeasurementPhase.LOAD)
        try:
            self._asked(self._engine.load)
            yield
        finally:
            try:
                self._engine.close()
            # What was measured is no worse for it, and what else failed is what counts.
            except Exception as error:
                log.exception("the engine cannot be closed")
                self._warnings.append(f"the engine cannot be closed: {error}")

    def _warm_up(self) -> WarmupRecord:
        settings = self._config.warmup
        most = settings.batches if settings.cv is None else settings.most
        self._enter(MeasurementPhase.WARMUP, most, "batches")
        latencies_s: list[float] = []
        last = self._engine.batches - 1
        if most > 0 and self._engine.prompts(last) != self._engine.prompts(0):
            # What is compiled and allocated for its own shape must not be so in the window.
            self._timed(self._engine.generate, last)
        while not warmup.is_over(settings, latencies_s):
            # The same batch each time: others may be longer, and that is no sign of a device that is still cold.
            latencies_s.append(self._timed(self._engine.generate, 0))
        record = warmup.record(settings, latencies_s, self._keep_working())
        if record.converged is False:
            problem = f"the time of a batch has not settled in {record.batches} batches"
            self._warnings.append(f"{problem}: those of the last {settings.last} vary by {record.cv or 0:.1%}")
        return record

    def _keep_working(self) -> float:
        """For how long it did. Every batch in turn, for each may have a shape of its own."""
        self._enter(MeasurementPhase.THERMAL_FLOOR, self._config.thermal_floor_s, "s")
        begin_s, batch = self._clock(), 0
        while self._clock() - begin_s < self._config.thermal_floor_s:
            self._timed(self._engine.generate, batch)
            batch = (batch + 1) % self._engine.batches
        return self._clock() - begin_s

    def _window(self) -> Window:
        self._enter(MeasurementPhase.WINDOW, self._config.task.n_prompts, "prompts")
        self._asked(self._engine.reset_peak_memory)
        self._instruments.sampler.record()
        was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            window = self._run_batches(self._engine.batches)
        finally:
            if was_enabled:
                gc.enable()
        self.tokens_out = window.tokens_out
        window.peak_memory_bytes = self._asked(self._engine.peak_memory_bytes)
        return window

    def _run_batches(self, batches: int) -> Window:
        """Every call before this has waited for the device. What is in this loop is in the joules: nothing else is."""
        clock, stop, generate = self._clock, self._stop, self._engine.generate
        latencies_s: list[float] = []
        generated: list[Generated] = []
        begin_s = clock()
        for batch in range(batches):
            stop()
            began_s = clock()
            try:
                generated.append(generate(batch))
            except Exception as error:
                raise BackendError(MeasurementPhase.WINDOW, error) from error
            latencies_s.append(clock() - began_s)
            self.beats += 1
        return Window(begin_s, clock(), latencies_s, generated)

    def _first_tokens(self) -> list[float]:
        wanted = self._config.first_token_prompts
        self._enter(MeasurementPhase.FIRST_TOKEN, wanted, "prompts")
        if wanted == 0:
            return []
        self._timed(self._engine.first_token, 0)
        self._expect(wanted, "prompts")
        batches = range(math.ceil(wanted / self._config.batch_size))
        return [self._timed(self._engine.first_token, batch % self._engine.batches) for batch in batches]

    def _count(self, window: Window) -> Counted:
        """That FLOPs cannot be counted is no reason to lose what was measured."""
        try:
            flops = self._engine.flops(window.generated)
            peak = self._engine.peak_flops_per_s()
        except Exception as error:
            log.exception("the FLOPs cannot be counted")
            problem = f"the FLOPs cannot be counted: {type(error).__name__}: {error}"
            self._warnings.append(problem)
            return Counted(None, problem, (None, problem))
        if flops.uncounted:
            self._warnings.append(f"the FLOPs are too few: those of {', '.join(flops.uncounted)} are not known")
        return Counted(flops, None, peak)

    def _result(
        self,
        window: Window,
        warm: WarmupRecord,
        baseline: Baseline,
        first_token_s: Sequence[float],
        counted: Counted,
        about: dict[str, Any],
    ) -> MeasurementResult:
        instruments = self._instruments
        measured = self._measured(window.begin_s, window.end_s)
        samples = [s for s in instruments.sampler.recorded() if window.begin_s <= s.at_s <= window.end_s]
        uses = device_uses(instruments, window, measured, baseline.idle, samples)
        throttle = thermal_throttle(instruments, window)
        known = figures(Found(window, first_token_s, counted, uses, instruments.unmetered, baseline))
        series = self._write_series(samples, window)
        self._warn(known["energy_j"], uses, throttle)
        self._end_phase()
        return MeasurementResult(
            config_hash=self._config.digest(),
            methodology=METHODOLOGY,
            n_prompts=self._config.task.n_prompts,
            tokens_in=window.tokens_in,
            tokens_out=window.tokens_out,
            figures=known,
            devices=uses,
            thermal_throttle=throttle,
            baseline=baseline.record,
            warmup=warm,
            flops=counted.flops,
            phases_s=self._phases_s,
            environment=about,
            series=series,
            warnings=self._warnings,
        )

    def _warn(self, energy: Figure, uses: Sequence[DeviceUse], throttle: ThermalThrottle) -> None:
        if energy.reason is not None and energy.reason.startswith(NO_METER):
            self._warnings.append(energy.reason)
        self._warnings += use_warnings(uses)
        if throttle.throttled:
            why = ", ".join(throttle.reasons)
            self._warnings.append(f"the device was slowed for {throttle.duration_s:.1f} s of the window: {why}")

    def _write_series(self, samples: Sequence[Sample], window: Window) -> str | None:
        if not samples:
            return None
        try:
            write_series(self._series, samples, window.begin_s)
        except ImportError:
            self._warnings.append("there is no series: pyarrow is not installed, `pip install relight[llm]` brings it")
            return None
        except OSError as error:
            self._warnings.append(f"there is no series: {error}")
            return None
        return self._series.name

    def _measured(self, since_s: float, until_s: float) -> dict[str, Measured]:
        """Once a reading lies behind the end."""
        self._await(lambda: self._instruments.ready(since_s, until_s))
        return self._instruments.between(since_s, until_s)

    def _await(self, condition: Callable[[], bool]) -> None:
        late_s = self._clock() + LATE_S
        while not condition() and self._clock() < late_s:
            self._wait(POLL_S)

    def _rest(self, duration_s: float) -> None:
        self._expect(duration_s, "s")
        until_s = self._clock() + duration_s
        while (left_s := until_s - self._clock()) > 0:
            self._wait(min(POLL_S, left_s))

    def _wait(self, duration_s: float) -> None:
        self._stop()
        self._pause(duration_s)
        self.beats += 1

    def _timed(self, call: Callable[[int], object], batch: int) -> float:
        self._stop()
        began_s = self._clock()
        self._asked(call, batch)
        duration_s = self._clock() - began_s
        self.beats += 1
        return duration_s

    def _asked(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Of the engine. Raises BackendError for whatever it raises."""
        try:
            return call(*args, **kwargs)
        except Exception as error:
            raise BackendError(self._step.phase, error) from error

    def _enter(
        self,
        phase: MeasurementPhase,
        total: float | None = None,
        unit: Literal["prompts", "batches", "s"] | None = None,
    ) -> None:
        self._end_phase()
        self.beats += 1
        self._phase_began_s = self._clock()
        self._step = Step(phase, self._phase_began_s, self.beats, total, unit)
        self._entered(phase)

    def _expect(self, total: float, unit: Literal["prompts", "batches", "s"]) -> None:
        """Of the phase that it is in."""
        self._step = Step(self._step.phase, self._clock(), self.beats, total, unit)

    def _end_phase(self) -> None:
        if self._phase_began_s is not None:
            self._phases_s[self._step.phase] = self._clock() - self._phase_began_s
