"""The resolved job without an operation, and complaints that name the field that was meant."""

from typing import Any

import httpx
import pytest

from helpers.measurement_jobs import GPT2, MEASURED, MEASURES
from helpers.store import TOY, Store, saved
from ops_contract.jobs import Job, JobSpec

COLOURED = {
    "type": "object",
    "properties": {"colour": {"type": "string", "default": "red"}},
    "additionalProperties": False,
}


async def test_a_dry_run_is_the_job_of_the_submit_and_stores_nothing(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(workloads=[TOY.model_copy(update={"config_schema": COLOURED})])
    spec = {"workload": "toy", "execution": {"max_steps": 7}, "env": {"A": "1"}}
    key = {"Idempotency-Key": "k"}

    dry = await api.post("/operations?dry_run=true", json=spec, headers=key)

    assert (await api.get("/operations")).json()["items"] == []
    wet = await api.post("/operations", json=spec, headers=key)
    assert (dry.status_code, wet.status_code) == (200, 201)
    assert dry.json() == wet.json()["job"]
    assert Job.model_validate(dry.json()).config == {"colour": "red"}


async def test_a_dry_run_of_a_fork_is_the_job_of_the_fork(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    run = await store.running()
    await store.report(run, saved(run, 3))
    fork, wish = f"/operations/{run.operation_id}/fork", {"overrides": {"execution": {"max_epochs": 9}}}

    dry = await api.post(f"{fork}?dry_run=true", json=wish)
    wrong = await api.post(f"{fork}?dry_run=true", json={"overrides": {"execution": {"seed": 5}}})

    assert len((await api.get("/operations")).json()["items"]) == 1
    wet = await api.post(fork, json=wish)
    assert (dry.status_code, wet.status_code) == (200, 201)
    assert dry.json() == wet.json()["job"]
    assert (wrong.status_code, wrong.json()["error"]["details"]["errors"][0]["field"]) == (
        422,
        "overrides.execution.seed",
    )


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"execution": {"max_epoch": 3}}, "execution.max_epoch", "did you mean max_epochs?"),
        ({"learning_rate": 3}, "learning_rate", "did you mean execution.learning_rate?"),
        ({"config": {"color": "blue"}}, "config.color", "did you mean colour?"),
        ({"resources": {"cores": 5}}, "resources.cores", "the most so far was 4"),
        ({"resources": {"cores": 4}, "execution": {"accelerator": "cuda"}}, "execution.accelerator", "cuda"),
    ],
)
@pytest.mark.parametrize("query", ["", "?dry_run=true"])
async def test_a_submit_and_a_dry_run_refuse_alike_and_say_what_was_meant(
    api: httpx.AsyncClient, store: Store, spec: dict[str, Any], field: str, words: str, query: str
) -> None:
    await store.worker(cores=4, workloads=[TOY.model_copy(update={"config_schema": COLOURED})])

    answer = await api.post(f"/operations{query}", json={"workload": "toy", **spec})

    error = answer.json()["error"]
    assert (answer.status_code, error["details"]["errors"][0]["field"]) == (422, field)
    assert words in error["message"]


async def test_what_is_wrong_with_a_measurement_is_said_with_what_was_meant(
    api: httpx.AsyncClient, store: Store
) -> None:
    await store.worker(workloads=[MEASURES])

    answer = await api.post("/operations", json={**MEASURED, "config": {"model": GPT2, "batch_sizes": 8}})

    [problem] = answer.json()["error"]["details"]["errors"]
    assert (answer.status_code, problem["field"]) == (422, "config.batch_sizes")
    assert problem["problem"] == "no such field; did you mean batch_size?"


async def test_all_that_is_wrong_with_a_config_is_said_in_the_order_of_its_fields(
    api: httpx.AsyncClient, store: Store
) -> None:
    numbers = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}}
    await store.worker(workloads=[TOY.model_copy(update={"config_schema": numbers})])

    answer = await api.post("/operations", json={"workload": "toy", "config": {"b": "x", "a": "y"}})

    problems = answer.json()["error"]["details"]["errors"]
    assert problems == [
        {"field": "config.a", "problem": "'y' is not of type 'integer'"},
        {"field": "config.b", "problem": "'x' is not of type 'integer'"},
    ]


async def test_a_workload_without_any_config_refuses_each_field_of_one(api: httpx.AsyncClient, store: Store) -> None:
    nothing = {"type": "object", "additionalProperties": False}
    await store.worker(workloads=[TOY.model_copy(update={"config_schema": nothing})])

    empty = await api.post("/operations", json={"workload": "toy"})
    answer = await api.post("/operations", json={"workload": "toy", "config": {"b": 1, "a": 2}})

    assert empty.status_code == 201
    fields = [error["field"] for error in answer.json()["error"]["details"]["errors"]]
    assert (answer.status_code, fields) == (422, ["config.b", "config.a"])


async def test_cores_that_a_slot_of_the_device_has_had_are_accepted(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(cores=4)
    await store.worker("g", device="cuda", cores=2, slot={"device_uuid": "GPU-1"})

    async def status(cores: int, accelerator: str) -> int:
        spec = {"workload": "toy", "resources": {"cores": cores}, "execution": {"accelerator": accelerator}}
        return (await api.post("/operations?dry_run=true", json=spec)).status_code

    assert [await status(4, "auto"), await status(4, "cpu"), await status(2, "cuda")] == [200, 200, 200]
    assert [await status(4, "cuda"), await status(5, "auto")] == [422, 422]


async def test_editors_get_the_schema_without_a_token(api: httpx.AsyncClient) -> None:
    answer = await api.get("/schemas/job", headers={"Authorization": ""})

    assert (answer.status_code, answer.json()) == (200, JobSpec.model_json_schema())
