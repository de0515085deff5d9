"""What the devices take when they are idle, measured or remembered."""

import json
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ops_contract.energy import Source
from ops_contract.measurements import BaselinePolicy, BaselineRecord
from ops_worker.energy.meters import Measured, Meter


@dataclass(frozen=True)
class IdlePower:
    """`power_w` null: not known, for `reason`. `error_w` bounds its error; null: no bound is known."""

    power_w: float | None
    error_w: float | None = None
    reason: str | None = None

    @classmethod
    def of(cls, measured: Measured, duration_s: float) -> "IdlePower":
        if measured.energy_j is None:
            return cls(None, reason=measured.reason)
        if measured.shared:
            return cls(None, reason="others_use_it")
        if measured.energy_j <= 0:
            return cls(None, reason="counter_did_not_move")
        error_w = None if measured.error_j is None else measured.error_j / duration_s
        return cls(measured.energy_j / duration_s, error_w)


@dataclass(frozen=True)
class Baseline:
    record: BaselineRecord
    idle: Mapping[str, IdlePower]
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Cached:
    """`measured_at_s` is wall-clock time: it holds over processes and boots."""

    device: str
    source: Source
    power_w: float
    error_w: float | None
    measured_at_s: float


class Baselines:
    """In `directory` a file a device. `measure` rests for so long and says what each device took meanwhile."""

    def __init__(
        self,
        policy: BaselinePolicy,
        meters: Sequence[Meter],
        directory: Path,
        measure: Callable[[float], Mapping[str, IdlePower]],
        wall: Callable[[], float],
    ) -> None:
        self._policy = policy
        # What an estimate says of an idle device is what it says of a busy one.
        self._meters = [meter for meter in meters if meter.source is not Source.ESTIMATE]
        self._directory = directory
        self._measure = measure
        self._wall = wall
        self._warnings: list[str] = []

    def take(self) -> Baseline:
        strategy = self._policy.strategy
        if strategy == "none":
            return self._nothing("not asked for")
        if not self._meters:
            return self._nothing("no meter here knows what an idle device takes")
        cached = {} if strategy == "fresh" else self._cached()
        if not cached:
            return self._afresh()
        if strategy == "cached":
            return self._remembered(cached, None)
        drift = self._drift(cached)
        if drift is not None and drift <= self._policy.drift:
            return self._remembered(cached, drift)
        off = "is not known" if drift is None else f"is off by {drift:.0%}"
        self._warnings.append(f"the cached idle power {off} against a short look: it was measured afresh")
        return self._afresh(drift)

    def _nothing(self, reason: str) -> Baseline:
        return Baseline(BaselineRecord(strategy=self._policy.strategy, origin="none", reason=reason), {})

    def _afresh(self, drift: float | None = None) -> Baseline:
        idle = self._measure(self._policy.duration_s)
        idle = {meter.device: idle[meter.device] for meter in self._meters}
        unknown = [f"{device}: {power.reason}" for device, power in idle.items() if power.power_w is None]
        self._warnings += [f"the idle power is not known of {said}" for said in unknown]
        self._keep(idle)
        return Baseline(
            BaselineRecord(
                strategy=self._policy.strategy,
                origin="measured",
                power_w={device: power.power_w for device, power in idle.items()},
                duration_s=self._policy.duration_s,
                drift=drift,
                reason="; ".join(unknown) or None,
            ),
            idle,
            self._warnings,
        )

    def _remembered(self, cached: Mapping[str, Cached], drift: float | None) -> Baseline:
        idle = {device: IdlePower(found.power_w, _error_w(found, drift)) for device, found in cached.items()}
        return Baseline(
            BaselineRecord(
                strategy=self._policy.strategy,
                origin="cache",
                power_w={device: power.power_w for device, power in idle.items()},
                age_s=max(self._age_s(found) for found in cached.values()),
                drift=drift,
            ),
            idle,
            self._warnings,
        )

    def _drift(self, cached: Mapping[str, Cached]) -> float | None:
        """Of the device that differs most."""
        look = self._measure(self._policy.look_s)
        drifts: list[float] = []
        for device, found in cached.items():
            power_w = look[device].power_w
            if power_w is None:
                return None
            drifts.append(abs(power_w - found.power_w) / found.power_w)
        return max(drifts)

    def _cached(self) -> dict[str, Cached]:
        """Of every device, or of none: they are measured together."""
        cached = {meter.device: found for meter in self._meters if (found := self._load(meter)) is not None}
        return cached if len(cached) == len(self._meters) else {}

    def _load(self, meter: Meter) -> Cached | None:
        path = self._path(meter.device)
        try:
            found = _parsed(path.read_text())
            age_s = self._age_s(found)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            problem = f"the cached idle power in {path.name} cannot be used, it was measured afresh"
            self._warnings.append(f"{problem}: {error}")
            return None
        same = (found.device, found.source) == (meter.device, meter.source)
        # Below zero: the wall clock was set back, and how old it is nobody knows.
        return found if same and 0 <= age_s <= self._policy.ttl_s else None

    def _keep(self, idle: Mapping[str, IdlePower]) -> None:
        for meter in self._meters:
            power = idle[meter.device]
            if power.power_w is None:
                continue
            new = Cached(meter.device, meter.source, power.power_w, power.error_w, self._wall())
            try:
                self._write(self._path(meter.device), json.dumps(asdict(new)))
            except OSError as error:
                self._warnings.append(f"the idle power of {meter.device} cannot be kept for the next: {error}")

    def _write(self, path: Path, content: str) -> None:
        """Two that write at once leave the whole of one of them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(content)
        temporary.replace(path)

    def _age_s(self, cached: Cached) -> float:
        return self._wall() - cached.measured_at_s

    def _path(self, device: str) -> Path:
        # A GPU's uuid is its own; every host has a cpu0, and the directory may be one that hosts share.
        name = f"{socket.gethostname()}-{device}" if device.startswith("cpu") else device
        return self._directory / f"{name}.json"


def _error_w(cached: Cached, drift: float | None) -> float | None:
    """What it was off by when it was measured, and by now; where nobody has looked since, there is no bound."""
    if cached.error_w is None or drift is None:
        return None
    return cached.error_w + drift * cached.power_w


def _parsed(content: str) -> Cached:
    """Raises ValueError and TypeError."""
    found = Cached(**json.loads(content))
    if not (0 < found.power_w < math.inf and 0 <= (found.error_w or 0.0) < math.inf):
        raise ValueError(f"it says {found.power_w} W, wrong by {found.error_w}")
    return found
