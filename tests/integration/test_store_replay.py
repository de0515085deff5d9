"""What is reported again, against what was reported before, on real Postgres."""

import math
import struct
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest

from helpers.store import Held, Store, at_once, held, losses, saved, started
from ops_backend.store import queries
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import AttemptView, EventView, ReplayCheck
from ops_contract.lifecycle import CheckpointStatus, Outcome
from ops_contract.reports import Metrics, Report

ULP_OFF = math.nextafter(0.3, 1.0)
NAN, OTHER_NAN = (struct.unpack(">d", bytes.fromhex(bits))[0] for bits in ("7ff8000000000000", "7ff8000000000001"))


def curve(first: int, end: int, **changed: float) -> Metrics:
    """Losses of [first, end): a tenth of the step; `s7=0.5` is another one at step 7."""
    return losses(*((step, changed.get(f"s{step}", step / 10)) for step in range(first, end)))


async def first_attempt(store: Store, *reports: Report, checkpoint: int = 3) -> Held:
    """Handed back after these reports, with a checkpoint on the way."""
    await store.worker(slots=8)
    run = await store.running()
    run = await store.report(run, started(), saved(run, checkpoint), *(reports or (curve(0, 6),)))
    return await store.finish(run, Outcome.PREEMPTED)


async def next_attempt(
    store: Store, *reports: Report, step: int = 3, promise: Any = "promised", **environment: Any
) -> Held:
    claim = await store.claim()
    assert claim is not None
    assert (claim.checkpoint.step if claim.checkpoint else 0) == step
    return await store.report(held(claim), started(step, promise, **environment), *reports)


async def attempt(store: Store, run: Held) -> AttemptView:
    return (await store.attempts(run.operation_id))[run.attempt - 1]


async def check(store: Store, run: Held) -> ReplayCheck | None:
    return (await attempt(store, run)).replay


async def diverged(store: Store, id: UUID) -> list[EventView]:
    async with store.sessions.begin() as session:
        return [event for event in (await queries.events(session, id, 0)).items if event.name == "replay_diverged"]


async def test_steps_that_are_redone_with_the_same_bits_are_counted_and_nothing_is_said(store: Store) -> None:
    first = await first_attempt(store)

    run = await next_attempt(store, curve(3, 5), curve(5, 9))
    run = await store.report(run, curve(9, 12))

    assert await check(store, first) is None
    assert await check(store, run) == ReplayCheck(compared=3)
    assert await diverged(store, run.operation_id) == []
    exactness = (await store.get(run.operation_id)).exactness
    assert exactness is not None
    assert exactness.promise == "promised"


@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 2, 6), (0, 3, 4, 6), (0, 2, 5, 6)])
@pytest.mark.parametrize("again", [(3, 9), (3, 4, 9), (3, 5, 6, 7)])
async def test_however_the_reports_were_cut_each_value_is_compared_once(
    store: Store, cuts: tuple[int, ...], again: tuple[int, ...]
) -> None:
    await first_attempt(store, *(curve(a, b) for a, b in pairwise(cuts)))

    run = await next_attempt(store, *(curve(a, b, s5=7.0) for a, b in pairwise(again)))

    found = await check(store, run)
    assert found is not None
    assert (found.compared, found.differing, found.first_difference and found.first_difference.step) == (3, 1, 5)


async def test_one_bit_breaks_the_promise_once_and_for_good(store: Store) -> None:
    first = await first_attempt(store, losses((0, 0.1), (3, 0.3), (4, 0.3)))
    id = first.operation_id
    before = await store.get(id)

    run = await next_attempt(store, losses((3, ULP_OFF)), losses((4, 0.5), name="other"))
    run = await store.report(run, losses((4, 0.5)))

    found = await check(store, run)
    assert found is not None
    assert (found.compared, found.differing, found.largest_difference) == (2, 2, 0.2)
    assert found.first_difference is not None
    assert found.first_difference.model_dump() == {
        "name": "loss",
        "step": 3,
        "earlier_attempt": 1,
        "was": 0.3,
        "now": ULP_OFF,
        "was_bits": "3fd3333333333333",
        "now_bits": "3fd3333333333334",
    }
    [event] = await diverged(store, id)
    assert (event.attempt, event.from_status, event.to_status) == (2, "running", "running")
    assert event.detail == found.first_difference.model_dump() | {"was": "0.3", "now": "0.30000000000000004"}
    after = await store.get(id)
    assert (after.status, after.error, after.failures) == ("running", before.error, 0)
    assert after.exactness is not None
    assert after.exactness.promise == "best_effort"
    assert after.exactness.reasons == ["replay diverged at step 3: loss was 0.3 and is 0.30000000000000004"]

    await store.finish(run, Outcome.PREEMPTED)
    await next_attempt(store)
    assert (await store.get(id)).exactness == after.exactness


@pytest.mark.parametrize(
    ("was", "now", "largest"),
    [(NAN, OTHER_NAN, math.nan), (0.0, -0.0, 0.0), (1.0, math.nan, math.nan), (-math.inf, math.inf, math.inf)],
)
async def test_nan_zero_and_infinity_are_their_bits(store: Store, was: float, now: float, largest: float) -> None:
    await first_attempt(store, losses((3, was), (4, was), (5, was)))

    run = await next_attempt(store, losses((3, was), (4, now), (5, was)))

    found = await check(store, run)
    assert found is not None
    assert found.first_difference is not None
    assert (found.compared, found.differing, found.first_difference.step) == (3, 1, 4)
    assert repr(found.largest_difference) == repr(largest)
    assert found.first_difference.now_bits == struct.pack(">d", now).hex()
    [event] = await diverged(store, run.operation_id)
    assert (event.detail["was"], event.detail["now"]) == (repr(was), repr(now))


@pytest.mark.parametrize("values", [(math.nan, math.inf), (math.inf, math.nan)])
async def test_a_nan_is_the_largest_difference_whatever_comes_beside_it(
    store: Store, values: tuple[float, float]
) -> None:
    await first_attempt(store)

    run = await next_attempt(store, curve(3, 4, s3=values[0]), curve(4, 5, s4=values[1]))

    found = await check(store, run)
    assert found is not None
    assert (found.differing, repr(found.largest_difference)) == (2, "nan")


async def test_best_effort_is_recorded_and_no_event_is_written(store: Store) -> None:
    await first_attempt(store)

    run = await next_attempt(store, curve(3, 9, s4=1.0), promise="best_effort")

    found = await check(store, run)
    assert found is not None
    assert (found.compared, found.differing, found.largest_difference) == (3, 1, 0.6)
    assert await diverged(store, run.operation_id) == []


@pytest.mark.parametrize(("environment", "events"), [({"device": "other"}, 0), ({"host": "other"}, 1)])
async def test_values_of_other_hardware_break_no_promise(
    store: Store, environment: dict[str, str], events: int
) -> None:
    await first_attempt(store)

    run = await next_attempt(store, curve(3, 9, s4=1.0), **environment)

    found = await check(store, run)
    assert found is not None
    assert found.differing == 1
    assert len(await diverged(store, run.operation_id)) == events


async def test_a_report_that_is_sent_again_is_counted_once(store: Store) -> None:
    await first_attempt(store)
    run = await next_attempt(store)

    await at_once(*(store.report(run, curve(3, 5, s3=1.0)) for _ in range(5)))
    await store.report(run, curve(3, 5, s3=1.0), curve(5, 6))  # the second of them is new

    found = await check(store, run)
    assert found is not None
    assert (found.compared, found.differing) == (3, 1)
    assert len(await diverged(store, run.operation_id)) == 1


async def test_of_several_attempts_the_newest_that_reported_a_step_counts(store: Store) -> None:
    await first_attempt(store)
    second = await next_attempt(store, curve(3, 5, s4=1.0))
    await store.finish(second, Outcome.PREEMPTED)

    run = await next_attempt(store, curve(3, 7, s4=1.0))

    assert await check(store, run) == ReplayCheck(compared=3)


async def test_a_fenced_attempt_changes_no_record(store: Store) -> None:
    await first_attempt(store)
    fenced = await next_attempt(store)
    await store.finish(fenced, Outcome.PREEMPTED)

    with pytest.raises(OpsError) as refused:
        await store.report(Held(fenced.operation_id, 2, fenced.incarnation, fenced.seq + 1), curve(3, 6, s3=1.0))

    assert refused.value.code is ErrorCode.FENCED
    assert await check(store, fenced) is None
    assert await diverged(store, fenced.operation_id) == []


async def completed(store: Store, *checkpoints: int, **job: Any) -> Held:
    """Of ten steps."""
    await store.worker(slots=8)
    run = await store.running(**job)
    run = await store.report(run, started(), *(saved(run, step) for step in checkpoints), curve(0, 10))
    return await store.finish(run, Outcome.COMPLETED)


async def replay_of(store: Store, parent: Held, *reports: Report, **wish: Any) -> Held:
    id = await store.replay(parent.operation_id, **wish)
    claim = await store.claim()
    assert claim is not None
    assert claim.operation_id == id
    return await store.report(held(claim), started(), *reports)


@pytest.mark.parametrize(
    ("checkpoints", "wish", "start", "until"),
    [
        ((0, 4, 8, 10), {}, 8, 10),
        ((0, 4, 8, 10), {"steps": 1}, 8, 9),
        ((0, 4, 8, 10), {"steps": 99}, 8, 10),
        ((10,), {}, None, 10),  # only the final one is left: from the beginning
        ((10,), {"steps": 3}, None, 3),
    ],
)
async def test_a_replay_redoes_the_same_job_from_the_newest_checkpoint_with_steps_after_it(
    store: Store, checkpoints: tuple[int, ...], wish: dict[str, Any], start: int | None, until: int
) -> None:
    parent = await completed(store, *checkpoints, execution={"max_epochs": 7}, priority=3)
    before = await store.get(parent.operation_id)

    run = await replay_of(store, parent, **wish)

    replay = await store.get(run.operation_id)
    assert (replay.replay_of, replay.name, replay.priority) == (parent.operation_id, f"replay of {before.name}", 3)
    assert (replay.forked_from.step if replay.forked_from else None) == start
    kept = before.job.execution.model_copy(update={"checkpoint_save_top_k": 0})
    assert replay.job == before.job.model_copy(update={"until_step": until, "execution": kept})
    assert replay.job.execution.threads == 1
    pinned = await store.fetch("SELECT step FROM checkpoints WHERE pinned_at IS NOT NULL")
    assert [step for (step,) in pinned] == ([] if start is None else [start])
    assert await store.get(parent.operation_id) == before


async def test_a_named_checkpoint_is_where_a_replay_begins(store: Store) -> None:
    parent = await completed(store, 0, 4, 8)
    [(four,)] = await store.fetch("SELECT id FROM checkpoints WHERE step = 4")

    run = await replay_of(store, parent, from_checkpoint=four)

    assert (await attempt(store, run)).start_step == 4


async def test_a_replay_is_compared_with_its_parent_over_all_of_its_attempts(store: Store) -> None:
    parent = await completed(store, 4)

    run = await replay_of(store, parent, curve(4, 7))
    run = await store.report(run, saved(run, 5), curve(7, 8, s7=math.nan))
    run = await store.finish(run, Outcome.PREEMPTED)
    again = await next_attempt(store, curve(5, 10), step=5)

    first, second = await check(store, run), await check(store, again)
    assert first is not None
    assert (first.compared, first.differing) == (4, 1)
    assert second == ReplayCheck(compared=5)  # with the parent's, not with what diverged
    assert await check(store, parent) is None
    assert len(await diverged(store, run.operation_id)) == 1


async def test_the_parents_lineage_counts_not_what_a_resume_abandoned(store: Store) -> None:
    first = await first_attempt(store, curve(0, 6, s4=9.0))
    parent = await next_attempt(store, curve(3, 5), promise="best_effort")
    await store.finish(parent, Outcome.COMPLETED)

    run = await replay_of(store, first, curve(3, 5))

    assert (await store.get(run.operation_id)).job.until_step == 5
    assert await check(store, run) == ReplayCheck(compared=2)


async def test_a_replay_of_a_fork_begins_where_the_fork_did(store: Store) -> None:
    parent = await completed(store, 4)
    fork_id = await store.fork(parent.operation_id)
    claim = await store.claim()
    assert claim is not None
    assert fork_id == claim.operation_id
    fork = await store.report(held(claim), started(4), curve(4, 6, s5=8.0))

    run = await replay_of(store, fork, curve(4, 6, s5=8.0))

    assert (await attempt(store, run)).start_step == 4
    assert await check(store, run) == ReplayCheck(compared=2)


async def test_what_leaves_nothing_to_compare_is_refused(store: Store) -> None:
    await store.worker(slots=8)
    silent = await store.running()
    parent = await completed(store, 10)
    fork = await store.fork(parent.operation_id)
    [(final,)] = await store.fetch("SELECT id FROM checkpoints")
    assert fork is not None

    for id, wish in ((silent.operation_id, {}), (fork, {}), (parent.operation_id, {"from_checkpoint": final})):
        with pytest.raises(OpsError) as refused:
            await store.replay(id, **wish)
        assert refused.value.code in (ErrorCode.NOT_REPLAYABLE, ErrorCode.NO_CHECKPOINT)
    assert refused.value.code is ErrorCode.NOT_REPLAYABLE
    assert "from step 10 on" in refused.value.message


@pytest.mark.parametrize("gone", [CheckpointStatus.CORRUPT, CheckpointStatus.DELETING])
async def test_a_checkpoint_that_is_gone_is_not_replayed(store: Store, gone: CheckpointStatus) -> None:
    parent = await completed(store, 4)
    [(id,)] = await store.fetch("UPDATE checkpoints SET status = :status RETURNING id", status=gone)

    with pytest.raises(OpsError) as refused:
        await store.replay(parent.operation_id, from_checkpoint=id)
    assert refused.value.code is ErrorCode.NO_CHECKPOINT
    assert (await store.get((await replay_of(store, parent)).operation_id)).forked_from is None


async def test_a_completed_replay_keeps_no_checkpoint(store: Store) -> None:
    parent = await completed(store, 4)
    run = await replay_of(store, parent)

    run = await store.report(run, saved(run, 6))
    assert await store.fetch("SELECT 1 FROM checkpoints WHERE status = 'committed' AND step = 6")
    await store.finish(await store.report(run, saved(run, 10)), Outcome.COMPLETED)

    rows = await store.fetch("SELECT step, status FROM checkpoints ORDER BY step")
    assert [tuple(row) for row in rows] == [(4, "committed"), (6, "deleting"), (10, "deleting")]


async def test_the_same_key_from_twenty_clients_makes_one_replay(store: Store) -> None:
    parent = await completed(store, 4)

    answers = await at_once(*(store.replay(parent.operation_id, key="k") for _ in range(20)))

    assert [isinstance(a, UUID) for a in answers if a is not None] == [True]
