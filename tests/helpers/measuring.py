"""An engine that takes the time that it is told to, on a clock that nothing else moves, with meters read on the way."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers.fake_nvml import FakeClock
from ops_contract.energy import Quality
from ops_contract.measurements import FlopsRecord, MeasurementConfig, MeasurementResult, RandomModel, Task, Warmup
from ops_worker.energy.nvml import Driver, nvml_meter
from ops_worker.energy.sampler import Sampler
from ops_worker.measurement.engines import Checked, Generated
from ops_worker.measurement.instruments import KEEP_S, Instruments, find_instruments
from ops_worker.measurement.run import Measurement

BEGAN_S = 1000.0
# A power of two: a sample falls exactly on the edges of what lasts whole seconds.
INTERVAL_S = 0.125

# The course of a measurement with `config()` and a baseline of 10 s: begin and end on the script's clock.
LOADED_S = 20.0
WINDOW_S = (25.0, 35.0)


def config(**changes: Any) -> MeasurementConfig:
    """10 s of idle; then two batches to warm up, three for the thermal floor, and ten in the window, of 1 s each."""
    given: dict[str, Any] = {
        "model": RandomModel(model_type="gpt2"),
        "task": Task(n_prompts=20, output_tokens=16),
        "batch_size": 2,
        "warmup": Warmup(batches=2, cv=None),
        "thermal_floor_s": 3.0,
        "baseline": {"strategy": "fresh", "duration_s": 10.0, "look_s": 5.0},
        "first_token_prompts": 4,
    }
    return MeasurementConfig.model_validate(given | changes)


class Rig:
    """The meters are read every `INTERVAL_S` from `offset_s` on, while the clock moves."""

    def __init__(self, clock: FakeClock, instruments: Instruments, directory: Path, offset_s: float = 0.0) -> None:
        self.clock = clock
        self.instruments = instruments
        self.directory = directory
        self.wall_s = 1.7e9
        self._due_s = clock() + offset_s
        self.run(offset_s)

    def run(self, duration_s: float) -> None:
        until_s = self.clock() + duration_s
        while self._due_s <= until_s:
            self.clock.advance(self._due_s - self.clock())
            self.instruments.sampler.sample()
            self._due_s += INTERVAL_S
        self.clock.advance(until_s - self.clock())

    def run_until(self, at_s: float) -> None:
        """Of the script's clock."""
        self.run(max(0.0, BEGAN_S + at_s - self.clock()))

    def measurement(self, engine: "FakeEngine", given: MeasurementConfig | None = None, **how: Any) -> Measurement:
        return Measurement(
            given or engine.config,
            engine,
            self.instruments,
            baselines=self.directory / "baselines",
            series=self.directory / "series.parquet",
            clock=self.clock,
            wall=lambda: self.wall_s,
            pause=self.run,
            **how,
        )

    def measure(self, given: MeasurementConfig | None = None, **changes: Any) -> MeasurementResult:
        return self.measurement(FakeEngine(self, given or config(), **changes)).run()


def on_gpus(driver: Driver, clock: FakeClock, directory: Path, offset_s: float = 0.0) -> Rig:
    """All of them: a measurement has one, but its sums are of any number."""
    gpus = driver.gpus()
    meters = [meter for gpu in gpus if (meter := nvml_meter(gpu, Quality.MEASURED, clock))]
    sampler = Sampler(meters, gpus, INTERVAL_S, clock, KEEP_S)
    return Rig(clock, Instruments(sampler, meters, gpus, driver), directory, offset_s)


def on_cpu(clock: FakeClock, directory: Path, meter: str = "auto", cpu_power_w: float | None = None) -> Rig:
    found = find_instruments(None, None, meter, cpu_power_w, 2, clock, directory / "powercap")
    return Rig(clock, found, directory)


class FakeEngine:
    """`batch_s` is how long each call of `generate` takes, in turn, the last for good; `before` is called by each."""

    def __init__(
        self,
        rig: Rig,
        given: MeasurementConfig,
        batch_s: Sequence[float] = (1.0,),
        checked: Checked | None = None,
        fails: str | None = None,
        before: Callable[[int], None] | None = None,
    ) -> None:
        self.config = given
        self.calls: list[str] = []
        self.batches = -(-given.task.n_prompts // given.batch_size)
        self._rig = rig
        self._batch_s = list(batch_s)
        self._checked = checked or Checked()
        self._fails = fails
        self._before = before

    def check(self) -> Checked:
        self._called("check")
        return self._checked

    def environment(self) -> dict[str, Any]:
        return {"attention": "sdpa"}

    def load(self) -> None:
        self._called("load")
        self._rig.run_until(LOADED_S)

    def prompts(self, batch: int) -> int:
        return min(self.config.batch_size, self.config.task.n_prompts - batch * self.config.batch_size)

    def generate(self, batch: int) -> Generated:
        n = sum(call.startswith("generate") for call in self.calls)
        self._called(f"generate {batch}")
        if self._before:
            self._before(n)
        self._rig.run(self._batch_s[min(n, len(self._batch_s) - 1)])
        return Generated(tokens_in=100, tokens_out=32)

    def first_token(self, batch: int) -> None:
        self._called(f"first_token {batch}")
        self._rig.run(0.25 + batch)

    def reset_peak_memory(self) -> None:
        self._called("reset_peak_memory")

    def peak_memory_bytes(self) -> int | None:
        self._called("peak_memory_bytes")
        return 5 * 2**30

    def flops(self, generated: Sequence[Generated]) -> FlopsRecord:
        self._called("flops")
        self._rig.run(5.0)
        return FlopsRecord(prefill=6e12, decode=4e12, params=1000)

    def peak_flops_per_s(self) -> tuple[float | None, str]:
        return 4e12, "data sheet"

    def close(self) -> None:
        self._called("close")

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if call == self._fails:
            raise RuntimeError(f"no {call}")
