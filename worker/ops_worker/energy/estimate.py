"""Joules by a configured wattage, where no meter is readable."""

import time
from collections.abc import Callable

from ops_contract.energy import Quality, Source
from ops_worker.energy.meters import Reading


class Estimate:
    """The watts of a busy core, times the cores of a slot, times the time, however much of them was used."""

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
