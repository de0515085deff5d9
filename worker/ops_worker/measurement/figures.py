"""The figures of a measurement, each with its source and its uncertainty, or why it is not known."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from ops_contract.energy import Quality
from ops_contract.measurements import DeviceUse, Figure, FigureName, FlopsRecord
from ops_worker.measurement.baseline import Baseline
from ops_worker.measurement.instruments import SET_A_WATTAGE
from ops_worker.measurement.window import Window

NO_METER = "no_meter"
CLOCK = "monotonic clock"
# Of one interval: each of its ends is read once.
CLOCK_ERROR_S = 2 * time.get_clock_info("monotonic").resolution
PERCENTILES = (50, 90, 99)

METHODOLOGY = {
    "window": "From before the first batch to after the last, the device synchronised at both ends and after every "
    "batch; nothing else is done in it by the thread that measures, and garbage collection is off. Beside it run the "
    "sampler of the meters, ten times a second, and a line of progress once a second.",
    "time": "By CLOCK_MONOTONIC; the uncertainty is what the clock cannot tell apart.",
    "tokens": "Generated tokens without padding and without what follows an end of sequence; those of the prompts "
    "without padding.",
    "energy": "The meter's cumulative joules at the two ends of the window, interpolated between the readings around "
    "each. The uncertainty bounds the error of the two ends; the accuracy of the sensor itself is not in it. Devices "
    "that others may use are in no sum.",
    "adjusted": "Less the idle power, measured before the model was loaded, times the window.",
    "latency": "Of a batch, from its submission until the device is done; percentiles are interpolated linearly.",
    "first_token": "A pass of its own, after the window: batches of which one token is generated, prefill included; "
    "a first one is not timed.",
    "flops": "Counted from the modules that ran, a multiply-add as two.",
    "mfu": "The window's FLOPs a second over the device's peak at this precision.",
    "throttle": "From the reasons that the driver shows, at every sample; a moment counts once.",
    "warmup": "The first batch again and again; the coefficient of variation is that of its last latencies.",
}


@dataclass(frozen=True)
class Counted:
    """The FLOPs of the window, or why they are not known; the device's peak with its source, or with why not."""

    flops: FlopsRecord | None
    no_flops: str | None
    peak_flops_per_s: tuple[float | None, str]


@dataclass(frozen=True)
class Found:
    """All that figures are computed from. `unmetered`: devices that worked, and whose joules nobody knows."""

    window: Window
    first_token_s: Sequence[float]
    counted: Counted
    uses: Sequence[DeviceUse]
    unmetered: Sequence[str]
    baseline: Baseline


def figures(found: Found) -> dict[FigureName, Figure]:
    window = found.window
    tokens, total = window.tokens_out, window.tokens_in + window.tokens_out
    window_s = Figure(value=window.duration_s, unit="s", source=CLOCK, uncertainty=CLOCK_ERROR_S)
    energy, adjusted, flops = _energy(found), _adjusted(found), _flops(found.counted)
    flops_per_s = _over(flops, window.duration_s, "FLOP/s", "the window took no time")
    return {
        "tokens_per_s": _rate(tokens, window_s),
        "total_tokens_per_s": _rate(total, window_s),
        "energy_j": energy,
        "energy_adjusted_j": adjusted,
        "j_per_output_token": _over(energy, tokens, "J/token", "no token was generated"),
        "j_per_output_token_adjusted": _over(adjusted, tokens, "J/token", "no token was generated"),
        "power_mean_w": _over(energy, window.duration_s, "W", "the window took no time"),
        "window_s": window_s,
        **_percentiles("latency", window.latencies_s, "there was no batch"),
        **_percentiles("first_token", found.first_token_s, "not asked for: first_token_prompts is 0"),
        "flops": flops,
        "flops_per_s": flops_per_s,
        "mfu": _mfu(flops_per_s, *found.counted.peak_flops_per_s),
        "peak_memory_bytes": _peak_memory(window),
    }


def _rate(count: int, window_s: Figure) -> Figure:
    if not window_s.value:
        return _unknown("token/s", CLOCK, "the window took no time")
    per_s = count / window_s.value
    uncertainty = per_s * CLOCK_ERROR_S / window_s.value
    return Figure(value=per_s, unit="token/s", source=f"token count, {CLOCK}", uncertainty=uncertainty)


def _energy(found: Found) -> Figure:
    counted = [use for use in found.uses if use.quality is not Quality.UPPER_BOUND]
    source = _source(counted or found.uses)
    if reason := _no_energy(found, counted):
        return _unknown("J", source, reason)
    values = [use.energy_j for use in counted if use.energy_j is not None]
    return Figure(value=sum(values), unit="J", source=source, uncertainty=_sum(use.error_j for use in counted))


def _no_energy(found: Found, counted: Sequence[DeviceUse]) -> str | None:
    if found.unmetered:
        return f"{NO_METER}: {', '.join(found.unmetered)} shows neither energy nor power"
    if not found.uses:
        return f"{NO_METER}: no energy meter can be read here; {SET_A_WATTAGE}"
    if not counted:
        return "upper_bound: others may have used what was measured"
    return "; ".join(f"{use.reason}: {use.device}" for use in counted if use.energy_j is None) or None


def _adjusted(found: Found) -> Figure:
    counted = [use for use in found.uses if use.quality is not Quality.UPPER_BOUND]
    source = f"{_source(counted or found.uses)}, baseline"
    reason = _no_energy(found, counted) or "; ".join(filter(None, (_unadjusted(use, found) for use in counted)))
    if reason:
        return _unknown("J", source, reason)
    values = [use.energy_adjusted_j for use in counted if use.energy_adjusted_j is not None]
    bounds = [_adjusted_bound(use, found) for use in counted]
    return Figure(value=sum(values), unit="J", source=source, uncertainty=_sum(bounds))


def _unadjusted(use: DeviceUse, found: Found) -> str | None:
    if use.energy_adjusted_j is not None:
        return None
    if use.baseline_w is not None:
        return f"baseline_above_window: {use.device} took less in the window than its idle power"
    idle = found.baseline.idle.get(use.device)
    why = idle.reason if idle else found.baseline.record.reason or "its meter does not know what an idle device takes"
    return f"no_baseline: {use.device}: {why}"


def _adjusted_bound(use: DeviceUse, found: Found) -> float | None:
    idle = found.baseline.idle.get(use.device)
    if use.error_j is None or idle is None or idle.error_w is None:
        return None
    return use.error_j + idle.error_w * found.window.duration_s


def _flops(counted: Counted) -> Figure:
    source, flops = "count of the modules", counted.flops
    if flops is None:
        return _unknown("FLOP", source, counted.no_flops)
    return Figure(value=flops.prefill + flops.decode, unit="FLOP", source=source)


def _mfu(flops_per_s: Figure, peak: float | None, source: str) -> Figure:
    if peak is None:
        return _unknown("1", "peak of the device", source)
    return _over(flops_per_s, peak, "1", "the device's peak is 0", f"{flops_per_s.source}, {source}")


def _peak_memory(window: Window) -> Figure:
    if window.peak_memory_bytes is None:
        return _unknown("B", "engine", "the engine does not tell")
    return Figure(value=window.peak_memory_bytes, unit="B", source="engine")


def _percentiles(
    name: Literal["latency", "first_token"], seconds: Sequence[float], reason: str
) -> dict[FigureName, Figure]:
    found: dict[FigureName, Figure] = {}
    for percentile in PERCENTILES:
        figure = _unknown("s", CLOCK, reason)
        if seconds:
            value = float(np.percentile(seconds, percentile))
            figure = Figure(value=value, unit="s", source=CLOCK, uncertainty=CLOCK_ERROR_S)
        found[cast(FigureName, f"{name}_p{percentile}_s")] = figure
    return found


def _over(figure: Figure, divisor: float, unit: str, if_zero: str, source: str | None = None) -> Figure:
    source = source or figure.source
    if figure.value is None:
        return _unknown(unit, source, figure.reason)
    if not divisor:
        return _unknown(unit, source, if_zero)
    uncertainty = None if figure.uncertainty is None else figure.uncertainty / divisor
    return Figure(value=figure.value / divisor, unit=unit, source=source, uncertainty=uncertainty)


def _unknown(unit: str, source: str, reason: str | None) -> Figure:
    return Figure(value=None, unit=unit, source=source, reason=reason)


def _source(uses: Sequence[DeviceUse]) -> str:
    return " + ".join(sorted({use.source for use in uses})) or "none"


def _sum(bounds: Iterable[float | None]) -> float | None:
    """None where one of them is not known."""
    known = list(bounds)
    return None if None in known else sum(bound for bound in known if bound is not None)
