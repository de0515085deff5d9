"""A device whose counter moves by 100 J a second, whoever looks: like a real one it outlives an agent.

As a module it is an agent whose slots have it.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ops_contract.energy import Quality, Source
from ops_worker.__main__ import main
from ops_worker.energy.devices import Devices
from ops_worker.energy.meters import Meter, Reading

POWER_W = 100.0


class Counting:
    source = Source.NVML_COUNTER
    quality = Quality.MEASURED

    def __init__(self, device: str = "GPU-0") -> None:
        self.device = device

    def read(self) -> Reading:
        at_s = time.monotonic()
        self._energy_j = POWER_W * at_s
        return Reading(at_s, self._energy_j)

    def counter(self) -> float | None:
        return self._energy_j


def install() -> None:
    """In the place of whatever this host has."""

    def only(self: Devices, powercap: Path, clock: object) -> Sequence[Meter]:
        return [Counting()]

    Devices._of_the_cpu = only  # type: ignore[method-assign]


def each_slot() -> None:
    """A second device, and each slot is booked on one of the two."""

    def both(self: Devices, powercap: Path, clock: object) -> Sequence[Meter]:
        return [Counting("GPU-0"), Counting("GPU-1")]

    Devices._of_the_cpu = both  # type: ignore[method-assign]
    Devices._meters_of = lambda self, slot: [self._cpu_meters[slot]]  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    sys.exit(main())
