"""Forks on real Postgres: where they begin, what they are refused, and who wins against retention."""

import asyncio
from uuid import UUID

import pytest
from sqlalchemy import text

from helpers.store import Held, Store, at_once, held, losses, saved, started
from ops_backend.store import curves, queries
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import CheckpointView
from ops_contract.lifecycle import CheckpointStatus, Outcome, Status

RETIRE = """
    UPDATE checkpoints SET status = 'deleting' WHERE id = :id AND status = 'committed' AND pinned_at IS NULL
"""


async def parent_of(store: Store, *steps: int, end: Outcome | None = Outcome.COMPLETED) -> Held:
    """A run with a checkpoint at each of these steps."""
    await store.worker(slots=8)
    run = await store.running(execution={"max_epochs": 5, "learning_rate": 0.25}, labels={"team": "a"}, priority=3)
    run = await store.report(run, started(), *(saved(run, step) for step in steps))
    return await store.finish(run, end) if end else run


async def checkpoints(store: Store, id: UUID) -> list[CheckpointView]:
    async with store.sessions.begin() as session:
        return (await queries.checkpoints(session, id)).items


async def claimed(store: Store, id: UUID) -> Held:
    claim = await store.claim()
    assert claim is not None
    assert claim.operation_id == id
    return held(claim)


async def test_a_fork_is_a_new_operation_from_the_newest_checkpoint(store: Store) -> None:
    parent = await parent_of(store, 0, 10, 20)
    before = await store.get(parent.operation_id)

    id = await store.fork(parent.operation_id, overrides={"execution": {"max_epochs": 9}, "labels": {"x": "y"}})

    assert id is not None
    fork, newest = await store.get(id), (await checkpoints(store, parent.operation_id))[-1]
    assert (fork.status, fork.attempt, fork.priority, fork.labels) == ("pending", 0, 3, {"team": "a", "x": "y"})
    assert (fork.job.execution.max_epochs, fork.job.execution.learning_rate) == (9, 0.25)
    assert fork.forked_from is not None
    assert fork.forked_from.model_dump() == {
        "operation_id": parent.operation_id,
        "checkpoint_id": newest.id,
        "step": 20,
    }
    [(name, detail)] = await store.fetch("SELECT name, detail FROM events WHERE operation_id = :id", id=id)
    assert (name, detail["forked_from"]["checkpoint_id"]) == ("submit", str(newest.id))
    assert await store.fetch("SELECT 1 FROM checkpoints WHERE id = :id AND pinned_at IS NOT NULL", id=newest.id)
    assert await store.get(parent.operation_id) == before


@pytest.mark.parametrize("end", [None, Outcome.COMPLETED, Outcome.PREEMPTED])
async def test_an_operation_of_any_status_is_forked(store: Store, end: Outcome | None) -> None:
    parent = await parent_of(store, 0, 10, end=end)

    assert await store.fork(parent.operation_id) is not None


async def test_the_claim_hands_out_the_parents_checkpoint_until_there_is_an_own_one(store: Store) -> None:
    parent = await parent_of(store, 0, 10, 20)
    id = await store.fork(parent.operation_id, overrides={"execution": {"learning_rate": 0.5}})
    assert id is not None
    point = (await checkpoints(store, parent.operation_id))[-1]

    first = await store.claim()
    assert first is not None
    assert first.checkpoint is not None
    assert first.parent_job is not None
    assert (first.checkpoint.checkpoint_id, first.checkpoint.path) == (point.id, point.path)
    assert (first.job.execution.learning_rate, first.parent_job.execution.learning_rate) == (0.5, 0.25)
    run = await store.report(held(first), started(20), losses((20, 1.0)))
    await store.finish(run, Outcome.FAILED)
    second = await store.claim()
    assert second is not None
    assert second.checkpoint == first.checkpoint
    assert second.parent_job == first.parent_job
    run = await store.report(held(second), started(20), losses((20, 1.0), (21, 2.0)), saved(held(second), 22))
    await store.finish(run, Outcome.FAILED)
    third = await store.claim()
    assert third is not None
    assert third.checkpoint is not None
    assert (third.checkpoint.step, third.parent_job) == (22, None)

    fork = await store.get(id)
    assert [(e.start_step, e.end_step) for e in fork.lineage] == [(20, 20), (20, 22), (22, None)]
    assert [(c.operation_id, c.step) for c in await checkpoints(store, id)] == [(parent.operation_id, 20), (id, 22)]
    async with store.sessions.begin() as session:
        points = (await curves.read(session, id, "loss")).points
    assert points == [(20, 1.0), (21, 2.0)]


async def test_what_a_fork_accepts_is_for_its_own_attempts_until_a_checkpoint(store: Store) -> None:
    parent = await parent_of(store, 0, 10)
    assert await store.fork(parent.operation_id, accept_changes=True) is not None

    first = await store.claim()
    assert first is not None
    run = await store.report(held(first), started(10), saved(held(first), 11))
    await store.finish(run, Outcome.PREEMPTED)
    second = await store.claim()

    assert second is not None
    assert (first.accept_changes, second.accept_changes) == (True, False)


async def test_a_fork_without_a_checkpoint_of_its_own_is_resumed_from_its_parents(store: Store) -> None:
    parent = await parent_of(store, 0, 10)
    id = await store.fork(parent.operation_id)
    assert id is not None
    await store.cancel(id)

    accepted = await store.resume(id)

    assert accepted is not None
    assert accepted.resumed_from.step == 10
    run = await claimed(store, id)
    assert (await store.fetch("SELECT start_step FROM attempts WHERE operation_id = :id", id=id))[0][0] == 10
    await store.finish(run, Outcome.PREEMPTED)


async def test_a_branch_left_behind_is_forked_though_it_cannot_be_resumed(store: Store) -> None:
    parent = await parent_of(store, 0, 10, 20, end=Outcome.FAILED)
    [old, left] = [c.id for c in await checkpoints(store, parent.operation_id) if c.step > 0]
    await store.execute("UPDATE operations SET status = 'failed', ended_at = now(), not_before = NULL")
    assert await store.resume(parent.operation_id, old)
    second = await claimed(store, parent.operation_id)
    await store.report(second, started(10), saved(second, 11))

    id, newest = await store.fork(parent.operation_id, from_checkpoint=left), await store.fork(parent.operation_id)

    assert id is not None
    assert newest is not None
    for fork, step in ((id, 20), (newest, 11)):
        assert (await store.get(fork)).forked_from.step == step  # type: ignore[union-attr]
        await claimed(store, fork)
        sql = "SELECT start_step FROM attempts WHERE operation_id = :id"
        assert (await store.fetch(sql, id=fork))[0][0] == step
    assert [c.in_lineage for c in await checkpoints(store, id)] == [True]


async def test_forks_of_a_corrupt_checkpoint_fail_and_never_begin_at_0(store: Store) -> None:
    parent = await parent_of(store, 0, 10)
    first, second = await store.fork(parent.operation_id), await store.fork(parent.operation_id)
    assert first is not None
    assert second is not None

    for id in (first, second):
        run = await claimed(store, id)
        claimed_at = "SELECT start_step FROM attempts WHERE operation_id = :id"
        assert (await store.fetch(claimed_at, id=id))[0][0] == 10
        await store.finish(run, Outcome.CHECKPOINT_CORRUPT, error={"code": "checkpoint_corrupt", "message": "bits"})

        fork = await store.get(id)
        assert (fork.status, fork.error.code) == (Status.FAILED, "checkpoint_corrupt")  # type: ignore[union-attr]
        assert await store.resume(id) is None
    assert [c.status for c in await checkpoints(store, parent.operation_id)] == ["committed", "corrupt"]
    third = await store.fork(parent.operation_id)
    assert third is not None
    assert (await store.get(third)).forked_from.step == 0  # type: ignore[union-attr]


async def test_a_fork_with_a_corrupt_checkpoint_of_its_own_falls_back_to_its_parents(store: Store) -> None:
    parent = await parent_of(store, 0, 10)
    id = await store.fork(parent.operation_id)
    assert id is not None
    run = await claimed(store, id)
    run = await store.report(run, started(10), saved(run, 12))
    await store.finish(run, Outcome.PREEMPTED)

    await store.finish(await claimed(store, id), Outcome.CHECKPOINT_CORRUPT)

    assert (await store.get(id)).status is Status.PENDING
    claim = await store.claim()
    assert claim is not None
    assert claim.checkpoint is not None
    assert (claim.checkpoint.step, claim.parent_job is not None) == (10, True)


async def test_a_fork_of_a_fork_without_own_checkpoints_begins_at_the_same_one(store: Store) -> None:
    parent = await parent_of(store, 0, 10)
    child = await store.fork(parent.operation_id, overrides={"execution": {"learning_rate": 0.5}})
    assert child is not None

    grandchild = await store.fork(child)

    assert grandchild is not None
    made = await store.get(grandchild)
    assert made.forked_from is not None
    assert (made.forked_from.operation_id, made.job.execution.learning_rate) == (parent.operation_id, 0.5)


@pytest.mark.parametrize("gone", [CheckpointStatus.DELETING, CheckpointStatus.CORRUPT])
async def test_a_checkpoint_that_is_not_committed_is_not_forked(store: Store, gone: CheckpointStatus) -> None:
    parent = await parent_of(store, 10)
    [point] = await checkpoints(store, parent.operation_id)
    await store.execute("UPDATE checkpoints SET status = :status", status=gone)

    for wish in ({}, {"from_checkpoint": point.id}):
        with pytest.raises(OpsError) as refused:
            await store.fork(parent.operation_id, **wish)
        assert refused.value.code is ErrorCode.NO_CHECKPOINT
    assert len(await store.fetch("SELECT 1 FROM operations")) == 1


async def test_a_checkpoint_of_a_stranger_is_not_forked(store: Store) -> None:
    one = await parent_of(store, 10)
    other = await parent_of(store, 20)
    [theirs] = await checkpoints(store, other.operation_id)

    with pytest.raises(OpsError) as refused:
        await store.fork(one.operation_id, from_checkpoint=theirs.id)
    assert refused.value.code is ErrorCode.NO_CHECKPOINT


async def test_a_fork_that_waited_for_retention_is_refused(store: Store) -> None:
    """Scenario 27: the row is locked by a retirement that commits while the fork waits."""
    parent = await parent_of(store, 10)
    [point] = await checkpoints(store, parent.operation_id)
    async with store.sessions.begin() as retention:
        await retention.execute(text(RETIRE), {"id": point.id})
        fork = asyncio.create_task(store.fork(parent.operation_id))
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        while not await store.fetch(waiting):
            assert not fork.done()
        await retention.commit()
    with pytest.raises(OpsError) as refused:
        await fork
    assert refused.value.code is ErrorCode.NO_CHECKPOINT
    assert len(await store.fetch("SELECT 1 FROM operations")) == 1


async def test_forks_racing_with_retention_have_their_checkpoint_or_are_not_made(store: Store) -> None:
    """Scenario 27."""
    parent = await parent_of(store, *range(10, 30))
    for point in await checkpoints(store, parent.operation_id):
        forks = [store.fork(parent.operation_id, from_checkpoint=point.id) for _ in range(3)]
        answers = await at_once(forks[0], store.execute(RETIRE, id=point.id), *forks[1:])

        made = [a for a in answers if isinstance(a, UUID)]
        refused = [a.code for a in answers if isinstance(a, OpsError)]
        assert len(made) + len(refused) == 3
        assert set(refused) <= {ErrorCode.NO_CHECKPOINT}
        [(status,)] = await store.fetch("SELECT status FROM checkpoints WHERE id = :id", id=point.id)
        assert status == "committed" or not made
    sql = """SELECT 1 FROM operations o JOIN checkpoints c ON c.id = o.forked_from_checkpoint_id
              WHERE c.status <> 'committed'"""
    assert await store.fetch(sql) == []


async def test_the_same_key_from_twenty_clients_makes_one_fork(store: Store) -> None:
    parent = await parent_of(store, 10)

    answers = await at_once(*(store.fork(parent.operation_id, key="k") for _ in range(20)))

    assert [isinstance(a, UUID) for a in answers if a is not None] == [True]
    assert len(await store.fetch("SELECT 1 FROM operations")) == 2
