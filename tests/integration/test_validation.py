"""Whether a job is right, asked of a worker at submit: outside any transaction, and never in the way of one."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import httpx
import pytest

from helpers.openapi import openapi_of_this_code
from helpers.store import Held, Store, plan, registration, saved, started
from ops_backend.app import create_app
from ops_backend.dispatcher import Dispatcher
from ops_backend.settings import Settings
from ops_backend.validator import Validator
from ops_contract.agents import VALIDATED_MAX_BYTES, Validated, WorkloadOffer
from ops_contract.plans import Plan
from ops_contract.reports import Resolved

STORAGE = tempfile.TemporaryDirectory()
Answer = Callable[[httpx.Request], httpx.Response]
TOLD = {"config": {"depth": 3, "width": 8}, "reports": {"score": "max"}}


class Backend:
    """The app, and a worker that answers as told; `asked` are the jobs that it was asked about."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.asked: list[dict[str, Any]] = []
        self.answer: Callable[[], Any] = lambda: httpx.Response(200, json=TOLD)

    async def receive(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(json.loads(request.content)["job"])
        answer = self.answer()
        return await answer if asyncio.iscoroutine(answer) else answer

    async def worker(self, *, user_code: bool = True, validates: bool = False, cores: int = 1) -> None:
        offer = {"name": "deep", "config_schema": {"type": "object"}, "validates": validates}
        incarnation = uuid4()
        worker = registration(
            incarnation, slots=[{"index": 0, "device": "cpu", "cores": cores}], workloads=[offer], user_code=user_code
        )
        (await self.http.post("/workers", json=worker)).raise_for_status()

    async def submit(self, key: str | None = None, **job: Any) -> httpx.Response:
        headers = {"Idempotency-Key": key} if key else {}
        return await self.http.post("/operations", json={"workload": "my.module:Mine"} | job, headers=headers)


@asynccontextmanager
async def serving(database_url: str) -> AsyncIterator[Backend]:
    storage_root = Path(STORAGE.name)
    settings = Settings(database_url=database_url, api_token="t" * 16, storage_root=storage_root, db_pool_size=1)
    app = create_app(settings)
    headers = {"Authorization": f"Bearer {settings.api_token}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "_claim_all", AsyncMock())
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test/api/v1", headers=headers) as client,
        ):
            openapi_of_this_code().watch_async(client)
            backend = Backend(client)
            app.state.validator = Validator(httpx.AsyncClient(transport=httpx.MockTransport(backend.receive)), 0.2)
            yield backend


@pytest.fixture
async def backend(database_url: str) -> AsyncIterator[Backend]:
    async with serving(database_url) as backend:
        yield backend


async def test_a_job_of_the_users_own_is_stored_as_its_worker_understands_it(backend: Backend) -> None:
    await backend.worker()

    made = await backend.submit(config={"depth": 3}, execution={"checkpoint_every": "auto"})

    job = made.json()["job"]
    assert backend.asked[0]["config"] == {"depth": 3}
    assert job["config"] == TOLD["config"]
    execution = job["execution"]
    assert (execution["checkpoint_monitor"], execution["checkpoint_mode"]) == ("score", "max")
    assert execution["checkpoint_save_top_k"] == 1


@pytest.mark.parametrize("workload", ["my.module:Mine", "deep"])
async def test_what_the_worker_refuses_is_a_422_with_the_path_of_the_field(backend: Backend, workload: str) -> None:
    await backend.worker(validates=True)
    problems = [{"field": "config.depth", "problem": "must be less than width"}]
    backend.answer = lambda: httpx.Response(200, json={"problems": problems})

    answer = await backend.submit(workload=workload)

    assert answer.status_code == 422
    assert answer.json()["error"]["details"]["errors"] == problems
    assert (await backend.http.get("/operations")).json()["items"] == []


async def test_a_metric_that_the_users_workload_does_not_report_is_refused(backend: Backend) -> None:
    await backend.worker()

    answer = await backend.submit(execution={"checkpoint_monitor": "accuracy"})

    assert answer.json()["error"]["details"]["errors"][0]["field"] == "execution.checkpoint_monitor"


async def test_a_study_is_planned_to_be_judged_and_stored_as_it_was_written(backend: Backend) -> None:
    """An offered workload too, whose schema alone would do for a training."""
    await backend.worker()
    planned = plan("a", "b")
    backend.answer = lambda: httpx.Response(200, text=Validated(plan=planned).model_dump_json())
    study = {"workload": "deep", "study": {"type": "grid", "axes": {"config.depth": [1, 2]}}}

    dry = await backend.http.post("/operations?dry_run=true", json=study)
    made = await backend.http.post("/operations", json=study)

    assert Plan.model_validate(dry.json()["plan"]) == planned
    assert (made.status_code, made.json()["job"]["config"]) == (201, {})
    assert made.json()["job"]["execution"]["checkpoint_save_top_k"] is None
    assert [job["study"]["axes_order"] for job in backend.asked] == [["config.depth"]] * 2
    problems = [{"field": "study.size", "problem": "does not change how many parameters the model has"}]
    backend.answer = lambda: httpx.Response(200, json={"problems": problems})
    refused = await backend.http.post("/operations", json=study)
    assert (refused.status_code, refused.json()["error"]["details"]["errors"]) == (422, problems)


class Trickling(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)


def raising(error: Exception) -> Callable[[], httpx.Response]:
    def raise_it() -> httpx.Response:
        raise error

    return raise_it


@pytest.mark.parametrize(
    "answer",
    [
        raising(httpx.ReadTimeout("hangs")),
        raising(httpx.RemoteProtocolError("died")),
        raising(httpx.ConnectError("gone")),
        lambda: httpx.Response(503, json={}),
        lambda: httpx.Response(404, json={}),
        lambda: httpx.Response(200, json={"config": 3}),
        lambda: httpx.Response(200, json={"config": {"a": "\0"}}),
        lambda: httpx.Response(200, json={"config": {"a": "x" * VALIDATED_MAX_BYTES}}),
        lambda: httpx.Response(200, stream=Trickling()),
    ],
    ids=["hangs", "dies", "gone", "busy", "older", "nonsense", "unstorable", "endless", "trickling"],
)
async def test_a_worker_that_does_not_say_leaves_it_to_the_start(backend: Backend, answer: Any) -> None:
    await backend.worker()
    backend.answer = answer

    made = await backend.submit(config={"depth": 3})

    assert (made.status_code, len(backend.asked)) == (201, 1)
    job = made.json()["job"]
    assert (job["config"], job["execution"]["checkpoint_save_top_k"]) == ({"depth": 3}, None)


@pytest.mark.parametrize(
    ("worker", "job", "asked"),
    [
        (None, {}, 0),
        ({"user_code": False}, {}, 0),
        ({}, {"execution": {"accelerator": "cpu"}}, 1),
        ({}, {"workload": "deep"}, 0),
        ({"validates": True}, {"workload": "deep"}, 1),
        ({}, {"workload": None, "command": ["true"]}, 0),
    ],
)
async def test_only_a_worker_that_would_take_it_and_knows_more_is_asked(
    backend: Backend, worker: dict[str, bool] | None, job: dict[str, Any], asked: int
) -> None:
    if worker is not None:
        await backend.worker(**worker)
    else:
        backend.answer = raising(AssertionError())

    made = await backend.submit(**job)

    assert (made.status_code, len(backend.asked)) == (201, asked), made.text


async def test_a_worker_with_too_few_cores_is_not_asked(backend: Backend) -> None:
    await backend.worker(user_code=False, cores=2)
    await backend.worker()

    made = await backend.submit(resources={"cores": 2})

    assert (made.status_code, backend.asked) == (201, [])


async def test_no_connection_is_held_while_the_worker_thinks(backend: Backend) -> None:
    """The pool has one."""
    await backend.worker()
    thinking, done = asyncio.Event(), asyncio.Event()

    async def think() -> httpx.Response:
        thinking.set()
        await done.wait()
        return httpx.Response(200, json=TOLD)

    backend.answer = think
    submitting = asyncio.create_task(backend.submit())
    await thinking.wait()

    others = await backend.http.get("/operations")
    done.set()

    assert (others.status_code, (await submitting).status_code) == (200, 201)


async def test_of_concurrent_submits_with_one_key_one_is_made_and_a_replay_asks_nobody(backend: Backend) -> None:
    await backend.worker()

    answers = await asyncio.gather(*(backend.submit("key") for _ in range(8)))
    asked = len(backend.asked)
    backend.answer = lambda: httpx.Response(200, json={"problems": [{"field": "config", "problem": "now refused"}]})
    replayed = await backend.submit("key")

    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["id"] for answer in (*answers, replayed)}) == 1
    assert (replayed.status_code, len(backend.asked)) == (200, asked)


async def own_run(store: Store) -> Held:
    """Of a job that nobody could judge at its submit."""
    await store.worker(user_code=True)
    return await store.running(workload="my.module:Mine", config={"depth": 3}, execution={"checkpoint_every": "auto"})


async def test_what_was_left_open_is_frozen_by_the_first_start(store: Store) -> None:
    run = await own_run(store)
    before = (await store.get(run.operation_id)).job
    execution = before.execution.model_copy(update={"checkpoint_monitor": "score", "checkpoint_save_top_k": 1})
    resolved = Resolved(config={"depth": 3, "width": 8}, execution=execution)

    await store.report(run, started().model_copy(update={"resolved": resolved}))

    after = (await store.get(run.operation_id)).job
    assert after == before.model_copy(update={"config": resolved.config, "execution": execution})


@pytest.mark.parametrize(("overrides", "asked"), [({"config": {"depth": 5}}, 1), ({"priority": 3}, 0)])
async def test_a_fork_is_validated_when_it_runs_something_else(
    store: Store, backend: Backend, overrides: dict[str, Any], asked: int
) -> None:
    run = await own_run(store)
    await store.report(run, started(), saved(run, 0))

    path = f"/operations/{run.operation_id}/fork"
    fork = await backend.http.post(path, json={"overrides": overrides})
    backend.answer = lambda: httpx.Response(200, json={"problems": [{"field": "config.depth", "problem": "odd"}]})
    refused = await backend.http.post(
        f"/operations/{run.operation_id}/fork", json={"overrides": {"config": {"depth": 5}}}
    )

    assert (fork.status_code, len(backend.asked)) == (201, asked + 1)
    assert fork.json()["job"]["config"] == (TOLD["config"] if asked else {"depth": 3})
    assert refused.json()["error"]["details"]["errors"][0]["field"] == "overrides.config.depth"


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://169.254.169.254/latest"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#"},
        {"type": 5},
        {"properties": 3},
        {"properties": {"depth": {"pattern": "("}}},
    ],
)
async def test_a_schema_that_a_worker_made_up_is_neither_followed_nor_our_error(
    store: Store, backend: Backend, monkeypatch: pytest.MonkeyPatch, schema: dict[str, Any]
) -> None:
    fetched: list[object] = []
    monkeypatch.setattr("urllib.request.urlopen", fetched.append)
    await store.worker(workloads=[WorkloadOffer(name="odd", config_schema=schema)])

    answer = await backend.submit(workload="odd", config={"depth": "3"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid")
    assert "cannot be applied" in answer.json()["error"]["message"]
    assert fetched == []


async def test_what_the_stored_schema_refuses_is_asked_of_no_worker(backend: Backend, store: Store) -> None:
    await backend.worker(validates=True)
    schema = {"type": "object", "properties": {"depth": {"type": "integer"}}}
    await store.execute("UPDATE workloads SET config_schema = :schema", schema=json.dumps(schema))

    answer = await backend.submit(workload="deep", config={"depth": "three"})

    assert (answer.status_code, backend.asked) == (422, [])
