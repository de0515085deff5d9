"""The HTTP face of the store: shapes, codes, filters, tags. The app on a real database, called without a socket."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import httpx
import pytest
from fastapi import FastAPI

from helpers.openapi import openapi_of_this_code
from helpers.store import TOY, Store, credential_of, losses, registration, saved, shown_by, started
from ops_backend.app import create_app
from ops_backend.dispatcher import Dispatcher
from ops_backend.settings import Settings, SettingsError
from ops_backend.store import lists
from ops_contract.errors import ErrorBody, OpsError
from ops_contract.lifecycle import Outcome
from ops_contract.reports import ArtifactSaved, LogChunk, Progress

TOKEN = "a token of the tests"
STORAGE = tempfile.TemporaryDirectory()
MISSING = "00000000-0000-0000-0000-000000000000"


@asynccontextmanager
async def serving(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(database_url=database_url, api_token=TOKEN, storage_root=Path(STORAGE.name)))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "_claim_all", AsyncMock())  # the tests claim by themselves
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test/api/v1", headers=headers) as client,
        ):
            openapi_of_this_code().watch_async(client)
            yield client


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url) as client:
        yield client


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, ErrorBody.model_validate(answer.json()).error.code


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded"])
async def test_a_body_that_does_not_say_that_it_is_json_is_told_to(
    api: httpx.AsyncClient, content_type: str | None
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}

    answer = await api.post(f"/operations/{MISSING}/cancel", content='{"reason": "late"}', headers=headers)

    assert refusal(answer) == (422, "invalid")
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", f"/operations/{MISSING}", None, (404, "not_found")),
        ("GET", f"/operations/{MISSING}/attempts", None, (404, "not_found")),
        ("GET", f"/operations/{MISSING}/metrics", None, (404, "not_found")),
        ("GET", f"/operations/{MISSING}/metrics?name=loss", None, (404, "not_found")),
        ("GET", f"/operations/{MISSING}/checkpoints", None, (404, "not_found")),
        ("GET", f"/operations/{MISSING}/artifacts", None, (404, "not_found")),
        ("DELETE", f"/operations/{MISSING}/checkpoints/{MISSING}", None, (404, "not_found")),
        ("GET", f"/operations/{MISSING}/events", None, (404, "not_found")),
        ("GET", f"/operations/{MISSING}/logs", None, (404, "not_found")),
        ("GET", f"/operations/{MISSING}/logs?offset=last", None, (422, "invalid")),
        ("GET", f"/operations/{MISSING}/logs?max_bytes=0", None, (422, "invalid")),
        ("GET", f"/operations/{MISSING}/logs?offset=9223372036854775808", None, (422, "invalid")),
        ("DELETE", f"/operations/{MISSING}", None, (404, "not_found")),
        ("POST", "/cleanup", {}, (422, "invalid")),
        ("POST", "/cleanup", {"older_than_s": 0, "status": ["running"], "dry_run": False}, (422, "invalid")),
        ("POST", "/cleanup", {"older_than_s": -1}, (422, "invalid")),
        ("POST", f"/operations/{MISSING}/cancel", None, (404, "not_found")),
        ("POST", f"/operations/{MISSING}/resume", None, (404, "not_found")),
        ("POST", f"/operations/{MISSING}/fork", None, (404, "not_found")),
        ("POST", f"/operations/{MISSING}/replay", None, (404, "not_found")),
        ("POST", f"/operations/{MISSING}/replay", {"steps": 0}, (422, "invalid")),
        ("GET", "/operations/not-an-id", None, (422, "invalid")),
        ("GET", "/operations?cursor=nonsense", None, (422, "invalid")),
        ("GET", "/operations?limit=0", None, (422, "invalid")),
        ("GET", "/operations?status=runing", None, (422, "invalid")),
        ("GET", "/operations?kind=cooking", None, (422, "invalid")),
        ("POST", "/operations", "not json", (422, "invalid")),
        ("POST", "/operations", {"workload": "absent"}, (422, "unknown_workload")),
        ("POST", f"/workers/{MISSING}/heartbeat", {}, (403, "forbidden")),
        ("POST", "/webhooks", {"url": "ftp://host/"}, (422, "invalid")),
        ("POST", "/webhooks", {"url": "http://"}, (422, "invalid")),
        ("POST", "/webhooks", {"url": "http://user:word@host/"}, (422, "invalid")),
        ("POST", "/webhooks", {"url": "http://host/" + "x" * 1000}, (422, "invalid")),
        ("POST", "/webhooks", {"url": "http://169.254.169.254/"}, (422, "invalid")),
        ("POST", "/webhooks", {"url": "http://127.0.0.1/", "statuses": ["running"]}, (422, "invalid")),
        ("POST", "/webhooks", {"url": "http://127.0.0.1/", "statuses": []}, (422, "invalid")),
        ("POST", f"/webhooks/{MISSING}/test", None, (404, "not_found")),
        ("GET", f"/webhooks/{MISSING}/deliveries", None, (404, "not_found")),
        ("DELETE", f"/webhooks/{MISSING}", None, (404, "not_found")),
        ("GET", "/nowhere", None, (404, "not_found")),
        ("PUT", "/operations", None, (405, "method_not_allowed")),
    ],
)
async def test_errors_have_one_shape(
    api: httpx.AsyncClient, method: str, path: str, body: Any, expected: tuple[int, str]
) -> None:
    content = {"content": body} if isinstance(body, str) else {"json": body} if body is not None else {}
    assert refusal(await api.request(method, path, **content)) == expected


@pytest.mark.parametrize(
    ("job", "field"),
    [
        ({"execution": {"max_epochs": 0}}, "execution.max_epochs"),
        ({"execution": {"max_epoch": 3}}, "execution.max_epoch"),
        ({"execution": {"learning_rate": "NaN"}}, "execution.learning_rate"),
        ({"execution": {"checkpoint_every": {"steps": 5, "epochs": 1}}}, "execution.checkpoint_every"),
        ({"execution": {"checkpoint_monitor": "loss"}}, "execution.checkpoint_monitor"),
        ({"execution": {"checkpoint_every": {"seconds": 0}}}, "execution.checkpoint_every.seconds"),
        ({"execution": {"checkpoint_every": "weekly"}}, "execution.checkpoint_every"),
        ({"execution": {"checkpoint_every": 5}}, "execution.checkpoint_every"),
        ({"execution": {"precision": 8}}, "execution.precision"),
        (
            {"execution": {"checkpoint_save_last": False, "checkpoint_every": {"epochs": 1}}},
            "execution.checkpoint_save_last",
        ),
        (
            {"execution": {"checkpoint_save_top_k": 0, "checkpoint_save_last": False}},
            "execution.checkpoint_save_last",
        ),
        ({"execution": {"checkpoint_save_top_k": -2}}, "execution.checkpoint_save_top_k"),
        ({"execution": {"checkpoint_mode": "median"}}, "execution.checkpoint_mode"),
        ({"execution": {"early_stop_patience": 0}}, "execution.early_stop_patience"),
        ({"execution": {"early_stop_min_delta": 0.1}}, "execution.early_stop_min_delta"),
        ({"execution": {"stall_timeout_s": 0}}, "execution.stall_timeout_s"),
        ({"execution": {"early_stop_patience": 1, "early_stop_min_delta": -0.1}}, "execution.early_stop_min_delta"),
        ({"execution": {"scheduler": "multistep"}}, "execution.scheduler_milestones"),
        ({"execution": {"scheduler_milestones": [5]}}, "execution.scheduler_milestones"),
        ({"execution": {"scheduler": "multistep", "scheduler_milestones": []}}, "execution.scheduler_milestones"),
        ({"execution": {"scheduler": "multistep", "scheduler_milestones": [9, 5]}}, "execution.scheduler_milestones"),
        ({"execution": {"optimizer": "adamm"}}, "execution.optimizer"),
        ({"execution": {"logger": "wandb"}}, "execution.logger"),
        ({"execution": {"devices": 0}}, "execution.devices"),
        ({"execution": {"devices": 2, "accelerator": "mps"}}, "execution.devices"),
        ({"execution": {"devices": 4, "batch_size": 3}}, "execution.batch_size"),
        ({"execution": {"strategy": "fsdp"}}, "execution.strategy"),
        ({"execution": {"devices": 4}, "resources": {"nodes": 3}}, "body"),
        ({"execution": {"accelerator": "tpu"}}, "execution.accelerator"),
        ({"execution": {"accelerator": "mps"}}, "execution.accelerator"),
        ({"config": {"hiden": 3}}, "config.hiden"),
        ({"config": {"depth": "deep"}}, "config.depth"),
        ({"name": "a\x00b"}, "body"),
        ({"labels": {"team": "x" * 300}}, "labels.team"),
        ({"workdir": "../elsewhere"}, "workdir"),
        ({"artifacts": ["/etc/*"]}, "artifacts.0"),
        ({"env": {"OPS_API_TOKEN": "x"}}, "env.OPS_API_TOKEN.[key]"),
        ({"env": {"A B": "x"}}, "env.A B.[key]"),
        ({"secrets": ["RELIGHT_FD"]}, "secrets.0"),
        ({"code": {"sha256": "a" * 64}}, "body"),
        ({"workload": "mine:Model", "code": {"sha256": "a" * 64}}, "code.sha256"),
        ({"command": ["true"]}, "body"),
        ({"workload": None, "kind": "command"}, "body"),
        ({"workload": None, "command": []}, "command"),
        ({"workload": None, "command": ["true"], "config": {"depth": 3}}, "body"),
        ({"workload": None, "command": ["true"], "env": {"A": "1"}, "secrets": ["A"]}, "body"),
        ({"workload": None, "command": ["true"], "execution": {"max_epochs": 3}}, "execution.max_epochs"),
        ({"resources": {"cores": 0}}, "resources.cores"),
    ],
)
async def test_a_bad_job_is_refused_with_the_path_of_the_field(
    api: httpx.AsyncClient, offered: str, job: dict[str, Any], field: str
) -> None:
    answer = await api.post("/operations", json={"workload": offered, **job})
    assert refusal(answer) == (422, "invalid")
    assert answer.json()["error"]["details"]["errors"][0]["field"] == field
    assert (await api.get("/operations")).json()["items"] == []


@pytest.fixture
async def offered(api: httpx.AsyncClient) -> str:
    """A workload that some worker offers; no slot of it is free, so nothing starts."""
    schema = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"depth": {"type": "integer", "default": 3}},
    }
    incarnation = uuid4()
    worker = registration(
        incarnation,
        slots=[{"index": 0, "device": "cuda", "device_uuid": "GPU-1", "cores": 1}],
        workloads=[{"name": "deep", "config_schema": schema, "reports": {"val_score": "max", "error": "min"}}],
    )
    (await api.post("/workers", json=worker)).raise_for_status()
    beat = api.post(f"/workers/{incarnation}/heartbeat", json={"draining": True}, headers=shown_by(incarnation))
    (await beat).raise_for_status()
    return "deep"


async def test_the_job_is_stored_resolved(api: httpx.AsyncClient, offered: str) -> None:
    made = await api.post("/operations", json={"workload": offered, "labels": {"team": "a"}})
    assert made.status_code == 201
    job = (await api.get(f"/operations/{made.json()['id']}")).json()["job"]
    assert job["config"] == {"depth": 3}
    assert job["execution"]["learning_rate"] == 1e-3
    assert made.json()["submitted_by"] == "operator"


async def forkable(store: Store) -> str:
    """The path of a completed run that can be forked at steps 0, 10 and 20, the end of its second epoch."""
    await store.worker()
    run = await store.running(execution={"max_epochs": 2})
    points = [saved(run, 0), saved(run, 10, epoch=1), saved(run, 20, epoch=2)]
    run = await store.report(run, started(), *points)
    await store.finish(run, Outcome.COMPLETED)
    await store.execute("UPDATE workers SET draining = true")  # so that what is forked stays as it was made
    return f"/operations/{run.operation_id}"


@pytest.mark.parametrize(
    ("step", "wish", "field"),
    [
        (10, {"overrides": {"workload": "other"}}, "overrides.workload"),
        (10, {"overrides": {"execution": {"max_epoch": 3}}}, "overrides.execution.max_epoch"),
        (10, {"overrides": {"execution": {"learning_rate": -1}}}, "overrides.execution.learning_rate"),
        (10, {"overrides": {"config": {"depth": 3}}}, "overrides.config.depth"),
        (10, {"overrides": {"priority": 5000}}, "overrides.priority"),
        (10, {"overrides": {"execution": {"batch_size": 7}}}, "overrides.execution.batch_size"),
        (10, {"overrides": {"execution": {"seed": 7}}}, "overrides.execution.seed"),
        (10, {"overrides": {"execution": {"optimizer": "sgd"}}}, "overrides.execution.optimizer"),
        (
            10,
            {"overrides": {"execution": {"accumulate_grad_batches": 2}}},
            "overrides.execution.accumulate_grad_batches",
        ),
        (10, {"overrides": {"execution": {"max_steps": 10}}}, "overrides.execution.max_steps"),
        (10, {"overrides": {"execution": {"max_epochs": 1}}}, "overrides.execution.max_epochs"),
        (20, {}, "overrides.execution.max_epochs"),
        (20, {"override": {}}, "override"),
    ],
)
async def test_what_a_fork_cannot_carry_over_is_refused_with_the_path_of_the_field(
    store: Store, database_url: str, step: int, wish: dict[str, Any], field: str
) -> None:
    path = await forkable(store)
    async with serving(database_url) as api:
        point = next(c for c in (await api.get(f"{path}/checkpoints")).json()["items"] if c["step"] == step)
        answer = await api.post(f"{path}/fork", json=wish | {"from_checkpoint": point["id"]})
        assert refusal(answer) == (422, "invalid")
        assert answer.json()["error"]["details"]["errors"][0]["field"] == field
        assert len((await api.get("/operations")).json()["items"]) == 1


async def test_anything_may_change_before_the_first_update(store: Store, database_url: str) -> None:
    path = await forkable(store)
    changes = {"batch_size": 7, "seed": 7, "optimizer": "sgd", "accumulate_grad_batches": 2}
    async with serving(database_url) as api:
        point = (await api.get(f"{path}/checkpoints")).json()["items"][0]
        wish = {"from_checkpoint": point["id"], "overrides": {"execution": changes}}
        assert (await api.post(f"{path}/fork", json=wish)).status_code == 201


async def test_a_fork_is_made_once_per_key_parent_and_wish(store: Store, database_url: str) -> None:
    path, other = await forkable(store), await forkable(store)
    wish = {"overrides": {"execution": {"max_epochs": 3}}, "name": "longer"}
    key = {"Idempotency-Key": "k"}
    async with serving(database_url) as api:
        made, again = [await api.post(f"{path}/fork", json=wish, headers=key) for _ in range(2)]
        assert (made.status_code, again.status_code) == (201, 200)
        assert made.json() == again.json()
        assert (made.json()["name"], made.json()["forked_from"]["step"]) == ("longer", 20)
        assert path.endswith(made.json()["forked_from"]["operation_id"])
        # The key is looked at before the wish is understood.
        for at, body in ((path, wish | {"name": "other"}), (other, wish), (path, {"no_such_field": 1})):
            answer = await api.post(f"{at}/fork", json=body, headers=key)
            assert refusal(answer) == (409, "idempotency_conflict")
            assert answer.json()["error"]["details"] == {"operation_id": made.json()["id"]}
        assert refusal(await api.post(f"{path}/fork", json={"from_checkpoint": MISSING})) == (404, "no_checkpoint")


async def test_a_replay_is_made_once_per_key_and_shows_its_parent(store: Store, database_url: str) -> None:
    path, key = await forkable(store), {"Idempotency-Key": "k"}
    async with serving(database_url) as api:
        assert refusal(await api.post(f"{path}/replay", json={})) == (409, "not_replayable")
        await store.execute("UPDATE holds SET first_step = 0, last_step = 19")
        made, again = [await api.post(f"{path}/replay", json={"steps": 3}, headers=key) for _ in range(2)]
        assert (made.status_code, again.status_code) == (201, 200)
        assert made.json() == again.json()
        assert path.endswith(made.json()["replay_of"])
        assert (made.json()["forked_from"]["step"], made.json()["job"]["until_step"]) == (10, 13)
        for verb in ("replay", "fork"):
            other = await api.post(f"{path}/{verb}", json={}, headers=key)
            assert refusal(other) == (409, "idempotency_conflict")


async def test_the_monitored_metric_is_resolved_by_what_the_workload_reports(
    api: httpx.AsyncClient, offered: str
) -> None:
    async def resolved(**execution: Any) -> tuple[str, str]:
        made = await api.post("/operations", json={"workload": offered, "execution": execution})
        job = made.json()["job"]["execution"]
        return job["checkpoint_monitor"], job["checkpoint_mode"]

    assert await resolved(early_stop_patience=2) == ("val_score", "max")  # the first, though longer than the second
    assert await resolved(checkpoint_monitor="error") == ("error", "min")
    assert await resolved(checkpoint_mode="min") == ("val_score", "min")


async def test_what_is_kept_follows_from_the_period_and_the_metrics(
    api: httpx.AsyncClient, store: Store, offered: str
) -> None:
    async def kept(workload: str, **execution: Any) -> tuple[Any, int]:
        made = await api.post("/operations", json={"workload": workload, "execution": execution})
        job = made.json()["job"]["execution"]
        return job["checkpoint_every"], job["checkpoint_save_top_k"]

    await store.worker(workloads=[TOY])

    assert await kept(offered) == ("auto", 1)
    assert await kept("toy") == ("auto", 0)
    assert await kept(offered, checkpoint_save_top_k=-1) == ("auto", -1)
    assert (await kept(offered, checkpoint_every={"seconds": 2}))[1] == -1


async def test_a_metric_that_is_not_reported_is_refused_with_those_that_are(
    api: httpx.AsyncClient, offered: str
) -> None:
    answer = await api.post("/operations", json={"workload": offered, "execution": {"checkpoint_monitor": "loss"}})

    message = "execution.checkpoint_monitor: this workload does not report 'loss'; it reports val_score, error"
    assert answer.json()["error"]["message"] == message


@pytest.mark.parametrize(
    "knob",
    [
        {"checkpoint_mode": "min"},
        {"checkpoint_save_top_k": 1},
        {"early_stop_patience": 1},
        {"scheduler": "plateau"},
        {"checkpoint_save_last": False},
    ],
)
async def test_what_needs_a_metric_is_refused_where_none_is_reported(
    api: httpx.AsyncClient, store: Store, knob: dict[str, Any]
) -> None:
    await store.worker(workloads=[TOY])

    answer = await api.post("/operations", json={"workload": "toy", "execution": knob})

    assert refusal(answer) == (422, "invalid")
    assert answer.json()["error"]["details"]["errors"][0]["field"] == f"execution.{next(iter(knob))}"
    plain = {"checkpoint_save_top_k": 0, "checkpoint_every": {"steps": 1}}
    assert (await api.post("/operations", json={"workload": "toy", "execution": plain})).status_code == 201


async def test_without_the_token_nothing_is_told(api: httpx.AsyncClient) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        for path in ("/operations", "/workers", "/workloads", f"/operations/{MISSING}"):
            assert refusal(await api.get(path, headers=headers)) == (401, "unauthenticated")


async def test_an_unchanged_operation_is_a_304(api: httpx.AsyncClient, offered: str) -> None:
    id = (await api.post("/operations", json={"workload": offered})).json()["id"]
    first = await api.get(f"/operations/{id}")
    again = await api.get(f"/operations/{id}", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    await api.post(f"/operations/{id}/cancel", json={"reason": "no"})
    changed = await api.get(f"/operations/{id}", headers={"If-None-Match": first.headers["etag"]})
    assert (changed.status_code, changed.json()["status"]) == (200, "cancelled")


async def test_a_poll_is_refused_like_every_call_and_head_is_answered(api: httpx.AsyncClient, offered: str) -> None:
    path = f"/operations/{(await api.post('/operations', json={'workload': offered})).json()['id']}"
    bad_token = await api.get("/operations/not-an-id", headers={"Authorization": "Bearer wrong"})
    bad_id = await api.get("/operations/not-an-id")
    got, head = await api.get(path), await api.head(path)

    assert refusal(bad_token) == (401, "unauthenticated")
    assert refusal(bad_id) == (422, "invalid")
    assert bad_id.json()["error"]["details"]["errors"][0]["field"] == "id"
    assert (head.status_code, head.headers) == (200, got.headers)
    assert refusal(await api.put(path)) == (405, "method_not_allowed")


async def test_the_short_way_of_a_poll_says_what_the_long_way_says(
    api: httpx.AsyncClient, offered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/operations/{(await api.post('/operations', json={'workload': offered})).json()['id']}"
    tag = (await api.get(path)).headers["etag"]
    real, long_ways = FastAPI.__call__, list[str]()

    async def counted(self: Any, scope: Any, receive: Any, send: Any) -> None:
        long_ways.append(scope["path"])
        await real(self, scope, receive, send)

    monkeypatch.setattr(FastAPI, "__call__", counted)
    twice = httpx.Headers([("If-None-Match", tag), ("If-None-Match", '"another"')])
    for status, headers in (
        (200, {}),
        (304, {"If-None-Match": tag}),
        (200, {"If-None-Match": '"another"'}),
        (304, twice),
    ):
        short = await api.get(path, headers=headers)
        assert not long_ways
        long = await api.get(f"{path}?long", headers=headers)
        assert long_ways.pop()
        assert (short.status_code, short.content, short.headers) == (status, long.content, long.headers)
    for other, headers in ((f"/operations/{uuid4()}", {}), (path, {"Authorization": "Bearer wrong"})):
        short, long = await api.get(other, headers=headers), await api.get(f"{other}?long", headers=headers)
        assert refusal(short) == refusal(long)
        assert (short.content, short.headers) == (long.content, long.headers)


async def test_an_unchanged_list_is_a_304(api: httpx.AsyncClient, offered: str) -> None:
    id = (await api.post("/operations", json={"workload": offered})).json()["id"]
    seen = {"If-None-Match": (await api.get("/operations")).headers["etag"]}
    again = await api.get("/operations", headers=seen)
    assert (again.status_code, again.content) == (304, b"")
    await api.post(f"/operations/{id}/cancel", json={"reason": "no"})
    changed = await api.get("/operations", headers=seen)
    assert (changed.status_code, changed.json()["items"][0]["status"]) == (200, "cancelled")


async def test_what_has_not_ended_is_counted(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    first = (await api.get("/counts")).json()
    running = await store.running()
    await store.submit()
    await api.post(f"/operations/{await store.submit()}/cancel")
    counted = await api.get("/counts")
    again = await api.get("/counts", headers={"If-None-Match": counted.headers["etag"]})
    await api.post(f"/operations/{running.operation_id}/cancel")
    last = (await api.get("/counts")).json()
    assert first == {"pending": 0, "running": 0, "waiting": 0, "cancelling": 0}
    assert counted.json() == {"pending": 1, "running": 1, "waiting": 0, "cancelling": 0}
    assert (again.status_code, again.content) == (304, b"")
    assert last == {"pending": 1, "running": 0, "waiting": 0, "cancelling": 1}


async def test_pages_are_newest_first_and_complete(api: httpx.AsyncClient, offered: str) -> None:
    ids = [(await api.post("/operations", json={"workload": offered})).json()["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        page = (await api.get("/operations", params={"limit": 2, **({"cursor": cursor} if cursor else {})})).json()
        seen += [item["id"] for item in page["items"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert seen == ids[::-1]


async def test_what_was_meant_is_said(api: httpx.AsyncClient, offered: str) -> None:
    status = await api.get("/operations", params={"status": "pending,runing"})
    workload = await api.post("/operations", json={"workload": f"{offered}x"})

    assert "did you mean running?" in status.json()["error"]["message"]
    assert f"did you mean {offered}?" in workload.json()["error"]["message"]


async def test_a_search_goes_on_where_its_page_has_stopped_looking(
    api: httpx.AsyncClient, offered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "SEARCHED", 3)
    names = ["big 1", "x", "big 2", "x", "x", "x", "x", "big 3", "x"]
    for name in names:
        await api.post("/operations", json={"workload": offered, "name": name})
    pages, params = [], {"q": "big", "workload": offered}
    while True:
        page = (await api.get("/operations", params=params)).json()
        pages.append([item["name"] for item in page["items"]])
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert pages == [["big 3"], [], ["big 2", "big 1"], []]


async def test_filters_narrow_the_list(api: httpx.AsyncClient, offered: str) -> None:
    async def add(**job: Any) -> str:
        return str((await api.post("/operations", json={"workload": offered, **job})).json()["id"])

    plain, named, labelled = await add(), await add(name="Big run"), await add(labels={"team": "a", "x": "y"})
    await api.post(f"/operations/{plain}/cancel")

    async def listed(**params: str) -> list[str]:
        return [item["id"] for item in (await api.get("/operations", params=params)).json()["items"]]

    assert await listed(status="cancelled") == [plain]
    assert await listed(status="pending,cancelled") == [labelled, named, plain]
    assert await listed(q="big") == [named]
    assert await listed(q=named[:8]) == [named]
    assert await listed(q="100%") == []
    assert await listed(label="team=a") == await listed(label="x") == [labelled]
    assert await listed(label="team=b") == await listed(workload="other") == []
    assert await listed(label="=a") == await listed(mine="true") == [labelled, named, plain]


async def test_the_same_incarnation_registers_twice_but_a_device_has_one_owner(api: httpx.AsyncClient) -> None:
    incarnation = uuid4()
    worker: dict[str, Any] = {
        "incarnation": str(incarnation),
        "credential": credential_of(incarnation),
        "secret": "s" * 43,
        "name": "w",
        "host": "h",
        "url": "http://127.0.0.1:1",
        "slots": [{"index": 0, "device": "cuda", "device_uuid": "GPU-1", "cores": 1}],
        "workloads": [],
    }
    first, again = await api.post("/workers", json=worker), await api.post("/workers", json=worker)
    assert first.json() == again.json()
    assert (first.status_code, again.status_code) == (201, 201)
    other = uuid4()
    stranger = await api.post("/workers", json=worker | {"incarnation": str(other), "credential": credential_of(other)})
    assert refusal(stranger) == (409, "device_taken")
    [view] = (await api.get("/workers")).json()["items"]
    assert (view["live"], view["slots"][0]["operation_id"]) == (True, None)
    assert not {"secret", "credential"} & set(view)


async def test_drain_and_undrain_may_be_repeated_and_show_in_the_list(api: httpx.AsyncClient, store: Store) -> None:
    worker = await store.worker()
    wishes: list[tuple[str, Any]] = [
        ("drain", None),
        ("drain", {}),
        ("drain", {"preempt": True}),
        ("undrain", None),
        ("undrain", None),
    ]

    answers = [await api.post(f"/workers/{worker}/{path}", json=body) for path, body in wishes]

    assert [(a.status_code, a.json()["drain"], a.json()["draining"]) for a in answers] == [
        (200, "finish", True),
        (200, "finish", True),
        (200, "preempt", True),
        (200, None, False),
        (200, None, False),
    ]
    await store.heartbeat(worker, draining=True)
    [view] = (await api.get("/workers")).json()["items"]
    assert (view["draining"], view["drain"]) == (True, None)
    assert refusal(await api.post(f"/workers/{uuid4()}/drain")) == (404, "not_found")
    assert refusal(await api.post(f"/workers/{worker}/drain", json={"preempt": "hard"})) == (422, "invalid")


async def test_non_finite_numbers_are_strings_and_every_bit_is_kept(store: Store, database_url: str) -> None:
    await store.worker()
    run = await store.running()
    values = [(0, 0.1 + 0.2), (1, float("nan")), (2, float("inf")), (3, -0.0), (4, 5e-324)]
    run = await store.report(
        run,
        *(started(), losses(*values), saved(run, 5), losses(*values, name="val_loss")),
        progress=Progress(step=5, loss=float("nan")),
    )
    await store.finish(run, Outcome.COMPLETED)
    path = f"/operations/{run.operation_id}"

    async with serving(database_url) as api:
        answer = await api.get(f"{path}/metrics", params={"name": "loss"})
        assert '[1,"NaN"],[2,"Infinity"],[3,-0.0],[4,5e-324]]' in answer.text
        assert answer.json()["points"][0] == [0, 0.1 + 0.2]
        assert answer.json()["attempt_starts"] == [[0, 1]]
        assert (await api.get(f"{path}/metrics")).json()["names"] == ["loss", "val_loss"]
        [listed] = (await api.get("/operations")).json()["items"]
        got = (await api.get(path)).json()
        assert listed["progress"]["loss"] == got["progress"]["loss"] == "NaN"
        tail = await api.get(f"{path}/metrics", params={"name": "loss", "after_step": 2})
        assert [step for step, _ in tail.json()["points"]] == [3, 4]
        [attempt] = (await api.get(f"{path}/attempts")).json()["items"]
        assert (attempt["first_step"], attempt["last_step"], attempt["energy_j"]) == (0, 4, None)
        assert attempt["energy_reason"] == "not_measured"


async def test_a_value_the_database_refuses_is_the_senders_fault(store: Store, database_url: str) -> None:
    await store.worker()
    run = await store.running()
    nul = started().model_dump(mode="json") | {"environment": {"host": "a\x00b"}}
    twice = losses((0, 1.0)).model_dump(mode="json")
    twice["series"] *= 2
    falling = losses((0, 1.0), (1, 2.0)).model_dump(mode="json")
    falling["series"][0]["steps"] = [1, 0]

    async with serving(database_url) as api:
        for report in (nul, twice, falling):
            batch = {"incarnation": str(run.incarnation), "first_seq": 1, "reports": [report]}
            answer = await api.post(
                f"/operations/{run.operation_id}/attempts/1/reports", json=batch, headers=shown_by(run.incarnation)
            )
            assert refusal(answer) == (422, "invalid")


async def test_the_health_checks_need_no_token(api: httpx.AsyncClient) -> None:
    for path in ("live", "ready"):
        assert (await api.get(f"http://test/health/{path}", headers={"Authorization": ""})).json()["status"] == "ok"


@pytest.mark.parametrize("path", ["/operations", f"/operations/{MISSING}"])
async def test_a_database_that_is_away_is_a_503_with_retry_after(tmp_path: Any, path: str) -> None:
    url = f"postgresql+asyncpg://relight:x@/relight?host={tmp_path}"
    app = create_app(Settings(database_url=url, api_token=TOKEN, storage_root=tmp_path))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        answer = await client.get(f"/api/v1{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    assert refusal(answer) == (503, "unavailable")
    assert answer.headers["retry-after"] == "1"


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(SettingsError, match=r"OPS_DATABASE_URL.*OPS_API_TOKEN.*OPS_STORAGE_ROOT.*OPS_LEASE_S"):
        Settings.from_env({"OPS_LEASE_S": "soon", "OPS_PORT": "1"})


async def test_an_operation_is_deleted_once_it_has_ended(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    of = f"/operations/{await store.submit()}"
    assert refusal(await api.delete(of)) == (409, "not_deletable")
    await api.post(f"{of}/cancel")

    [told] = [
        event["message"] for event in (await api.get(f"{of}/events")).json()["items"] if event["name"] == "cancel"
    ]
    assert told == "cancelled while it waited"
    preview = (await api.post("/cleanup", json={"older_than_s": 0})).json()
    assert [item["goes"] for item in preview["items"]] == ["all"]
    assert (await api.delete(of)).status_code == 204
    for path in ("", "/events", "/checkpoints"):
        assert refusal(await api.get(of + path)) == (404, "not_found")
    assert refusal(await api.delete(of)) == (404, "not_found")
    assert (await api.get("/operations")).json()["items"] == []


async def test_a_checkpoint_is_deleted_and_the_final_model_listed(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    run = await store.running()
    older, newer = saved(run, 0), saved(run, 9)
    place = f"{run.operation_id}/1-9-model/model.safetensors"
    model = ArtifactSaved(
        artifact_id=older.checkpoint_id, name="model.safetensors", step=9, path=place, size_bytes=7, sha256="a" * 64
    )
    elsewhere = model.model_copy(update={"path": f"{run.operation_id}/2-9-model/model.safetensors"})
    with pytest.raises(OpsError, match=f"this artifact belongs at {place}"):
        await store.report(run, elsewhere)
    run = await store.report(run, older, newer, model)
    of = f"/operations/{run.operation_id}"

    assert refusal(await api.delete(f"{of}/checkpoints/{newer.checkpoint_id}")) == (409, "checkpoint_in_use")
    assert (await api.delete(f"{of}/checkpoints/{older.checkpoint_id}")).status_code == 204
    assert refusal(await api.delete(f"{of}/checkpoints/{older.checkpoint_id}")) == (404, "no_checkpoint")
    assert (await api.get(f"{of}/artifacts")).json()["items"] == [], "it may not be the last one"
    await store.finish(run, Outcome.COMPLETED)

    [listed] = (await api.get(f"{of}/artifacts")).json()["items"]
    assert (listed["path"], listed["size_bytes"], listed["attempt"]) == (place, 7, 1)


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.FAILED])
async def test_an_operation_that_did_not_complete_has_no_artifact(
    api: httpx.AsyncClient, store: Store, outcome: Outcome
) -> None:
    await store.worker()
    run = await store.running()
    place = f"{run.operation_id}/1-9-model/model.safetensors"
    model = ArtifactSaved(
        artifact_id=run.operation_id, name="model.safetensors", step=9, path=place, size_bytes=7, sha256="a" * 64
    )
    run = await store.report(run, model)
    await store.cancel(run.operation_id)

    await store.finish(run, outcome)

    assert (await api.get(f"/operations/{run.operation_id}/artifacts")).json()["items"] == []


async def test_output_is_its_bytes_and_the_headers_say_where_it_stands(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    run = await store.report(await store.running(), LogChunk.of(b"\x00\xff\xfe<b>\n"), LogChunk.of(b"end", skipped=93))
    of = f"/operations/{run.operation_id}/logs"

    def told(answer: httpx.Response) -> tuple[bytes, list[str]]:
        words = ("Offset", "Next", "End", "Complete")
        return answer.content, [answer.headers[f"Relight-Log-{word}"] for word in words]

    first = await api.get(of)
    assert first.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert first.headers["X-Content-Type-Options"] == "nosniff"
    assert told(first) == (b"\x00\xff\xfe<b>\n", ["0", "7", "103", "false"])
    assert told(await api.get(of, params={"offset": 7})) == (b"end", ["100", "103", "103", "false"])
    await store.finish(run, Outcome.COMPLETED)
    assert told(await api.get(of, params={"offset": -2, "max_bytes": 9})) == (b"nd", ["101", "103", "103", "true"])
    assert told(await api.get(of, params={"offset": 2**62})) == (b"", ["103", "103", "103", "true"])

    described = (await api.get("http://test/openapi.json")).json()["paths"]["/api/v1/operations/{id}/logs"]["get"]
    assert set(described["responses"]["200"]["content"]) == {"text/plain"}
    assert {name.lower() for name in described["responses"]["200"]["headers"]} <= set(first.headers)
