"""How far the fits are to be trusted under noise: against arg-min, and how often an interval has the truth in it."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from helpers.scaling import ALPHA, BETA, BUDGETS, EXPONENT, A, B, E, centred, noisy
from ops_contract.study_results import Approach3, Estimate
from ops_studies import approach2, approach3
from ops_studies.runs import Cost, Run, Runs

pytestmark = pytest.mark.slow

TRUTH = {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA}


def by_approach2(runs: Sequence[Run]) -> Estimate:
    """The exponent of N_opt. On these grids it has no bias, so the law's own is the truth."""
    columns = Runs.of(runs)
    found, _, _ = approach2.fit(columns, Cost.of(columns))
    assert found is not None
    assert found.params is not None
    return found.params.exponent


def by_approach3(runs: Sequence[Run], bootstraps: int, seed: int = 0) -> Approach3:
    columns = Runs.of(runs)
    found, _, _ = approach3.fit(columns, Cost.of(columns), bootstraps, seed)
    assert found is not None
    return found


def by_arg_min(runs: Sequence[Run]) -> float:
    """What is common instead: the best run of each budget for its optimum, and a line through these."""
    best = [min((each for each in runs if each.budget == budget), key=lambda each: each.loss) for budget in BUDGETS]
    return float(np.polyfit(np.log(BUDGETS), np.log([each.params for each in best]), 1)[0])


def simulations(runs: Sequence[Run], share: float, count: int) -> Iterator[list[Run]]:
    return (noisy(runs, share, seed) for seed in range(count))


def covers(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def test_under_10_percent_noise_both_fits_are_better_than_arg_min() -> None:
    found = np.array(
        [
            (by_approach2(runs).value, fitted.beta.value / (fitted.alpha.value + fitted.beta.value), by_arg_min(runs))
            for runs in simulations(centred(), 0.1, 200)
            for fitted in [by_approach3(runs, bootstraps=0)]
        ]
    )

    second, third, arg_min = np.sqrt(np.mean((found - EXPONENT) ** 2, axis=0))
    print(f"\nerror of the exponent: approach 2 {second:.3f}, approach 3 {third:.3f}, arg-min {arg_min:.3f}")
    assert second < arg_min / 2
    assert third < arg_min / 2


@pytest.mark.parametrize(("budgets", "sizes", "share"), [(8, 16, 0.01), (8, 16, 0.03), (8, 16, 0.1), (3, 5, 0.03)])
def test_95_percent_intervals_of_approach_2_have_the_truth_in_92_to_98_percent(
    budgets: int, sizes: int, share: float
) -> None:
    runs = centred(np.geomspace(BUDGETS[0], BUDGETS[-1], budgets), sizes)
    covered = np.mean([covers(by_approach2(each), EXPONENT) for each in simulations(runs, share, 500)])

    print(f"\napproach 2, {budgets} × {sizes} runs, noise {share:.0%}: {covered:.1%} of 500")
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize("share", [0.01, 0.1])
@pytest.mark.parametrize(("budgets", "sizes"), [(8, 16), (3, 5)])
def test_how_often_95_percent_intervals_of_approach_3_have_the_truth(budgets: int, sizes: int, share: float) -> None:
    """Told rather than promised. Of 60 simulations chance alone makes it 95 ± 6 %."""
    runs = centred(np.geomspace(BUDGETS[0], BUDGETS[-1], budgets), sizes, factor=12)
    found = [by_approach3(each, 100, seed) for seed, each in enumerate(simulations(runs, share, 60))]

    covered = {name: np.mean([covers(getattr(each, name), truth) for each in found]) for name, truth in TRUTH.items()}
    told = ", ".join(f"{name} {each:.0%}" for name, each in covered.items())
    print(f"\napproach 3, {budgets} × {sizes} runs, noise {share:.0%}: {told}")
    assert min(covered.values()) > 0.75
