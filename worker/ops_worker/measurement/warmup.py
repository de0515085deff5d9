"""When a device has warmed up."""

import statistics
from collections.abc import Sequence

from ops_contract.measurements import Warmup, WarmupRecord


def is_over(warmup: Warmup, latencies_s: Sequence[float]) -> bool:
    if len(latencies_s) >= warmup.most:
        return True
    return len(latencies_s) >= warmup.batches and (warmup.cv is None or _settled(warmup, latencies_s))


def record(warmup: Warmup, latencies_s: Sequence[float], thermal_floor_s: float) -> WarmupRecord:
    return WarmupRecord(
        batches=len(latencies_s),
        latencies_s=list(latencies_s),
        cv=_variation(latencies_s[-warmup.last :]),
        converged=None if warmup.cv is None else _settled(warmup, latencies_s),
        thermal_floor_s=thermal_floor_s,
    )


def _settled(warmup: Warmup, latencies_s: Sequence[float]) -> bool:
    if warmup.cv is None or len(latencies_s) < warmup.last:
        return False
    variation = _variation(latencies_s[-warmup.last :])
    return variation is not None and variation < warmup.cv


def _variation(latencies_s: Sequence[float]) -> float | None:
    """The coefficient of variation: the sample's standard deviation over its mean."""
    if len(latencies_s) < 2 or (mean_s := statistics.fmean(latencies_s)) <= 0:
        return None
    return statistics.stdev(latencies_s) / mean_s
