"""Optima as people read them."""

import math

from ops_contract.study_results import Estimate, Prediction, SweepFit

HEAD = ("budget (FLOPs)", "approach", "parameters", "tokens", "tokens per parameter", "loss")


def chinchilla(fit: SweepFit) -> str:
    """A Markdown table with a row for each prediction: what to train under a budget, with 95 % intervals."""
    rows = [HEAD, ("---:",) * len(HEAD), *(_cells(each) for each in fit.predictions)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(each: Prediction) -> tuple[str, ...]:
    return (
        f"{each.budget:.3g}" + (" (extrapolated)" if each.extrapolates else ""),
        str(each.approach),
        estimate(each.params),
        estimate(each.tokens),
        estimate(each.tokens_per_param),
        estimate(each.loss, digits=4),
    )


def estimate(value: Estimate | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return count(value.value, digits)
    return f"{count(value.value, digits)} ({count(value.low, digits)}–{count(value.high, digits)})"


def count(value: float, digits: int = 3) -> str:
    """As models and data sets are called: 70B, 1.4T."""
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if float(f"{value:.{digits}g}") >= factor:
            return f"{value / factor:.{digits}g}{unit}" if value < 1e16 else f"{value:.{digits}g}"
    return f"{value:.{digits}g}"
