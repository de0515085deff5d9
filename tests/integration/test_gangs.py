"""Starts of gangs: sent to every member, and taken back when one does not take it; read through the API."""

import asyncio
import json
from typing import Any
from uuid import uuid4

import httpx
import pytest

from helpers.store import Held, Store, holds_of, registration, saved, shown_by, started
from integration.test_dispatcher import Deliveries, answers
from ops_contract.agents import StartTraining
from ops_contract.lifecycle import Outcome, Status


async def gang_of_two_workers(store: Store, devices: int = 3, **spec: Any) -> Any:
    """Two slots on `a.test`, one on `b.test`."""
    for name, slots in (("a", 2), ("b", 1)):
        incarnation = await store.worker(name, slots=slots, host=name, slot={"port": 4000 + slots})
        url = f"http://{name}.test:1"
        await store.execute("UPDATE workers SET url = :url WHERE incarnation = :i", url=url, i=incarnation)
    return await store.submit(execution={"devices": devices, "batch_size": 64}, **spec)


def host_answers(**by_host: Any) -> Any:
    return lambda request: by_host[request.url.host.partition(".")[0]](request)


async def test_every_member_is_told_its_slots_and_where_rank_0_is(store: Store, database_url: str) -> None:
    id = await gang_of_two_workers(store)
    async with Deliveries(store, database_url, answers(202)) as deliveries:
        sent = await deliveries.settled(2)

    assert [path for path, _ in sent] == ["/training/start"] * 2
    orders = [StartTraining.model_validate(order) for _, order in sent]
    told = {tuple(order.slots): order.gang.model_dump() for order in orders if order.gang}
    where = {"world_size": 3, "host": "a.test", "port": 4002}
    assert told == {(0, 1): where | {"first_rank": 0}, (0,): where | {"first_rank": 2}}
    assert {order.attempt for order in orders} == {1}
    assert (await store.get(id)).status is Status.RUNNING
    assert (
        deliveries.telemetry.render("", None)[0].count(b'relight_dispatch_seconds_count{outcome="accepted"} 1.0') == 1
    )


async def test_an_ordinary_start_has_no_gang(store: Store, database_url: str) -> None:
    await store.worker(slot={"port": 4000})
    await store.submit()
    async with Deliveries(store, database_url, answers(202)) as deliveries:
        [(_, order)] = await deliveries.settled(1)
    assert (order["slots"], order["gang"]) == ([0], None)


async def test_members_are_told_at_the_same_time(store: Store, database_url: str) -> None:
    """Each waits for the other's request: one after the other would never end."""
    await gang_of_two_workers(store)
    both = asyncio.Barrier(2)
    async with Deliveries(store, database_url, answers(202)) as deliveries:
        receive = deliveries._receive

        async def together(request: httpx.Request) -> httpx.Response:
            await both.wait()
            return await receive(request)

        deliveries._dispatcher._http = httpx.AsyncClient(transport=httpx.MockTransport(together))
        await deliveries.settled(2)


@pytest.mark.parametrize("refusing", ["a", "b"])
async def test_one_that_refuses_takes_it_back_for_all_and_only_its_slots_rest(
    store: Store, database_url: str, refusing: str
) -> None:
    id = await gang_of_two_workers(store)
    by_host = {"a": answers(202), "b": answers(202)} | {refusing: answers(409, "busy")}
    async with Deliveries(store, database_url, host_answers(**by_host)) as deliveries:
        await deliveries.settled(2)

    operation = await store.get(id)
    assert (operation.status, operation.attempt, operation.failures) == (Status.PENDING, 1, 0)
    rests = await store.fetch("""
        SELECT w.name, bool_and(coalesce(s.rests_until > now(), false)) AS rests
          FROM slots s JOIN workers w USING (incarnation) GROUP BY w.name""")
    assert {row.name: row.rests for row in rests} == {"a": False, "b": False} | {refusing: True}


async def test_both_that_refuse_take_it_back_once(store: Store, database_url: str) -> None:
    id = await gang_of_two_workers(store)
    async with Deliveries(store, database_url, answers(409, "busy")) as deliveries:
        await deliveries.settled(2)
    names = await store.fetch("SELECT name FROM events WHERE operation_id = :id ORDER BY seq", id=id)
    assert [row.name for row in names] == ["submit", "claim", "refuse"]


async def test_one_of_which_nobody_knows_is_left_to_its_lease(store: Store, database_url: str) -> None:
    id = await gang_of_two_workers(store)
    silent = host_answers(a=answers(202), b=answers(500))
    async with Deliveries(store, database_url, silent) as deliveries:
        await deliveries.settled(2)
    assert (await store.get(id)).status is Status.RUNNING


async def test_a_checkpoint_that_one_member_cannot_use_is_marked_for_all(store: Store, database_url: str) -> None:
    id = await gang_of_two_workers(store)
    claim = await store.claim()
    assert claim is not None
    leader = await store.report(holds_of(claim)[0], started(), saved(holds_of(claim)[0], 0))
    leader = await store.report(leader, saved(leader, 7))
    await store.expire(leader)
    await store.lose(leader)

    def once(request: httpx.Request) -> httpx.Response:
        step = json.loads(request.content)["checkpoint"]["step"]
        bad = step == 7 and request.url.host == "b.test"
        return (answers(422, "checkpoint_corrupt") if bad else answers(202))(request)

    async with Deliveries(store, database_url, once) as deliveries:
        await deliveries.settled(4)

    statuses = await store.fetch("SELECT step, status FROM checkpoints ORDER BY step")
    assert [tuple(row) for row in statuses] == [(0, "committed"), (7, "corrupt")]
    assert (await store.get(id)).attempt == 3


async def test_the_api_tells_of_members_and_of_a_finish_that_is_not_the_last(
    api: httpx.AsyncClient, store: Store
) -> None:
    id = await gang_of_two_workers(store)
    claim = await store.claim()
    assert claim is not None
    leader, other = holds_of(claim)

    async def finish(member: Held) -> httpx.Response:
        body = {
            "incarnation": str(member.incarnation),
            "first_seq": 1,
            "reports": [{"kind": "finish", "outcome": "completed"}],
        }
        path = f"/operations/{id}/attempts/1/reports"
        return await api.post(path, json=body, headers=shown_by(member.incarnation))

    for _ in range(2):  # the second one as if the first answer had been lost
        answer = await finish(other)
        assert (answer.status_code, answer.json()) == (200, {"last_seq": 1})
    assert (await api.get(f"/operations/{id}")).json()["status"] == "running"
    [attempt] = (await api.get(f"/operations/{id}/attempts")).json()["items"]
    assert (attempt["worker"], attempt["world_size"], attempt["outcome"]) == ("a", 3, None)
    assert [(m["worker"], m["first_rank"], m["ranks"]) for m in attempt["members"]] == [("a", 0, 2), ("b", 2, 1)]
    assert (await finish(leader)).status_code == 200
    assert (await api.get(f"/operations/{id}")).json()["status"] == "completed"
    assert (await store.attempts(id))[0].outcome is Outcome.COMPLETED


async def test_a_gang_that_is_too_large_is_refused_at_submit_at_a_dry_run_and_at_a_fork(
    api: httpx.AsyncClient, store: Store
) -> None:
    id = await gang_of_two_workers(store)
    claim = await store.claim()
    assert claim is not None
    await store.report(holds_of(claim)[0], started(), saved(holds_of(claim)[0], 0))
    job = {"workload": "toy", "execution": {"devices": 4, "batch_size": 64}}
    fork = {"overrides": {"execution": {"devices": 4}}}
    for path, body, field in (
        ("/operations", job, "execution.devices"),
        ("/operations?dry_run=true", job, "execution.devices"),
        (f"/operations/{id}/fork", fork, "overrides.execution.devices"),
    ):
        answer = await api.post(path, json=body)
        assert answer.status_code == 422, answer.text
        [error] = answer.json()["error"]["details"]["errors"]
        assert error["field"] == field
        assert error["problem"].startswith("4 are more than the 3 slots")


async def test_an_incarnation_keeps_its_ports(api: httpx.AsyncClient, store: Store) -> None:
    """The same one registers again with the ports that it has; with others it is another's."""
    incarnation = uuid4()
    slot = {"index": 0, "device": "cpu", "cores": 1, "port": 4000}
    for port, status in ((4000, 201), (4000, 201), (4001, 409)):
        body = registration(incarnation, slots=[slot | {"port": port}], workloads=[])
        assert (await api.post("/workers", json=body)).status_code == status
    assert [row.port for row in await store.fetch("SELECT port FROM slots")] == [4000]
