"""The window of a measurement: what was run in it, and what its devices used."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ops_contract.energy import DeviceState, Quality, Source
from ops_contract.measurements import DeviceUse, ThermalThrottle
from ops_worker.energy.meters import Measured, Meter
from ops_worker.energy.nvml import THROTTLE_REASONS
from ops_worker.energy.sampler import Sample
from ops_worker.energy.track import Slowed
from ops_worker.measurement.baseline import IdlePower
from ops_worker.measurement.engines import Generated
from ops_worker.measurement.instruments import Instruments

LEAST_TICKS = 100
# What a counter says is bounded by its own ticks. Between samples of power, and in an estimate, nobody knows.
BOUNDED = frozenset({Source.NVML_COUNTER, Source.RAPL})


@dataclass
class Window:
    """From `begin_s` to `end_s` on the measurement's clock; a latency and what was generated for each batch."""

    begin_s: float = 0.0
    end_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    generated: list[Generated] = field(default_factory=list)
    peak_memory_bytes: int | None = None

    @property
    def duration_s(self) -> float:
        return self.end_s - self.begin_s

    @property
    def tokens_in(self) -> int:
        return sum(batch.tokens_in for batch in self.generated)

    @property
    def tokens_out(self) -> int:
        return sum(batch.tokens_out for batch in self.generated)


def device_uses(
    instruments: Instruments,
    window: Window,
    measured: Mapping[str, Measured],
    idle: Mapping[str, IdlePower],
    samples: Sequence[Sample],
) -> list[DeviceUse]:
    names = {gpu.whole.uuid: gpu.name for gpu in instruments.gpus}
    return [
        _use(meter, names.get(meter.device), window, measured[meter.device], idle.get(meter.device), ticks, samples)
        for meter in instruments.meters
        for ticks in [instruments.sampler.ticks(meter.device, window.begin_s, window.end_s)]
    ]


def _use(
    meter: Meter,
    name: str | None,
    window: Window,
    measured: Measured,
    idle: IdlePower | None,
    ticks: int | None,
    samples: Sequence[Sample],
) -> DeviceUse:
    state = measured.state or DeviceState()
    baseline_w = idle.power_w if idle else None
    temperatures = (sample.look.temperature_c for sample in samples if sample.device == meter.device)
    return DeviceUse(
        device=meter.device,
        name=name,
        source=meter.source,
        quality=Quality.UPPER_BOUND if measured.shared else meter.quality,
        energy_j=measured.energy_j,
        error_j=measured.error_j if meter.source in BOUNDED else None,
        reason=measured.reason,
        baseline_w=baseline_w,
        energy_adjusted_j=_adjusted_j(measured.energy_j, baseline_w, window.duration_s),
        ticks=ticks,
        temperature_begin_c=next(temperatures, None),
        **state.model_dump(),
    )


def _adjusted_j(energy_j: float | None, baseline_w: float | None, window_s: float) -> float | None:
    if energy_j is None or baseline_w is None:
        return None
    adjusted_j = energy_j - baseline_w * window_s
    return adjusted_j if adjusted_j >= 0 else None


def use_warnings(uses: Iterable[DeviceUse]) -> list[str]:
    warnings: list[str] = []
    for use in uses:
        if use.energy_j is None:
            warnings.append(f"the energy of {use.device} is not known: {use.reason}")
        elif use.baseline_w is not None and use.energy_adjusted_j is None:
            warnings.append(f"{use.device} took less in the window than when idle: the baseline cannot be right")
        if use.ticks is not None and use.ticks < LEAST_TICKS:
            few = f"the counter of {use.device} was seen moving {use.ticks} times in the window"
            warnings.append(f"{few}, fewer than {LEAST_TICKS}: its energy is coarse; give it more prompts")
        if use.quality is Quality.UPPER_BOUND:
            warnings.append(f"others may use {use.device} too: its joules are an upper bound, and in no sum")
        if use.source is Source.ESTIMATE:
            warnings.append(f"the joules of {use.device} are an estimate by a configured wattage, not measured")
    return warnings


def thermal_throttle(instruments: Instruments, window: Window) -> ThermalThrottle:
    slowed: list[Slowed] = []
    says = False
    for uuid in {gpu.whole.uuid for gpu in instruments.gpus}:
        found = instruments.sampler.slowed(uuid, window.begin_s, window.end_s)
        says = says or found is not None
        slowed += found or []
    if not says:
        return ThermalThrottle(throttled=None)
    reasons = {name: _union_s(part for part in slowed if part.reasons & bit) for bit, name in THROTTLE_REASONS.items()}
    held = {name: duration_s for name, duration_s in reasons.items() if duration_s > 0}
    return ThermalThrottle(throttled=bool(slowed), duration_s=_union_s(slowed), reasons=held)


def _union_s(parts: Iterable[Slowed]) -> float:
    """How long any of them lasted; what overlaps counts once."""
    total_s, until_s = 0.0, float("-inf")
    for part in sorted(parts, key=lambda part: part.since_s):
        total_s += max(0.0, part.until_s - max(part.since_s, until_s))
        until_s = max(until_s, part.until_s)
    return total_s
