"""Studies over HTTP: what is refused at submit, how children and results are read, and what a study takes along."""

import asyncio
from typing import Any
from uuid import UUID

import httpx
import pytest
from pydantic import ValidationError

from helpers.store import Held, Store, held, losses, plan, saved, started, window
from ops_backend.store import estimates
from ops_contract.jobs import JobSpec
from ops_contract.lifecycle import Outcome
from ops_contract.operations import StudyPreview
from ops_contract.plans import TrainingResult
from ops_contract.problems import problems_of
from ops_contract.reports import Result
from ops_contract.study_results import GridResult

ISOFLOP = {"type": "isoflop", "budgets": [1e9], "size": "config.d", "sizes": [8]}
GRID = {"workload": "toy", "study": {"type": "grid", "axes": {"config.name": ["a", "b"]}}, "max_retries": 0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"study": {"type": "grid"}}, "nothing to vary"),
        ({"study": {"type": "grid", "axes": {"lr": [1]}}}, "study.grid.axes.lr"),
        ({"study": {"type": "grid", "axes": {"config.name": []}}}, "at least 1"),
        ({"study": {"type": "random"}}, "'grid', 'isoflop'"),
        ({"kind": "training"}, "study and kind study go together"),
        ({"study": None, "kind": "study"}, "study and kind study go together"),
        ({"workload": None}, "give a workload to train, or a command"),
        ({"command": ["true"]}, "a command has neither workload nor config"),
        ({"study": ISOFLOP | {"budgets": [1e9, 1e9]}}, "twice"),
        ({"study": ISOFLOP | {"budgets": [-1]}}, "greater than 0"),
        ({"study": ISOFLOP | {"size": "env.D"}}, "field of config"),
        ({"study": ISOFLOP, "workload": None, "command": ["true"]}, "trains a workload"),
    ],
)
def test_what_is_no_study_is_refused_with_what_to_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        JobSpec.model_validate({name: value for name, value in (GRID | changes).items() if value is not None})
    problems = [f"{field}: {problem}" for field, problem in problems_of(refused.value, JobSpec)]
    assert said in "; ".join(problems)


async def test_a_study_says_by_itself_what_it_is(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    refused = await api.post("/operations", json=GRID | {"study": {"type": "grid"}})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid")
    answer = await api.post("/operations", json=GRID)
    assert answer.status_code == 201, answer.text
    study = answer.json()
    assert (study["kind"], study["workload"], study["job"]["study"]["type"]) == ("study", "toy", "grid")
    assert study["name"].startswith("grid-toy-")
    assert (study["children"], study["parent_id"]) == (None, None)


async def test_children_and_results_are_read_while_they_come(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(slots=3)
    run = await _planned(store, "a", "b", "c")
    path = f"/operations/{run.operation_id}"
    first = await _claim(store)
    await store.finish(await store.report(first, started(), losses((0, 1.5)), _trained(100, 10)), Outcome.COMPLETED)

    page = (await api.get(f"{path}/children?limit=2")).json()
    rest = (await api.get(f"{path}/children?limit=2&cursor={page['next_cursor']}")).json()

    children = page["items"] + rest["items"]
    assert rest["next_cursor"] is None
    assert [(c["name"], c["status"]) for c in children] == [("a", "completed"), ("b", "pending"), ("c", "pending")]
    assert (children[0]["final"], children[0]["training"]["units"]) == ({"loss": 1.5}, 10)
    assert (await api.get(path)).json()["progress"]["percent"] == pytest.approx(100 / 3)
    assert (await api.get(f"{path}/results")).json() == {"items": []}
    results = (await api.get(f"/operations/{first.operation_id}/results")).json()["items"]
    assert results[0]["content"]["params"] == 100
    assert (await api.get(f"/operations/{first.operation_id}/children")).json()["items"] == []
    assert (await api.get(f"{path}/children?cursor=x")).status_code == 422
    assert (await api.get(f"/operations/{UUID(int=0)}/children")).status_code == 404
    assert (await api.get(f"/operations/{UUID(int=0)}/results")).status_code == 404


async def test_a_list_has_all_children_none_or_those_of_one_study(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(slots=3)
    run = await _planned(store, "a", "b")
    lone = await store.submit()
    names = {
        query: [item["name"] for item in (await api.get(f"/operations?{query}")).json()["items"]]
        for query in ("", "parent_id=none", f"parent_id={run.operation_id}")
    }
    assert len(names[""]) == 4
    assert names["parent_id=none"] == [(await store.get(id)).name for id in (lone, run.operation_id)]
    assert names[f"parent_id={run.operation_id}"] == ["b", "a"]
    assert (await api.get("/operations?parent_id=some")).status_code == 422


async def test_the_backend_wakes_a_study_by_itself(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(slots=2)
    run = await _planned(store, "a")
    await store.finish(await _claim(store), Outcome.COMPLETED)
    study = await _until(api, run, "pending")
    assert study["children"] == {"completed": 1}
    reducing = await store.report(await _claim(store), started(), Result(content=GridResult(rows=[])))
    await store.finish(reducing, Outcome.COMPLETED)
    told = (await api.get(f"/operations/{run.operation_id}/events")).json()["items"]
    assert [event["name"] for event in told] == ["submit", "claim", "plan", "reduce", "claim", "complete"]
    assert (await api.get(f"/operations/{run.operation_id}/results")).json()["items"][0]["content"]["type"] == "grid"


async def test_a_cancel_over_http_ends_study_and_children(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(slots=2)
    run = await _planned(store, "a", "b")
    child = await _claim(store)
    child = await store.report(child, started(), saved(child, 2))
    assert (await api.post(f"/operations/{run.operation_id}/cancel", json={})).json()["status"] == "cancelling"
    await _until(api, child, "cancelling")
    await store.finish(child, Outcome.CANCELLED)
    await _until(api, run, "cancelled")
    refused = await api.post(f"/operations/{child.operation_id}/resume", json={})
    assert refused.status_code == 409
    assert f"ops resume {run.operation_id}" in refused.json()["error"]["message"]
    resumed = await api.post(f"/operations/{run.operation_id}/resume", json={})
    assert (resumed.status_code, resumed.json()["resumed_from"]) == (202, None)


async def test_a_study_that_nobody_holds_is_counted_while_it_lives(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(slots=2)
    run = await _planned(store, "a", "b")
    child = await _claim(store)
    counts = {"pending": 1, "running": 1, "waiting": 1, "cancelling": 0}
    assert (await api.get("/counts")).json() == counts
    await api.post(f"/operations/{run.operation_id}/cancel", json={})
    await _until(api, child, "cancelling")
    assert (await api.get("/counts")).json() == {"pending": 0, "running": 0, "waiting": 0, "cancelling": 2}


async def test_a_study_is_deleted_with_its_children_once_all_have_ended(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker(slots=2)
    run = await _planned(store, "a", "b")
    path = f"/operations/{run.operation_id}"
    for child in (await _claim(store), await _claim(store)):
        child = await store.report(child, started(), _trained(1, 1), saved(child, 1))
        await store.finish(child, Outcome.COMPLETED)
    await _until(api, run, "pending")
    assert (await api.delete(path)).status_code == 409
    await store.finish(await _claim(store), Outcome.COMPLETED)
    fork = await store.fork(child.operation_id, overrides={"execution": {"max_epochs": 2}})
    refused = await api.delete(path)
    assert (refused.status_code, refused.json()["error"]["details"]["needed_by"]) == (409, [str(fork)])
    await store.cancel(fork) if fork else None
    assert (await api.delete(f"/operations/{fork}")).status_code == 204
    assert (await api.delete(path)).status_code == 204
    assert (await api.get("/operations")).json()["items"] == []
    assert len(await store.fetch("SELECT * FROM deletions")) == 4


async def test_a_study_cannot_be_forked_and_says_what_to_do(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    run = await store.running(**GRID)
    answer = await api.post(f"/operations/{run.operation_id}/fork", json={})
    assert answer.status_code == 404
    assert "submit a changed one" in answer.json()["error"]["message"]


async def test_an_estimate_goes_by_trainings_of_the_same_workload(store: Store) -> None:
    await store.worker(slots=2)
    job = (await store.get(await store.submit(**GRID))).job
    wanted = plan("a", "b", "c").model_copy(update={"flops": 12e6})
    async with store.sessions.begin() as session:
        unplanned = await estimates.preview(session, job, None, 60)
        unknown = await estimates.preview(session, job, wanted, 60)
    assert "none answered in time" in str(unplanned.reason)
    assert (unknown.time_s, unknown.slots) == (None, 2)
    assert unknown.reason == "no training of toy has completed here yet to go by"
    await store.cancel((await store.fetch("SELECT id FROM operations"))[0].id)
    run = await store.running()
    run = await store.report(run, started(), _trained(100, 10_000))
    await store.book(run, window(1))
    await store.finish(run, Outcome.COMPLETED)
    await store.execute("UPDATE attempts SET started_at = ended_at - interval '3 s'")

    async with store.sessions.begin() as session:
        known = await estimates.preview(session, job, wanted, 60)

    # 6e6 FLOPs took 3 s and 100 J: 12e6 take 6 s of work, on two slots.
    assert (known.time_s, known.energy_j, known.by_trainings) == (pytest.approx(3.0), pytest.approx(200.0), 1)
    assert known.reason is None


async def test_an_estimate_of_gangs_counts_those_that_have_room_and_goes_by_gangs(store: Store) -> None:
    """5 slots that gangs can use are two of two at a time: of three children one comes later."""
    await store.worker("no ports", slots=2)
    await store.worker("one", slot={"port": 40_000})
    await store.worker("four", slots=4, slot={"port": 40_000})
    job = (await store.get(await store.submit(**GRID | {"execution": {"devices": 2}}))).job
    await store.cancel((await store.fetch("SELECT id FROM operations"))[0].id)
    wanted = plan("a", "b", "c").model_copy(update={"flops": 12e6})

    async def said() -> StudyPreview:
        async with store.sessions.begin() as session:
            return await estimates.preview(session, job, wanted, 60)

    for devices in (1, 2):
        assert (await said()).reason == "no training of toy on 2 devices has completed here yet to go by"
        run = await store.running(execution={"devices": devices})
        await store.finish(await store.report(run, started(), _trained(100, 10_000)), Outcome.COMPLETED)
        await store.execute("UPDATE attempts SET started_at = ended_at - interval '3 s'")
    known = await said()
    assert (known.slots, known.time_s, known.by_trainings) == (5, pytest.approx(6.0 / 2), 1)

    await store.execute("DELETE FROM slots WHERE incarnation IN (SELECT incarnation FROM workers WHERE name = 'four')")

    assert (await said()).reason == "one of its gangs takes 2 slots, and 1 are there"


async def _planned(store: Store, *names: str) -> Held:
    run = await store.running(**GRID)
    await store.finish(run, Outcome.PLANNED, plan=plan(*names))
    return run


async def _claim(store: Store) -> Held:
    claim = await store.claim()
    assert claim is not None
    return held(claim)


async def _until(api: httpx.AsyncClient, run: Held, status: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            found = (await api.get(f"/operations/{run.operation_id}")).json()
            if found["status"] == status:
                return dict(found)
            await asyncio.sleep(0.02)


def _trained(params: int, units: int) -> Result:
    return Result(content=TrainingResult(steps=1, samples=1, units=units, params=params, embedding_params=0))
