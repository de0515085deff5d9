"""Deleting operations: all of it goes or nothing, and who needs it wins or finds it gone."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID

import pytest

from helpers.store import LEASE_S, Held, Store, at_once, losses, saved, started
from ops_backend.orphans import OrphanSweeper
from ops_backend.routes import cleanup
from ops_backend.store import curves, deletion, fork, log_files, queries
from ops_backend.store.identities import Identity
from ops_backend.store.submit import Fleet, Submission
from ops_backend.sweeper import Sweeper
from ops_contract.cleanup import Cleanup, CleanupRequest
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Outcome, Status
from ops_contract.operations import ForkRequest
from ops_contract.reports import ArtifactSaved, LogChunk, Note
from ops_contract.tokens import Scope

TABLES = ("events", "metrics", "logs", "artifacts", "checkpoints", "holds", "attempts")

PRINTED = LogChunk.of(b"hello")


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    root = tmp_path / "storage"
    root.mkdir()
    return root


@pytest.fixture
async def run(store: Store) -> Callable[..., Awaitable[Held]]:
    """Makes an operation that ended so, with a checkpoint, a metric, a note, and a model where it completed."""
    await store.worker(slots=40)

    async def run(outcome: Outcome = Outcome.COMPLETED, **spec: Any) -> Held:
        held = await store.running(**spec)
        path = f"{held.operation_id}/1-2-model/model.safetensors"
        model = ArtifactSaved(
            artifact_id=held.operation_id, name="model.safetensors", step=2, path=path, size_bytes=10, sha256="0" * 64
        )
        left = [model] if outcome is Outcome.COMPLETED else []
        held = await store.report(held, started(), losses((0, 1.0)), saved(held, 1), Note(message="hm"), *left, PRINTED)
        if outcome is Outcome.CANCELLED:
            await store.cancel(held.operation_id)
        return await store.finish(held, outcome, permanent=outcome is Outcome.FAILED)

    return run


async def delete(store: Store, id: UUID) -> bool:
    async with store.sessions.begin() as session:
        return await deletion.delete_if_ended(session, id)


async def refusal(store: Store, id: UUID) -> OpsError:
    async with store.sessions.begin() as session:
        return await deletion.explain_delete(session, id)


async def clean(store: Store, **wanted: Any) -> Cleanup:
    wish = CleanupRequest.model_validate({"older_than_s": 0} | wanted)
    return await cleanup.cleanup(wish, store.sessions, Identity("me", Scope.ADMIN), AsyncMock())


async def exists(store: Store, id: UUID) -> bool:
    return bool(await store.fetch("SELECT 1 FROM operations WHERE id = :id", id=id))


async def somebody_waits(store: Store) -> None:
    """Until a statement of this database waits for a lock."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    while not await store.fetch(waiting):
        pass


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.FAILED, Outcome.CANCELLED])
async def test_all_rows_go_and_every_read_is_404(store: Store, run: Any, outcome: Outcome) -> None:
    id, other = (await run(outcome)).operation_id, (await run(outcome)).operation_id
    before = [len(await store.fetch(f"SELECT 1 FROM {table} WHERE operation_id = :id", id=other)) for table in TABLES]

    assert await delete(store, id)

    for read in (queries.get, queries.attempts, curves.names, queries.checkpoints, queries.artifacts):
        with pytest.raises(OpsError, match="no operation"):
            async with store.sessions.begin() as session:
                await read(session, id)
    for table, kept in zip(TABLES, before, strict=True):
        assert not await store.fetch(f"SELECT 1 FROM {table} WHERE operation_id = :id", id=id), table
        assert len(await store.fetch(f"SELECT 1 FROM {table} WHERE operation_id = :id", id=other)) == kept
    assert not await delete(store, id)
    assert (await refusal(store, id)).code is ErrorCode.NOT_FOUND


async def test_a_live_one_is_refused_with_what_to_do(store: Store, run: Any) -> None:
    running = await store.running()
    pending = await store.submit()
    cancelling = await store.running() if await store.cancel(pending) else running
    await store.cancel(cancelling.operation_id)

    for id, status in ((running.operation_id, "running"), (cancelling.operation_id, "cancelling")):
        assert not await delete(store, id)
        why = await refusal(store, id)
        assert (why.code, why.http_status, why.details["status"]) == (ErrorCode.NOT_DELETABLE, 409, status)
        assert "cancel" in why.message
    assert await delete(store, pending)


async def test_one_that_forks_or_replays_need_stays_until_they_are_deleted(store: Store, run: Any) -> None:
    id = (await run(Outcome.FAILED)).operation_id
    forked, replayed = await store.fork(id), await store.replay(id, from_checkpoint=None)
    assert forked
    assert replayed
    for child in (forked, replayed):
        await store.cancel(child)  # one that has ended can be resumed, and needs it too

    assert not await delete(store, id)
    assert set((await refusal(store, id)).details["needed_by"]) == {str(forked), str(replayed)}

    assert await delete(store, forked)
    assert not await delete(store, id)
    assert await delete(store, replayed)
    assert await delete(store, id)


async def test_a_fork_that_is_being_made_is_waited_for_and_wins(store: Store, run: Any) -> None:
    id = (await run()).operation_id
    async with store.sessions.begin() as session:
        await fork.fork_if_there(session, id, ForkRequest(), Submission("me", None, b"{}"), Fleet(LEASE_S))
        deleting = asyncio.create_task(delete(store, id))
        await somebody_waits(store)

    assert not await deleting
    assert await exists(store, id)


async def test_of_a_deletion_and_a_resume_or_fork_one_wins(store: Store, run: Any) -> None:
    for _ in range(4):
        first, second = (await run(Outcome.CANCELLED)).operation_id, (await run()).operation_id
        deleted, resumed, gone, forked = await at_once(
            delete(store, first), store.resume(first), delete(store, second), store.fork(second)
        )
        assert deleted is (resumed is None)
        assert await exists(store, first) is not deleted
        assert gone is isinstance(forked, OpsError)
        if gone:
            assert forked.http_status == 404


async def test_of_many_deletions_one_wins(store: Store, run: Any) -> None:
    id = (await run()).operation_id
    assert sorted(await at_once(*(delete(store, id) for _ in range(8)))) == [False] * 7 + [True]


async def test_the_files_go_after_the_rows_and_a_crash_in_between_is_found_again(
    store: Store, run: Any, storage: Path
) -> None:
    id, other = (await run()).operation_id, (await run()).operation_id
    for owner in (id, other):
        for name in ("1-1", "1-2-model", "logs"):
            (storage / str(owner) / name).mkdir(parents=True)
            (storage / str(owner) / name / "file").write_text("x")
    await delete(store, id)
    unswept = "SELECT 1 FROM deletions WHERE operation_id = :id AND swept_at IS NULL"

    await Sweeper(store.sessions, storage / "not mounted", 1.0).sweep()
    assert await store.fetch(unswept, id=id)

    await Sweeper(store.sessions, storage, 1.0).sweep()
    assert not (storage / str(id)).exists()
    assert len(list((storage / str(other)).iterdir())) == 3
    assert not await store.fetch(unswept, id=id)


async def test_a_zombie_is_told_and_what_it_publishes_later_goes(store: Store, run: Any, storage: Path) -> None:
    """Scenario 15, after the operation it worked for was deleted."""
    zombie = await run(Outcome.FAILED)
    await delete(store, zombie.operation_id)
    await Sweeper(store.sessions, storage, 1.0).sweep()

    with pytest.raises(OpsError) as told:
        await store.report(zombie, saved(zombie, 5))
    assert told.value.code is ErrorCode.NOT_FOUND
    assert (await store.heartbeat(zombie.incarnation, zombie)).ended

    (storage / str(zombie.operation_id) / "1-5").mkdir(parents=True)
    await OrphanSweeper(store.sessions, storage, 1.0).sweep()
    assert not (storage / str(zombie.operation_id) / "1-5").exists()


async def test_logs_that_are_being_written_are_waited_for(store: Store, run: Any) -> None:
    id = (await run()).operation_id
    async with store.sessions.begin() as session:
        assert await log_files.read_if_unlogged(session, id)
        deleting = asyncio.create_task(delete(store, id))
        await somebody_waits(store)
        assert await exists(store, id)
    assert await deleting


async def test_its_idempotency_key_is_free_again(store: Store) -> None:
    await store.worker()
    id = await store.submit(key="k")
    await store.cancel(id)
    await delete(store, id)
    assert await store.submit(key="k") != id


async def test_cleanup_says_what_would_go_and_then_does_it(store: Store, run: Any) -> None:
    old = (await run(Outcome.FAILED, labels={"team": "a"})).operation_id
    done = (await run(labels={"team": "b"})).operation_id
    young = (await run()).operation_id
    running = (await store.running()).operation_id
    await store.execute("UPDATE operations SET ended_at = ended_at - interval '31 days' WHERE id <> :id", id=young)
    month = {"older_than_s": 30 * 86_400}

    preview = await clean(store, **month)

    assert {item.id: (item.goes, item.size_bytes) for item in preview.items} == {old: ("all", 1), done: ("all", 11)}
    assert preview.size_bytes == 12
    for narrowed, expected in (({"status": ["failed"]}, [old]), ({"label": "team=b"}, [done]), ({"label": "x"}, [])):
        assert [item.id for item in (await clean(store, **month, **narrowed)).items] == expected
    assert all([await exists(store, id) for id in (old, done, young, running)])

    assert (await clean(store, **month, dry_run=False)).size_bytes == 12
    assert [await exists(store, id) for id in (old, done, young, running)] == [False, False, True, True]
    assert (await clean(store, **month, dry_run=False)).items == []


async def test_cleanup_takes_forks_before_what_they_begin_at(
    store: Store, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "DELETED_A_CALL", 1)
    parent, needed = (await run(Outcome.FAILED)).operation_id, (await run(Outcome.FAILED)).operation_id
    ended, live = await store.fork(parent), await store.fork(needed)
    assert ended
    assert live
    await store.cancel(ended)

    first = await clean(store, dry_run=False)

    goes = {item.id: item.goes for item in first.items}
    assert (goes, first.more) == ({ended: "all", needed: "nothing"}, True)
    assert str(live) in str(next(item.reason for item in first.items if item.id == needed))
    second = await clean(store, dry_run=False)
    assert ({item.id for item in second.items}, second.more) == ({parent, needed}, False)
    assert [await exists(store, id) for id in (parent, ended, needed, live)] == [False, False, True, True]


async def test_with_keep_model_only_checkpoints_go_where_there_is_a_model(store: Store, run: Any) -> None:
    model, none = (await run()).operation_id, (await run(Outcome.FAILED)).operation_id

    items = {item.id: item for item in (await clean(store, keep_model=True, dry_run=False)).items}

    assert (items[model].goes, items[model].size_bytes, items[none].goes) == ("checkpoints", 1, "all")
    assert await store.fetch("SELECT 1 FROM checkpoints WHERE operation_id = :id AND status = 'deleting'", id=model)
    assert await store.fetch("SELECT 1 FROM artifacts WHERE operation_id = :id", id=model)
    assert (await store.get(model)).status is Status.COMPLETED
    assert (await clean(store, keep_model=True)).items == []


async def test_what_is_needed_since_the_plan_stays_and_what_is_gone_is_not_said(
    store: Store, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed, gone = (await run(Outcome.FAILED)).operation_id, (await run(Outcome.FAILED)).operation_id
    plan = deletion.cleanup_plan

    async def planned_too_early(*arguments: Any) -> Any:
        found = await plan(*arguments)
        await store.resume(resumed)
        await delete(store, gone)
        return found

    monkeypatch.setattr(cleanup, "cleanup_plan", planned_too_early)
    [item] = (await clean(store, dry_run=False)).items
    assert (item.id, item.goes, item.size_bytes) == (resumed, "nothing", 0)
    assert "pending" in str(item.reason)
