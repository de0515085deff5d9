"""Measurements over HTTP: what is refused at submit, what is stored, and what a fork of one is."""

from typing import Any
from uuid import uuid4

import httpx
import pytest

from helpers.measurement_jobs import GPT2, MEASURED, MEASURES, measured
from helpers.store import Store, held, registration, started
from ops_contract.lifecycle import Outcome
from ops_contract.measurements import MeasurementConfig, MeasurementPhase, MeasurementProgress
from ops_contract.reports import Progress, Result


async def test_it_is_stored_with_every_default_and_says_by_itself_what_it_is(
    api: httpx.AsyncClient, store: Store
) -> None:
    await store.worker(workloads=[MEASURES])

    answer = await api.post("/operations", json=MEASURED | {"execution": {"timeout_s": 60, "threads": 2}})

    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert (made["kind"], made["workload"], made["status"]) == ("measurement", "measurement", "pending")
    assert made["name"].startswith("measurement-")
    assert MeasurementConfig.model_validate(made["job"]["config"]) == MeasurementConfig(model=GPT2)  # type: ignore[arg-type]
    assert made["job"]["config"]["baseline"]["strategy"] == "validated"
    assert (made["job"]["execution"]["timeout_s"], made["job"]["execution"]["stall_timeout_s"]) == (60, 1800)
    offered = (await api.get("/workloads")).json()["items"]
    assert [(each["name"], each["reports"]) for each in offered] == [("measurement", {})]
    claim = await store.claim()
    assert claim is not None
    assert claim.job.config == made["job"]["config"]


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"config": {}}, "config.model", "required"),
        ({"config": {"model": 3}}, "config.model", "model_type"),
        ({"config": {"model": {"model_typ": "gpt2"}}}, "config.model.model_typ", "did you mean model_type?"),
        ({"config": {"model": "m", "bach_size": 4}}, "config.bach_size", "did you mean batch_size?"),
        ({"config": {"model": "m", "n_prompts": 4}}, "config.n_prompts", "did you mean task.n_prompts?"),
        (
            {"config": {"model": "m", "task": {"output_tokens": 0}}},
            "config.task.output_tokens",
            "greater than or equal",
        ),
        ({"config": {"model": "m", "warmup": {"most": 2}}}, "config.warmup", "most"),
        ({"execution": {"learning_rate": 0.1}}, "execution.learning_rate", "does nothing for a measurement"),
        ({"execution": {"seed": 3}}, "execution.seed", "does nothing for a measurement"),
        ({"execution": {"timeout_s": 0}}, "execution.timeout_s", "greater than 0"),
        ({"artifacts": ["*.txt"]}, "body", "files/series.parquet"),
        ({"kind": "training"}, "body", "workload measurement and kind measurement go together"),
    ],
)
async def test_what_is_wrong_with_it_is_refused_by_the_fields_path(
    api: httpx.AsyncClient, store: Store, changes: dict[str, Any], field: str, said: str
) -> None:
    await store.worker(workloads=[MEASURES])
    answer = await api.post("/operations", json=MEASURED | changes)
    assert answer.status_code == 422
    problems = answer.json()["error"]["details"]["errors"]
    assert any(each["field"] == field and said in each["problem"] for each in problems), problems


async def test_all_that_is_wrong_is_told_at_once(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(workloads=[MEASURES])
    config = {"model": "m", "batch_size": 0, "task": {"n_prompts": 0}}
    answer = await api.post("/operations", json=MEASURED | {"config": config})
    problems = answer.json()["error"]["details"]["errors"]
    assert {each["field"] for each in problems} == {"config.batch_size", "config.task.n_prompts"}


async def test_a_worker_that_measures_may_register(api: httpx.AsyncClient) -> None:
    """Its schema goes through the API's own reading of JSON, which takes no number of more than 64 bits."""
    incarnation = uuid4()
    worker = registration(incarnation, workloads=[MEASURES.model_dump(mode="json")])
    answer = await api.post("/workers", json=worker)
    assert answer.is_success, answer.text


async def test_where_no_worker_measures_it_says_what_to_install(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    for content in (MEASURED, MEASURED | {"study": {"type": "grid", "axes": {"config.batch_size": [1]}}}):
        answer = await api.post("/operations", json=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unknown_workload")
        assert "pip install 'relight[llm]'" in answer.json()["error"]["message"]


async def test_its_progress_and_its_result_are_read_while_and_after_it_runs(
    api: httpx.AsyncClient, store: Store
) -> None:
    await store.worker(workloads=[MEASURES])
    run = await store.running(**MEASURED)
    phase = MeasurementProgress(phase=MeasurementPhase.WARMUP, done=1, total=3, unit="batches", power_w=200.0)
    progress = Progress(step=0, steps_total=64, epoch=None, measurement=phase)

    run = await store.report(run, started(), progress=progress)

    path = f"/operations/{run.operation_id}"
    told = (await api.get(path)).json()["progress"]
    assert (told["measurement"]["phase"], told["measurement"]["power_w"]) == ("warmup", 200.0)
    assert (told["step"], told["steps_total"]) == (0, 64)
    run = await store.report(run, Result(content=measured(tokens_per_s=10.0, mfu=None)))
    await store.finish(run, Outcome.COMPLETED)
    [result] = (await api.get(f"{path}/results")).json()["items"]
    assert result["content"]["figures"]["mfu"]["reason"] == "no_meter"


async def test_a_fork_of_one_is_another_measurement_with_what_is_changed(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(workloads=[MEASURES])
    run = await store.running(**MEASURED)

    answer = await api.post(f"/operations/{run.operation_id}/fork", json={"overrides": {"config": {"batch_size": 8}}})

    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert (made["kind"], made["job"]["config"]["batch_size"], made["forked_from"]) == ("measurement", 8, None)
    assert made["job"]["config"]["model"]["model_type"] == "gpt2"
    await store.finish(run, Outcome.COMPLETED)
    claim = await store.claim()
    assert claim is not None
    assert (str(claim.operation_id), claim.checkpoint) == (made["id"], None)
    wrong = {"overrides": {"config": {"batch_size": 0}}}
    answer = await api.post(f"/operations/{run.operation_id}/fork", json=wrong)
    assert answer.json()["error"]["details"]["errors"][0]["field"] == "overrides.config.batch_size"
    assert held(claim).attempt == 1
