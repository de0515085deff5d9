"""What repeated runs say of a quantity."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

from scipy.special import stdtrit

from ops_contract.study_results import Statistic


def statistic(values: Sequence[float]) -> Statistic:
    """Of finite values, at least one; the interval is Student's, at 95 %."""
    n, middle = len(values), float(mean(values))
    if n == 1:
        return Statistic(n=n, mean=middle)
    try:
        sd = stdev(values)
    except OverflowError:  # of values near the largest float64
        sd = math.inf
    half = float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
    return Statistic(n=n, mean=middle, sd=sd, low=middle - half, high=middle + half)
