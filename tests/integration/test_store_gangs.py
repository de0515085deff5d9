"""Gangs in the store: placed all or none, reserved for, held by several workers, and ended as their rules say."""

import asyncio
from collections.abc import Sequence
from itertools import permutations
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from helpers.store import TOY, Held, Store, at_once, held, holds_of, losses, saved, started, window
from ops_backend.store import catalog, claims, deletion, queries
from ops_backend.store.claims import Claim
from ops_contract.agents import WorkloadOffer
from ops_contract.energy import Use
from ops_contract.errors import OpsError
from ops_contract.lifecycle import CheckpointStatus, Outcome, Status
from ops_contract.reports import PEER_LOST, Finish, Progress, Standing

BOOM = {"code": "exception", "message": "boom"}


async def worker(store: Store, name: str, slots: int = 1, *, host: str | None = None, **kw: Any) -> UUID:
    """On a host of its own, with slots that a gang can use."""
    offer = {"port": 40_000} | kw.pop("slot", {})
    return await store.worker(name, slots=slots, host=host or f"host-{name}", slot=offer, **kw)


async def gang(store: Store, devices: int, nodes: int | None = None, **spec: Any) -> UUID:
    execution = {"devices": devices, "batch_size": 1024} | spec.pop("execution", {})
    resources = {"nodes": nodes} | spec.pop("resources", {})
    return await store.submit(execution=execution, resources=resources, **spec)


async def claimed(store: Store) -> Claim:
    claim = await store.claim()
    assert claim is not None
    return claim


async def pair(store: Store, **spec: Any) -> list[Held]:
    """A gang of two ranks on two workers: the holds of its leader and of the other."""
    await worker(store, "a")
    await worker(store, "b")
    await gang(store, 2, **spec)
    return holds_of(await claimed(store))


async def next_pair(store: Store) -> list[Held]:
    return holds_of(await claimed(store))


def places(claim: Claim, **workers: UUID) -> list[tuple[str, list[int], int]]:
    """Name, slots and first rank of each member."""
    names = {incarnation: name for name, incarnation in workers.items()}
    return [(names[m.incarnation], m.slots, m.first_rank) for m in claim.members]


async def live_holds(store: Store) -> list[Any]:
    return await store.fetch("SELECT operation_id, attempt, incarnation FROM holds WHERE ended_at IS NULL")


# ---- placement


async def test_a_gang_of_one_worker_is_one_member(store: Store) -> None:
    a = await worker(store, "a", 4)
    id = await gang(store, 4)

    claim = await claimed(store)

    assert places(claim, a=a) == [("a", [0, 1, 2, 3], 0)]
    assert (claim.operation_id, claim.host, claim.port, claim.world_size) == (id, "127.0.0.1", 40_000, 4)
    assert len(await live_holds(store)) == 1
    assert await store.claim() is None


async def test_it_takes_the_host_that_has_the_least_room_which_is_enough(store: Store) -> None:
    await worker(store, "a", 4)
    b = await worker(store, "b", 3)
    await worker(store, "c", 1)
    await gang(store, 2)
    assert places(await claimed(store), b=b) == [("b", [0, 1], 0)]


async def test_two_workers_of_a_host_come_before_two_hosts(store: Store) -> None:
    await worker(store, "far", 2)
    here = {await worker(store, name, 2, host="one") for name in ("x", "y")}
    await gang(store, 4)
    claim = await claimed(store)
    assert {member.incarnation for member in claim.members} == here
    assert [(m.slots, m.first_rank) for m in claim.members] == [([0, 1], 0), ([0, 1], 2)]


async def test_without_a_host_that_has_room_it_takes_as_few_as_there_can_be(store: Store) -> None:
    a = await worker(store, "a", 1)
    b = await worker(store, "b", 3)
    await worker(store, "c", 1)
    await gang(store, 4)
    claim = await claimed(store)
    assert places(claim, a=a, b=b) == [("b", [0, 1, 2], 0), ("a", [0], 3)]


async def test_ranks_of_a_host_lie_side_by_side(store: Store) -> None:
    hosts = {await worker(store, f"{host}{n}", 1, host=host): host for n in range(2) for host in ("p", "q")}
    await gang(store, 4)
    order = [hosts[member.incarnation] for member in (await claimed(store)).members]
    assert order in (["p", "p", "q", "q"], ["q", "q", "p", "p"])


async def test_so_many_nodes_give_the_same_number_each(store: Store) -> None:
    a = await worker(store, "a", 4)
    b = await worker(store, "b", 2)
    await worker(store, "c", 1)
    await gang(store, 4, nodes=2)
    claim = await claimed(store)
    assert places(claim, a=a, b=b) == [("b", [0, 1], 0), ("a", [0, 1], 2)]


async def test_one_node_is_waited_for_though_two_have_room(store: Store) -> None:
    a = await worker(store, "a", 2)
    await worker(store, "b", 1)
    first = await store.submit()
    await store.execute("UPDATE workers SET draining = true WHERE incarnation <> :a", a=a)
    run = held(await claimed(store))
    await store.execute("UPDATE workers SET draining = false")
    id = await gang(store, 2, nodes=1)
    assert run.operation_id == first
    assert await store.claim() is None

    await store.finish(run, Outcome.COMPLETED)
    assert (await claimed(store)).operation_id == id


async def test_a_gang_is_of_one_kind_of_device_and_never_of_mps(store: Store) -> None:
    cpu = await worker(store, "cpu", 3)
    await worker(store, "mac", 2, device="mps")
    await gang(store, 2)
    assert places(await claimed(store), cpu=cpu) == [("cpu", [0, 1], 0)]
    gpu = await worker(store, "gpu", 2, device="cuda")
    await gang(store, 2)
    assert places(await claimed(store), gpu=gpu) == [("gpu", [0, 1], 0)]


async def test_auto_waits_for_gpus_where_there_are_any(store: Store) -> None:
    await worker(store, "cpu", 4)
    gpu = await worker(store, "gpu", 2, device="cuda")
    await store.submit(execution={"accelerator": "cuda"})
    run = held(await claimed(store))
    await gang(store, 2)
    assert await store.claim() is None
    await store.finish(run, Outcome.COMPLETED)
    assert places(await claimed(store), gpu=gpu) == [("gpu", [0, 1], 0)]


async def test_every_slot_of_a_gang_has_the_cores_and_the_fewest_are_frozen(store: Store) -> None:
    await worker(store, "small", 2, cores=1)
    big = await worker(store, "big", 1, cores=8)
    middle = await worker(store, "middle", 1, cores=4)
    await gang(store, 2, resources={"cores": 2})
    claim = await claimed(store)
    assert {member.incarnation for member in claim.members} == {big, middle}
    assert claim.job.execution.threads == 4


async def test_only_workers_that_offer_it_are_of_the_gang(store: Store) -> None:
    other = WorkloadOffer(name="other", config_schema=TOY.config_schema)
    await worker(store, "x", 2, workloads=(other,))
    await worker(store, "closed", 2)
    opened = await worker(store, "open", 2, user_code=True)
    await gang(store, 2, env={"A": "b"})
    assert places(await claimed(store), opened=opened) == [("opened", [0, 1], 0)]


async def test_a_worker_without_ports_is_none_of_a_gang(store: Store) -> None:
    await store.worker("old", slots=2)
    new = await worker(store, "new", 2)
    await gang(store, 2)
    assert places(await claimed(store), new=new) == [("new", [0, 1], 0)]


async def test_an_address_that_only_its_own_host_reaches_is_not_rank_0s(store: Store) -> None:
    a = await worker(store, "a", 2)
    b = await worker(store, "b", 1)
    await store.execute("UPDATE workers SET url = 'http://b.cluster:7' WHERE incarnation = :b", b=b)
    await gang(store, 3)
    claim = await claimed(store)
    assert places(claim, a=a, b=b) == [("b", [0], 0), ("a", [0, 1], 1)]
    assert claim.host == "b.cluster"


async def test_a_study_takes_one_slot_whatever_its_children_take(store: Store) -> None:
    await worker(store, "a", 4)
    study = {"type": "grid", "axes": {"config.x": [1, 2]}}
    await gang(store, 4, kind="study", study=study)
    assert (await claimed(store)).world_size == 1


async def test_the_claim_says_who_its_members_are(store: Store) -> None:
    one, _ = await pair(store)
    async with store.sessions.begin() as session:
        event = (await queries.events(session, one.operation_id, 1)).items[0]
    assert sorted((m["worker"], m["ranks"]) for m in event.detail["members"]) == [("a", 1), ("b", 1)]
    assert "2 workers (" in event.message
    assert "with 2 ranks at step 0" in event.message

    [attempt] = await store.attempts(one.operation_id)
    assert attempt.world_size == 2
    assert attempt.worker_id == one.incarnation
    assert [(m.first_rank, m.ranks) for m in attempt.members] == [(0, 1), (1, 1)]
    assert {m.host for m in attempt.members} == {"host-a", "host-b"}


async def test_an_ordinary_attempt_has_one_member_and_its_claim_says_what_it_said(store: Store) -> None:
    incarnation = await store.worker()
    run = await store.running()
    [attempt] = await store.attempts(run.operation_id)
    assert (attempt.world_size, [m.worker_id for m in attempt.members]) == (1, [incarnation])
    [event] = await store.fetch("SELECT detail FROM events WHERE name = 'claim'")
    assert event.detail == {"worker": str(incarnation)}


# ---- all or none, and the reservation


async def test_concurrent_claims_of_gangs_and_others_give_no_slot_twice_and_no_half_a_gang(store: Store) -> None:
    for name in ("a", "b", "c"):
        await worker(store, name, 3)
    sizes = {}
    for n in range(15):
        size = (1, 4, 1, 2, 5)[n % 5]
        sizes[await gang(store, size) if size > 1 else await store.submit()] = size
    running: list[Claim] = []
    done = 0
    while done < len(sizes):
        got = await at_once(*(store.claim() for _ in range(20)))
        assert not [each for each in got if isinstance(each, BaseException)]
        running += (new := [claim for claim in got if claim is not None])
        for claim in new:
            assert claim.world_size == sizes[claim.operation_id]
        taken = [(m.incarnation, slot) for claim in running for m in claim.members for slot in m.slots]
        assert len(taken) == len(set(taken))
        holds = await store.fetch("SELECT operation_id, ranks FROM holds WHERE ended_at IS NULL")
        assert sum(hold.ranks for hold in holds) == len(taken)
        if not new:
            oldest = running.pop(0)
            await at_once(*(store.finish(each, Outcome.COMPLETED) for each in holds_of(oldest)))
            done += 1


async def test_small_ones_do_not_starve_a_gang(store: Store) -> None:
    await worker(store, "a", 2)
    first = await store.running()
    big = await gang(store, 2)
    small = await store.submit()

    assert await store.claim() is None  # a slot is free, and reserved
    await store.finish(first, Outcome.COMPLETED)
    run = await claimed(store)
    assert run.operation_id == big
    await store.finish(held(run), Outcome.COMPLETED)
    assert (await claimed(store)).operation_id == small


async def test_what_is_reserved_is_so_though_something_else_is_free(store: Store) -> None:
    await worker(store, "a", 2)
    await worker(store, "gpu", 1, device="cuda")
    await store.running(execution={"accelerator": "cpu"})
    await gang(store, 2, execution={"accelerator": "cpu"})
    await store.submit(execution={"accelerator": "cpu"})
    await gang(store, 2, execution={"accelerator": "cpu"})
    assert await store.claim() is None


async def test_a_gang_waits_for_all_its_slots(store: Store) -> None:
    await worker(store, "a", 2)
    await store.running()
    await gang(store, 2)
    assert await store.claim() is None


async def test_a_smaller_gang_behind_it_waits_too(store: Store) -> None:
    await worker(store, "a", 3)
    await worker(store, "gpu", 1, device="cuda")
    await store.running(execution={"accelerator": "cpu"})
    await gang(store, 3, execution={"accelerator": "cpu"})
    await gang(store, 2, execution={"accelerator": "cpu"})
    assert await store.claim() is None


async def test_a_host_with_too_few_is_not_reserved(store: Store) -> None:
    await worker(store, "a", 2)
    lone = await worker(store, "lone", 1)
    await store.drain(lone, "finish")
    await store.running()
    await store.drain(lone, None)
    await gang(store, 2, nodes=1)
    small = await store.submit()
    claim = await claimed(store)
    assert (claim.operation_id, claim.members[0].incarnation) == (small, lone)


async def test_higher_priority_passes_it(store: Store) -> None:
    await worker(store, "a", 2)
    await store.running()
    await gang(store, 2)
    await store.submit()
    urgent = await store.submit(priority=1)
    assert (await claimed(store)).operation_id == urgent


async def test_what_was_there_before_it_passes_it(store: Store) -> None:
    await worker(store, "a", 2)
    await store.running()
    older = await store.submit()
    await gang(store, 2)
    assert (await claimed(store)).operation_id == older


async def test_a_gang_that_nobody_could_hold_reserves_nothing(store: Store) -> None:
    b = await worker(store, "b", 2)
    await worker(store, "a", 1)
    await gang(store, 3)
    small = await store.submit()
    await store.execute("UPDATE workers SET last_seen_at = now() - interval '1 h' WHERE incarnation = :b", b=b)
    assert (await claimed(store)).operation_id == small


async def test_a_drained_worker_is_not_counted_on(store: Store) -> None:
    b = await worker(store, "b", 1)
    await worker(store, "a", 1)
    await gang(store, 2)
    small = await store.submit()
    await store.drain(b, "finish")
    assert (await claimed(store)).operation_id == small


async def test_behind_one_that_nobody_could_hold_the_next_gang_reserves(store: Store) -> None:
    b = await worker(store, "b", 4)
    await worker(store, "a", 2)
    await gang(store, 6)
    await store.execute("UPDATE workers SET last_seen_at = now() - interval '1 h' WHERE incarnation = :b", b=b)
    await store.running()
    await gang(store, 2)
    await store.submit()
    assert await store.claim() is None


async def test_a_gang_that_is_not_due_reserves_nothing(store: Store) -> None:
    await worker(store, "a", 2)
    await store.running()
    big = await gang(store, 2)
    small = await store.submit()
    await store.execute("UPDATE operations SET not_before = now() + interval '1 h' WHERE id = :id", id=big)
    assert (await claimed(store)).operation_id == small


async def test_a_gang_goes_by_while_the_first_one_reserves_what_it_cannot_use(store: Store) -> None:
    await worker(store, "cpu", 2)
    gpu = await worker(store, "gpu", 2, device="cuda")
    await store.running(execution={"accelerator": "cpu"})
    await gang(store, 2, execution={"accelerator": "cpu"})
    await gang(store, 2, execution={"accelerator": "cuda"})
    assert places(await claimed(store), gpu=gpu) == [("gpu", [0, 1], 0)]


async def test_slots_that_rest_stay_reserved(store: Store) -> None:
    await worker(store, "a", 1)
    await worker(store, "b", 1)
    await gang(store, 2)
    await store.submit()
    await store.refuse(await claimed(store), rest_s=3600, member=1)
    assert await store.claim() is None


# ---- submit


@pytest.mark.parametrize(
    ("devices", "nodes", "words"),
    [(5, None, "5 are more than the 4 slots"), (4, 2, "2 each on 2 nodes are asked for, and 1 nodes")],
)
async def test_a_gang_that_live_workers_could_never_hold_is_refused(
    store: Store, devices: int, nodes: int | None, words: str
) -> None:
    await worker(store, "a", 3)
    await worker(store, "b", 1)
    with pytest.raises(OpsError, match=words) as refused:
        await gang(store, devices, nodes)
    [error] = refused.value.details["errors"]
    assert error["field"] == "execution.devices"


async def test_taken_and_drained_slots_count_and_without_a_live_worker_it_waits(store: Store) -> None:
    a = await worker(store, "a", 2)
    await store.running()
    await store.drain(a, "finish")
    assert await gang(store, 2)
    await store.execute("UPDATE workers SET last_seen_at = now() - interval '1 h'")
    assert await gang(store, 100)


async def test_a_fork_is_asked_as_a_submit_is_and_a_resume_is_not(store: Store) -> None:
    leader, other = await pair(store, max_retries=0)
    leader = await store.report(leader, started(), saved(leader, 0))
    await store.cancel(leader.operation_id)
    await store.finish(leader, Outcome.CANCELLED)
    await store.finish(other, Outcome.CANCELLED)
    wish = {"overrides": {"execution": {"devices": 3, "batch_size": 1024}}}
    with pytest.raises(OpsError, match="3 are more than the 2 slots") as refused:
        await store.fork(leader.operation_id, **wish)
    assert refused.value.details["errors"][0]["field"] == "overrides.execution.devices"
    assert await store.fork(leader.operation_id, overrides={"execution": {"devices": 1}})

    await store.execute(
        "UPDATE workers SET last_seen_at = now() - interval '1 h' WHERE incarnation = :b", b=other.incarnation
    )
    assert await store.resume(leader.operation_id) is not None


# ---- the end


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.PREEMPTED, Outcome.CANCELLED])
@pytest.mark.parametrize("order", list(permutations(range(3))))
async def test_in_order_the_last_of_any_order_moves_the_operation(
    store: Store, outcome: Outcome, order: Sequence[int]
) -> None:
    for name in ("a", "b", "c"):
        await worker(store, name)
    id = await gang(store, 3)
    members = holds_of(await claimed(store))
    if outcome is Outcome.CANCELLED:
        await store.cancel(id)
    before = await store.get(id)
    seqs = await store.fetch("SELECT max(seq) AS seq FROM events")

    for n in order[:2]:
        await store.finish(members[n], outcome)
        assert (await store.get(id)).status is before.status
    assert len(await live_holds(store)) == 1
    assert await store.fetch("SELECT max(seq) AS seq FROM events") == seqs
    await store.finish(members[order[2]], outcome)

    ends = {Outcome.COMPLETED: Status.COMPLETED, Outcome.PREEMPTED: Status.PENDING, Outcome.CANCELLED: Status.CANCELLED}
    after = await store.get(id)
    assert (after.status, after.failures, after.exit_unconfirmed) == (ends[outcome], 0, False)
    [attempt] = await store.attempts(id)
    assert attempt.outcome is outcome
    assert not await live_holds(store)


@pytest.mark.parametrize("leader_first", [True, False])
async def test_the_leaders_word_decides(store: Store, leader_first: bool) -> None:
    """It published the model while the host of the other began to drain."""
    leader, other = await pair(store)
    ends = [(leader, Outcome.COMPLETED), (other, Outcome.PREEMPTED)]
    for member, outcome in ends if leader_first else ends[::-1]:
        await store.finish(member, outcome)
    assert (await store.get(leader.operation_id)).status is Status.COMPLETED
    [attempt] = await store.attempts(leader.operation_id)
    [event] = await store.fetch("SELECT detail FROM events WHERE name = 'complete'")
    assert (attempt.outcome, event.detail["outcome"]) == (Outcome.COMPLETED, "completed")


async def test_members_that_finish_at_the_same_moment_move_it_once(store: Store) -> None:
    """The leader with a metric before, as agents send it: then it locks its own hold before the others'."""
    for name in ("a", "b", "c"):
        await worker(store, name)
    for _ in range(15):
        id = await gang(store, 3)
        leader, *others = holds_of(await claimed(store))
        leader = await store.report(leader, started())
        finish = {"outcome": Outcome.COMPLETED}
        calls = [_report_and_finish(store, leader), *(store.finish(each, **finish) for each in others)]
        answers = await at_once(*calls)
        assert all(isinstance(answer, Held) for answer in answers), answers
        assert (await store.get(id)).status is Status.COMPLETED
        assert [e.name for e in await _events(store, id)] == ["submit", "claim", "complete"]
        assert not await live_holds(store)


async def _report_and_finish(store: Store, leader: Held) -> Held:
    return await store.report(leader, losses((0, 1.0)), saved(leader, 1), Finish(outcome=Outcome.COMPLETED))


async def _events(store: Store, id: UUID) -> list[Any]:
    return await store.fetch(
        "SELECT name, from_status, to_status FROM events WHERE operation_id = :id ORDER BY seq", id=id
    )


async def test_who_reports_and_finishes_locks_the_holds_in_one_order(store: Store) -> None:
    """Not its own first: the finish of the lower one would wait for that, and this one for the lower."""
    lower, higher = sorted(await pair(store), key=lambda each: str(each.incarnation))
    own = "SELECT incarnation FROM holds WHERE incarnation = :i FOR UPDATE SKIP LOCKED"
    waits = "SELECT count(*) AS n FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with store.sessions.begin() as session:
        await session.execute(text(own), {"i": lower.incarnation})
        finishing = asyncio.create_task(store.report(higher, Standing(), Finish(outcome=Outcome.COMPLETED)))
        while (await store.fetch(waits))[0].n == 0:
            assert not finishing.done()
        assert await store.fetch(own, i=higher.incarnation)
    await finishing


async def test_a_finish_sent_again_is_had_already(store: Store) -> None:
    leader, other = await pair(store)
    again = leader
    await store.finish(leader, Outcome.COMPLETED)
    assert (await store.finish(again, Outcome.COMPLETED)).seq == 2
    assert (await store.get(leader.operation_id)).status is Status.RUNNING
    await store.finish(other, Outcome.COMPLETED)
    await store.finish(again, Outcome.COMPLETED)
    await store.finish(other, Outcome.COMPLETED)
    assert (await store.get(leader.operation_id)).status is Status.COMPLETED


async def test_a_member_that_has_finished_reports_no_more(store: Store) -> None:
    leader, other = await pair(store)
    leader = await store.finish(leader, Outcome.COMPLETED)
    with pytest.raises(OpsError, match="has ended"):
        await store.report(leader, losses((0, 1.0)))
    assert (await store.heartbeat(leader.incarnation, leader)).ended
    assert not (await store.heartbeat(other.incarnation, other)).ended


async def test_a_finish_out_of_order_ends_nothing(store: Store) -> None:
    _, other = await pair(store)
    with pytest.raises(OpsError, match="is missing"):
        await store.report(other, Finish(outcome=Outcome.COMPLETED), seq=5)
    assert len(await live_holds(store)) == 2


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("outcome", "error", "status", "failures"),
    [
        (Outcome.FAILED, BOOM, Status.PENDING, 1),
        (Outcome.FAILED, None, Status.PENDING, 1),
        (Outcome.PREEMPTED, {"code": PEER_LOST, "message": "gone"}, Status.PENDING, 0),
        (Outcome.CANCELLED, {"code": "killed", "message": "after the grace"}, Status.PENDING, 0),
    ],
)
async def test_an_end_with_a_fault_is_everybodys(
    store: Store, who: int, outcome: Outcome, error: dict[str, str] | None, status: Status, failures: int
) -> None:
    members = await pair(store, max_retries=3)
    await store.finish(members[who], outcome, error=error)
    operation = await store.get(members[0].operation_id)
    assert (operation.status, operation.failures, operation.exit_unconfirmed) == (status, failures, False)
    zombie = members[1 - who]
    assert (await store.heartbeat(zombie.incarnation, zombie)).ended
    with pytest.raises(OpsError, match="has ended"):
        await store.finish(zombie, Outcome.COMPLETED)
    assert (await store.get(zombie.operation_id)).status is status


@pytest.mark.parametrize("alone", [True, False])
async def test_a_fault_while_it_is_cancelled_leaves_the_others_exit_unconfirmed(store: Store, alone: bool) -> None:
    leader, other = await pair(store)
    await store.cancel(leader.operation_id)
    if alone:
        await store.finish(other, Outcome.CANCELLED)
    await store.finish(leader, Outcome.FAILED, error=BOOM)
    operation = await store.get(leader.operation_id)
    assert (operation.status, operation.exit_unconfirmed) == (Status.CANCELLED, not alone)


async def test_a_cancel_is_told_to_every_member(store: Store) -> None:
    leader, other = await pair(store)
    cancelled = await store.cancel(leader.operation_id)
    assert cancelled is not None
    assert {push.incarnation for push in cancelled.pushes} == {leader.incarnation, other.incarnation}
    for member in (leader, other):
        assert (await store.heartbeat(member.incarnation, member)).cancelling
    await store.finish(other, Outcome.CANCELLED)
    forced = await store.cancel(leader.operation_id, force=True)
    assert forced is not None
    assert [push.incarnation for push in forced.pushes] == [leader.incarnation]


async def expire_one(store: Store, member: Held) -> None:
    sql = "UPDATE holds SET lease_expires_at = now() - interval '1 s' WHERE incarnation = :i AND ended_at IS NULL"
    await store.execute(sql, i=member.incarnation)


@pytest.mark.parametrize("who", [0, 1])
async def test_one_lease_that_expires_ends_it_for_all(store: Store, who: int) -> None:
    members = await pair(store)
    members[0] = await store.report(members[0], started(), saved(members[0], 0), saved(members[0], 5))
    assert await store.lose(members[0]) is None
    await expire_one(store, members[who])
    assert await store.lose(members[0]) is Status.PENDING
    assert not await live_holds(store)
    with pytest.raises(OpsError, match="has ended"):
        await store.report(members[0], losses((5, 1.0)))


async def test_what_a_leader_that_has_finished_saved_is_progress(store: Store) -> None:
    leader, other = await pair(store)
    await store.execute("UPDATE operations SET lost_without_progress = 2")
    leader = await store.report(leader, started(), saved(leader, 0), saved(leader, 5))
    await store.finish(leader, Outcome.PREEMPTED)
    await expire_one(store, other)
    assert await store.lose(other) is Status.PENDING


async def test_the_lease_of_a_member_that_has_finished_is_nothing(store: Store) -> None:
    leader, other = await pair(store)
    await expire_one(store, leader)
    await store.finish(leader, Outcome.COMPLETED)
    assert await store.lose(leader) is None
    await store.finish(other, Outcome.COMPLETED)
    assert (await store.get(leader.operation_id)).status is Status.COMPLETED


async def test_a_member_that_refuses_takes_it_back_though_another_reports_already(store: Store) -> None:
    await worker(store, "a")
    await worker(store, "b", 2)
    await gang(store, 3, max_retries=0)
    claim = await claimed(store)
    leader, other = holds_of(claim)
    leader = await store.report(leader, started(), saved(leader, 0))

    assert await store.refuse(claim, rest_s=3600, member=1) is Status.PENDING

    operation = await store.get(claim.operation_id)
    assert (operation.status, operation.failures) == (Status.PENDING, 0)
    [attempt] = await store.attempts(claim.operation_id)
    assert attempt.outcome is Outcome.REFUSED
    rests = await store.fetch("SELECT incarnation FROM slots WHERE rests_until > now()")
    assert {row.incarnation for row in rests} == {other.incarnation}
    with pytest.raises(OpsError, match="has ended"):
        await store.report(leader, losses((0, 1.0)))


async def test_one_that_reports_already_cannot_refuse(store: Store) -> None:
    await worker(store, "a", 1)
    await worker(store, "b", 1)
    await gang(store, 2)
    claim = await claimed(store)
    await store.report(holds_of(claim)[0], started())
    assert await store.refuse(claim, member=0) is None
    assert len(await live_holds(store)) == 2


async def test_a_refusal_while_it_is_cancelled_leaves_the_others_exit_unconfirmed(store: Store) -> None:
    await worker(store, "a", 1)
    await worker(store, "b", 1)
    await gang(store, 2)
    claim = await claimed(store)
    await store.cancel(claim.operation_id)
    assert await store.refuse(claim, member=1) is Status.CANCELLED
    assert (await store.get(claim.operation_id)).exit_unconfirmed


async def newest_event(store: Store, id: UUID) -> str:
    async with store.sessions.begin() as session:
        return (await queries.events(session, id, 0)).items[-1].message


@pytest.mark.parametrize("who", [0, 1])
async def test_the_event_names_the_member_that_ended_the_attempt(store: Store, who: int) -> None:
    name = "ab"[who]
    await worker(store, "a", 2)
    await worker(store, "b")
    id = await gang(store, 3)
    claim = await claimed(store)
    assert [len(member.slots) for member in claim.members] == [2, 1]
    await store.refuse(claim, member=who)
    assert (await newest_event(store, id)).startswith(f"{name} did not take attempt 1: busy")
    members = await next_pair(store)
    await store.finish(members[who], Outcome.PREEMPTED, error=BOOM)
    assert (await newest_event(store, id)).startswith(f"attempt 2 was handed back by {name}: boom")
    members = await next_pair(store)
    await expire_one(store, members[who])
    await store.lose(members[0])
    assert (await newest_event(store, id)).startswith(f"{name} was lost with attempt 3")


async def test_of_a_gang_that_is_handed_back_in_order_the_leader_is_named(store: Store) -> None:
    leader, other = await pair(store)
    await store.finish(leader, Outcome.PREEMPTED)
    await store.finish(other, Outcome.PREEMPTED)
    [event] = await store.fetch("SELECT detail FROM events WHERE name = 'preempt'")
    assert "member" not in event.detail


async def test_of_two_that_are_lost_the_first_is_named_and_none_that_had_finished(store: Store) -> None:
    for name in ("a", "b", "c"):
        await worker(store, name)
    await gang(store, 3)
    members = holds_of(await claimed(store))
    for ago_s, member in zip((9, 5, 7), members, strict=True):
        sql = "UPDATE holds SET lease_expires_at = now() - make_interval(secs => :s) WHERE incarnation = :i"
        await store.execute(sql, s=float(ago_s), i=member.incarnation)
    await store.finish(members[0], Outcome.COMPLETED)
    await store.lose(members[1])
    assert (await newest_event(store, members[0].operation_id)).startswith("c was lost")


async def test_forty_concurrent_resumes_of_a_gang_make_one(store: Store) -> None:
    members = await pair(store)
    members[0] = await store.report(members[0], started(), saved(members[0], 0))
    id = members[0].operation_id
    await store.cancel(id)
    await at_once(*(store.finish(each, Outcome.CANCELLED) for each in members))

    answers = await at_once(*(store.resume(id) for _ in range(40)))

    assert sum(answer is not None for answer in answers) == 1
    got = [c for c in await at_once(*(store.claim() for _ in range(10))) if c is not None]
    assert [(c.attempt, c.world_size) for c in got] == [(2, 2)]


async def test_a_corrupt_checkpoint_of_any_member_is_marked(store: Store) -> None:
    members = await pair(store)
    members[0] = await store.report(members[0], started(), saved(members[0], 0), saved(members[0], 4))
    await expire_one(store, members[1])
    await store.lose(members[0])
    members = await next_pair(store)
    await store.finish(members[1], Outcome.CHECKPOINT_CORRUPT, error={"code": "checkpoint_corrupt", "message": "m"})
    rows = await store.fetch("SELECT step, status FROM checkpoints ORDER BY step")
    assert [row.status for row in rows] == [CheckpointStatus.COMMITTED, CheckpointStatus.CORRUPT]
    assert (await store.get(members[0].operation_id)).status is Status.PENDING


# ---- what is read of it


async def test_progress_is_the_leaders(store: Store) -> None:
    leader, other = await pair(store)
    await store.report(leader, started(), progress=Progress(step=7, steps_total=10))
    await store.report(other, Standing(), progress=Progress(step=3, steps_total=10))
    operation = await store.get(leader.operation_id)
    assert operation.progress is not None
    assert operation.progress.step == 7


async def test_each_slot_of_a_gang_says_what_it_runs(store: Store) -> None:
    leader, _ = await pair(store)
    async with store.sessions.begin() as session:
        seen = (await catalog.workers(session, 60.0)).items
    assert [slot.operation_id for each in seen for slot in each.slots] == 2 * [leader.operation_id]


async def test_joules_are_summed_over_members_and_steps_and_units_count_once(store: Store) -> None:
    await worker(store, "a", 2)
    await worker(store, "b", 2)
    id = await gang(store, 4)
    leader, other = holds_of(await claimed(store))
    leader = await store.report(leader, started(), saved(leader, 0))
    for member in (leader, other):
        for device in ("GPU-1", "GPU-2"):
            trained = window(1, Use.TRAIN, (0, 10), device=device, units=320)
            await store.book(member, trained, window(2, Use.SAVE, (10, 10), device=device))
    for member in (leader, other):
        await store.finish(member, Outcome.COMPLETED)

    ledger = await store.energy(id)

    assert ledger.total.energy_j == 800.0
    assert (ledger.per_work.steps, ledger.per_work.units) == (10, 320)
    assert ledger.per_work.per_step_j == 40.0
    [attempt] = ledger.attempts
    assert (attempt.steps, attempt.units, attempt.duration_s) == (10, 320, 2.0)
    assert len(ledger.devices) == 4
    [view] = await store.attempts(id)
    assert view.energy_j == 800.0


async def test_a_deleted_gang_takes_its_rows_along(store: Store) -> None:
    leader, other = await pair(store)
    for member in (leader, other):
        await store.book(member, window(1))
        await store.finish(member, Outcome.COMPLETED)
    async with store.sessions.begin() as session:
        assert await deletion.delete_if_ended(session, leader.operation_id)
    assert await store.fetch("SELECT attempt FROM holds") == []
    assert await store.fetch("SELECT attempt FROM energy_windows") == []


# ---- what it costs


async def test_with_no_free_slot_the_queue_is_not_walked(store: Store) -> None:
    await worker(store, "a", 2)
    await gang(store, 2)
    await claimed(store)
    await gang(store, 2)
    for _ in range(5):
        await store.submit()
    rows = await store.fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) {claims.CLAIM.text}", lease_s=60.0)
    queue = [node for node in _nodes(rows[0][0][0]["Plan"]) if node.get("Relation Name") == "operations"]
    assert queue
    assert not any(node["Actual Loops"] and node["Actual Rows"] for node in queue)


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan] + [node for child in plan.get("Plans", []) for node in _nodes(child)]
