"""Which checkpoints are kept, on real Postgres; and that nobody resumes from one that goes."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from helpers.store import LEASE_S, TOY, Held, Store, at_once, held, saved, started
from ops_backend.store import fork, queries, retention, transitions
from ops_backend.store.submit import Fleet, Submission
from ops_backend.sweeper import Sweeper
from ops_contract.lifecycle import Outcome, Status
from ops_contract.operations import ForkRequest

LOSS = TOY.model_copy(update={"reports": {"val_loss": "min"}})
NAN = float("nan")


@pytest.fixture
async def run(store: Store) -> Callable[..., Awaitable[Held]]:
    """Starts an operation with these knobs."""
    await store.worker(slots=40, workloads=[LOSS])

    async def run(**execution: Any) -> Held:
        return await store.running(execution=execution)

    return run


async def commit(store: Store, run: Held, *values: tuple[int, float | None]) -> Held:
    """A checkpoint a step, each with its monitored value."""
    for step, value in values:
        run = await store.report(run, saved(run, step, monitored=value))
    return run


async def kept(store: Store, run: Held) -> list[int]:
    sql = "SELECT step FROM checkpoints WHERE operation_id = :id AND status = 'committed' ORDER BY step"
    return [row.step for row in await store.fetch(sql, id=run.operation_id)]


async def again(store: Store, run: Held) -> Held:
    """Its next attempt, after this one was lost."""
    await store.expire(run)
    await store.lose(run)
    claim = await store.claim()
    assert claim is not None
    return held(claim)


async def release(store: Store) -> None:
    async with store.sessions.begin() as session:
        await retention.release(session)


async def test_of_a_metric_that_improves_the_best_two_and_the_last_remain(store: Store, run: Any) -> None:
    attempt = await run(checkpoint_save_top_k=2)

    attempt = await commit(store, attempt, (0, None), (10, 0.5), (20, 0.4), (30, 0.3), (40, 0.2), (45, None))

    assert await kept(store, attempt) == [30, 40, 45]
    attempt = await commit(store, attempt, (50, 0.1))
    await store.finish(attempt, Outcome.COMPLETED)
    assert await kept(store, attempt) == [40, 50]


@pytest.mark.parametrize(
    ("execution", "values", "expected"),
    [
        ({}, [(0, None), (10, 0.5), (20, 0.6)], [0, 10, 20]),
        ({"checkpoint_save_top_k": 0}, [(0, None), (10, 0.5), (20, 0.6)], [20]),
        ({"checkpoint_save_top_k": 1}, [(0, None)], [0]),
        ({"checkpoint_save_top_k": 1}, [(0, None), (10, 0.1), (20, 0.2), (30, 0.3)], [10, 30]),
        ({"checkpoint_save_top_k": 1}, [(10, 0.1), (20, 0.1), (30, 0.1)], [10, 30]),
        (
            {"checkpoint_save_top_k": 1, "checkpoint_mode": "max"},
            [(10, 0.1), (20, 0.2), (30, 0.1), (40, None)],
            [20, 40],
        ),
        ({"checkpoint_save_top_k": 2, "checkpoint_mode": "max"}, [(10, 0.1), (20, NAN), (30, None)], [10, 30]),
        ({"checkpoint_save_top_k": 2}, [(10, 0.1), (20, NAN), (30, None)], [10, 30]),
    ],
)
async def test_what_is_kept(
    store: Store, run: Any, execution: dict[str, Any], values: list[tuple[int, float | None]], expected: list[int]
) -> None:
    attempt = await commit(store, await run(**execution), *values)
    assert await kept(store, attempt) == expected


async def test_without_save_last_the_last_goes_once_nobody_can_resume_from_it(store: Store, run: Any) -> None:
    attempt = await run(checkpoint_save_top_k=1, checkpoint_save_last=False)
    attempt = await commit(store, attempt, (10, 0.1), (20, 0.2))
    assert await kept(store, attempt) == [10, 20]

    await store.finish(attempt, Outcome.COMPLETED)

    assert await kept(store, attempt) == [10]


async def test_top_k_is_of_the_lineage_and_survives_a_resume(store: Store, run: Any) -> None:
    """Scenario 12. What a resume left behind is as good as it may be: it counts no more."""
    attempt = await run(checkpoint_save_top_k=2)
    old = saved(attempt, 20, monitored=0.4)
    attempt = await store.report(attempt, saved(attempt, 10, monitored=0.5), old, saved(attempt, 30, monitored=0.1))
    await store.cancel(attempt.operation_id)
    await store.finish(attempt, Outcome.CANCELLED)
    assert await kept(store, attempt) == [20, 30]
    assert await store.resume(attempt.operation_id, old.checkpoint_id) is not None
    claim = await store.claim()
    assert claim is not None

    resumed = await commit(store, held(claim), (31, 0.45), (32, 0.6))

    assert await kept(store, resumed) == [20, 31, 32]


async def test_what_a_live_attempt_started_from_stays_until_it_is_over(store: Store, run: Any) -> None:
    attempt = await commit(store, await run(checkpoint_save_top_k=0), (10, None))
    attempt = await again(store, attempt)
    attempt = await commit(store, attempt, (20, None))
    await release(store)
    attempt = await commit(store, attempt, (30, None))
    assert await kept(store, attempt) == [10, 30]

    attempt = await again(store, attempt)
    await release(store)
    attempt = await commit(store, attempt, (40, None))
    assert await kept(store, attempt) == [30, 40]

    await store.finish(attempt, Outcome.COMPLETED)
    await release(store)
    assert await kept(store, attempt) == [40]


async def test_the_choice_of_a_resume_stays_pinned_while_it_stands(store: Store, run: Any) -> None:
    attempt = await commit(store, await run(), (10, None), (20, None))
    await store.cancel(attempt.operation_id)
    await store.finish(attempt, Outcome.CANCELLED)
    [first] = await store.fetch("SELECT id FROM checkpoints WHERE step = 10")
    await store.resume(attempt.operation_id, first.id)
    await store.cancel(attempt.operation_id)  # before any claim

    await release(store)

    assert [row.step for row in await store.fetch("SELECT step FROM checkpoints WHERE pinned_at IS NOT NULL")] == [10]


async def cancelled_with_surplus(store: Store, run: Any) -> tuple[UUID, UUID]:
    """A cancelled operation and its checkpoint of step 10, which its retention would give up now."""
    attempt = await run()
    surplus = saved(attempt, 10)
    attempt = await store.report(attempt, surplus, saved(attempt, 20))
    await store.cancel(attempt.operation_id)
    await store.finish(attempt, Outcome.CANCELLED)
    await store.execute("""UPDATE operations SET job = jsonb_set(job, '{execution,checkpoint_save_top_k}', '0')""")
    return attempt.operation_id, surplus.checkpoint_id


async def status_of(store: Store, checkpoint: UUID) -> str:
    [row] = await store.fetch("SELECT status FROM checkpoints WHERE id = :id", id=checkpoint)
    return str(row.status)


async def until_one_waits_for_a_lock(store: Store) -> None:
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    while not await store.fetch(waiting):  # noqa: ASYNC110 - what is awaited happens in Postgres
        await asyncio.sleep(0.005)


async def test_what_a_resume_has_just_chosen_is_not_retired(store: Store, run: Any) -> None:
    """Scenario 27."""
    id, surplus = await cancelled_with_surplus(store, run)
    async with store.sessions.begin() as resuming, store.sessions.begin() as retiring:
        assert await transitions.resume_if_ended(resuming, id, surplus) is not None
        retire = asyncio.create_task(retention.retire(retiring, id))
        await until_one_waits_for_a_lock(store)
        await resuming.commit()
        await retire
    await release(store)

    claim = await store.claim()

    assert claim is not None
    assert claim.checkpoint is not None
    assert claim.checkpoint.checkpoint_id == surplus
    assert await status_of(store, surplus) == "committed"


async def test_what_is_just_retired_is_not_resumed_from(store: Store, run: Any) -> None:
    id, surplus = await cancelled_with_surplus(store, run)
    async with store.sessions.begin() as resuming, store.sessions.begin() as retiring:
        await retention.retire(retiring, id)
        resume = asyncio.create_task(transitions.resume_if_ended(resuming, id, surplus))
        await until_one_waits_for_a_lock(store)
        await retiring.commit()
        assert await resume is None

    assert (await store.get(id)).status is Status.CANCELLED
    assert await status_of(store, surplus) == "deleting"


async def test_a_pin_renewed_while_the_old_one_is_being_cleared_holds(store: Store, run: Any) -> None:
    id, surplus = await cancelled_with_surplus(store, run)
    await store.execute("UPDATE checkpoints SET pinned_at = now() WHERE id = :id", id=surplus)
    async with store.sessions.begin() as resuming, store.sessions.begin() as clearing:
        assert await transitions.resume_if_ended(resuming, id, surplus) is not None
        clear = asyncio.create_task(retention.release(clearing))
        await until_one_waits_for_a_lock(store)
        await resuming.commit()
        await clear

    assert await store.fetch("SELECT 1 FROM checkpoints WHERE id = :id AND pinned_at IS NOT NULL", id=surplus)


async def test_many_resumes_and_retentions_at_once_agree(store: Store, run: Any) -> None:
    ended = [await cancelled_with_surplus(store, run) for _ in range(15)]

    async def retire(id: UUID) -> None:
        async with store.sessions.begin() as session:
            await retention.retire(session, id)

    calls = [call for id, surplus in ended for call in (retire(id), store.resume(id, surplus), release(store))]
    answers = await at_once(*calls)

    assert not [answer for answer in answers if isinstance(answer, BaseException)]
    for (_, surplus), resumed in zip(ended, answers[1::3], strict=True):
        assert await status_of(store, surplus) == ("deleting" if resumed is None else "committed")


async def corrupted(store: Store, run: Held, step: int) -> None:
    sql = "UPDATE checkpoints SET status = 'corrupt' WHERE operation_id = :id AND step = :step"
    await store.execute(sql, id=run.operation_id, step=step)


@pytest.mark.parametrize(
    ("top_k", "outcome", "expected"),
    [
        (1, Outcome.COMPLETED, "deleting"),
        (1, Outcome.CANCELLED, "corrupt"),
        (1, Outcome.FAILED, "corrupt"),
        (-1, Outcome.COMPLETED, "corrupt"),
    ],
)
async def test_corrupt_ones_stay_until_the_operation_is_completed_and_its_job_does_not_keep_all(
    store: Store, run: Any, top_k: int, outcome: Outcome, expected: str
) -> None:
    attempt = await run(checkpoint_save_top_k=top_k)
    attempt = await store.report(attempt, bad := saved(attempt, 10))
    await corrupted(store, attempt, 10)
    attempt = await commit(store, attempt, (20, None), (30, None))
    assert await status_of(store, bad.checkpoint_id) == "corrupt"
    if outcome is Outcome.CANCELLED:
        await store.cancel(attempt.operation_id)

    await store.finish(attempt, outcome, **({"permanent": True} if outcome is Outcome.FAILED else {}))

    assert await status_of(store, bad.checkpoint_id) == expected


async def delete(store: Store, run: Held, checkpoint: UUID) -> str:
    """The refusal, its code first; "" when it is deleted."""
    async with store.sessions.begin() as session:
        if await retention.delete_if_unused(session, run.operation_id, checkpoint):
            return ""
        refusal = await retention.explain_delete(session, run.operation_id, checkpoint)
        return f"{refusal.code}: {refusal.message}"


ABSENT = "no_checkpoint: this operation has no such checkpoint; see `ops checkpoints list`"
IN_USE = "checkpoint_in_use: this checkpoint is in use: "


async def test_a_checkpoint_is_deleted_once_and_a_corrupt_one_too(store: Store, run: Any, storage: Path) -> None:
    attempt = await run()
    first, second, third = (saved(attempt, step) for step in (0, 10, 20))
    for checkpoint in (first, second, third):
        (storage / checkpoint.path).mkdir(parents=True)
    attempt = await store.report(attempt, first, second, third)
    await corrupted(store, attempt, 0)

    answers = [await delete(store, attempt, c.checkpoint_id) for c in (first, second, second)]
    assert answers == ["", "", "no_checkpoint: this checkpoint is being deleted already"]
    await Sweeper(store.sessions, storage, 1.0).sweep()

    assert await rows(store) == [20]
    assert [(storage / c.path).exists() for c in (first, second, third)] == [False, False, True]
    assert await delete(store, attempt, second.checkpoint_id) == ABSENT


async def test_what_is_needed_is_not_deleted(store: Store, run: Any) -> None:
    attempt = await run()
    first, newest = saved(attempt, 0), saved(attempt, 10)
    attempt = await store.report(attempt, first, newest)
    assert await delete(store, attempt, newest.checkpoint_id) == (
        f"{IN_USE}the live operation may go on from it; wait until its attempt has saved a newer one, or cancel it"
    )

    second = await again(store, attempt)
    second = await store.report(second, after := saved(second, 20))
    assert await delete(store, second, newest.checkpoint_id) == (
        f"{IN_USE}an attempt started from it; try again when that attempt has ended"
    )

    await store.cancel(second.operation_id)
    await store.finish(second, Outcome.CANCELLED)
    await release(store)
    forked = await store.fork(second.operation_id, from_checkpoint=after.checkpoint_id)
    assert await delete(store, second, after.checkpoint_id) == (
        f"{IN_USE}forks begin at it, which need it as long as they exist: {forked}"
    )
    assert await store.resume(second.operation_id, first.checkpoint_id) is not None
    assert await delete(store, second, first.checkpoint_id) == (
        f"{IN_USE}a resume chose it; it is needed until the operation has saved another one"
    )

    stranger = Held(forked or second.operation_id, 1, second.incarnation)
    assert await delete(store, stranger, newest.checkpoint_id) == ABSENT
    assert await delete(store, second, newest.checkpoint_id) == ""


async def test_the_only_checkpoint_of_an_ended_operation_can_be_deleted(store: Store, run: Any) -> None:
    attempt = await run()
    attempt = await store.report(attempt, only := saved(attempt, 10))
    await store.finish(attempt, Outcome.FAILED, permanent=True)

    assert await delete(store, attempt, only.checkpoint_id) == ""

    assert await store.resume(attempt.operation_id) is None


async def test_deletions_racing_with_resumes_and_forks_agree(store: Store, run: Any) -> None:
    """Scenario 27: whoever comes first, what was chosen is still there."""
    ended = [await cancelled_with_surplus(store, run) for _ in range(15)]
    runs = [Held(id, 1, surplus) for id, surplus in ended]

    answers = await at_once(
        *(
            call
            for one, (id, surplus) in zip(runs, ended, strict=True)
            for call in (
                store.resume(id, surplus),
                store.fork(id, from_checkpoint=surplus, overrides={"labels": {"is": "fork"}}),
                *(delete(store, one, surplus) for _ in range(3)),
            )
        )
    )

    for i, (_, surplus) in enumerate(ended):
        resumed, forked, *deleted = answers[5 * i : 5 * i + 5]
        used = resumed is not None or isinstance(forked, UUID)
        assert deleted.count("") == (not used)
        assert await status_of(store, surplus) == ("committed" if used else "deleting")


async def test_what_a_resume_has_just_chosen_is_not_deleted(store: Store, run: Any) -> None:
    id, surplus = await cancelled_with_surplus(store, run)
    async with store.sessions.begin() as resuming, store.sessions.begin() as deleting:
        assert await transitions.resume_if_ended(resuming, id, surplus) is not None
        task = asyncio.create_task(retention.delete_if_unused(deleting, id, surplus))
        await until_one_waits_for_a_lock(store)
        await resuming.commit()
        assert not await task

    assert await status_of(store, surplus) == "committed"


async def test_what_a_fork_has_just_pinned_is_not_deleted(store: Store, run: Any) -> None:
    id, surplus = await cancelled_with_surplus(store, run)
    wish = ForkRequest(from_checkpoint=surplus)
    async with store.sessions.begin() as forking, store.sessions.begin() as deleting:
        assert await fork.fork_if_there(forking, id, wish, Submission("me", None, b""), Fleet(LEASE_S)) is not None
        task = asyncio.create_task(retention.delete_if_unused(deleting, id, surplus))
        await until_one_waits_for_a_lock(store)
        await forking.commit()
        assert not await task

    assert await status_of(store, surplus) == "committed"


async def test_a_resume_waits_for_a_deletion_and_takes_nothing_that_goes(store: Store, run: Any) -> None:
    id, surplus = await cancelled_with_surplus(store, run)
    async with store.sessions.begin() as resuming, store.sessions.begin() as deleting:
        assert await retention.delete_if_unused(deleting, id, surplus)
        task = asyncio.create_task(transitions.resume_if_ended(resuming, id, surplus))
        await until_one_waits_for_a_lock(store)
        await deleting.commit()
        assert await task is None

    assert (await store.get(id)).status is Status.CANCELLED


async def test_an_older_one_stays_until_the_attempt_has_restored_the_newest(store: Store, run: Any) -> None:
    """If the newest is corrupt, the older one is what is left: without it the operation would begin at step 0."""
    attempt = await run()
    older, newest = saved(attempt, 10), saved(attempt, 20)
    attempt = await again(store, await store.report(attempt, older, newest))
    assert (await delete(store, attempt, older.checkpoint_id)).startswith(IN_USE)

    attempt = await commit(store, attempt, (30, None))

    assert await delete(store, attempt, older.checkpoint_id) == ""


async def test_what_a_live_operation_left_behind_may_go(store: Store, run: Any) -> None:
    attempt = await run()
    first, abandoned = saved(attempt, 10), saved(attempt, 20)
    attempt = await store.report(attempt, first, abandoned)
    await store.cancel(attempt.operation_id)
    await store.finish(attempt, Outcome.CANCELLED)
    await store.resume(attempt.operation_id, first.checkpoint_id)
    assert await store.claim() is not None

    assert await delete(store, attempt, abandoned.checkpoint_id) == ""


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    root = tmp_path / "storage"
    root.mkdir()
    return root


async def published(store: Store, run: Any, storage: Path) -> tuple[Held, list[Path]]:
    """Three checkpoints with files; the job keeps the last one."""
    attempt = await run(checkpoint_save_top_k=0)
    directories = []
    for step in (0, 10, 20):
        checkpoint = saved(attempt, step)
        directories.append(storage / checkpoint.path)
        directories[-1].mkdir(parents=True)
        (directories[-1] / "manifest.json").write_text("{}")
        attempt = await store.report(attempt, checkpoint)
    return attempt, directories


async def rows(store: Store) -> list[int]:
    return [row.step for row in await store.fetch("SELECT step FROM checkpoints ORDER BY step")]


async def test_files_go_and_then_their_rows(store: Store, run: Any, storage: Path) -> None:
    attempt, directories = await published(store, run, storage)

    await Sweeper(store.sessions, storage, 1.0).sweep()

    assert [directory.exists() for directory in directories] == [False, False, True]
    assert await rows(store) == [20]
    assert await kept(store, attempt) == [20]


async def test_what_a_crash_left_between_files_and_row_is_finished(store: Store, run: Any, storage: Path) -> None:
    """Scenario 22."""
    _, [first, second, _] = await published(store, run, storage)
    for directory in (first, second):
        (directory / "manifest.json").unlink()
    first.rmdir()

    await Sweeper(store.sessions, storage, 1.0).sweep()

    assert not second.exists()
    assert await rows(store) == [20]


async def test_an_attempt_outlives_the_checkpoint_that_it_started_from(store: Store, run: Any, storage: Path) -> None:
    attempt = await again(store, await commit(store, await run(checkpoint_save_top_k=0), (10, None)))
    attempt = await commit(store, await store.report(attempt, started(10)), (20, None))
    await store.finish(attempt, Outcome.COMPLETED)

    await Sweeper(store.sessions, storage, 1.0).sweep()

    assert await rows(store) == [20]
    async with store.sessions.begin() as session:
        attempts = (await queries.attempts(session, attempt.operation_id)).items
    assert [a.start_step for a in attempts] == [0, 10]
    assert (await store.get(attempt.operation_id)).resumed_from is None


async def test_no_symbolic_link_is_followed(store: Store, run: Any, storage: Path, tmp_path: Path) -> None:
    attempt, [first, second, _] = await published(store, run, storage)
    elsewhere = tmp_path / "elsewhere"
    for directory in (first, second):
        (elsewhere / directory.name).mkdir(parents=True)
        (elsewhere / directory.name / "mine").write_text("keep")
    (first / "manifest.json").unlink()
    first.rmdir()
    first.symlink_to(elsewhere / first.name)
    (second / "link").symlink_to(elsewhere / second.name)
    await Sweeper(store.sessions, storage, 1.0).sweep()
    assert await rows(store) == [20]

    # The operation's own directory is one that leads out: nothing is deleted, and the row waits.
    await commit(store, attempt, (30, None))
    operation = storage / str(attempt.operation_id)
    operation.rename(elsewhere / "operation")
    operation.symlink_to(elsewhere / "operation")
    await Sweeper(store.sessions, storage, 1.0).sweep()

    assert await rows(store) == [20, 30]
    assert sorted(str(path.relative_to(elsewhere)) for path in elsewhere.rglob("m*")) == [
        "1-0/mine",
        "1-10/mine",
        "operation/1-20/manifest.json",
    ]


async def test_a_storage_that_is_not_mounted_keeps_the_rows(store: Store, run: Any, storage: Path) -> None:
    _, directories = await published(store, run, storage)
    await Sweeper(store.sessions, storage / "not mounted", 1.0).sweep()
    assert await rows(store) == [0, 10, 20]

    await Sweeper(store.sessions, storage, 1.0).sweep()

    assert await rows(store) == [20]
    assert [directory.exists() for directory in directories] == [False, False, True]


async def test_a_fork_point_stays_whatever_its_parent_keeps(store: Store, run: Any) -> None:
    """Scenario 27: the fork has nothing else to begin from, however long it waits."""
    attempt = await commit(store, await run(checkpoint_save_top_k=1), (10, 0.1), (20, 0.2))
    forked = await store.fork(attempt.operation_id, overrides={"labels": {"is": "fork"}})
    attempt = await commit(store, attempt, (30, 0.3))
    await store.finish(attempt, Outcome.COMPLETED)
    await release(store)

    assert await kept(store, attempt) == [10, 20, 30]
    claim = await store.claim()
    assert claim is not None
    assert (claim.operation_id, claim.checkpoint.step if claim.checkpoint else None) == (forked, 20)
