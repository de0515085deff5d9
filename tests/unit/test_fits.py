"""What both approaches find in sweeps whose law is known, and what they say when they cannot know."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize, minimize_scalar
from scipy.special import huber, stdtrit

from helpers import scaling
from helpers.scaling import ALPHA, BETA, BUDGETS, EXPONENT, A, B, E, centred, noisy, optimal_params, run, same_sizes
from ops_contract.lifecycle import Status
from ops_contract.study_results import Approach2, Approach3, Estimate, PowerLaw, Prediction, SweepFit, SweepRow
from ops_studies import tables
from ops_studies.approach2 import Parabola
from ops_studies.approach3 import DELTA, Problem, residuals, too_few
from ops_studies.estimates import exp, percentiles, plus_minus
from ops_studies.fits import fit, fit_rows, joule_optima
from ops_studies.runs import Run, Runs, Slice, runs_of


def fitted(runs: Sequence[Run], *predict: float, bootstraps: int = 0, seed: int = 0, drop_worst: int = 0) -> SweepFit:
    return fit(runs, predict, bootstraps=bootstraps, seed=seed, drop_worst=drop_worst)


def second(found: SweepFit) -> tuple[Approach2, PowerLaw]:
    assert found.approach2 is not None
    assert found.approach2.params is not None
    return found.approach2, found.approach2.params


def third(found: SweepFit) -> Approach3:
    assert found.approach3 is not None
    return found.approach3


def predicted(found: SweepFit, approach: int, budget: float) -> Prediction:
    [prediction] = [each for each in found.predictions if (each.approach, each.budget) == (approach, budget)]
    return prediction


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low <= estimate.value <= estimate.high
    return estimate.high - estimate.low


@pytest.mark.parametrize("runs", [centred(), same_sizes()], ids=["centred", "same sizes"])
def test_without_noise_approach_3_finds_the_law(runs: list[Run]) -> None:
    found = third(fitted(runs))

    values = [each.value for each in (found.E, found.A, found.B, found.alpha, found.beta)]
    assert values == pytest.approx([E, A, B, ALPHA, BETA], rel=1e-6)
    assert (found.r2, found.outliers) == (pytest.approx(1), [])


@pytest.mark.parametrize("off", [1, 3, 0.2])
@pytest.mark.parametrize("factor", [4, 32])
def test_without_noise_the_exponent_of_approach_2_is_exact_where_grids_lie_alike(factor: float, off: float) -> None:
    """At the optima of their budgets, or all equally far from them; then every vertex is off by one factor."""
    approach, law = second(fitted(centred(factor=factor, off=off)))

    assert law.exponent.value == pytest.approx(EXPONENT, rel=1e-6)
    assert approach.bias == pytest.approx(0, abs=1e-6)
    assert "off by about" not in " ".join(fitted(centred(factor=factor, off=off)).warnings)
    factors = [optimum.params / scaling.optimal_params(optimum.budget) for optimum in approach.optima]
    assert np.ptp(factors) < 1e-6
    assert abs(factors[0] - 1) > 0.001  # a parabola's vertex is not the optimum


def test_an_optimum_is_where_its_parabola_turns() -> None:
    for optimum in second(fitted(centred(factor=4)))[0].optima:
        at = np.linspace(np.log(optimum.params) - 0.1, np.log(optimum.params) + 0.1, 3)
        before, here, after = np.polynomial.polynomial.polyval(at, optimum.coefficients)
        assert before == pytest.approx(after, rel=1e-9)
        assert here == pytest.approx(optimum.loss, rel=1e-9)
        assert here < before
        assert optimum.params == pytest.approx(scaling.optimal_params(optimum.budget), rel=0.02)
        assert 6 * optimum.params * optimum.tokens == pytest.approx(optimum.budget, rel=1e-6)


def test_without_noise_approach_2_is_off_on_other_grids_by_the_bias_that_it_tells() -> None:
    found = fitted(same_sizes())
    approach, law = second(found)

    error = law.exponent.value - EXPONENT
    assert abs(error) > 0.01
    assert approach.bias == pytest.approx(error, abs=1e-6)
    assert f"off by about {error:+.3f}" in " ".join(found.warnings)


def test_there_is_a_bias_where_the_curve_has_minima_for_two_budgets() -> None:
    """Far from the optima it may have none near the sizes, though the runs seem to."""
    grid, off = BUDGETS[:2], 30
    bent = [
        replace(each, loss=each.loss * (1 + 0.05 * np.log(each.params / optimal_params(each.flops) / off) ** 2))
        for each in centred(grid, 7, factor=1.5, off=off)
    ]

    assert second(fitted(centred(grid)))[0].bias == pytest.approx(0, abs=1e-6)
    assert second(fitted(bent))[0].bias is None


def test_the_optimum_is_that_of_the_curve() -> None:
    found = fitted(centred(), 1e24)

    best = predicted(found, 3, 1e24)
    params = scaling.optimal_params(1e24)
    tokens = 1e24 / 6 / params
    assert best.params.value == pytest.approx(params, rel=1e-6)
    assert best.tokens.value == pytest.approx(tokens, rel=1e-6)
    assert best.tokens_per_param.value == pytest.approx(tokens / params, rel=1e-6)
    assert best.loss is not None
    assert best.loss.value == pytest.approx(scaling.loss(params, tokens), rel=1e-6)


def test_where_flops_are_counted_their_growth_with_n_moves_the_optimum() -> None:
    """C = 40·N^0.9·D, as where attention's share falls with the size."""
    k, m, budget = 40.0, 0.9, 1e22
    runs = [run(params, each, k, m) for each in BUDGETS for params in np.geomspace(1e7, 1e11, 12)]

    best = predicted(fitted(runs, budget), 3, budget)

    bounds = (np.log(1e6), np.log(1e13))
    least = minimize_scalar(lambda x: run(np.exp(x), budget, k, m).loss, bounds=bounds, options={"xatol": 1e-9})
    assert best.params.value == pytest.approx(np.exp(least.x), rel=1e-4)
    assert k * best.params.value**m * best.tokens.value == pytest.approx(budget, rel=1e-6)
    plain = predicted(fitted([replace(each, flops=6 * each.params * each.tokens) for each in runs], budget), 3, budget)
    assert abs(plain.params.value / best.params.value - 1) > 0.1


def test_the_sum_is_of_hubers_losses_by_their_weights() -> None:
    runs = noisy(centred(BUDGETS[:3], 5), 0.001, seed=1)
    problem = Problem.of(Runs.of(runs))
    theta, least, _ = problem.fit()
    weight = np.random.default_rng(0).gamma(1, size=(1, 15))

    residual = problem.residual(theta)

    found, target = third(fitted(runs)), np.log([each.loss for each in runs])
    assert found.objective == least == pytest.approx(huber(DELTA, residual).sum())
    assert found.r2 == pytest.approx(1 - residual @ residual / np.square(target - target.mean()).sum())
    assert found.rmse_log == pytest.approx(np.sqrt(np.mean(residual**2)))
    assert 0 < sum(abs(residual) <= DELTA) < 15
    assert problem.objective(theta[None], weight)[0] == pytest.approx(weight[0] @ huber(DELTA, residual))


@pytest.mark.parametrize("share", [0, 0.001, 0.1])
def test_the_derivatives_are_those_of_the_sum(share: float) -> None:
    problem = Problem.of(Runs.of(noisy(centred(BUDGETS[:3], 5), share, seed=1)))
    theta = np.array([[-0.7, -0.8, 0.5, 0.31, 0.33]])
    weight = np.random.default_rng(0).gamma(1, size=(1, 15))

    gradient, hessian, above = problem.derivatives(theta, weight)

    numeric = approx_fprime(theta[0], lambda at: problem.objective(at[None], weight)[0], 1e-7)
    assert gradient[0] == pytest.approx(numeric, rel=1e-3, abs=1e-7)
    each = [
        approx_fprime(theta[0], lambda at, i=i: problem.derivatives(at[None], weight)[0][0, i], 1e-8) for i in range(5)
    ]
    assert hessian[0] == pytest.approx(np.array(each), rel=1e-3, abs=1e-5)
    assert np.linalg.eigvalsh(above[0]).min() > -1e-12


def test_each_fit_goes_down_by_itself_whatever_weighs_beside_it() -> None:
    problem = Problem.of(Runs.of(noisy(centred(BUDGETS[:3], 5), 0.01, seed=1)))
    theta = problem.starts()[::13]
    weight = np.random.default_rng(0).gamma(1, size=(len(theta), 15))
    weight[1] *= 1e12

    together, _ = problem.descend(theta, weight, iterations=5)

    alone = [problem.descend(theta[[i]], weight[[i]], iterations=5)[0][0] for i in range(len(theta))]
    assert together == pytest.approx(np.array(alone), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.003, 0.1])
def test_no_other_optimizer_finds_a_smaller_sum(share: float) -> None:
    problem = Problem.of(Runs.of(noisy(centred(BUDGETS[:5], 7), share, seed=3)))
    weight = np.ones((1, 35))

    _, objective, starts = problem.fit()

    def both(theta: np.ndarray) -> tuple[float, np.ndarray]:
        return problem.objective(theta[None], weight)[0], problem.derivatives(theta[None], weight)[0][0]

    options = {"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-12}
    bounds = list(zip(problem.low, problem.high, strict=True))
    others = [
        minimize(both, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).fun
        for start in problem.starts()[::7]
    ]
    assert starts == 64
    assert objective <= min(others) * (1 + 1e-9)


def test_an_outlier_is_named_and_stays_and_only_the_user_drops_it() -> None:
    runs = noisy(centred(), 0.01, seed=0)
    runs[37] = replace(runs[37], loss=runs[37].loss * 1.5)

    kept, dropped = fitted(runs), fitted(runs, drop_worst=1)

    [outlier, *_] = third(kept).outliers
    assert outlier.experiment_id == runs[37].experiment_id
    assert outlier.residual == pytest.approx(np.log(1.5), abs=0.05)
    assert outlier.robust_z > 20
    assert (kept.points, kept.dropped) == (128, [])
    assert (dropped.points, dropped.dropped) == (127, [runs[37].experiment_id])
    assert outlier.experiment_id not in [each.experiment_id for each in third(dropped).outliers]
    residual = residuals(Runs.of(runs))
    scale = 1.4826 * np.median(abs(residual)) * np.sqrt(128 / (128 - 5))
    assert outlier.robust_z == pytest.approx(residual[37] / scale)
    # Huber's loss hardly minds it; a parabola's squares do.
    assert third(kept).alpha.value == pytest.approx(third(dropped).alpha.value, rel=0.01)
    assert width(second(kept)[1].exponent) > 3 * width(second(dropped)[1].exponent)


def test_the_farthest_outlier_comes_first_and_is_dropped_first() -> None:
    runs = noisy(centred(), 0.01, seed=0)
    for i, factor in ((20, 1.2), (70, 0.5), (110, 1.5)):
        runs[i] = replace(runs[i], loss=runs[i].loss * factor)

    outliers = third(fitted(runs)).outliers

    assert [each.experiment_id for each in outliers[:3]] == [runs[i].experiment_id for i in (70, 110, 20)]
    assert fitted(runs, drop_worst=2).dropped == [runs[70].experiment_id, runs[110].experiment_id]


def test_rounding_makes_no_outliers() -> None:
    runs = centred()
    runs[::10] = [replace(each, loss=float(np.float32(each.loss))) for each in runs[::10]]

    assert third(fitted(runs)).outliers == []


@pytest.mark.parametrize(
    ("off", "words"),
    [(10, "below all sizes that were run. Run smaller"), (0.1, "above all sizes that were run. Run larger")],
)
def test_an_optimum_beyond_the_sizes_is_told_with_what_to_run(off: float, words: str) -> None:
    found = fitted(centred(factor=4, off=off))

    assert all(optimum.at_edge and optimum.usable for optimum in second(found)[0].optima)
    told = [f"{budget:.3g} FLOPs: the optimum lies {words} ones" for budget in BUDGETS]
    assert [warning for warning in found.warnings if "the optimum lies" in warning] == told


@pytest.mark.parametrize(("off", "end", "then"), [(100, "smallest", "smaller"), (0.01, "largest", "larger")])
def test_a_best_run_at_the_end_is_told_though_a_wide_parabola_turns_before_it(off: float, end: str, then: str) -> None:
    found = fitted(centred(factor=32, off=off))

    assert not any(optimum.at_edge for optimum in second(found)[0].optima)
    told = f"the best run is one of the {end} size; the parabola's minimum is doubtful. Run {then} ones"
    assert sum(told in warning for warning in found.warnings) == len(BUDGETS)


def test_a_parabola_that_opens_downwards_is_left_out_of_the_law() -> None:
    """So is one whose minimum lies so far outside that nothing is known of it."""
    runs = centred()
    upside_down = [replace(each, loss=6 - each.loss) if each.budget == BUDGETS[2] else each for each in runs]
    far = [run(scaling.optimal_params(BUDGETS[5]) * each, BUDGETS[5]) for each in (1e4, 1.1e4, 1.2e4, 1.3e4)]
    others = [each for each in upside_down if each.budget not in BUDGETS[5:7]]
    below = [run(scaling.optimal_params(BUDGETS[6]) / each, BUDGETS[6]) for each in (1e4, 1.1e4, 1.2e4, 1.3e4)]

    found = fitted([*others, *far, *below])

    approach, law = second(found)
    assert [optimum.usable for optimum in approach.optima] == [True, True, False, True, True, False, False, True]
    assert law.exponent.value == pytest.approx(EXPONENT, rel=1e-6)
    out = "it is left out of the power law"
    assert [warning for warning in found.warnings if out in warning] == [
        f"{BUDGETS[2]:.3g} FLOPs: the parabola opens downwards; {out}. Run sizes farther apart, or more of them",
        f"{BUDGETS[5]:.3g} FLOPs: the optimum lies below all sizes that were run; {out}. Run smaller ones",
        f"{BUDGETS[6]:.3g} FLOPs: the optimum lies above all sizes that were run; {out}. Run larger ones",
    ]
    # The better end of the sizes that were run stands for it.
    assert approach.optima[5].params == pytest.approx(far[0].params)
    assert approach.optima[6].params == pytest.approx(below[0].params)
    assert {optimum.params_interval for optimum in approach.optima if not optimum.usable} == {None}


def test_what_lies_beyond_the_budgets_is_told_to() -> None:
    found = fitted(centred(), 1e19, 1e25)

    assert [(each.budget, each.approach) for each in found.predictions if each.extrapolates] == [(1e25, 2), (1e25, 3)]
    assert [warning for warning in found.warnings if "extrapolated" in warning and "1e+25 FLOPs" in warning]
    assert not [warning for warning in found.warnings if "1e+19" in warning]
    said = "FLOPs: extrapolated, the runs had 1e+18 to 3e+21; intervals trust the law beyond"
    assert f"1e+24, 1e+25, 1e+26 {said}" in fitted(centred(), 1e24, 1e25, 1e26).warnings
    assert f"1e+24, 1e+25, 1e+26, … {said}" in fitted(centred(), 1e24, 1e25, 1e26, 1e27).warnings
    assert predicted(found, 2, 1e25).loss is None  # a parabola knows no E
    assert predicted(found, 2, 1e19).loss is not None


ONE = BUDGETS[0]


@pytest.mark.parametrize(
    ("runs", "second_is_there", "third_is_there", "words"),
    [
        ([], False, False, "there is no run"),
        (centred([ONE], 1), False, False, "there are 1"),
        (centred([ONE], 2), False, False, "sizes under each of two budgets"),
        (centred([ONE], 16), True, False, "two or more budgets"),
        (centred(BUDGETS[:2], 2), False, False, "6 or more runs"),
        (centred(BUDGETS[:2], 3), True, True, "run a third"),
        (centred(BUDGETS, 1), False, True, "3 or more sizes"),
        (centred([ONE], 1) * 20, False, False, "3 or more sizes of model"),
        ([replace(each, flops=1e18) for each in centred(BUDGETS, 1)], False, False, "do not grow"),
    ],
)
def test_too_few_runs_are_a_reason_and_no_crash(
    runs: list[Run], second_is_there: bool, third_is_there: bool, words: str
) -> None:
    found = fitted(runs, 1e20, bootstraps=3, drop_worst=1 if len(runs) < 5 else 0)

    assert (found.approach2 is not None, found.approach3 is not None) == (second_is_there, third_is_there)
    assert words in " ".join(found.warnings)
    assert SweepFit.model_validate_json(found.model_dump_json()).points == len(runs)
    assert tables.chinchilla(found).startswith("| budget (FLOPs) |")


@pytest.mark.parametrize(
    ("sizes", "lengths", "reason"),
    [
        (3, 3, None),
        (2, 3, "wants 3 or more sizes of model: there are 2"),
        (3, 2, "wants 3 or more numbers of tokens: there are 2"),
    ],
)
def test_approach_3_wants_three_sizes_and_three_lengths(sizes: int, lengths: int, reason: str | None) -> None:
    grid = [(n, d) for n in np.geomspace(1e7, 1e9, sizes) for d in np.geomspace(1e9, 1e11, lengths)]
    runs = [Run(f"{i}", n, d, 6 * n * d, scaling.loss(n, d)) for i, (n, d) in enumerate(grid)]

    assert too_few(Runs.of(runs)) == reason


def test_a_budget_with_too_few_sizes_is_passed_over_and_told() -> None:
    """Through three sizes goes a parabola, that explains all there is: of that there is no share."""
    told = "1 of 3 budgets have fewer than 3 sizes, and so no parabola"
    few, enough = fitted([*centred(BUDGETS[:2], 3), *centred([BUDGETS[2]], 2)]), fitted(centred(BUDGETS[:3], 3))

    assert told in few.warnings
    assert "no parabola" not in " ".join(enough.warnings)
    assert [optimum.r2 for optimum in second(few)[0].optima] == [None, None]


NO_LAW = (
    "Approach 2 wants two or more budgets, of FLOPs that differ, with a minimum near the sizes that were run: "
    "there is no power law"
)


@pytest.mark.parametrize(("factor", "is_law"), [(1.0, False), (1.04, False), (1.06, True)])
def test_budgets_that_spent_about_the_same_have_no_law_whatever_they_are_called(factor: float, is_law: bool) -> None:
    """As in a table whose column of FLOPs is a wrong one."""
    spent = dict(zip(BUDGETS[:3], (1e18, 1e18 * factor, 1e18 * factor**2), strict=True))
    found = fitted([replace(each, flops=spent[each.flops]) for each in centred(BUDGETS[:3], 5)])

    assert found.approach2 is not None
    assert len(found.approach2.optima) == 3
    assert ((found.approach2.params is not None), (NO_LAW not in found.warnings)) == (is_law, is_law)


def test_one_budget_gives_its_optimum_and_no_law() -> None:
    found = fitted(centred([ONE], 16))

    assert found.approach2 is not None
    assert (len(found.approach2.optima), found.approach2.params) == (1, None)
    assert NO_LAW in found.warnings
    assert "Approach 3 wants two or more budgets: within one it cannot tell E from the rest" in found.warnings


def test_without_a_law_there_is_no_bias_of_one_though_the_curve_has_it() -> None:
    runs = centred(BUDGETS[:2], 7, factor=4)
    downwards = [replace(each, loss=6 - each.loss) if each.flops == BUDGETS[1] else each for each in runs]

    found = fitted(downwards)

    assert found.approach2 is not None
    assert found.approach3 is not None
    assert (found.approach2.params, found.approach2.bias) == (None, None)


def test_flops_that_do_not_grow_with_the_size_are_doubted_and_what_was_dropped_is_named() -> None:
    runs = [replace(each, flops=1e18) for each in centred(BUDGETS, 1)]
    runs[3] = replace(runs[3], loss=runs[3].loss * 2)

    found = fitted(runs, drop_worst=1)

    assert found == SweepFit(
        points=7,
        dropped=[runs[3].experiment_id],
        warnings=[
            "FLOPs per token do not grow with the size of the model: are params, tokens and flops what they say?"
        ],
    )
    assert fitted([]) == SweepFit(points=0, warnings=["there is no run to fit"])


def test_flops_that_follow_no_law_are_told() -> None:
    runs = centred(BUDGETS[:3], 5)
    runs[3] = replace(runs[3], flops=runs[3].flops * 1.5)

    assert "FLOPs are up to 45% off any k·N^m·D: tokens of optima are that uncertain" in fitted(runs).warnings
    assert "off any" not in " ".join(fitted(centred(BUDGETS[:3], 5)).warnings)


def test_two_budgets_have_intervals_of_the_noise_within_them() -> None:
    found = fitted(noisy(centred(BUDGETS[::7]), 0.01, seed=0))
    _, law = second(found)

    assert width(law.exponent) < 0.2
    assert law.r2 is None
    assert "two budgets lie on a line whatever the law is: run a third" in found.warnings


def test_optima_that_scatter_more_than_the_noise_widen_the_interval() -> None:
    """Each budget tuned better or worse than the law: its own noise knows nothing of it."""
    moved = [1.0, 3.0, 0.5, 2.0, 0.4, 1.5, 0.6, 1.0]
    truth = noisy(centred(factor=8), 0.001, seed=0)
    shifted = [
        replace(each, params=each.params * by, tokens=each.tokens / by)
        for each, by in zip(truth, np.repeat(moved, 16), strict=True)
    ]

    steady, scattered = fitted(truth), fitted(shifted)

    approach, law = second(scattered)
    sizes = [optimum.params for optimum in approach.optima]
    assert law.r2 == pytest.approx(np.corrcoef(np.log(BUDGETS), np.log(sizes))[0, 1] ** 2, abs=0.1)  # nearly as heavy
    assert width(second(scattered)[1].exponent) > 30 * width(second(steady)[1].exponent)
    farther = (
        "the optima of the budgets lie farther from a power law than the noise within budgets explains; "
        "Approach 2 takes its intervals from that alone"
    )
    assert farther in scattered.warnings
    assert farther not in steady.warnings


@pytest.mark.parametrize("moved", [(1, 1, 1, 1, 1), (1, 3, 0.5, 2, 0.4)], ids=["noise", "scatter"])
def test_the_intervals_of_the_law_are_those_of_weighted_least_squares(moved: tuple[float, ...]) -> None:
    """Of the noise within budgets and about the line together, unless the line's is larger than that explains."""
    made = noisy(centred(BUDGETS[:5], 9, factor=8), 0.002, seed=0)
    runs = [
        replace(each, params=each.params * by, tokens=each.tokens / by)
        for each, by in zip(made, np.repeat(moved, 9), strict=True)
    ]
    found = fitted(runs, 1e24)
    columns = Runs.of(runs)
    parabolas = [Parabola.through(columns, each) for each in columns.slices]
    x, y, variance, squares = np.array(
        [(np.log(each.slice.flops), each.vertex, each.vertex_variance, each.squares) for each in parabolas if each]
    ).T

    basis = np.column_stack([np.ones(5), x])
    covariance = np.linalg.inv(basis.T @ (basis / variance[:, None]))
    off = y - basis @ covariance @ basis.T @ (y / variance)
    scatter, of_scatter = off**2 @ (1 / variance), 5 - 2
    within, freedom = (squares.sum(), 5 * (9 - 3)) if set(moved) == {1} else (0, 0)
    noise, t = (within + scatter) / (freedom + of_scatter), stdtrit(freedom + of_scatter, 0.975)
    assert width(second(found)[1].exponent) / 2 == pytest.approx(t * np.sqrt(noise * covariance[1, 1]))
    at = np.array([1, np.log(1e24)])
    assert logs(predicted(found, 2, 1e24).params)[1] == pytest.approx(t * np.sqrt(noise * at @ covariance @ at))


def test_the_interval_of_an_optimum_is_fiellers() -> None:
    """Without an end where the curvature may be none, of which the delta method knows nothing."""
    # Sizes that do not lie evenly, so that slope and curvature are off together.
    of_runs = [each for i, each in enumerate(noisy(centred(), 0.001, seed=0)) if i % 16 not in (1, 2, 3)]
    little = second(fitted(of_runs))[0].optima
    much = second(fitted(noisy(centred(factor=3), 0.1, seed=0)))[0].optima

    squares, ends = 0.0, []
    for budget, optimum in zip(BUDGETS, little, strict=True):
        assert optimum.params_interval is not None
        low, high = optimum.params_interval
        assert low < optimum.params < high < 1.5 * low
        x, y = np.array([(np.log(each.params), each.loss) for each in of_runs if each.flops == budget]).T
        basis, coefficients = np.vander(x - x.mean(), 3), np.polyfit(x - x.mean(), y, 2)
        squares += np.square(y - basis @ coefficients).sum() / y.mean() ** 2
        for end in (low, high):
            slope = np.array([2 * (np.log(end) - x.mean()), 1, 0])  # of the parabola, by its coefficients
            ends.append(slope @ coefficients / y.mean() / np.sqrt(slope @ np.linalg.inv(basis.T @ basis) @ slope))
    freedom = 8 * (13 - 3)
    t = stdtrit(freedom, 0.975) * np.sqrt(squares / freedom)
    assert ends == pytest.approx([-t, t] * 8)
    assert None in [optimum.params_interval for optimum in much if optimum.usable]


def test_a_curvature_that_is_just_as_uncertain_as_large_gives_no_interval() -> None:
    nothing = Slice(1.0, 1.0, np.arange(3))
    parabola = Parabola(nothing, 3, 0.0, -1.0, 1.0, 0.0, np.array([1.0, 0.0, 1.0]), np.eye(3), 0.0, None)

    assert parabola.vertex_interval(noise=1.0, t=1.0) is None
    assert parabola.vertex_interval(noise=0.99, t=1.0) is not None


def test_seeds_are_further_runs_of_a_point() -> None:
    runs = centred()
    once = fitted(noisy(runs, 0.01, seed=0))
    often = fitted([each for seed in range(9) for each in noisy(runs, 0.01, seed)])

    assert (once.points, often.points) == (128, 9 * 128)
    assert [optimum.points for optimum in second(often)[0].optima] == [9 * 16] * 8
    assert width(second(often)[1].exponent) < width(second(once)[1].exponent) / 2


def test_runs_that_say_no_budget_share_one_where_their_flops_are_about_the_same() -> None:
    rng = np.random.default_rng(0)
    silent = [replace(each, budget=None) for each in centred()]
    spent = [replace(each, flops=each.flops * rng.uniform(0.98, 1.02)) for each in silent]

    optima = second(fitted(silent))[0].optima
    assert [optimum.budget for optimum in optima] == pytest.approx(BUDGETS, rel=1e-5)
    assert [optimum.points for optimum in second(fitted(spent))[0].optima] == [16] * 8


def test_resamples_are_the_seeds_own() -> None:
    runs = noisy(centred(BUDGETS[:3], 5), 0.01, seed=0)

    one, again, other = (third(fitted(runs, bootstraps=40, seed=seed)) for seed in (1, 1, 2))
    none = third(fitted(runs))

    assert one == again
    assert one.alpha.value == other.alpha.value == none.alpha.value
    assert one.alpha.low != other.alpha.low
    assert width(one.alpha) > 0
    assert (none.alpha.low, none.bootstraps) == (None, 0)
    assert none.r2 == pytest.approx(1, abs=0.01)


def test_resamples_weigh_the_runs_by_one_on_average_and_spread_for_the_five_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights: list[np.ndarray] = []

    def descend(problem: Problem, theta: np.ndarray, weight: np.ndarray, iterations: int) -> tuple[np.ndarray, None]:
        weights.append(weight)
        return theta, None

    monkeypatch.setattr(Problem, "descend", descend)
    found = Problem.of(Runs.of(centred(BUDGETS[:2], 5))).resampled(np.zeros(5), 4000, seed=0)

    drawn = np.concatenate(weights)
    assert (found.shape, drawn.shape) == ((4000, 5), (4000, 10))
    assert drawn.mean() == pytest.approx(1, abs=0.03)
    assert drawn.var() == pytest.approx(10 / (10 - 5), rel=0.1)


def test_losses_that_are_all_the_same_have_no_share_that_is_explained() -> None:
    found = fitted([replace(each, loss=2.0) for each in centred(BUDGETS[:3], 5)])

    assert third(found).r2 is None
    assert third(found).E.value == pytest.approx(2, rel=1e-3)


def test_intervals_grow_beyond_the_budgets() -> None:
    found = fitted(noisy(centred(), 0.01, seed=0), 5e19, 1e26, bootstraps=50)

    for approach in (2, 3):
        near, far = predicted(found, approach, 5e19), predicted(found, approach, 1e26)
        assert width(far.params) / far.params.value > 3 * width(near.params) / near.params.value
        assert width(near.tokens) > 0
        assert width(near.tokens_per_param) > 0
        assert near.loss is not None
        assert 0 < width(near.loss) < 0.2


def logs(estimate: Estimate) -> tuple[float, float]:
    """The value and half the interval, which lies evenly about it."""
    assert estimate.low is not None
    assert estimate.high is not None
    low, value, high = np.log([estimate.low, estimate.value, estimate.high])
    assert high - value == pytest.approx(value - low, rel=1e-6)
    return float(value), float(high - value)


def test_approach_2_says_the_same_of_params_tokens_their_ratio_and_both_powers() -> None:
    """Of one line through the vertices follows all of it, with C = k·N^m·D."""
    k, m, grid = 40.0, 0.9, BUDGETS[:5]
    runs = [run(params, each, k, m) for each in grid for params in optimal_params(each) * np.geomspace(1 / 8, 8, 9)]
    found = fitted(noisy(runs, 0.002, seed=0), 1e18, 7e21)
    approach, law = second(found)
    assert approach.tokens is not None

    for budget in (1e18, 7e21):
        told = predicted(found, 2, budget)
        (n, of_n), (d, of_d), (ratio, of_ratio) = map(logs, (told.params, told.tokens, told.tokens_per_param))
        assert (d, ratio) == pytest.approx((np.log(budget / k) - m * n, d - n), rel=1e-6)
        assert (of_d, of_ratio) == pytest.approx((m * of_n, (1 + m) * of_n), rel=1e-6)
        for power, value in ((law, n), (approach.tokens, d)):
            assert np.log(power.coefficient.value) + power.exponent.value * np.log(budget) == pytest.approx(value)
    assert approach.tokens.exponent.value == pytest.approx(1 - m * law.exponent.value)
    assert width(approach.tokens.exponent) == pytest.approx(m * width(law.exponent))
    assert law.r2 == approach.tokens.r2 == pytest.approx(1, abs=0.01)
    # The variance is a parabola in log C, and that of the exponent its curvature.
    spaced = fitted(noisy(runs, 0.002, seed=0), 1e20, 1e22, 1e24)
    before, at, after = (logs(predicted(spaced, 2, budget).params)[1] for budget in (1e20, 1e22, 1e24))
    half = width(law.exponent) / 2
    assert before**2 - 2 * at**2 + after**2 == pytest.approx(2 * (np.log(100) * half) ** 2, rel=1e-6)


def test_a_loss_of_approach_2_is_that_of_the_optima_and_on_the_line_between_them() -> None:
    runs = noisy(centred(BUDGETS[:4], 9, factor=8), 0.003, seed=1)
    low, high = BUDGETS[0], BUDGETS[3]
    between = float(np.sqrt(BUDGETS[1] * BUDGETS[2]))
    found = fitted(runs, between, low * 0.999, high * 1.001)

    optima = second(found)[0].optima
    squares, variances = [], []
    for budget, optimum in zip(BUDGETS[:4], optima, strict=True):
        told = predicted(found, 2, budget).loss
        assert told is not None
        assert told.value == pytest.approx(optimum.loss)
        x, y = np.array([(np.log(each.params), each.loss) for each in runs if each.flops == budget]).T
        basis, at = np.vander(x - x.mean(), 3), np.vander([np.log(optimum.params) - x.mean()], 3)[0]
        unexplained = np.square(y - basis @ np.polyfit(x - x.mean(), y, 2)).sum()
        assert optimum.r2 == pytest.approx(1 - unexplained / np.square(y - y.mean()).sum())
        squares.append(unexplained / y.mean() ** 2)
        variances.append(at @ np.linalg.inv(basis.T @ basis) @ at * y.mean() ** 2 / optimum.loss**2)
    freedom = 4 * (9 - 3)
    noise = sum(squares) / freedom
    for budget, variance in zip(BUDGETS[:4], variances, strict=True):
        told = predicted(found, 2, budget).loss
        assert told is not None
        assert logs(told)[1] == pytest.approx(stdtrit(freedom, 0.975) * np.sqrt(noise * variance), rel=1e-3)
    middle = predicted(found, 2, between).loss
    assert middle is not None
    assert middle.value == pytest.approx(np.sqrt(optima[1].loss * optima[2].loss))
    assert predicted(found, 2, low * 0.999).loss is predicted(found, 2, high * 1.001).loss is None
    tenths = predicted(fitted([replace(each, loss=each.loss / 10) for each in runs], between), 2, between).loss
    assert tenths is not None
    assert tenths.value == pytest.approx(middle.value / 10)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda each: each.loss - E, "E"),
        (lambda each: E + A / each.params**ALPHA, "B, beta"),
        (lambda each: E + B / each.tokens**BETA, "A, alpha"),
        (lambda each: E + A / each.params**ALPHA + 1e45 / each.tokens**5, "beta"),
    ],
    ids=["no floor", "nothing of D", "nothing of N", "too much of D"],
)
def test_what_the_runs_do_not_determine_is_told(loss: Callable[[Run], float], words: str) -> None:
    found = fitted([replace(each, loss=loss(each)) for each in centred(BUDGETS[:3], 5)])

    assert f"these runs do not determine {words} of Approach 3: run more budgets, and sizes farther apart" in (
        found.warnings
    )


def test_a_term_that_is_none_ends_at_e_to_the_minus_25_of_the_least_loss() -> None:
    runs = [replace(each, loss=each.loss - E) for each in centred(BUDGETS[:3], 5)]

    assert third(fitted(runs)).E.value == pytest.approx(np.exp(-25) * min(each.loss for each in runs))


def test_one_resample_is_an_interval_and_none_is_not() -> None:
    assert percentiles(np.array([1.0, 2.0])) == Estimate(value=1.0, low=2.0, high=2.0)
    assert percentiles(np.array([1.0])) == Estimate(value=1.0)


def test_half_an_interval_that_nobody_knows_is_none() -> None:
    assert plus_minus(1.0, float("nan")) == Estimate(value=1.0)
    assert plus_minus(1.0, 0.5) == Estimate(value=1.0, low=0.5, high=1.5)


def test_what_is_too_large_for_a_float_is_infinite_without_a_word() -> None:
    with np.errstate(over="raise"):
        assert exp(1000.0) == np.inf


def row(name: str, **changes: object) -> SweepRow:
    known = {"compute_budget": 1e18, "size": 64, "model_size": 10**6, "num_tokens": 10**9, "actual_flops": 6e15}
    ended = {"experiment_id": name, "final_loss": 2.0, "status": Status.COMPLETED}
    return SweepRow.model_validate(known | ended | changes)


def test_rows_without_a_loss_are_named_and_the_others_fitted() -> None:
    made = centred(BUDGETS[:3], 5)
    rows = [
        row(
            each.experiment_id,
            compute_budget=each.flops,
            model_size=round(each.params),
            num_tokens=round(each.tokens),
            actual_flops=6.0 * round(each.params) * round(each.tokens),
            final_loss=each.loss,
        )
        for each in made
    ]
    failed = row("f", status=Status.FAILED, final_loss=None, error_message="out of memory")
    diverged, pending = row("d", final_loss=float("nan")), row("p", status=Status.PENDING, final_loss=None)

    found = fit_rows([*rows, failed, diverged, pending], [1e25], bootstraps=20)

    assert found.model_copy(update={"warnings": found.warnings[3:]}) == fitted(runs_of(rows)[0], 1e25, bootstraps=20)
    assert found.points == 15
    assert third(found).alpha.value == pytest.approx(ALPHA, rel=1e-3)
    assert found.warnings[:3] == [
        "f is not in the fits: out of memory",
        "d is not in the fits: its loss is nan",
        "p is not in the fits: it is pending",
    ]


def test_the_joule_optimal_run_is_the_most_frugal_of_those_about_as_good() -> None:
    rows = [
        row("best", final_loss=2.0, energy_j=100.0),
        row("as good", final_loss=2.0, energy_j=99.0),
        row("frugal", final_loss=2.02, energy_j=60.0),
        row("as frugal", final_loss=2.01, energy_j=60.0),
        row("worse", final_loss=2.021, energy_j=1.0),
        row("unknown", final_loss=2.001),
        row("diverged", final_loss=float("nan"), energy_j=0.1),
        row("failed", final_loss=1.9, energy_j=0.1, status=Status.FAILED),
        row("alone", compute_budget=1e17, energy_j=5.0),
        row("unmeasured", compute_budget=1e19),
    ]

    found = [(each.budget, each.flop_optimal, each.joule_optimal) for each in joule_optima(rows)]

    assert found == [(1e17, "alone", "alone"), (1e18, "best", "frugal")]


def test_the_table_has_a_row_for_each_optimum() -> None:
    found = fitted(noisy(centred(BUDGETS[:3], 7), 0.003, seed=0), 1e25, bootstraps=20)

    lines = tables.chinchilla(found).splitlines()

    assert [line.count("|") for line in lines] == [7] * 10
    assert lines[0] == "| budget (FLOPs) | approach | parameters | tokens | tokens per parameter | loss |"
    assert lines[2].startswith("| 1e+18 | 2 | ")
    assert lines[-2].startswith("| 1e+25 (extrapolated) | 2 | ")
    assert lines[-2].endswith(" | – |")
    assert lines[-1].count("–") == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.0123"), (20.04, "20"), (999.6, "1k"), (1.4e12, "1.4T"), (7e10, "70B"), (4.2e17, "4.2e+17")],
)
def test_counts_are_as_models_are_called(value: float, text: str) -> None:
    assert tables.count(value) == text
