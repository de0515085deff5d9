"""NVIDIA's driver, as far as it answers: the GPUs, their joules, and how they are."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from ops_contract.energy import Quality, Source
from ops_worker.energy.meters import Meter, MeterLost, Reading

log = logging.getLogger(__name__)

# What slows a GPU down, by NVML's names. Idleness and clocks that somebody has set are no slowdown.
THROTTLE_REASONS = {
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x200: "board_limit",
    0x400: "reliability",
}
THROTTLE_BITS = sum(THROTTLE_REASONS)

_UNINITIALIZED, _NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND, _DRIVER_NOT_LOADED = 1, 3, 4, 6, 9
_FUNCTION_NOT_FOUND, _GPU_IS_LOST, _RESET_REQUIRED, _DEPRECATED = 13, 15, 16, 26
_GONE = frozenset({_UNINITIALIZED, _NOT_FOUND, _DRIVER_NOT_LOADED, _GPU_IS_LOST, _RESET_REQUIRED})
_NEVER = frozenset({_NOT_SUPPORTED, _NO_PERMISSION, _FUNCTION_NOT_FOUND, _DEPRECATED})


@dataclass(frozen=True, slots=True)
class Look:
    """How a GPU is at a moment; None is what it does not say. `throttle` has the bits of NVML."""

    power_w: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    utilization_percent: float | None = None
    memory_used_bytes: int | None = None
    throttle: int | None = None


class Driver:
    """NVML, opened. Its calls block, for milliseconds or for good when a GPU hangs."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self.version: str = nvml.nvmlSystemGetDriverVersion()
        self.cuda_version = _dotted(nvml.nvmlSystemGetCudaDriverVersion_v2())

    @classmethod
    def open(cls) -> Self | None:
        """None where there is no driver, which the log says once."""
        try:
            import pynvml
        except ImportError:
            log.info("no GPU is looked for: nvidia-ml-py is not installed")
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml)
        except pynvml.NVMLError as error:
            # Most hosts without a GPU have no driver either: nothing to warn of.
            missing = getattr(error, "value", None) == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
            log.log(logging.INFO if missing else logging.WARNING, "no GPU is used: NVML says %s", error)
            return None

    def close(self) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def gpus(self) -> list["Gpu"]:
        """In the order of their PCI addresses, as `nvidia-smi` numbers them. One that does not answer is left out."""
        found = []
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                found.append(Gpu(self._nvml, self._nvml.nvmlDeviceGetHandleByIndex(index)))
            except self._nvml.NVMLError as error:
                log.error("GPU %d is left out, it does not answer: %s", index, error)
        return found


class Gpu:
    """A GPU, or a MIG instance of one (`parent`), whose joules and state nobody knows but the whole's."""

    def __init__(self, nvml: Any, handle: Any, parent: "Gpu | None" = None) -> None:
        self._nvml = nvml
        self._handle = handle
        self._unsupported: set[str] = set()
        self._slow = Look()
        self.has_instant = parent is None  # as of the last `power_w`
        self.parent = parent
        self.uuid: str = nvml.nvmlDeviceGetUUID(handle)
        self.name: str = nvml.nvmlDeviceGetName(handle)
        memory = self.memory()
        self.memory_total_bytes = memory[1] if memory else None
        self.power_limit_w = None if parent else self._watts(nvml.nvmlDeviceGetEnforcedPowerLimit)

    @property
    def whole(self) -> "Gpu":
        return self.parent or self

    @property
    def in_mig_mode(self) -> bool:
        mode = self._ask(self._nvml.nvmlDeviceGetMigMode, self._handle, quiet=True)
        return bool(mode and mode[0])

    def instances(self) -> list["Gpu"]:
        """Its MIG instances."""
        found = []
        for index in range(self._nvml.nvmlDeviceGetMaxMigDeviceCount(self._handle)):
            with suppress(self._nvml.NVMLError):  # a place that has none
                handle = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(self._handle, index)
                found.append(Gpu(self._nvml, handle, parent=self))
        return found

    def answers(self) -> str | None:
        """What is wrong, or None."""
        try:
            self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError as error:
            return str(error)
        return None

    def memory(self) -> tuple[int, int] | None:
        """Bytes free, and in all."""
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, self._handle)
        return memory and (memory.free, memory.total)

    def persistence(self) -> bool | None:
        mode = self._ask(self._nvml.nvmlDeviceGetPersistenceMode, self.whole._handle)
        return None if mode is None else bool(mode)

    def processes(self) -> list[int]:
        """Those that compute on it. In a container they may have the host's numbers."""
        found = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        return [process.pid for process in found or []]

    def energy_mj(self) -> int:
        """Of its counter. Raises MeterLost."""
        try:
            counter: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            gone = getattr(error, "value", None) in _GONE
            raise MeterLost("device_lost" if gone else "read_failed", f"{self.uuid}: {error}") from error
        return counter

    def power_w(self) -> float | None:
        """At this moment where the driver knows it (`has_instant`), else the mean of the last second or so."""
        if self.has_instant:
            field = self._nvml.NVML_FI_DEV_POWER_INSTANT
            values = self._ask(self._nvml.nvmlDeviceGetFieldValues, self._handle, [field], quiet=True)
            if values and values[0].nvmlReturn == 0:
                return float(values[0].value.uiVal) / 1000
            self.has_instant = values is not None and values[0].nvmlReturn not in _NEVER
        return self._watts(self._nvml.nvmlDeviceGetPowerUsage)

    def look(self, thorough: bool) -> Look:
        """`thorough`: also what moves slowly, or costs much; else that is as it was."""
        ask, nvml, handle = self._ask, self._nvml, self._handle
        if thorough:
            utilization, memory = ask(nvml.nvmlDeviceGetUtilizationRates, handle), self.memory()
            self._slow = Look(
                temperature_c=ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                sm_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
                utilization_percent=utilization and utilization.gpu,
                memory_used_bytes=memory and memory[1] - memory[0],
            )
        slow, bits = self._slow, ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        return Look(
            self.power_w(),
            slow.temperature_c,
            slow.sm_clock_mhz,
            slow.utilization_percent,
            slow.memory_used_bytes,
            None if bits is None else bits & THROTTLE_BITS,
        )

    def _watts(self, call: Callable[[Any], int]) -> float | None:
        milliwatts = self._ask(call, self._handle)
        return None if milliwatts is None else milliwatts / 1000

    def _ask(self, call: Callable[..., Any], *arguments: Any, quiet: bool = False) -> Any:
        """None where it does not say. What it never says is asked and told once."""
        name = call.__name__
        if name in self._unsupported:
            return None
        try:
            return call(*arguments)
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) in _NEVER:
                self._unsupported.add(name)
                log.log(logging.DEBUG if quiet else logging.INFO, "%s of %s: %s", name, self.uuid, error)
            return None


class NvmlCounter:
    """The GPU's own count of millijoules since its driver was loaded. It moves in ticks of 20 to 100 ms."""

    source = Source.NVML_COUNTER

    def __init__(self, gpu: Gpu, quality: Quality, clock: Callable[[], float]) -> None:
        """Raises MeterLost where there is no counter."""
        self.device = gpu.uuid
        self.quality = quality
        self._gpu = gpu
        self._clock = clock
        self._last_mj = gpu.energy_mj()

    def read(self) -> Reading:
        counter_mj = self._gpu.energy_mj()
        at_s, before_mj, self._last_mj = self._clock(), self._last_mj, counter_mj
        if counter_mj < before_mj:
            raise MeterLost("counter_fell", f"{self.device}: its counter fell from {before_mj} to {counter_mj} mJ")
        return Reading(at_s, counter_mj / 1000)

    def counter(self) -> float | None:
        return self._last_mj / 1000


class NvmlPower:
    """The integral of a GPU's power over the intervals as they really were, by trapezoids."""

    source = Source.NVML_POWER

    def __init__(self, gpu: Gpu, quality: Quality, clock: Callable[[], float]) -> None:
        self.device = gpu.uuid
        self.quality = quality
        self._gpu = gpu
        self._clock = clock
        self._last: tuple[float, float] | None = None
        self._energy_j = 0.0

    def read(self) -> Reading:
        power_w, at_s = self._gpu.power_w(), self._clock()
        if power_w is None:
            problem = self._gpu.answers()
            raise MeterLost("device_lost" if problem else "read_failed", f"{self.device}: {problem or 'no power'}")
        if self._last is not None:
            before_s, before_w = self._last
            self._energy_j += (before_w + power_w) / 2 * (at_s - before_s)
        self._last = at_s, power_w
        return Reading(at_s, self._energy_j)

    def counter(self) -> float | None:
        return None


def nvml_meter(gpu: Gpu, quality: Quality, clock: Callable[[], float] = time.monotonic) -> Meter | None:
    """The best that the GPU has; None, which the log says, where it has none."""
    try:
        return NvmlCounter(gpu, quality, clock)
    except MeterLost as lost:
        problem = lost
    if gpu.power_w() is None:
        log.warning("%s has no meter: it shows no power either", problem)
        return None
    kind = "instant power" if gpu.has_instant else "its power of the last second or so: the driver has no other"
    log.info("no counter of energy at %s; what is summed up is %s", problem, kind)
    return NvmlPower(gpu, quality, clock)


def others(pids: Sequence[int], agent: int | None = None) -> list[int]:
    """Those that are not this agent's children.

    A number that is not seen here is another container's, or our own where the driver tells the host's: one such is
    taken for ours if none else is.
    """
    agent = os.getpid() if agent is None else agent
    ours = [pid for pid in pids if _descends(pid, agent)]
    unseen = [pid for pid in pids if not os.path.exists(f"/proc/{pid}")]
    allowed = unseen[:1] if not ours else []
    return [pid for pid in pids if pid not in ours and pid not in allowed]


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            with open(f"/proc/{pid}/stat", "rb") as stat:
                pid = int(stat.read().rpartition(b")")[2].split()[1])
        except OSError:
            return False
    return False


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
