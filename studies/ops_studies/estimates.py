"""Values with 95 % intervals, from what they are uncertain by."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np
from scipy.special import stdtrit

from ops_contract.study_results import Estimate, Statistic
from ops_studies.runs import Floats

LEVELS = (0.025, 0.975)


def student(freedom: float) -> float:
    """Half the width of the interval, in standard errors; NaN without a degree of freedom."""
    return float(stdtrit(freedom, LEVELS[1]))


def statistic(values: Sequence[float]) -> Statistic:
    """Of finite values, at least one."""
    n, middle = len(values), float(mean(values))
    if n == 1:
        return Statistic(n=n, mean=middle)
    try:
        sd = stdev(values)
    except OverflowError:  # of values near the largest float64
        sd = math.inf
    half = student(n - 1) * sd / math.sqrt(n)
    return Statistic(n=n, mean=middle, sd=sd, low=middle - half, high=middle + half)


def plus_minus(value: float, half: float) -> Estimate:
    """Without an interval where `half` is NaN."""
    return Estimate(value=value) if np.isnan(half) else Estimate(value=value, low=value - half, high=value + half)


def exp_plus_minus(log_value: float, half: float) -> Estimate:
    return _exp(plus_minus(log_value, half))


def percentiles(values: Floats) -> Estimate:
    """The first is the value, the others its resamples; without any there is no interval."""
    if len(values) < 2:
        return Estimate(value=float(values[0]))
    low, high = np.quantile(values[1:], LEVELS)
    return Estimate(value=float(values[0]), low=float(low), high=float(high))


def exp_percentiles(logs: Floats) -> Estimate:
    return _exp(percentiles(logs))


def exp(log_value: float) -> float:
    """Infinite where it is too large for a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(log_value))


def _exp(logs: Estimate) -> Estimate:
    if logs.low is None or logs.high is None:
        return Estimate(value=exp(logs.value))
    return Estimate(value=exp(logs.value), low=exp(logs.low), high=exp(logs.high))
