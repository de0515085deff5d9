"""`ops sweep fit` on files that anybody may have written."""

import csv
import json
from io import StringIO
from pathlib import Path

import pytest

from helpers.cli import Ops, ops
from helpers.scaling import ALPHA, BUDGETS, centred, noisy
from ops_cli.exits import ExitCode
from ops_contract.lifecycle import Status
from ops_contract.study_results import SweepFit, SweepRow

__all__ = ["ops"]  # a fixture

RUNS = noisy(centred(BUDGETS[:4], 7), 0.01, seed=0)
HERE = ("--params", "n", "--tokens", "d", "--loss", "val_loss", "--bootstraps", "20")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def written(**columns: str) -> str:
    """A CSV of RUNS: the columns by what of a run they have."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([getattr(each, attribute) for attribute in columns.values()] for each in RUNS)
    return text.getvalue()


CSV = written(n="params", d="tokens", val_loss="loss")


def with_cell(line: int, cell: str) -> str:
    """The third cell of that line is another."""
    lines = CSV.splitlines()
    lines[line - 1] = ",".join([*lines[line - 1].split(",")[:2], cell])
    return "\n".join(lines)


def fitted(ops: Ops, *arguments: str, text: str = CSV, name: str = "runs.csv") -> SweepFit:
    Path(name).write_text(text)
    ran = ops("sweep", "fit", name, *arguments, "--json")
    assert ran.code == ExitCode.DONE, ran.err
    return SweepFit.model_validate_json(ran.out)


def test_what_people_read_fits_80_columns_and_warnings_are_beside_it(ops: Ops) -> None:
    Path("runs.csv").write_text(with_cell(9, "9.9"))

    ran = ops("sweep", "fit", "runs.csv", *HERE, "--predict", "1e24")

    lines = [line.rstrip() for line in ran.out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["runs", "28"]
    assert [line.split()[0] for line in lines[1:10]] == [
        *("approach", "a", "b,"),
        *("approach", "E", "A", "B", "alpha", "beta"),
    ]
    assert "line 9" in ran.out
    assert lines[-2].split()[:2] == ["1e+24*", "3"]
    assert ran.err.startswith("ops: ")
    assert "1e+24 FLOPs: extrapolated" in ran.err


def test_tokens_or_flops_are_enough(ops: Ops) -> None:
    tokens = fitted(ops, *HERE)
    flops = fitted(
        ops, *(each.replace("tokens", "flops") for each in HERE), text=written(n="params", d="flops", val_loss="loss")
    )
    both = fitted(ops, *HERE, "--flops", "c", text=written(n="params", d="tokens", c="flops", val_loss="loss"))

    for found in (tokens, flops, both):
        assert found.approach3 is not None
        assert tokens.approach3 is not None
        assert found.approach3.alpha.value == pytest.approx(tokens.approach3.alpha.value, rel=1e-6)
        assert found.approach3.alpha.value == pytest.approx(ALPHA, rel=0.2)
        assert [each.budget for each in found.predictions[::2]] == pytest.approx(BUDGETS[:4], rel=1e-5)


def test_the_options_reach_the_fit(ops: Ops) -> None:
    text = written(n="params", d="tokens", val_loss="loss", b="budget", experiment_id="experiment_id")
    further = ("--predict", "1e22", "--predict", "1e23", "--drop-worst", "2", "--budget", "b")
    found = fitted(ops, *HERE, *further, text=text)
    other = fitted(ops, *HERE, "--seed", "1")

    assert (found.points, len(found.dropped)) == (26, 2)
    assert set(found.dropped) < {each.experiment_id for each in RUNS}
    assert [each.budget for each in found.predictions[::2]] == [*BUDGETS[:4], 1e22, 1e23]
    assert found.approach3 is not None
    assert found.approach3.bootstraps == 20
    assert other.approach3 != fitted(ops, *HERE).approach3


def test_the_rows_of_a_sweep_of_ours_need_no_option_and_the_unfinished_are_named(ops: Ops) -> None:
    rows = [
        SweepRow(
            experiment_id=each.experiment_id,
            compute_budget=each.budget or 0,
            size=8,
            model_size=round(each.params),
            num_tokens=round(each.tokens),
            actual_flops=each.flops,
            final_loss=each.loss,
            status=Status.COMPLETED,
        )
        for each in RUNS
    ]
    failed = {"experiment_id": "lost", "status": "failed", "final_loss": None}
    listed = [*(row.model_dump(mode="json") for row in rows), failed]

    for text in (json.dumps(listed), json.dumps({"rows": listed})):
        found = fitted(ops, "--bootstraps", "0", text=text, name="results.json")
        assert found.points == 28
        assert found.warnings[0] == "lost is left out: it is failed"


def test_markdown_is_the_table_alone(ops: Ops) -> None:
    Path("runs.csv").write_text(CSV)

    ran = ops("sweep", "fit", "runs.csv", *HERE, "--markdown")
    both = ops("sweep", "fit", "runs.csv", *HERE, "--markdown", "--json")

    assert [line[0] for line in ran.out.splitlines()] == ["|"] * 10
    assert both.code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no run"),
        ("n,d,val_loss\n", "has no run"),
        (CSV.replace("val_loss", "loss"), "no column 'val_loss': say which it is with --loss. There are: n, d, loss"),
        (CSV.replace("n,d", "n,n"), "two columns 'n'"),
        (with_cell(5, "about 3"), "line 5: val_loss is about 3: give a number above 0, or leave the run out"),
        (with_cell(5, ""), "line 5: val_loss is empty"),
        (with_cell(5, "NaN"), "line 5: val_loss is NaN"),
        (with_cell(5, "inf"), "line 5: val_loss is inf"),
        (with_cell(5, "-2"), "line 5: val_loss is -2"),
        (with_cell(5, "2,7"), "line 5: it has not as many fields as the head"),
        (with_cell(5, '"2'), "unexpected end of data"),
        (with_cell(5, "\x1b[2J"), "line 5: val_loss is \ufffd[2J"),
        ("\n".join(CSV.splitlines()[:2]), "these runs allow no fit; Approach 2 wants 3 or more sizes"),
        ("n,d,val_loss\n" + "1e6,1e9,2\n" * 9, "Approach 3 wants 3 or more sizes of model: there are 1"),
        ("n,d,val_loss\n" + "1e300,1e300,2\n" * 9, "line 2: by C = 6ND it has 1e+300 tokens and inf FLOPs"),
    ],
)
def test_a_file_that_cannot_be_fitted_is_2_and_says_what_to_do(ops: Ops, text: str, said: str) -> None:
    Path("runs.csv").write_text(text)

    ran = ops("sweep", "fit", "runs.csv", *HERE, "--json")

    assert (ran.code, ran.out) == (ExitCode.USAGE, "")
    assert said in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("text", ["{", "3", "[1]", '{"rows": 1}', "[" * 100_000])
def test_json_that_has_no_runs_is_2(ops: Ops, text: str) -> None:
    Path("runs.json").write_text(text)

    assert ops("sweep", "fit", "runs.json").code == ExitCode.USAGE


def test_other_wrong_uses_are_2_as_well(ops: Ops) -> None:
    Path("runs.csv").write_text(CSV)
    Path("binary.csv").write_bytes(b"\xff\xfe\x00")

    assert "--tokens COL or --flops COL" in ops("sweep", "fit", "runs.csv", "--params", "n", "--loss", "val_loss").err
    assert "no text in UTF-8" in ops("sweep", "fit", "binary.csv").err
    for arguments in (
        ["none.csv"],
        ["."],
        ["runs.csv", *HERE, "--predict", "-1"],
        ["runs.csv", *HERE, "--predict", "nan"],
    ):
        assert ops("sweep", "fit", *arguments).code == ExitCode.USAGE


def test_without_scipy_it_says_what_to_install(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("runs.csv").write_text(CSV)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    ran = ops("sweep", "fit", "runs.csv", *HERE)

    assert (ran.code, ran.out) == (ExitCode.FAILED, "")
    assert "pip install 'relight[studies]'" in ran.err
