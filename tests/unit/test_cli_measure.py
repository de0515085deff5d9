"""`ops measure`, and what the other commands say of measurements."""

import json
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from helpers.answers import operation
from helpers.cli import Api, Ops, api, ops
from helpers.measured import DONE, NO_METER, measurement_result, measurement_study, without_joules
from ops_cli.exits import ExitCode
from ops_contract.history import ResultView
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Status
from ops_contract.measurements import MEASUREMENT, MeasurementPhase, MeasurementResult
from ops_contract.operations import ProgressView
from ops_contract.plans import ChildResult, GridAbout
from ops_contract.reports import Fault
from ops_contract.studies import Grid
from ops_contract.study_results import GridResult

__all__ = ["api", "ops"]  # fixtures

ID = UUID("11111111-0000-4000-8000-000000000000")
GRID = Grid(axes={"config.batch_size": [1, 8, 64], "config.precision": ["float32", "bfloat16"]}, cycles=3)


def measurement(api: Api, content: MeasurementResult | None = None, **changes: Any) -> None:
    job = Job(kind=Kind.MEASUREMENT, workload=MEASUREMENT, config={}, execution=Execution())
    plain = {"id": ID, "kind": Kind.MEASUREMENT, "workload": MEASUREMENT, "job": job, "name": "gpt2"}
    api.holds(operation(**plain | {"status": Status.COMPLETED if content else Status.RUNNING} | changes))
    _gives(api, content)


def study(api: Api, content: GridResult | None = None, **changes: Any) -> None:
    job = Job(kind=Kind.STUDY, workload=MEASUREMENT, config={}, execution=Execution(), study=GRID)
    plain = {"id": ID, "kind": Kind.STUDY, "workload": MEASUREMENT, "job": job, "name": "sizes"}
    api.holds(operation(**plain | {"status": Status.FAILED if content else Status.WAITING} | changes))
    _gives(api, content)


def _gives(api: Api, content: MeasurementResult | GridResult | None) -> None:
    if content is not None:
        api.results = [ResultView(attempt=1, created_at="2026-01-01T00:00:00Z", content=content)]


# run


def test_one_value_of_each_is_a_measurement_and_no_default_is_sent(api: Api, ops: Ops) -> None:
    ran = ops(
        *("measure", "run", "gpt2", "--n-prompts", 16, "--precision", "bfloat16", "--gap", 30, "--baseline", "none"),
        *("--timeout", 600, "--meter", "rapl", "--set", "config.warmup.batches=2", "--name", "mine"),
    )

    assert ran.code == ExitCode.DONE, ran.err
    assert api.submitted == [
        {
            "kind": "measurement",
            "workload": "measurement",
            "name": "mine",
            "config": {
                "model": "gpt2",
                "task": {"n_prompts": 16},
                "precision": "bfloat16",
                "gap_s": 30.0,
                "baseline": {"strategy": "none"},
                "meter": "rapl",
                "warmup": {"batches": 2},
            },
            "execution": {"timeout_s": 600.0},
        }
    ]


def test_commas_make_axes_in_the_order_of_the_flags(api: Api, ops: Ops) -> None:
    ran = ops(
        *("measure", "run", "gpt2,facebook/opt-125m", "--batch-size", "1,8", "--precision", "bfloat16,float32"),
        *("--output-tokens", 64, "--vary", "config.warmup.batches=1,5", "--vary", "config.compile=[true, false]"),
        *("--cycles", 3, "--order", "interleave", "--stop-after-failures", 3),
    )

    assert ran.code == ExitCode.DONE, ran.err
    [sent] = api.submitted
    axes = {
        "config.model": ["gpt2", "facebook/opt-125m"],
        "config.batch_size": [1, 8],
        "config.precision": ["bfloat16", "float32"],
        "config.warmup.batches": [1, 5],
        "config.compile": [True, False],
    }
    known = {"type": "grid", "axes": axes, "axes_order": list(axes), "cycles": 3, "order": "interleave"}
    assert sent["study"] == known | {"stop_after_failures": 3}
    assert sent["config"]["task"] == {"output_tokens": 64}
    assert sent["kind"] == "study"


def test_random_weights_are_an_architecture_that_set_shapes(api: Api, ops: Ops) -> None:
    ran = ops("measure", "run", "--random-weights", "gpt2", "--set", "config.model.config.n_layer=2", "--cycles", 2)

    assert ran.code == ExitCode.DONE, ran.err
    assert api.submitted[0]["config"] == {"model": {"model_type": "gpt2", "config": {"n_layer": 2}}}
    assert api.submitted[0]["study"] == {"type": "grid", "experiments": [{}], "cycles": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--random-weights"),
        (["gpt2", "--random-weights", "gpt2"], "--random-weights"),
        (["gpt2", "--order", "shuffle"], "vary something, or give cycles"),
        (["gpt2", "--vary", "compile=true,false"], "config.warmup.batches=1,5"),
        (["gpt2", "--vary", "config.compile=true"], "several values"),
        (["gpt2", "--batch-size", "8", "--set", "config.batch_size=4"], "twice"),
        (["gpt2", "--cycles", "2", "--order", "sideways"], "study.grid.order"),
    ],
)
def test_what_is_mistyped_is_a_usage_error_that_says_how(api: Api, ops: Ops, words: list[str], said: str) -> None:
    ran = ops("measure", "run", *words)
    assert (ran.code, api.submitted) == (ExitCode.USAGE, [])
    assert said in " ".join(ran.err.split())


# show


def test_every_figure_is_shown_with_unit_bound_and_source(api: Api, ops: Ops) -> None:
    measurement(api, measurement_result())

    ran = ops("measure", "show", ID)

    assert ran.code == ExitCode.DONE, ran.err
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["j_per_output_token", "0.9375", "0.003", "J/token", "nvml_counter"] in rows
    assert ["latency_p50_s", "1.562", "–", "s", "clock"] in rows
    for said in (
        "GPU-7 60 W, 30m00s old, drift 2.0 %",
        "for 1.25 s: sw power cap 1.25 s",
        "7 batches, settled, cv 0.021",
    ):
        assert said in ran.out
    assert "Warning: random weights" in ran.out
    assert "load 3.2 s, warmup 11.5 s, thermal floor 60.2 s, window 12.5 s" in " ".join(ran.out.split())
    assert max(map(len, ran.out.splitlines())) <= 80


def test_a_figure_that_is_not_known_has_its_reason_and_no_number(api: Api, ops: Ops) -> None:
    measurement(api, measurement_result(with_meter=False))

    ran = ops("measure", "show", ID)

    [row, *_] = [line for line in ran.out.splitlines() if line.startswith("energy_j ")]
    assert "not known" in row
    assert " 0 " not in row
    joules = "j_per_output_token, j_per_output_token_adjusted, energy_j, energy_adjusted_j"
    assert f"Not known: {joules}: {NO_METER}" in ran.out
    shown = json.loads(ops("measure", "show", ID, "--json").out)
    assert shown["figures"]["energy_j"] == measurement_result(with_meter=False).figures["energy_j"].model_dump()


def test_a_study_is_its_points_with_intervals_the_front_and_what_failed(api: Api, ops: Ops) -> None:
    study(api, measurement_study())

    ran = ops("measure", "show", ID)

    assert ran.code == ExitCode.DONE, ran.err
    starred = [line for line in ran.out.splitlines() if line.startswith("★")]
    assert [words for line in starred for words in line.split() if "±" not in words][:1] == ["★"]
    assert len(starred) == 2
    assert "330 ± 2.5" in starred[0]
    assert "1.4 ± 0.025" in starred[0]
    for said in ("out of memory, 4.1 GB wanted", "not measured: 2 cancelled", "Skipped precision=int3", "ended early"):
        assert said in ran.out
    assert len(json.loads(ops("measure", "show", ID, "--json").out)["rows"]) == 15


def test_a_study_without_joules_says_so_and_stars_nothing(api: Api, ops: Ops) -> None:
    study(api, without_joules(measurement_study()))
    ran = ops("measure", "show", ID)
    assert "★" not in ran.out
    assert "No joules per token are known" in ran.out


def test_a_study_that_runs_shows_what_has_completed(api: Api, ops: Ops) -> None:
    study(api, children={"completed": 1, "running": 1}, progress=ProgressView(percent=50, step=1, steps_total=2))
    api.children = [_child(0, Status.COMPLETED, tokens_per_s=80.0), _child(1, Status.RUNNING)]

    ran = ops("measure", "show", ID)

    assert "80" in ran.out
    assert "50%, 1/2 children" in ran.out
    assert len(json.loads(ops("measure", "show", ID, "--json").out)) == 2


def test_what_has_no_figures_yet_says_where_it_stands(api: Api, ops: Ops) -> None:
    measurement(api)
    ran = ops("measure", "show", ID)
    assert (ran.code, ran.out) == (ExitCode.NOT_FOUND, "")
    assert "is running and has no figures" in ran.err

    measurement(api, status=Status.FAILED, error=Fault(code="preflight", message="no such model"))
    assert "preflight: no such model" in ops("measure", "show", ID).err
    api.holds(operation(id=ID))
    assert "is no measurement" in ops("measure", "show", ID).err


def _child(position: int, status: Status, **final: float) -> ChildResult:
    return ChildResult(
        key=f"{position:064x}",
        position=position,
        operation_id=uuid4(),
        name=f"batch_size={position}",
        status=status,
        about=GridAbout(point={"config.batch_size": position}, cycle=0),
        final=final,
    )


# the other commands


def test_status_watch_and_top_say_phase_watts_and_degrees(api: Api, ops: Ops) -> None:
    progress = ProgressView(percent=50, step=32, steps_total=64, measurement=DONE)
    measurement(api, progress=progress)

    assert "window, 32 of 64 prompts, 311.5 W, 64 °C" in ops("status", ID).out
    top = ops("top", "--once")
    assert all(said in top.out for said in ("50%", "window", "311.5 W", "64 °C"))


def test_a_log_of_watch_has_a_line_for_each_phase(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops_cli.watch.POLL_S", 0)
    measurement(api, measurement_result())
    [done] = api.states[ID]
    phases = [
        DONE.model_copy(update={"phase": phase})
        for phase in (MeasurementPhase.LOAD, MeasurementPhase.LOAD, MeasurementPhase.WINDOW)
    ]
    running = [
        done.model_copy(update={"status": Status.RUNNING, "progress": ProgressView(measurement=phase)})
        for phase in phases
    ]
    api.states[ID] = [*running, done.model_copy(update={"ended_at": done.created_at})]

    ran = ops("watch", ID)

    assert ran.code == ExitCode.DONE
    assert [line.split(": ")[1].split(",")[0] for line in ran.out.splitlines()[:2]] == ["load", "window"]
    assert f"Next: ops measure show {str(ID)[:8]}" in ran.out


def test_a_study_of_measurements_is_plotted_as_energy_against_throughput(api: Api, ops: Ops, tmp_path: Path) -> None:
    study(api, measurement_study())

    ran, file = ops("plot", ID), ops("plot", ID, "--to", tmp_path / "energy.svg")

    assert ran.code == ExitCode.DONE, ran.err
    assert ran.out.startswith("Energy against throughput: J per generated token against tokens/s")
    assert "Pareto front: batch_size=8, precision=float32, 330 tokens/s, 1.4 J per generated token" in ran.out
    assert "batch_size=8, precision=bfloat16" in (tmp_path / "energy.svg").read_text()
    assert file.code == ExitCode.DONE
    assert ops("plot", ID, "--metric", "mfu", "--axis", "config.batch_size").out.startswith("mfu: mfu against")


def test_without_joules_the_plot_says_why_and_shows_throughput(api: Api, ops: Ops) -> None:
    result = without_joules(measurement_study())
    study(api, status=Status.WAITING)
    api.children = [_child(n, Status.COMPLETED, **row.final) for n, row in enumerate(result.rows[:2])]
    child = api.children[0].operation_id
    api.holds(operation(id=child))
    _gives(api, measurement_result(with_meter=False))

    ran = ops("plot", ID)

    assert ran.code == ExitCode.DONE, ran.err
    assert f"No joules per token are known: {NO_METER}." in " ".join(ran.out.split())
    assert "tokens_per_s against config.batch_size" in ran.out
