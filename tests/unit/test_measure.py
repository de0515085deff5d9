"""`relight.measure`: what it submits, and what it makes of the answer."""

import subprocess
import sys
from typing import Any

import pytest

from helpers.answers import operation
from helpers.cli import Api, api
from helpers.measured import DONE, NO_METER, measurement_result, measurement_study, without_joules
from ops_contract.history import ResultView
from ops_contract.lifecycle import Status
from ops_contract.measurements import MeasurementPhase, MeasurementResult, RandomModel
from ops_contract.reports import Fault
from ops_contract.study_results import GridResult
from relight import measure
from relight.following import phase_line

__all__ = ["api"]  # a fixture


def gives(
    api: Api, monkeypatch: pytest.MonkeyPatch, content: MeasurementResult | GridResult | None, **changes: Any
) -> None:
    """What is submitted is completed at once, and comes to that."""
    plain = {"status": Status.COMPLETED}
    monkeypatch.setattr("helpers.cli.operation", lambda **given: operation(**plain | given | changes))
    if content is not None:
        api.results = [ResultView(attempt=1, created_at="2026-01-01T00:00:00Z", content=content)]


def test_one_thing_measured_once_is_a_plain_operation(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    gives(api, monkeypatch, measurement_result())

    study = measure("gpt2", batch_size=8, n_prompts=32, baseline={"strategy": "none"}, timeout_s=60, name="mine")

    assert api.submitted == [
        {
            "kind": "measurement",
            "workload": "measurement",
            "name": "mine",
            "config": {
                "model": "gpt2",
                "batch_size": 8,
                "task": {"n_prompts": 32},
                "baseline": {"strategy": "none"},
            },
            "execution": {"timeout_s": 60.0},
        }
    ]
    assert study.measurement == measurement_result()
    assert study.groups[0].metrics["j_per_output_token"].mean == 0.9375
    assert study.rows[0].final["tokens_per_s"] == 4096 / 12.5
    assert [group.point for group in study.pareto()] == [{}]
    assert "| base | 1 | 327.7 | 0.9375 | 0.7544 | 0.042 | 0.21 | ★ |" in study.table()


def test_lists_are_axes_and_what_is_run_again_is_a_study_too(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    gives(api, monkeypatch, measurement_study())
    tiny = RandomModel(model_type="gpt2", config={"n_layer": 2})

    study = measure(
        [tiny, "gpt2"],
        batch_size=[1, 8],
        output_tokens=[16, 64],
        precision=["float32"],
        vary={"config.warmup.batches": (1, 5)},
        cycles=3,
        order="interleave",
        stop_after_failures=2,
    )
    measure("gpt2", cycles=2)

    first, second = api.submitted
    model = {"model_type": "gpt2", "config": {"n_layer": 2}}
    assert first["config"] == {"model": model, "batch_size": 1, "task": {"output_tokens": 16}, "precision": "float32"}
    assert first["study"]["axes"] == {
        "config.model": [model, "gpt2"],
        "config.batch_size": [1, 8],
        "config.task.output_tokens": [16, 64],
        "config.warmup.batches": [1, 5],
    }
    assert [first["study"][name] for name in ("cycles", "order", "stop_after_failures")] == [3, "interleave", 2]
    assert first["kind"] == "study"
    assert (second["study"]["experiments"], second["study"]["cycles"]) == ([{}], 2)
    assert [group.metrics["tokens_per_s"].mean for group in study.pareto()] == [330, 520]
    assert "out of memory, 4.1 GB wanted" in str(study)
    assert "ended early" in str(study)


def test_what_is_not_known_is_said_with_its_reason_and_is_no_number(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    gives(api, monkeypatch, measurement_result(with_meter=False))

    study = measure("gpt2")

    assert "j_per_output_token" not in study.rows[0].final
    assert f"energy_j is not known: {NO_METER}" in str(study)
    assert study.pareto() == []


def test_nothing_measured_is_an_error_that_says_why(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(code="preflight", message="no such model")
    gives(api, monkeypatch, None, status=Status.FAILED, error=fault)
    with pytest.raises(RuntimeError, match="failed without a measurement: preflight: no such model"):
        measure("gpt3")

    failed = [row for row in measurement_study().rows if row.status is Status.FAILED]
    gives(api, monkeypatch, GridResult(rows=failed), status=Status.FAILED)
    with pytest.raises(RuntimeError, match=r"4\.1 GB wanted"):
        measure("gpt2", batch_size=[64, 128])


def test_a_study_with_some_failures_is_a_result(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    gives(api, monkeypatch, without_joules(measurement_study()), status=Status.FAILED)
    assert len(measure("gpt2", cycles=3).rows) == 15


def test_a_field_that_there_is_not_is_refused_before_anything_is_sent(api: Api) -> None:
    with pytest.raises(TypeError, match="did you mean batch_size"):
        measure("gpt2", batchsize=8)
    with pytest.raises(ValueError, match="order: one thing is measured once"):
        measure("gpt2", order="shuffle")
    assert api.submitted == []


def test_a_phase_is_said_with_as_much_as_is_known() -> None:
    assert phase_line(DONE) == "window, 32 of 64 prompts, 311.5 W, 64 °C"
    unknown = DONE.model_copy(
        update={"power_w": None, "temperature_c": None, "total": None, "phase": MeasurementPhase.THERMAL_FLOOR}
    )
    assert phase_line(unknown) == "thermal floor, 32 prompts"


def test_the_name_loads_no_httpx_before_it_is_called() -> None:
    program = "import sys, relight; relight.measure; sys.exit(str({'httpx', 'torch', 'scipy'} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.stderr == "set()\n"
