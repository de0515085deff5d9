"""What the children of a study come to: every one is a row, and statistics are of those that say something."""

import math
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers.study_jobs import base, ended
from ops_contract.lifecycle import Kind, Status
from ops_contract.plans import ChildResult, Plan, Skipped
from ops_contract.studies import NOT_RUN, IsoFlop
from ops_contract.study_results import GridResult, JouleOptimum, SweepFit, SweepResult, SweepRow
from ops_studies import grid, isoflop
from ops_studies.estimates import statistic
from ops_studies.isoflop import Candidate, Data

# Statistics

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.integers(-(10**6), 10**6).map(lambda n: n / 8), min_size=2, max_size=20))
@settings(max_examples=100)
def test_the_interval_is_students(values: list[float]) -> None:
    found = statistic(values)
    expected = (
        stats.t.interval(0.95, len(values) - 1, loc=mean(values), scale=stats.sem(values)) if stdev(values) else ()
    )

    assert (found.n, found.mean, found.sd) == (len(values), mean(values), stdev(values))
    assert (found.low, found.high) == pytest.approx(expected or (found.mean, found.mean), rel=1e-9, abs=1e-6)


@given(st.lists(finite, min_size=1, max_size=5))
@example([1.7e308, -1.7e308])
@settings(max_examples=100)
def test_no_finite_values_are_too_much(values: list[float]) -> None:
    found = statistic(values)

    assert min(values) <= found.mean <= max(values)
    assert (found.sd is None) == (found.low is None) == (found.high is None) == (len(values) == 1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 2,000 times four normal values: 95 % ± 4 standard errors of that share."""
    found = [statistic(values) for values in np.random.default_rng(1).normal(3.0, 2.0, (2000, 4)).tolist()]
    covered = sum(each.low <= 3.0 <= each.high for each in found if each.low is not None and each.high is not None)

    assert abs(covered / 2000 - 0.95) < 0.02


# Grids


def grid_plan() -> Plan:
    study = {"type": "grid", "axes": {"config.d_model": [64, 128]}, "cycles": 3, "order": "interleave"}
    return grid.plan(base(study))


def test_each_child_is_a_row_and_each_point_a_group_over_its_completed_cycles() -> None:
    plan, skipped = grid_plan(), [Skipped(what="x", reason="y")]
    fields: list[dict[str, Any]] = [
        {"loss": 1.0, "running_s": 10.0, "energy_j": 5.0},
        {"loss": 5.0, "running_s": 20.0, "energy_j": 6.0},
        {"loss": 2.0, "running_s": 11.0, "energy_j": 7.0},
        {"loss": 7.0, "running_s": 22.0, "energy_reason": "no_meter"},
        {"loss": 3.0, "status": Status.FAILED, "error": "out of memory"},
        {"status": Status.PENDING, "training": None},
    ]
    children = [ended(child, **each) for child, each in zip(plan.children, fields, strict=True)]
    result = grid.reduce(children, skipped, ["told before"])

    assert [(row.point["config.d_model"], row.cycle) for row in result.rows] == [
        (size, cycle) for cycle in range(3) for size in (64, 128)
    ]
    assert [row.operation_id for row in result.rows] == [child.operation_id for child in children]
    assert (result.rows[4].status, result.rows[4].error_message) == (Status.FAILED, "out of memory")
    assert result.rows[3].energy_reason == "no_meter"
    small, large = (group.metrics for group in result.groups)
    assert {name: (each.n, each.mean) for name, each in small.items()} == {
        "val_loss": (2, 1.5),
        "wall_time_seconds": (2, 10.5),
        "energy_j": (2, 6.0),
    }
    assert {name: (each.n, each.mean) for name, each in large.items()} == {
        "val_loss": (2, 6.0),
        "wall_time_seconds": (2, 21.0),
    }
    assert (result.skipped, result.warnings) == (skipped, ["told before"])


def test_a_value_that_is_not_finite_is_in_its_row_and_told_but_in_no_mean() -> None:
    plan = grid_plan()
    losses = [1.0, math.nan, 2.0, math.inf, 3.0, 4.0]
    result = grid.reduce([ended(child, loss) for child, loss in zip(plan.children, losses, strict=True)])

    assert math.isnan(result.rows[1].final["val_loss"])
    assert [(each.metrics["val_loss"].n, each.metrics["val_loss"].mean) for each in result.groups] == [
        (3, 2.0),
        (1, 4.0),
    ]
    assert result.warnings == [
        "val_loss of d_model=128 · cycle 0 is nan: it is left out of the mean of its point",
        "val_loss of d_model=128 · cycle 1 is inf: it is left out of the mean of its point",
    ]
    assert GridResult.model_validate_json(result.model_dump_json()).groups == result.groups


def test_a_point_none_of_whose_runs_completed_is_a_group_without_a_value() -> None:
    children = [ended(child, 1.0, status=Status.CANCELLED) for child in grid_plan().children]
    result = grid.reduce(children)

    assert [group.metrics for group in result.groups] == [{}, {}]
    assert len(result.rows) == 6


# Sweeps

STUDY: dict[str, Any] = {"type": "isoflop", "budgets": [1e9, 1e10], "size": "config.d_model", "sizes": [4, 8, 12, 16]}
STUDY |= {"tokens_per_param": (1e-3, 1e6)}


def sweep_plan() -> Plan:
    found = [Candidate(size, 300 * size, 1800.0 * size) for size in (4, 8, 12, 16)]
    return isoflop.plan(base(STUDY), found, Data(10**9, 64.0))


def reduced(children: list[ChildResult]) -> tuple[SweepResult, list[SweepRow]]:
    """Also what the fit was given."""
    fitted: list[SweepRow] = []

    def fit(rows: list[SweepRow]) -> SweepFit:
        fitted.extend(rows)
        return SweepFit(points=len(rows))

    def joules(rows: list[SweepRow]) -> list[JouleOptimum]:
        ids = [row.experiment_id for row in rows]
        return [JouleOptimum(budget=1e9, flop_optimal=ids[0], joule_optimal=ids[-1])] if ids else []

    study = IsoFlop.model_validate(STUDY | {"embeddings": "excluded"})
    return isoflop.reduce(study, children, "val_loss", fit, joules, [Skipped(what="x", reason="y")], ["before"]), fitted


def test_a_row_has_what_was_trained_and_not_what_was_planned() -> None:
    child = sweep_plan().children[1]
    units = child.about.tokens - 64  # type: ignore[union-attr]  # of a sweep
    [row] = isoflop.rows([ended(child, 2.5, units, running_s=3.0, energy_j=4.0)], "val_loss")

    assert row.experiment_id == "C=1e+9 d_model=8"
    assert (row.compute_budget, row.size, row.model_size, row.seed) == (1e9, 8, 2400, 0)
    assert (row.num_tokens, row.actual_flops) == (units, 14400.0 * units)
    assert (row.final_loss, row.wall_time_seconds, row.energy_j, row.error_message) == (2.5, 3.0, 4.0, None)


def test_every_child_is_a_row_and_the_fit_is_of_those_that_completed_with_a_finite_loss() -> None:
    fields: list[dict[str, Any]] = [
        {"loss": 3.0},
        {"loss": math.nan},
        {"loss": 2.0, "status": Status.FAILED, "error": "out of memory", "training": None},
        {},
        {"loss": 2.0, "units": None},
        {"loss": 2.0, "status": Status.CANCELLED},
        {"loss": 1.0},
        {"status": Status.RUNNING, "training": None},
    ]
    children = [ended(child, **each) for child, each in zip(sweep_plan().children, fields, strict=True)]
    result, fitted = reduced(children)

    assert [row.operation_id for row in result.rows] == [child.operation_id for child in children]
    assert [row.error_message for row in result.rows] == [
        None,
        "its val_loss is nan: it diverged",
        "out of memory",
        "it reported no val_loss",
        "nobody counted its tokens",
        None,
        None,
        None,
    ]
    assert fitted == [result.rows[0], result.rows[6]]
    assert result.fit == SweepFit(points=2)
    assert result.joules[0].flop_optimal == "C=1e+9 d_model=4"
    assert result.warnings == [
        "before",
        *(
            f"{result.rows[i].experiment_id} is not in the fits: {why}"
            for i, why in [
                (1, "its val_loss is nan: it diverged"),
                (2, "out of memory"),
                (3, "it reported no val_loss"),
                (4, "nobody counted its tokens"),
                (5, "it is cancelled"),
                (7, "it is running"),
            ]
        ),
    ]
    assert (result.embeddings, result.flops, result.skipped[0].what) == ("excluded", "6N", "x")
    again = SweepResult.model_validate_json(result.model_dump_json())
    assert again.rows[0] == result.rows[0]
    assert math.isnan(again.rows[1].final_loss or 0.0)


def test_a_sweep_of_which_nothing_completed_has_rows_and_no_fit() -> None:
    children = [ended(child, status=Status.FAILED, training=None) for child in sweep_plan().children]
    result, fitted = reduced(children)

    assert (len(result.rows), result.fit, result.joules, fitted) == (8, None, [], [])


def test_a_figure_that_a_cycle_lacks_is_in_no_mean_of_it_and_energy_is_that_of_the_window() -> None:
    plan = grid_plan()
    figures = [{"tokens_per_s": 10.0 + i} | ({} if i == 2 else {"energy_j": 1.0 + i}) for i in range(6)]
    children = [
        ended(child, final=final, running_s=9.0, energy_j=500.0)
        for child, final in zip(plan.children, figures, strict=True)
    ]
    result = grid.reduce(children, kind=Kind.MEASUREMENT)

    small, large = (group.metrics for group in result.groups)
    assert (small["tokens_per_s"].n, small["tokens_per_s"].mean) == (3, 12.0)
    assert (small["energy_j"].n, small["energy_j"].mean) == (2, 3.0)
    assert (large["energy_j"].n, large["energy_j"].mean) == (3, 4.0)
    unknown = [child.model_copy(update={"final": {"tokens_per_s": 1.0}}) for child in children]
    groups = grid.reduce(unknown, kind=Kind.MEASUREMENT).groups
    assert ["energy_j" in group.metrics for group in groups] == [False, False]


def test_what_was_not_run_is_said_by_name() -> None:
    plan = grid_plan()
    cut = [ended(child, status=Status.CANCELLED, error=NOT_RUN, training=None) for child in plan.children[1:]]
    result = grid.reduce([ended(plan.children[0], 1.0), *cut])

    [told] = result.warnings
    assert told.startswith(f"5 of 6 are {NOT_RUN}: d_model=128 · cycle 0, d_model=64 · cycle 1,")
    assert [row.error_message for row in result.rows] == [None, *[NOT_RUN] * 5]
    assert grid.in_short(["a"] * 7) == "a, a, a, a, a and 2 more"
