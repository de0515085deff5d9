"""`ops plot` of studies: what is drawn in the terminal and into files, finished or not."""

import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from helpers.answers import operation
from helpers.cli import Api, Ops, api, ops
from helpers.sweeps import grid_result, sweep_result
from ops_cli.exits import ExitCode
from ops_contract.history import ResultView
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Status
from ops_contract.operations import Operation
from ops_contract.plans import ChildResult, GridAbout, IsoFlopAbout
from ops_contract.studies import Grid, IsoFlop
from ops_contract.study_results import GridResult, SweepResult
from ops_studies import figures, plots

__all__ = ["api", "ops"]  # fixtures

SWEEP = IsoFlop(budgets=[1e15, 1e16, 1e17], size="config.d_model", sizes=[64, 128])
GRID = Grid(axes={"execution.learning_rate": [1e-4, 1e-2], "config.d_model": [64, 128]}, cycles=3)


def study(spec: IsoFlop | Grid, status: Status = Status.COMPLETED) -> Operation:
    job = Job(kind=Kind.STUDY, workload="bytelm", config={}, execution=Execution(), study=spec)
    return operation(kind=Kind.STUDY, job=job, name="a study", status=status)


def holds_result(api: Api, content: SweepResult | GridResult) -> None:
    api.results = [ResultView(attempt=1, created_at="2026-01-01T00:00:00Z", content=content)]


def child(position: int, about: IsoFlopAbout | GridAbout, **known: Any) -> ChildResult:
    plain = {"key": f"{position:064x}", "position": position, "operation_id": uuid4(), "name": f"child {position}"}
    return ChildResult.model_validate(plain | {"about": about, "status": Status.COMPLETED} | known)


def test_a_sweep_in_the_terminal_is_its_curves_with_the_runs_as_marks(
    api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = api.holds(study(SWEEP))
    holds_result(api, sweep_result())
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    ran = ops("plot", id)

    assert ran.code == ExitCode.DONE, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == "IsoFLOP curves: loss (nats) against parameters N"
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith("── ")] == ["── 1e15 FLOPs", "── 1e16 FLOPs", "── 1e17 FLOPs"]
    assert 15 <= ran.out.count("●") <= 18  # five sizes of three budgets, and their vertices
    assert any("⠀" < character <= "⣿" for character in ran.out)
    assert "not drawn: 1 failed" in lines


def test_each_figure_in_the_terminal_says_what_it_is(api: Api, ops: Ops) -> None:
    id = api.holds(study(SWEEP))
    holds_result(api, sweep_result())
    for name, panel in plots.sweep(sweep_result()).items():
        ran = ops("plot", id, "--figure", name)
        assert ran.code == ExitCode.DONE, ran.err
        assert ran.out.startswith(panel.title)


@pytest.mark.parametrize("suffix", [pytest.param(".png", marks=pytest.mark.slow), ".svg"])
def test_a_file_has_four_figures_or_the_one_that_is_asked_for(
    api: Api, ops: Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    drawn: list[list[tuple[str, bool]]] = []
    draw = figures.draw
    monkeypatch.setattr(
        figures, "draw", lambda all: drawn.append([(each.title, each.log_y) for each in all]) or draw(all)
    )
    id = api.holds(study(SWEEP))
    holds_result(api, sweep_result())

    assert ops("plot", id, "--to", tmp_path / f"all{suffix}").code == ExitCode.DONE
    assert ops("plot", id, "--figure", "energy", "--to", tmp_path / f"one{suffix}").code == ExitCode.DONE
    assert ops("plot", id, "--figure", "isoflop", "--log", "--to", tmp_path / f"log{suffix}").code == ExitCode.DONE

    titles = [panel.title for panel in plots.sweep(sweep_result()).values()]
    assert [[title for title, _ in figure] for figure in drawn] == [titles, ["Energy against loss"], ["IsoFLOP curves"]]
    assert drawn[2][0][1]
    begins = {".png": b"\x89PNG", ".svg": b"<?xml"}[suffix]
    assert all((tmp_path / f"{name}{suffix}").read_bytes().startswith(begins) for name in ("all", "one"))


def test_a_sweep_that_runs_is_drawn_from_what_its_children_monitor(api: Api, ops: Ops) -> None:
    id = api.holds(study(SWEEP, Status.WAITING))
    holds_result(api, sweep_result(fitted=False).model_copy(update={"rows": []}))  # what its plan said of itself
    for i in range(5):
        about = IsoFlopAbout(
            budget=1e15, size=64 * (i + 1), params=1000 * (i + 1), flops_per_token=6e3, tokens=100, seed=0
        )
        known = {"final": {"loss": 9.0, "val_loss": 2.0 + i}} if i < 3 else {"status": Status.RUNNING}
        api.children.append(child(i, about, **known))
    job = Job(kind=Kind.TRAINING, workload="bytelm", config={}, execution=Execution(checkpoint_monitor="val_loss"))
    api.holds(operation(id=api.children[0].operation_id, job=job))

    lines = ops("plot", id).out.splitlines()

    assert [line.split()[0] for line in lines if "┤" in line] == ["4", "3", "2"]
    assert "●  1e15 FLOPs" in lines
    assert "not drawn: 2 running" in lines


def test_a_grid_is_a_metric_against_an_axis(api: Api, ops: Ops, tmp_path: Path) -> None:
    id = api.holds(study(GRID))
    holds_result(api, grid_result())

    ran = ops("plot", id)
    assert ran.out.splitlines()[0] == "val_loss: val_loss against config.d_model"
    assert "── learning_rate=0.0001" in ran.out
    ran = ops(
        "plot", id, "--metric", "wall_time_seconds", "--axis", "execution.learning_rate", "--to", tmp_path / "a.svg"
    )
    assert ran.code == ExitCode.DONE, ran.err
    assert "did you mean val_loss?" in ops("plot", id, "--metric", "val_los").err
    assert "did you mean config.d_model?" in ops("plot", id, "--axis", "config.d_mode").err


def test_a_grid_that_runs_has_the_means_of_what_is_completed(api: Api, ops: Ops) -> None:
    id = api.holds(study(GRID, Status.WAITING))
    for position, (width, value) in enumerate([(64, 1.0), (128, 2.0), (64, 2.0), (128, None)]):
        about = GridAbout(point={"config.d_model": width}, cycle=position // 2)
        known = {"final": {"loss": value}} if value else {"status": Status.FAILED}
        api.children.append(child(position, about, **known))

    ran = ops("plot", id)

    assert [line.split()[0] for line in ran.out.splitlines() if "┤" in line] == ["2", "1.75", "1.5"]


def test_what_does_not_fit_a_study_is_refused_with_what_to_do(api: Api, ops: Ops) -> None:
    sweep, grid, training = api.holds(study(SWEEP)), api.holds(study(GRID)), api.holds(operation())
    ran = ops("plot", sweep)
    assert (ran.code, "no child of a study has a result yet" in ran.err) == (ExitCode.NOT_FOUND, True)
    holds_result(api, sweep_result())
    for words in (
        (sweep, training),
        (sweep, "--smooth", "0.5"),
        (sweep, "--metric", "loss"),
        (training, "--axis", "a"),
    ):
        assert ops("plot", *words).code == ExitCode.USAGE, words
    assert ops("plot", training, "--figure", "energy").code == ExitCode.USAGE
    holds_result(api, grid_result())
    assert ops("plot", grid, "--figure", "energy").code == ExitCode.USAGE
