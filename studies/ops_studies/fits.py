"""From the runs of a sweep to what is compute-optimal: both approaches, what they predict, and what to doubt."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from ops_contract.study_results import Approach2, JouleOptimum, Prediction, SweepFit, SweepRow
from ops_studies import approach2, approach3
from ops_studies.runs import Cost, Run, Runs, runs_of

BOOTSTRAPS = 1000
WITHIN = 1.01  # a budget within a hundredth of one that was run is no extrapolation
NOTABLE_BIAS = 0.01
NOTABLE_COST = 0.05
AS_GOOD = 1.01  # a loss this near to the lowest may be had for fewer joules


def fit_rows(rows: Iterable[SweepRow], predict: Sequence[float] = (), *, bootstraps: int = BOOTSTRAPS) -> SweepFit:
    """`fit` of the rows that have a loss; the warnings name those that have none."""
    runs, left_out = runs_of(rows)
    found = fit(runs, predict, bootstraps=bootstraps, seed=0, drop_worst=0)
    return found.model_copy(update={"warnings": left_out + found.warnings})


def fit(runs: Iterable[Run], predict: Sequence[float], *, bootstraps: int, seed: int, drop_worst: int) -> SweepFit:
    """Both approaches, and the optima of the runs' own budgets and of those to `predict`.

    Every number of a run is finite and above 0. A point that was run with several seeds is as many runs. `drop_worst`
    runs are left out: those farthest, in log loss, from a first fit of Approach 3. An approach that the runs do not
    suffice for is None, and a warning says why.
    """
    columns = Runs.of(runs)
    if not len(columns):
        return SweepFit(points=0, warnings=["there is no run to fit"])
    columns, dropped, warnings = _without_worst(columns, drop_worst)
    cost = Cost.of(columns)
    if cost.m <= 0:
        told = "FLOPs per token do not grow with the size of the model: are params, tokens and flops what they say?"
        return SweepFit(points=len(columns), dropped=dropped, warnings=[*warnings, told])
    if cost.worst > NOTABLE_COST:
        warnings.append(f"FLOPs are up to {cost.worst:.0%} off any k·N^m·D: tokens of optima are that uncertain")
    second, law, of_second = approach2.fit(columns, cost)
    third, curve, of_third = approach3.fit(columns, cost, bootstraps, seed)
    if second and law and curve:
        second, of_bias = _with_bias(second, columns, curve)
        of_second += of_bias
    own = {each.budget for each in second.optima} if second else set()
    asked = {budget: budget for budget in predict} | {s.budget: s.flops for s in columns.slices if s.budget in own}
    predictions = [each for budget in sorted(asked) for each in _both(columns, law, curve, budget, asked[budget])]
    return SweepFit(
        points=len(columns),
        approach2=second,
        approach3=third,
        predictions=predictions,
        dropped=dropped,
        warnings=warnings + of_second + of_third + _extrapolated(columns, predictions),
    )


def joule_optima(rows: Iterable[SweepRow]) -> list[JouleOptimum]:
    """By budget, as far as the joules of a run within 1 % of the lowest loss are known."""
    done = [row for row in rows if row.has_loss and row.final_loss]
    found = []
    for budget in sorted({row.compute_budget for row in done}):
        under = [(row.final_loss or math.nan, row) for row in done if row.compute_budget == budget]
        lowest, best = min(under, key=lambda each: each[0])
        frugal = [(row.energy_j, row) for loss, row in under if loss <= AS_GOOD * lowest and row.energy_j is not None]
        if frugal:
            _, least = min(frugal, key=lambda each: each[0])
            ids = {"flop_optimal": best.experiment_id, "joule_optimal": least.experiment_id}
            found.append(JouleOptimum(budget=budget, **ids))
    return found


def _without_worst(runs: Runs, count: int) -> tuple[Runs, list[str], list[str]]:
    if not count:
        return runs, [], []
    if reason := approach3.too_few(runs):
        return runs, [], [f"no run was dropped: to tell the worst Approach 3 {reason}"]
    worst = abs(approach3.residuals(runs)).argsort(kind="stable")[::-1][:count]
    return runs.without(worst), [runs.ids[i] for i in worst], []


def _with_bias(second: Approach2, runs: Runs, curve: approach3.Curve) -> tuple[Approach2, list[str]]:
    """Approach 2 of the losses that the curve has for these very runs, against the exponent of the curve itself."""
    bias = approach2.exponent(runs.with_loss(curve.losses_of(runs))) - curve.exponent
    if not math.isfinite(bias):
        return second, []
    told = f"the exponent of Approach 2 is off by about {bias:+.3f}: its sizes lie unlike about the budgets' optima"
    return second.model_copy(update={"bias": bias}), [told] if abs(bias) > NOTABLE_BIAS else []


def _both(
    runs: Runs, law: approach2.Law | None, curve: approach3.Curve | None, budget: float, flops: float
) -> Iterator[Prediction]:
    log_c, slack = math.log(flops), math.log(WITHIN)
    extrapolates = not runs.log_c.min() - slack <= log_c <= runs.log_c.max() + slack
    if law:
        yield _prediction(2, law, budget, log_c, extrapolates)
    if curve:
        yield _prediction(3, curve, budget, log_c, extrapolates)


def _prediction(
    number: Literal[2, 3], by: approach2.Law | approach3.Curve, budget: float, log_c: float, extrapolates: bool
) -> Prediction:
    return Prediction(
        approach=number,
        budget=budget,
        params=by.params(log_c),
        tokens=by.tokens(log_c),
        tokens_per_param=by.tokens_per_param(log_c),
        loss=by.loss(log_c),
        extrapolates=extrapolates,
    )


def _extrapolated(runs: Runs, predictions: Sequence[Prediction]) -> list[str]:
    beyond = sorted({each.budget for each in predictions if each.extrapolates})
    if not beyond:
        return []
    low, high = math.exp(runs.log_c.min()), math.exp(runs.log_c.max())
    named = ", ".join(f"{budget:.3g}" for budget in beyond[:3]) + (", …" if len(beyond) > 3 else "")
    return [f"{named} FLOPs: extrapolated, the runs had {low:.3g} to {high:.3g}; intervals trust the law beyond"]
