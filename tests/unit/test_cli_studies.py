"""What `ops` shows of studies: a preview, children as they come, sweeps and grids that are reduced."""

import csv
import io
import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from helpers.answers import operation
from helpers.cli import Api, Ops, api, ops
from helpers.store import plan
from ops_cli.exits import ExitCode
from ops_contract.history import ResultView
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Status
from ops_contract.plans import ChildPlan, ChildResult, IsoFlopAbout, Plan, Skipped
from ops_contract.studies import Grid
from ops_contract.study_results import GridGroup, GridResult, GridRow, Statistic, SweepResult, SweepRow
from ops_studies.fits import fit_rows

__all__ = ["api", "ops"]  # fixtures

ID = UUID("11111111-0000-4000-8000-000000000000")
GRID = Grid(axes={"config.width": [1, 2]})
JOB = Job(kind=Kind.STUDY, workload="digits", config={}, execution=Execution(), study=GRID)
SWEEP = ("sweep", "run", "digits", "--size", "config.channels")


def study(api: Api, **changes: Any) -> None:
    known = {"id": ID, "kind": Kind.STUDY, "job": JOB, "status": Status.WAITING}
    api.holds(operation(**known | {"children": {"completed": 1, "running": 2}} | changes))


def holds_result(api: Api, content: SweepResult | GridResult) -> None:
    api.results = [ResultView(attempt=2, created_at="2026-01-01T00:00:00Z", content=content)]


def test_a_sweep_is_sent_as_a_study_and_no_default(api: Api, ops: Ops) -> None:
    ran = ops(*SWEEP, "--sizes", "2:8:2", "--budget", "1e9", "--budget", "3e9", "--seeds", 2, "--predict", "1e12")

    assert ran.code == ExitCode.DONE
    assert api.submitted == [
        {
            "kind": "study",
            "workload": "digits",
            "study": {
                "type": "isoflop",
                "budgets": [1e9, 3e9],
                "size": "config.channels",
                "sizes": {"low": 2, "high": 8, "multiple_of": 2},
                "seeds": 2,
                "predict": [1e12],
            },
        }
    ]


@pytest.mark.parametrize("sizes", ["", "2,x", "1:2:3:4", "8:"])
def test_sizes_that_are_none_say_how_to_write_them(api: Api, ops: Ops, sizes: str) -> None:
    ran = ops(*SWEEP, "--budget", "1e9", "--sizes", sizes)
    assert (ran.code, api.submitted) == (ExitCode.USAGE, [])
    assert "32,48,64 or 32:256:16" in ran.err


def test_a_preview_shows_grid_tokens_and_why_no_time_is_known(api: Api, ops: Ops) -> None:
    about = IsoFlopAbout(budget=1e9, size=2, params=1200, flops_per_token=7200.0, tokens=138_889, seed=0)
    child = ChildPlan(key="0" * 64, name="C=1e9 channels=2", about=about, execution=Execution())
    skipped = [Skipped(what="config.channels=4", reason="too \x1b[31mlarge")]
    api.plan = Plan(children=[child], skipped=skipped, flops=1e9, tokens_needed=138_889, tokens_there=150_000)

    ran = ops(*SWEEP, "--budget", "1e9", "--sizes", "2,4", "--dry-run")

    assert ran.code == ExitCode.DONE
    assert "1 operations, 1e+09 FLOPs in all; the longest needs 138,889 tokens, of 150,000" in ran.out
    assert ["1e+09", "2", "1,200", "138,889", "116", "0"] in [line.split() for line in ran.out.splitlines()]
    assert "Skipped config.channels=4: too" in ran.out
    assert "\x1b" not in ran.out
    assert "Time and energy not known: no training of digits has completed here yet" in ran.out
    assert not api.submitted
    machine = ops(*SWEEP, "--budget", "1e9", "--sizes", "2,4", "--dry-run", "--json")
    assert json.loads(machine.out)["plan"]["tokens_needed"] == 138_889


def test_children_are_shown_as_they_come_and_a_study_says_how_far_it_is(api: Api, ops: Ops) -> None:
    study(api)
    api.children = [_child("width=1", Status.COMPLETED, val_loss=0.25), _child("width=2", Status.RUNNING)]

    shown, status = ops("sweep", "show", ID), ops("status", ID)

    assert max(map(len, shown.out.splitlines())) <= 80
    assert "val_loss 0.25" in shown.out
    assert "grid of 3: 1 completed, 2 running" in status.out
    assert f"ops sweep show {str(ID)[:8]}" in status.out
    assert json.loads(ops("sweep", "show", ID, "--json").out)[0]["final"] == {"val_loss": 0.25}
    api.children = []
    assert "not planned its children yet" in ops("sweep", "show", ID).out


def test_a_grid_is_shown_by_its_points_with_intervals(api: Api, ops: Ops) -> None:
    study(api, status=Status.COMPLETED)
    statistic = Statistic(n=3, mean=0.5, sd=0.1, low=0.25, high=0.75)
    group = GridGroup(point={"config.width": 1}, metrics={"val_loss": statistic, "loss": Statistic(n=3, mean=0.9)})
    row = GridRow(operation_id=uuid4(), name="n", point={"config.width": 1}, cycle=0, status=Status.COMPLETED)
    holds_result(api, GridResult(rows=[row], groups=[group], warnings=["beware"]))

    ran = ops("sweep", "show", ID)

    assert "width=1  3  0.5 ±0.25" in ran.out
    assert "Warning: beware" in ran.out
    assert "0.9" in ops("sweep", "show", ID, "--metric", "loss").out
    assert ops("sweep", "show", ID, "--csv").code == ExitCode.NOT_FOUND


def test_a_grid_of_a_command_shows_what_the_command_reports(api: Api, ops: Ops) -> None:
    study(api, status=Status.COMPLETED)
    values = {"accuracy": 0.75, "epoch": 9.0, "wall_time_seconds": 2.5}
    metrics = {name: Statistic(n=1, mean=mean) for name, mean in values.items()}
    row = GridRow(operation_id=uuid4(), name="n", point={"args.lr": 1}, cycle=0, status=Status.COMPLETED)
    holds_result(api, GridResult(rows=[row], groups=[GridGroup(point={"args.lr": 1}, metrics=metrics)]))

    ran = ops("sweep", "show", ID)

    assert ran.out.split()[:8] == ["POINT", "N", "accuracy", "wall_time_seconds", "lr=1", "1", "0.75", "2.5"]


def test_a_sweep_is_shown_with_its_fit_and_goes_on_as_markdown_and_csv(
    api: Api, ops: Ops, tmp_path_factory: pytest.TempPathFactory
) -> None:
    study(api, status=Status.COMPLETED)
    rows = _rows()
    holds_result(api, SweepResult(flops="6N", embeddings="included", rows=rows, fit=fit_rows(rows, bootstraps=2)))

    ran, markdown, table = (ops("sweep", "show", ID, *flags) for flags in ((), ("--markdown",), ("--csv",)))

    assert ran.code == ExitCode.DONE, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "approach 2" in ran.out
    assert markdown.out.startswith("| budget (FLOPs) |")
    assert [float(row["final_loss"]) for row in csv.DictReader(io.StringIO(table.out))] == [r.final_loss for r in rows]
    file = tmp_path_factory.mktemp("runs") / "runs.csv"
    file.write_text(table.out)
    assert ops("sweep", "fit", file, "--bootstraps", 2).code == ExitCode.DONE
    assert ops("sweep", "show", ID, "--csv", "--json").code == ExitCode.USAGE


def test_a_list_leaves_children_out_unless_it_is_asked_for_them(api: Api, ops: Ops) -> None:
    study(api)
    ops("list")
    ops("list", "--parent", "all")
    ops("list", "--parent", str(ID)[:8])
    asked = [each.get("parent_id") for each in api.asked_for if "limit" in each and "q" not in each]
    assert asked == ["none", None, str(ID)]


def test_a_preview_of_a_grid_names_its_runs(api: Api, ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> None:
    api.plan = plan("width=1", "width=2")
    file = tmp_path_factory.mktemp("jobs") / "grid.yaml"
    file.write_text("workload: digits\nstudy: {type: grid, axes: {config.width: [1, 2]}}\n")
    ran = ops("submit", file, "--dry-run")
    assert "It would run 2 operations:" in ran.out
    assert "width=2" in ran.out


def _child(name: str, status: Status, **final: float) -> ChildResult:
    [planned] = plan(name).children
    known = {"key": planned.key, "position": 0, "operation_id": uuid4(), "about": planned.about}
    return ChildResult.model_validate(known | {"name": name, "status": status, "final": final})


def _rows() -> list[SweepRow]:
    """L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28, under three budgets."""
    found = []
    for budget in (1e17, 1e18, 1e19):
        for share in (0.25, 0.5, 1.0, 2.0, 4.0):
            n = round(share * 0.6 * (budget / 6) ** 0.45)
            d = round(budget / 6 / n)
            row = {"experiment_id": f"{budget:.0e}-{share}", "compute_budget": budget, "size": n, "model_size": n}
            loss = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
            told = {"num_tokens": d, "actual_flops": 6.0 * n * d, "final_loss": loss, "status": Status.COMPLETED}
            found.append(SweepRow.model_validate(row | told))
    return found
