"""What the figures of a study show: that of its result, and in words what they do not show."""

import io
import math
from typing import Any

import numpy as np
import pytest

from helpers.sweeps import ASKED, BUDGETS, WIDE, grid_result, optimum, sweep_result
from ops_contract.lifecycle import Status
from ops_contract.study_results import GridGroup, GridResult, Statistic, SweepResult
from ops_studies import figures, plots
from ops_studies.plots import Panel, Points


def marked(panel: Panel, mark: str) -> list[Points]:
    return [points for points in panel.points if points.mark == mark and points.points]


def refitted(result: SweepResult, **changes: Any) -> SweepResult:
    """With another optimum of the first budget."""
    assert result.fit is not None
    assert result.fit.approach2 is not None
    first, *others = result.fit.approach2.optima
    second = result.fit.approach2.model_copy(update={"optima": [first.model_copy(update=changes), *others]})
    return result.model_copy(update={"fit": result.fit.model_copy(update={"approach2": second})})


def test_isoflop_curves_are_every_run_and_the_parabola_that_was_fitted() -> None:
    result = sweep_result()
    panel = plots.isoflop(result)

    runs = marked(panel, "run")
    assert [points.label for points in runs] == ["1e15 FLOPs", "1e16 FLOPs", "1e17 FLOPs"]
    assert [len(points.points) for points in runs] == [9, 10, 10]
    for line, points, budget in zip(panel.lines, runs, BUDGETS, strict=True):
        assert line.colour == points.colour
        n, loss = np.array(line.points).T
        a, b, c = result.fit.approach2.optima[BUDGETS.index(budget)].coefficients  # type: ignore[union-attr]
        assert loss == pytest.approx(a + b * np.log(n) + c * np.log(n) ** 2)
        assert (n[0], n[-1]) == pytest.approx((min(points.points)[0], max(points.points)[0]))
        [(vertex, lowest)] = next(each.points for each in marked(panel, "optimum") if each.colour == line.colour)
        assert loss.min() == pytest.approx(lowest, rel=1e-4)
        assert vertex == pytest.approx(optimum(budget)[0], rel=0.05)
    assert panel.notes == ["not drawn: 1 failed"]


def test_a_parabola_without_a_minimum_has_no_vertex_and_one_at_the_edge_is_said() -> None:
    panel = plots.isoflop(refitted(sweep_result(), usable=False, at_edge=True, curvature=-1.0))
    assert [line.dashed for line in panel.lines] == [True, False, False]
    assert len(marked(panel, "optimum")) == 2
    assert panel.notes[0] == "1e15 FLOPs: no optimum, its parabola opens downwards"

    [said] = plots.isoflop(refitted(sweep_result(), usable=False, at_edge=True)).notes[:1]
    assert said == "1e15 FLOPs: no optimum, its parabola is lowest far outside of the sizes that were run"
    far = optimum(BUDGETS[0])[0] * 30
    panel = plots.isoflop(refitted(sweep_result(), at_edge=True, params=far))
    assert panel.notes[0] == "1e15 FLOPs: its optimum lies outside of the sizes that were run"
    assert panel.lines[0].points[-1][0] == pytest.approx(far)  # the curve reaches it


def test_scaling_laws_have_bands_of_both_approaches_and_mark_what_is_extrapolated() -> None:
    panel = plots.scaling(sweep_result())

    assert [(line.colour, line.dashed) for line in panel.lines] == [(0, False), (0, True), (1, False), (1, True)]
    for quantity, band in enumerate(panel.bands[::2]):
        values = np.array([optimum(budget)[quantity] for budget in (*BUDGETS, ASKED)])
        assert np.array(band.low) == pytest.approx(values / WIDE)
        assert np.array(band.high) == pytest.approx(values * WIDE)
        assert list(band.x) == [*BUDGETS, ASKED]
    assert {c for points in marked(panel, "extrapolated") for c, _ in points.points} == {ASKED}
    assert [len(points.points) for points in marked(panel, "optimum")] == [3, 3]


def test_tokens_per_parameter_are_those_of_the_optima() -> None:
    panel = plots.tokens_per_parameter(sweep_result())
    ratios = [tokens / params for params, tokens in map(optimum, (*BUDGETS, ASKED))]
    assert [y for _, y in panel.lines[0].points] == pytest.approx(ratios)


def test_energy_marks_both_optima_and_leaves_out_and_tells_what_is_not_known() -> None:
    result = sweep_result()
    panel = plots.energy(result)

    by_id = {row.experiment_id: row for row in result.rows}
    for mark in ("flop_optimal", "joule_optimal"):
        runs = [by_id[getattr(each, mark)] for each in result.joules]
        assert [each.points for each in marked(panel, mark)] == [[(run.energy_j, run.final_loss)] for run in runs]
    assert sum(len(points.points) for points in marked(panel, "run")) == 28
    assert panel.notes == ["1 of the runs left out, energy unknown: device lost"]


def test_before_there_is_a_fit_the_runs_are_there() -> None:
    panels = plots.sweep(sweep_result(fitted=False))
    assert len(marked(panels["isoflop"], "run")) == 3
    assert panels["isoflop"].lines == panels["scaling"].lines == []
    assert panels["scaling"].notes == ["not fitted yet"]
    figures.draw(list(panels.values())).savefig(io.BytesIO())


def test_a_loss_that_diverged_is_no_point() -> None:
    result = sweep_result(fitted=False)
    diverged = result.rows[0].model_copy(update={"final_loss": math.inf})
    panel = plots.isoflop(result.model_copy(update={"rows": [diverged, *result.rows[1:]]}))
    assert panel.notes == ["not drawn: 1 completed without a finite loss, 1 failed"]
    assert all(math.isfinite(y) for points in panel.points for _, y in points.points)


def test_the_figure_draws_what_the_panels_say() -> None:
    panels = plots.sweep(sweep_result())
    figure = figures.of_sweep(sweep_result())

    assert [axes.get_title() for axes in figure.axes] == [panel.title for panel in panels.values()]
    for axes, panel in zip(figure.axes, panels.values(), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log" if panel.log_y else "linear")
        drawn = {tuple(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
        for series in (*panel.points, *panel.lines):
            assert tuple(series.points) in drawn
        assert len(axes.collections) == len(panel.bands)
        assert "\n".join(text.get_text() for text in axes.texts) == panel.legend + "\n".join(panel.notes)
    [one] = figures.of_sweep(sweep_result(), "energy").axes
    names = [text.get_text() for text in one.get_legend().get_texts()]
    assert names == ["1e15 FLOPs", "1e16 FLOPs", "1e17 FLOPs", "FLOP-optimal", "joule-optimal"]


def test_a_grid_is_means_with_intervals_over_an_axis_of_numbers_or_of_names() -> None:
    result = grid_result()
    panel = plots.grid(result, "val_loss", "execution.learning_rate")

    assert (panel.log_x, panel.ticks) == (True, [])
    assert [points.label for points in panel.points] == ["d_model=64", "d_model=128"]
    assert panel.points[1].points == [(1e-4, pytest.approx(2.52)), (1e-2, pytest.approx(1.82))]
    assert panel.points[1].intervals[1] == (pytest.approx(1.77), pytest.approx(1.87))
    assert not plots.grid(result, "val_loss", "config.d_model").log_x
    assert plots.grid(result, "wall_time_seconds", "config.d_model").points[0].intervals == [None, None]
    assert plots.grid_axes(result) == ["config.d_model", "execution.learning_rate"]
    assert plots.grid_metrics(result) == ["val_loss", "wall_time_seconds"]

    named = GridResult(
        rows=[],
        groups=[
            GridGroup(point={"config.name": name}, metrics={"loss": Statistic(n=1, mean=mean)} if mean else {})
            for name, mean in (("$\\frac$", 1.0), (True, 2.0), ("c", None))
        ],
    )
    panel = plots.grid(named, "loss", "config.name")
    assert panel.ticks == ["$\\frac$", "true", "c"]
    assert panel.points[0].points == [(0.0, 1.0), (1.0, 2.0)]
    assert panel.notes == ["1 of 3 points left out: without loss or config.name"]
    [axes] = figures.draw([panel]).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == panel.ticks
    axes.figure.savefig(io.BytesIO())  # what others named is no formula


def test_runs_that_did_not_complete_are_nowhere() -> None:
    result = sweep_result(fitted=False)
    rows = [row.model_copy(update={"status": Status.CANCELLED}) for row in result.rows]
    assert all(not points.points for points in plots.isoflop(result.model_copy(update={"rows": rows})).points)
