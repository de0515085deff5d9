"""The counters of the CPU's packages, which Linux shows by powercap; those of AMD have the same names."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from ops_contract.energy import Quality, Source
from ops_worker.energy.meters import MeterLost, Reading

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")


class Rapl:
    """One package's microjoules. They begin again at the end of their range, every quarter of an hour or so."""

    source = Source.RAPL

    def __init__(self, zone: Path, quality: Quality, clock: Callable[[], float]) -> None:
        """Raises OSError or ValueError where it cannot be read."""
        self.device = f"cpu{zone.name.partition(':')[2]}"
        self.quality = quality
        self._file = zone / "energy_uj"
        self._clock = clock
        # The highest figure that the counter shows.
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._last_uj = self._counter()
        self._energy_uj = 0

    def read(self) -> Reading:
        try:
            counter_uj = self._counter()
        except (OSError, ValueError) as error:
            raise MeterLost("read_failed", f"{self._file}: {error}") from error
        at_s, moved_uj = self._clock(), counter_uj - self._last_uj
        self._energy_uj += moved_uj if moved_uj >= 0 else moved_uj + self._range_uj
        self._last_uj = counter_uj
        return Reading(at_s, self._energy_uj / 1e6)

    def counter(self) -> float | None:
        """None: how often it has begun again, nobody can tell who did not look."""
        return None

    def _counter(self) -> int:
        return int(self._file.read_text())


def rapl_meters(quality: Quality, powercap: Path = POWERCAP, clock: Callable[[], float] = time.monotonic) -> list[Rapl]:
    """One a package; none, with the reason in the log, where they cannot be read."""
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            # What lies below a package is part of it (name:0), and psys has the whole board in it.
            if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                found.append(Rapl(zone, quality, clock))
        except PermissionError:
            log.info("%s is not measured: its counter is for root; `chmod a+r %s/energy_uj` shows it", zone.name, zone)
        except (OSError, ValueError) as error:
            log.info("%s is not measured: %s", zone.name, error)
    return found
