"""Measurements on the running service: a small GPT-2 with random weights, and a study that is killed in the middle."""

import asyncio
import io
import random
import secrets
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from pyarrow import parquet

from helpers.databases import Databases
from helpers.measurement_jobs import GPT2
from helpers.service import Service, eventually, running_service
from ops_contract.energy import Source, Use
from ops_contract.ledger import EnergyLedger
from ops_contract.measurements import MeasurementConfig, MeasurementResult
from ops_contract.study_results import GridResult

pytestmark = pytest.mark.slow

POWER_W = 12.5
QUICK: dict[str, Any] = {
    "model": GPT2,
    "task": {"n_prompts": 16, "input_tokens": 16, "output_tokens": 32},
    "batch_size": 4,
    "warmup": {"batches": 1, "cv": None},
    "thermal_floor_s": 0,
    "baseline": {"strategy": "fresh", "duration_s": 0.5},
    "first_token_prompts": 4,
}
JOB: dict[str, Any] = {"workload": "measurement", "config": QUICK, "execution": {"timeout_s": 120}}


@pytest.fixture(scope="module")
def alone(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With no worker yet: each test has its own."""
    url = asyncio.run(databases.fresh())
    with running_service(tmp_path_factory.mktemp("service"), url, workers=0) as service:
        yield service


def test_without_a_meter_the_energy_is_null_with_its_reason_and_the_rest_is_measured(alone: Service) -> None:
    alone.only_worker()

    id = alone.client.submit(JOB).id
    done = alone.wait(id, "completed", "failed")

    assert done.status == "completed", f"{done.error}\n{alone.logs()}"
    result = _result(alone, id)
    assert result.config_hash == MeasurementConfig.model_validate(QUICK).digest()
    assert (result.tokens_in, result.tokens_out) == (16 * 16, 16 * 32)
    figures = result.figures
    assert figures["energy_j"].value is None
    assert figures["energy_j"].reason
    assert figures["j_per_output_token"].value is None
    window_s, tokens_per_s = figures["window_s"].value, figures["tokens_per_s"].value
    assert window_s
    assert tokens_per_s == pytest.approx(16 * 32 / window_s)
    assert figures["flops"].value
    assert result.flops
    assert result.flops.params > 0
    assert any("random" in warning for warning in result.warnings)
    assert result.series is None
    ledger = _settled(alone, id)
    assert (ledger.total.energy_j, ledger.total.reason) == (None, "no_meter")
    [attempt] = alone.attempts(id)
    assert done.exactness
    assert done.exactness.promise == "best_effort"
    assert attempt.environment["accelerator"] == "cpu"


def test_by_a_configured_wattage_result_and_ledger_agree(alone: Service) -> None:
    alone.only_worker(OPS_CPU_POWER_W=str(POWER_W))

    id = alone.client.submit(JOB | {"config": QUICK | {"task": QUICK["task"] | {"n_prompts": 64}}}).id
    done = alone.wait(id, "completed", "failed")

    assert done.status == "completed", f"{done.error}\n{alone.logs()}"
    result = _result(alone, id)
    figures = result.figures
    [device] = result.devices
    window_s, energy_j = figures["window_s"].value, figures["energy_j"].value
    assert window_s
    assert energy_j
    assert device.source is Source.ESTIMATE
    assert energy_j == pytest.approx(POWER_W * window_s, rel=1e-3)
    assert figures["j_per_output_token"].value == pytest.approx(energy_j / result.tokens_out)
    ledger = _settled(alone, id)
    assert ledger.total.energy_j == pytest.approx(
        sum(part.energy_j or 0 for part in (ledger.useful, ledger.lost, ledger.overhead))
    )
    # What the agent booked as useful reaches from the phase's begin to its end: a little farther than the window.
    assert ledger.useful.energy_j
    assert energy_j <= ledger.useful.energy_j * 1.001 <= energy_j + POWER_W * 2
    assert sum(w.units for w in alone.client.energy_windows(id) if w.use is Use.TRAIN) == result.tokens_out
    [artifact] = alone.client.artifacts(id)
    assert artifact.name == result.series == "files/series.parquet"
    content = alone.http.get(f"/operations/{id}/artifacts/{artifact.id}").content
    table = parquet.read_table(io.BytesIO(content))
    at_s = table.column("at_s").to_pylist()
    assert at_s == sorted(at_s)
    assert 0 <= at_s[0] <= at_s[-1] <= window_s


def test_what_cannot_be_measured_says_everything_that_is_in_its_way(alone: Service) -> None:
    alone.only_worker()
    config = QUICK | {"model": "/no/such/model", "meter": "nvml_counter"}
    id = alone.client.submit(JOB | {"config": config}).id
    failed = alone.wait(id, "failed", "completed")
    assert failed.error
    assert failed.error.code == "preflight_failed"
    assert len(failed.error.details["failures"]) == 2
    assert failed.attempt == 1


def test_a_cancel_is_heeded_while_the_device_is_idle_and_a_resume_measures_anew(alone: Service) -> None:
    alone.only_worker()
    id = alone.client.submit(JOB | {"config": QUICK | {"gap_s": 600}}).id
    alone.until(id, lambda o: _phase(o) == "gap", "rests")
    alone.client.cancel(id)
    cancelled = alone.wait(id, "cancelled")
    assert cancelled.attempt == 1
    assert not cancelled.error
    alone.client.resume(id)
    alone.until(id, lambda o: o.attempt == 2 and o.status == "running", "runs again")
    alone.client.cancel(id)
    alone.wait(id, "cancelled")


@pytest.mark.timeout(600)
def test_a_study_that_is_killed_and_cancelled_in_the_middle_repeats_no_finished_run(alone: Service) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    luck = random.Random(seed)
    alone.only_worker()
    axes = {"config.batch_size": [2, 4], "config.task.output_tokens": [8, 16]}
    grid = {"type": "grid", "axes": axes, "cycles": 3, "order": "interleave"}
    id = alone.client.submit(JOB | {"study": grid, "name": "killed"}).id
    first = luck.randint(1, 4)
    _until_done(alone, id, first)
    victim = alone.workers[-1]
    victim.kill()
    eventually(lambda: not victim.running, "the agent is dead", alone.logs)
    alone.have_workers(1)
    _until_done(alone, id, first + luck.randint(1, 3))

    alone.client.cancel(id)
    cancelled = alone.wait(id, "cancelled")

    assert cancelled.children
    assert first < cancelled.children["completed"] < 12
    done = _attempts_of_the_finished(alone, id)
    alone.client.resume(id)
    alone.until(id, lambda o: o.ended_at is not None, "has ended", wait_s=300)
    assert alone.get(id).status == "completed", alone.get(id).error
    assert {child: told for child, told in _attempts_of_the_finished(alone, id).items() if child in done} == done
    result = alone.client.results(id).content
    assert isinstance(result, GridResult)
    assert (len(result.rows), len(result.groups)) == (12, 4)
    assert len({child.key for child in alone.client.children(id)}) == 12
    for group in result.groups:
        assert group.metrics["tokens_per_s"].n == 3
        assert group.metrics["tokens_per_s"].low is not None
        assert "energy_j" not in group.metrics
    for row in result.rows:
        assert row.final["tokens_per_s"] * row.final["window_s"] == pytest.approx(
            16 * int(str(row.point["config.task.output_tokens"]))
        )


def _until_done(service: Service, id: UUID, number: int) -> None:
    service.until(id, lambda o: (o.children or {}).get("completed", 0) >= number, f"has {number} runs done", wait_s=180)


def _attempts_of_the_finished(service: Service, id: UUID) -> dict[UUID, list[tuple[int, Any]]]:
    return {
        child.operation_id: [(a.number, a.started_at) for a in service.attempts(child.operation_id)]
        for child in service.client.children(id)
        if child.status == "completed"
    }


def _result(service: Service, id: UUID) -> MeasurementResult:
    content = service.client.results(id).content
    assert isinstance(content, MeasurementResult)
    return content


def _settled(service: Service, id: UUID) -> EnergyLedger:
    """Once its last window has come."""

    def look() -> EnergyLedger | None:
        windows = service.client.energy_windows(id)
        ledger = service.client.energy(id)
        return ledger if any(w.use is Use.FINISH or w.reason == "no_meter" for w in windows) else None

    return eventually(look, "the end of it is booked", service.logs)


def _phase(operation: Any) -> str | None:
    told = operation.progress.measurement if operation.progress else None
    return str(told.phase) if told else None
