"""What measures the device of one measurement, in the process that measures."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ops_contract.energy import Quality, Source
from ops_worker.energy.meters import Estimate, Measured, Meter, MeterLost
from ops_worker.energy.nvml import Driver, Gpu, NvmlCounter, NvmlPower, nvml_meter
from ops_worker.energy.rapl import POWERCAP, rapl_meters
from ops_worker.energy.sampler import INTERVAL_S, Sampler

# Nothing may be thinned out: a window may take hours, and each of its samples goes into the series.
KEEP_S = float("inf")
SET_A_WATTAGE = "set OPS_CPU_POWER_W, the watts of a busy core, for an estimate"


@dataclass(frozen=True)
class Instruments:
    """`gpus` are those that compute, MIG instances as such; `failures` and `warnings` are for the preflight.

    `unmetered`: devices that compute and that nothing measures, so that no sum is that of all.
    """

    sampler: Sampler
    meters: Sequence[Meter] = ()
    gpus: Sequence[Gpu] = ()
    driver: Driver | None = None
    unmetered: Sequence[str] = ()
    failures: Sequence[str] = ()
    warnings: Sequence[str] = ()

    def ready(self, since_s: float, until_s: float) -> bool:
        """Whether all is known of an interval, or never will be."""
        if not self.meters and not self.gpus:
            return True
        seen_s = self.sampler.seen_s
        return seen_s is not None and seen_s >= until_s and all(self._between(since_s, until_s))

    def between(self, since_s: float, until_s: float) -> dict[str, Measured]:
        late = Measured(None, reason="read_too_late")
        answers = self._between(since_s, until_s)
        return {meter.device: answer or late for meter, answer in zip(self.meters, answers, strict=True)}

    def power_w(self) -> float | None:
        """Of the devices whose joules are summed, as last read."""
        counted = [meter for meter in self.meters if meter.quality is not Quality.UPPER_BOUND]
        watts = [self.sampler.power_w(meter.device) for meter in counted or self.meters]
        known = [max(0.0, power_w) for power_w in watts if power_w is not None]
        return sum(known) if known else None

    def temperature_c(self) -> float | None:
        return max((now.temperature_c for now in self.sampler.now() if now.temperature_c is not None), default=None)

    def _between(self, since_s: float, until_s: float) -> list[Measured | None]:
        return [self.sampler.between(meter.device, since_s, until_s) for meter in self.meters]


@contextmanager
def open_instruments(
    gpu_uuid: str | None,
    meter: str,
    cpu_power_w: float | None,
    cores: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Instruments]:
    """Reading from here on. `gpu_uuid` null: of the CPU. A named meter that is not there is among the `failures`."""
    driver = Driver.open() if gpu_uuid is not None else None
    found = find_instruments(driver, gpu_uuid, meter, cpu_power_w, cores, clock)
    found.sampler.start()
    try:
        yield found
    finally:
        # While a call of it hangs, NVML cannot be closed.
        if found.sampler.stop() and driver is not None:
            driver.close()


def find_instruments(
    driver: Driver | None,
    gpu_uuid: str | None,
    meter: str,
    cpu_power_w: float | None,
    cores: int,
    clock: Callable[[], float] = time.monotonic,
    powercap: Path = POWERCAP,
) -> Instruments:
    failures: list[str] = []
    warnings: list[str] = []
    gpu = _gpu(driver, gpu_uuid)
    if gpu_uuid is not None and gpu is None:
        failures.append(f"the GPU {gpu_uuid} is not there, or its driver does not answer; `nvidia-smi` says more")
    on_gpu = _of_the_gpu(gpu, meter, clock) if gpu else None
    # Only who has the whole host to himself used what its packages used.
    quality = Quality.MEASURED if cores >= (os.cpu_count() or 1) else Quality.UPPER_BOUND
    packages = rapl_meters(quality, powercap, clock) if meter in ("auto", "rapl") else []
    meters: list[Meter] = [*([on_gpu] if on_gpu else []), *packages]
    # Beside a GPU's measured joules an estimate of a CPU would only spoil the sum.
    if cpu_power_w is not None and (meter == "estimate" or (meter == "auto" and gpu_uuid is None and not packages)):
        meters.append(Estimate(cpu_power_w, cores, clock))
    if meter != "auto" and not meters:
        failures.append(_not_there(meter))
    if gpu is not None and meter in ("rapl", "estimate"):
        warnings.append(f"the joules are by {meter}, those of the CPU alone: what {gpu.uuid} takes is not among them")
    wholes = [gpu.whole] if gpu else []
    unmetered = [whole.uuid for whole in wholes if meter == "auto" and on_gpu is None]
    sampler = Sampler(meters, wholes, INTERVAL_S, clock, KEEP_S)
    return Instruments(sampler, meters, [gpu] if gpu else [], driver, unmetered, failures, warnings)


def _gpu(driver: Driver | None, gpu_uuid: str | None) -> Gpu | None:
    wholes = driver.gpus() if driver is not None and gpu_uuid is not None else []
    instances = [instance for gpu in wholes if gpu.in_mig_mode for instance in gpu.instances()]
    return next((gpu for gpu in [*wholes, *instances] if gpu.uuid == gpu_uuid), None)


def _of_the_gpu(gpu: Gpu, meter: str, clock: Callable[[], float]) -> Meter | None:
    # An instance has no counter: what the whole GPU takes is the most that it can have taken.
    quality = Quality.UPPER_BOUND if gpu.parent else Quality.MEASURED
    if meter == "auto":
        return nvml_meter(gpu.whole, quality, clock)
    if meter == Source.NVML_POWER:
        return NvmlPower(gpu.whole, quality, clock) if gpu.whole.power_w() is not None else None
    if meter != Source.NVML_COUNTER:
        return None
    try:
        return NvmlCounter(gpu.whole, quality, clock)
    except MeterLost:
        return None


def _not_there(meter: str) -> str:
    advice = {
        "nvml_counter": "a GPU of Volta or later has it; `nvml_power` needs no counter",
        "nvml_power": "the device must be a GPU that shows its power",
        "rapl": "`chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj` lets it be read, where the CPU has it",
        "estimate": SET_A_WATTAGE,
    }
    return f"there is no meter {meter} here: {advice[meter]}"
