"""Each row of the transition table on real Postgres, and who wins when several want the same."""

from uuid import uuid4

import pytest

from helpers.store import Held, Store, at_once, held, losses, saved, started
from ops_backend.store import curves, queries, submit, transitions
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Outcome, Phase, Status
from ops_contract.reports import Exactness, Finish, Note


async def statuses(store: Store, held: Held) -> list[tuple[str, str | None, str]]:
    sql = "SELECT name, from_status, to_status FROM events WHERE operation_id = :id ORDER BY seq"
    return [tuple(row) for row in await store.fetch(sql, id=held.operation_id)]


async def test_a_run_that_completes_leaves_the_whole_chain(store: Store) -> None:
    await store.worker()
    run = await store.running()

    await store.finish(run, Outcome.COMPLETED)

    assert await statuses(store, run) == [
        ("submit", None, "pending"),
        ("claim", "pending", "running"),
        ("complete", "running", "completed"),
    ]
    operation = await store.get(run.operation_id)
    assert (operation.energy.total_j, operation.energy.reason) == (None, "not_measured")


async def test_a_second_start_report_says_more_of_the_attempt_and_leaves_when_it_began(store: Store) -> None:
    """A command's runner says it at once, and the relight.Run in it when it has come so far."""
    await store.worker()
    run = await store.report(await store.running(), started(promise="best_effort", by="runner"))
    (first,) = await store.fetch("SELECT started_at FROM attempts")

    await store.report(run, started(promise="promised", by="run"))

    (attempt,) = await store.fetch("SELECT started_at, environment, exactness->>'promise' AS promise FROM attempts")
    assert attempt.started_at == first.started_at
    assert (attempt.environment, attempt.promise) == ({"by": "run"}, "promised")


async def test_one_of_forty_concurrent_cancels_wins(store: Store) -> None:
    """Scenario 2."""
    await store.worker()
    run = await store.running()

    answers = await at_once(*(store.cancel(run.operation_id) for _ in range(40)))

    assert sum(a is not None for a in answers) == 1
    assert [s for s in await statuses(store, run) if s[0] == "cancel"] == [("cancel", "running", "cancelling")]


async def test_what_nobody_runs_is_cancelled_without_telling_anybody(store: Store) -> None:
    await store.worker()
    assert await store.cancel(await store.submit()) == transitions.Cancelled(Status.CANCELLED, [])


async def test_one_of_forty_concurrent_resumes_wins(store: Store) -> None:
    """Scenario 2."""
    await store.worker()
    run = await store.running()
    run = await store.report(run, started(), saved(run, 0))
    await store.cancel(run.operation_id)
    await store.finish(run, Outcome.CANCELLED)

    answers = await at_once(*(store.resume(run.operation_id) for _ in range(40)))

    assert sum(a is not None for a in answers) == 1
    assert (await store.get(run.operation_id)).status is Status.PENDING


async def test_twenty_concurrent_claims_give_each_operation_to_one_slot(store: Store) -> None:
    await store.worker("a", slots=3)
    for _ in range(5):
        await store.submit()

    claims = [c for _ in range(5) for c in await at_once(*(store.claim() for _ in range(4))) if c is not None]

    assert len(claims) == 3
    assert len({c.operation_id for c in claims}) == 3
    assert {c.members[0].slots[0] for c in claims} == {0, 1, 2}


async def test_the_same_idempotency_key_from_twenty_clients_makes_one_operation(store: Store) -> None:
    """Scenario 8."""
    await store.worker()

    ids = await at_once(*(store.submit(key="k") for _ in range(20)))

    assert len(set(ids)) == 1
    assert len(await store.fetch("SELECT id FROM operations")) == 1


async def test_who_comes_second_with_a_key_is_given_what_the_first_one_made(store: Store) -> None:
    await store.worker()
    made = []

    async def come_second() -> None:
        made.append(await store.submit(key="key"))

    async with store.sessions.begin() as session:
        found = await submit.once(session, submit.Submission("me", "key", b'{"workload": "toy"}'), come_second)

    assert found == (made[0], False)


async def test_a_key_whose_other_user_came_first_and_is_gone_may_be_tried_again(store: Store) -> None:
    async def come_second() -> None:
        return None

    async with store.sessions.begin() as session:
        with pytest.raises(OpsError, match="has just gone; try again") as refused:
            await submit.once(session, submit.Submission("me", "key", b"{}"), come_second)
    assert refused.value.code is ErrorCode.UNAVAILABLE


async def test_resume_without_a_checkpoint_changes_nothing(store: Store) -> None:
    """Scenario 3."""
    await store.worker()
    run_id = await store.submit()
    await store.cancel(run_id)
    before = await store.get(run_id)

    assert await store.resume(run_id) is None
    assert await store.get(run_id) == before


@pytest.mark.parametrize("end", [Outcome.COMPLETED, None])
async def test_running_and_completed_operations_are_not_resumed(store: Store, end: Outcome | None) -> None:
    """Scenario 3."""
    await store.worker()
    run = await store.running()
    run = await store.report(run, saved(run, 0))
    if end:
        await store.finish(run, end)

    assert await store.resume(run.operation_id) is None


async def test_failures_are_retried_on_a_budget_and_then_fail(store: Store) -> None:
    await store.worker()
    run = await store.running(max_retries=2)
    for _ in range(2):
        await store.finish(run, Outcome.FAILED)
        claim = await store.claim()
        assert claim is not None
        run = held(claim)
    await store.finish(run, Outcome.FAILED, error={"code": "exception", "message": "boom"})

    operation = await store.get(run.operation_id)
    assert (operation.status, operation.failures, operation.attempt) == (Status.FAILED, 3, 3)
    assert operation.error is not None
    assert operation.error.message == "boom"


async def test_a_permanent_failure_is_not_retried(store: Store) -> None:
    await store.worker()
    run = await store.running(max_retries=2)
    await store.finish(run, Outcome.FAILED, permanent=True)
    assert (await store.get(run.operation_id)).status is Status.FAILED


async def test_preemption_is_not_charged(store: Store) -> None:
    await store.worker()
    run = await store.running(max_retries=0)
    await store.finish(run, Outcome.PREEMPTED)
    operation = await store.get(run.operation_id)
    assert (operation.status, operation.failures) == (Status.PENDING, 0)


async def test_a_refusal_is_not_charged_and_lets_the_slot_rest(store: Store) -> None:
    await store.worker()
    await store.submit()
    claim = await store.claim()
    assert claim is not None

    assert await store.refuse(claim, rest_s=60) == "pending"
    assert await store.refuse(claim) is None  # once only
    assert await store.claim() is None  # the slot rests

    await store.worker("another")
    second = await store.claim()
    assert second is not None
    assert second.attempt == 2


async def test_a_refusal_after_the_trainer_has_reported_is_ignored(store: Store) -> None:
    """Scenario 20: a late answer reverts nothing."""
    await store.worker()
    await store.submit()
    claim = await store.claim()
    assert claim is not None
    await store.report(held(claim), started())

    assert await store.refuse(claim) is None
    assert (await store.get(claim.operation_id)).status is Status.RUNNING


async def test_a_run_that_is_lost_three_times_without_progress_fails(store: Store) -> None:
    await store.worker()
    run = await store.running()
    for expected in (Status.PENDING, Status.PENDING, Status.FAILED):
        await store.report(run, started())
        await store.expire(run)
        assert await store.lose(run) is expected
        claim = await store.claim()
        if claim:
            run = held(claim)
    error = (await store.get(run.operation_id)).error
    assert error is not None
    assert error.code == "lost"
    assert "3 attempts were lost one after the other without a new checkpoint" in error.message
    assert {a.error.message for a in await store.attempts(run.operation_id) if a.error} == {
        "the worker stopped renewing its lease: its host, agent or network died"
    }


async def test_losses_with_progress_in_between_never_add_up(store: Store) -> None:
    await store.worker()
    run = await store.running()
    for step in range(1, 8):
        await store.report(run, started(), saved(run, step))
        await store.expire(run)
        assert await store.lose(run) is Status.PENDING
        claim = await store.claim()
        assert claim is not None
        assert claim.checkpoint is not None
        assert claim.checkpoint.step == step
        run = held(claim)


async def test_nobody_is_lost_in_grace(store: Store) -> None:
    await store.worker()
    run = await store.running()
    await store.expire(run)
    assert await store.tick() is True  # the first tick ever: a gap

    assert await store.lose(run) is None

    await store.execute("UPDATE service SET grace_until = now() - interval '1 s'")
    assert await store.tick() is False
    assert await store.lose(run) is Status.PENDING


async def test_a_gap_in_the_ticks_gives_everybody_a_lease(store: Store) -> None:
    await store.tick()
    await store.execute("UPDATE service SET grace_until = NULL, last_tick_at = now() - interval '1 hour'")
    assert await store.tick() is True


async def test_a_renewed_lease_is_not_lost(store: Store) -> None:
    worker = await store.worker()
    run = await store.running()
    await store.expire(run)
    await store.heartbeat(worker, run)
    assert await store.lose(run) is None


async def test_a_cancelling_run_that_is_lost_is_cancelled_and_says_so(store: Store) -> None:
    await store.worker()
    run = await store.running()
    await store.cancel(run.operation_id)
    await store.expire(run)

    assert await store.lose(run) is Status.CANCELLED
    assert (await store.get(run.operation_id)).exit_unconfirmed


async def test_a_cancelling_run_that_did_its_last_step_is_completed(store: Store) -> None:
    await store.worker()
    run = await store.running()
    await store.cancel(run.operation_id)
    await store.finish(run, Outcome.COMPLETED)
    assert (await store.get(run.operation_id)).status is Status.COMPLETED


async def test_cancelling_again_is_refused_but_force_is_recorded_once(store: Store) -> None:
    """Scenario 4."""
    worker = await store.worker()
    run = await store.running()
    await store.cancel(run.operation_id)

    assert await store.cancel(run.operation_id) is None
    assert await store.cancel(run.operation_id, force=True) is not None
    assert await store.cancel(run.operation_id, force=True) is None
    answer = await store.heartbeat(worker, run)
    assert [order.force for order in answer.cancelling] == [True]


async def test_a_refused_cancel_or_resume_says_why_and_what_to_do(store: Store) -> None:
    """Scenarios 3 and 4."""
    await store.worker()
    run = await store.running()
    await store.cancel(run.operation_id)
    refusals = []
    async with store.sessions.begin() as session:
        refusals.append(await transitions.explain_cancel(session, run.operation_id))
        refusals.append(await transitions.explain_resume(session, run.operation_id, None))
    await store.finish(run, Outcome.CANCELLED)
    async with store.sessions.begin() as session:
        refusals.append(await transitions.explain_cancel(session, run.operation_id))
        refusals.append(await transitions.explain_resume(session, run.operation_id, None))
        refusals.append(await transitions.explain_resume(session, run.operation_id, uuid4()))
        refusals.append(await transitions.explain_cancel(session, uuid4()))

    cancellable, resumable = "only pending, running and waiting ones can be", "only cancelled and failed ones can be"
    assert [(e.code, e.message) for e in refusals[:5]] == [
        (
            "not_cancellable",
            f"operation is cancelling: it is stopping already; force kills it at once; {cancellable} cancelled",
        ),
        ("not_resumable", f"operation is cancelling; {resumable} resumed"),
        ("not_cancellable", f"operation is cancelled: it has ended; {cancellable} cancelled"),
        ("no_checkpoint", "this operation has no checkpoint; submit it again to start over"),
        ("no_checkpoint", "this operation has no such checkpoint; submit it again to start over"),
    ]
    assert [e.details["status"] for e in refusals[:5]] == ["cancelling"] * 2 + ["cancelled"] * 3
    assert refusals[5].code == ErrorCode.NOT_FOUND
    [told] = await store.fetch("SELECT detail FROM events WHERE name = 'cancel'")
    assert told.detail == {"force": False}


async def test_the_heartbeat_tells_what_has_ended(store: Store) -> None:
    worker = await store.worker()
    run = await store.running()
    await store.expire(run)
    await store.lose(run)

    answer = await store.heartbeat(worker, run)

    assert [(h.operation_id, h.attempt) for h in answer.ended] == [(run.operation_id, run.attempt)]


async def test_a_corrupt_checkpoint_is_marked_and_the_one_before_is_used(store: Store) -> None:
    await store.worker()
    run = await store.running()
    await store.report(run, saved(run, 0), saved(run, 5))
    await store.expire(run)
    await store.lose(run)
    claim = await store.claim()
    assert claim is not None
    assert claim.checkpoint is not None
    assert claim.checkpoint.step == 5

    await store.finish(held(claim), Outcome.CHECKPOINT_CORRUPT)

    again = await store.claim()
    assert again is not None
    assert again.checkpoint is not None
    assert again.checkpoint.step == 0
    await store.finish(held(again), Outcome.CHECKPOINT_CORRUPT)
    assert (await store.get(run.operation_id)).status is Status.FAILED  # none remains


async def test_a_corrupt_checkpoint_that_was_chosen_by_hand_fails(store: Store) -> None:
    await store.worker()
    run = await store.running()
    chosen = saved(run, 5)
    run = await store.report(run, saved(run, 0), chosen)
    await store.cancel(run.operation_id)
    await store.finish(run, Outcome.CANCELLED)
    await store.resume(run.operation_id, chosen.checkpoint_id)
    claim = await store.claim()
    assert claim is not None

    await store.finish(held(claim), Outcome.CHECKPOINT_CORRUPT)

    assert (await store.get(run.operation_id)).status is Status.FAILED


async def test_resume_from_an_old_checkpoint_then_a_crash_stays_on_the_new_lineage(store: Store) -> None:
    """Scenario 26."""
    await store.worker()
    run = await store.running()
    old = saved(run, 10)
    run = await store.report(
        run, losses((8, 0.8), (9, 0.9)), old, losses((10, 1.0), (29, 2.9)), saved(run, 30), losses((30, 3.0))
    )
    await store.cancel(run.operation_id)
    await store.finish(run, Outcome.CANCELLED)

    resumed = await store.resume(run.operation_id, old.checkpoint_id)
    assert resumed is not None
    first = await store.claim()
    assert first is not None
    await store.expire(held(first))
    await store.lose(held(first))  # before it committed anything: the choice still stands
    second = await store.claim()
    assert second is not None
    assert second.checkpoint is not None
    assert second.checkpoint.step == 10
    branch = await store.report(held(second), losses((10, 1.5)), saved(held(second), 11))
    await store.expire(branch)
    await store.lose(branch)

    third = await store.claim()

    assert third is not None
    assert third.checkpoint is not None
    assert (third.checkpoint.step, third.checkpoint.path.split("/")[1]) == (11, "3-11")
    async with store.sessions.begin() as session:
        curve = await curves.read(session, run.operation_id, "loss")
    assert curve.points == [(8, 0.8), (9, 0.9), (10, 1.5)]


async def test_accepted_changes_stand_until_an_attempt_has_a_checkpoint_of_its_own(store: Store) -> None:
    await store.worker()
    run = await store.running()
    run = await store.report(run, started(), saved(run, 10))
    await store.finish(run, Outcome.FAILED, permanent=True)

    accepted = []
    assert await store.resume(run.operation_id, accept_changes=True) is not None
    for report in (None, losses((10, 1.0)), saved(run, 11), None):
        claim = await store.claim()
        assert claim is not None
        accepted.append(claim.accept_changes)
        attempt = held(claim)
        if report is not None:
            report = saved(attempt, 11) if report.kind == "checkpoint" else report
            attempt = await store.report(attempt, started(10), report)
        await store.expire(attempt)
        await store.lose(attempt)
        await store.execute("UPDATE operations SET lost_without_progress = 0")

    assert accepted == [True, True, True, False]
    events = await store.fetch("SELECT detail FROM events WHERE name = 'resume'")
    assert [detail["accept_changes"] for (detail,) in events] == [True]


async def test_a_resume_decides_anew_whether_changes_are_accepted(store: Store) -> None:
    await store.worker()
    run = await store.running()
    run = await store.report(run, saved(run, 10))
    await store.finish(run, Outcome.FAILED, permanent=True)
    await store.resume(run.operation_id, accept_changes=True)
    await store.cancel(run.operation_id)

    await store.resume(run.operation_id)

    claim = await store.claim()
    assert claim is not None
    assert not claim.accept_changes


async def test_an_abandoned_branch_cannot_be_resumed(store: Store) -> None:
    await store.worker()
    run = await store.running()
    old, abandoned = saved(run, 10), saved(run, 30)
    run = await store.report(run, old, abandoned)
    await store.cancel(run.operation_id)
    await store.finish(run, Outcome.CANCELLED)
    await store.resume(run.operation_id, old.checkpoint_id)
    claim = await store.claim()
    assert claim is not None
    await store.finish(held(claim), Outcome.FAILED, permanent=True)

    assert await store.resume(run.operation_id, abandoned.checkpoint_id) is None
    async with store.sessions.begin() as session:
        refused = await transitions.explain_resume(session, run.operation_id, abandoned.checkpoint_id)
        assert (refused.code, refused.details["status"]) == (ErrorCode.NOT_RESUMABLE, Status.FAILED)
        assert "on a branch that a later resume left behind" in refused.message
        rows = (await queries.checkpoints(session, run.operation_id)).items
    assert [(row.step, row.in_lineage) for row in rows] == [(10, True), (30, False)]


async def test_what_was_saved_during_evaluation_comes_after_the_update_of_its_step(store: Store) -> None:
    await store.worker()
    run = await store.running()
    await store.report(run, saved(run, 7), saved(run, 7, phase=Phase.EVALUATE))
    await store.expire(run)
    await store.lose(run)
    claim = await store.claim()
    assert claim is not None
    assert claim.checkpoint is not None
    assert claim.checkpoint.phase is Phase.EVALUATE


async def test_reports_count_once_and_in_order(store: Store) -> None:
    await store.worker()
    run = await store.running()
    await store.report(run, started(), losses((0, 1.0)))

    await store.report(run, started(), losses((0, 1.0)), losses((1, 2.0)), seq=1)  # the answer was lost: all again
    with pytest.raises(OpsError) as gap:
        await store.report(run, losses((3, 4.0)), seq=5)

    assert (gap.value.code, gap.value.details["last_seq"]) == (ErrorCode.OUT_OF_ORDER, 3)
    assert gap.value.message == "report 4 is missing: send again from there"
    rows = await store.fetch("SELECT first_step, values FROM metrics ORDER BY first_step")
    assert [tuple(r) for r in rows] == [(0, [1.0]), (1, [2.0])]


async def test_a_fenced_report_writes_nothing_but_a_repeated_finish_is_fine(store: Store) -> None:
    await store.worker()
    run = await store.running()
    done = await store.finish(run, Outcome.COMPLETED)

    assert await store.finish(run, Outcome.COMPLETED) == done  # the answer was lost
    with pytest.raises(OpsError) as fenced:
        await store.report(done, losses((0, 1.0)))

    assert (fenced.value.code, fenced.value.details) == (ErrorCode.FENCED, {"last_seq": 1})
    assert await store.fetch("SELECT 1 FROM metrics") == []
    assert len(await statuses(store, run)) == 3


async def test_a_stranger_may_not_report(store: Store) -> None:
    await store.worker()
    run = await store.running()
    with pytest.raises(OpsError) as refused:
        await store.report(Held(run.operation_id, run.attempt, uuid4()), losses((0, 1.0)))
    assert refused.value.code is ErrorCode.NOT_FOUND


async def test_a_finish_and_an_expiry_at_once_end_the_attempt_once(store: Store) -> None:
    await store.worker(slots=20)
    runs = [await store.running() for _ in range(20)]
    for run in runs:
        await store.expire(run)

    await at_once(*(call for run in runs for call in (store.lose(run), store.finish(run, Outcome.COMPLETED))))

    for run in runs:
        assert len(await statuses(store, run)) == 3
        live = await store.fetch("SELECT 1 FROM holds WHERE operation_id = :i AND ended_at IS NULL", i=run.operation_id)
        assert live == []


async def test_a_finish_is_the_last_of_its_batch(store: Store) -> None:
    await store.worker()
    run = await store.running()
    with pytest.raises(OpsError) as refused:
        await store.report(run, Finish(outcome=Outcome.COMPLETED), losses((0, 1.0)))
    assert (refused.value.code, refused.value.message) == (
        ErrorCode.INVALID,
        "reports: a finish must be the last of its batch",
    )
    assert (await store.get(run.operation_id)).status == Status.RUNNING


async def test_a_checkpoint_outside_its_place_is_refused(store: Store) -> None:
    await store.worker()
    run = await store.running()
    elsewhere = saved(run, 3).model_copy(update={"path": "../../etc"})
    with pytest.raises(OpsError) as refused:
        await store.report(run, elsewhere)
    assert refused.value.code is ErrorCode.INVALID


async def test_what_makes_an_attempt_inexact_ends_its_promise_once_for_each_reason(store: Store) -> None:
    await store.worker()
    run = await store.running()

    run = await store.report(run, started())
    for reason in ("put_ has no kernel", "sort has no kernel", "put_ has no kernel"):
        run = await store.report(run, Note(message=reason, inexact=reason))

    told = await store.fetch("SELECT detail FROM events WHERE name = 'note' ORDER BY seq")
    assert [row.detail["message"] for row in told] == ["put_ has no kernel", "sort has no kernel", "put_ has no kernel"]
    exactness = (await store.get(run.operation_id)).exactness
    assert exactness == Exactness(promise="best_effort", reasons=["put_ has no kernel", "sort has no kernel"])
    assert [name for name, _, _ in await statuses(store, run)].count("note") == 3
