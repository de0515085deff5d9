"""What a meter is, and what it answers; and the one that is no meter, a configured wattage."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from ops_contract.energy import DeviceState, Quality, Source


@dataclass(frozen=True)
class Reading:
    """A device's cumulative joules at a moment of CLOCK_MONOTONIC. Only differences mean something."""

    at_s: float
    energy_j: float


@dataclass(frozen=True)
class Measured:
    """What a device used in an interval; `energy_j` null: not known, for `reason`. `error_j` bounds its edges' error.

    `shared`: others used the device in it too, so that the figure is an upper bound, whatever its meter's quality.
    """

    energy_j: float | None
    error_j: float | None = None
    reason: str | None = None
    shared: bool = False
    state: DeviceState | None = None

    def times(self, factor: int) -> "Measured":
        energy_j = None if self.energy_j is None else self.energy_j * factor
        error_j = None if self.error_j is None else self.error_j * factor
        return replace(self, energy_j=energy_j, error_j=error_j)


class MeterLost(Exception):
    """The device does not answer any more, or its counter fell; `reason` is a word (device_lost, counter_fell, …)."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class Meter(Protocol):
    """One device's joules. `device` is a GPU's uuid, or "cpu" and the package's number."""

    @property
    def device(self) -> str: ...

    @property
    def source(self) -> Source: ...

    @property
    def quality(self) -> Quality: ...

    def read(self) -> Reading:
        """Blocks for microseconds to milliseconds: on the sampler's thread only. Raises MeterLost."""

    def counter(self) -> float | None:
        """Joules of the hardware's own counter, which outlives this process; None where there is none.

        As of the last `read`. It starts anew with the driver or the host.
        """


class Estimate:
    """Where no meter is readable: the watts of a busy core, times the cores of a slot, times the time, however much of
    them was used."""

    device = "cpu"
    source = Source.ESTIMATE
    quality = Quality.ESTIMATED

    def __init__(self, core_power_w: float, cores: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._power_w = core_power_w * cores
        self._clock = clock

    def read(self) -> Reading:
        at_s = self._clock()
        return Reading(at_s, at_s * self._power_w)

    def counter(self) -> float | None:
        return None


@dataclass(frozen=True)
class SlotMeter:
    """What the windows of a hold are booked on; without any they say `no_meter`.

    `quality` is the slot's: a CPU package that other slots use too is an upper bound here. `times`: an estimate is of
    one slot, a hold may have several.
    """

    device: str
    source: Source
    quality: Quality
    times: int = 1
