"""Scenario 10: studies and their children in the store. Parent and child never touch each other; levels move them."""

from typing import Any
from uuid import UUID

import pytest

from helpers.measurement_jobs import MEASURED, MEASURES, measured
from helpers.store import LEASE_S, Held, Store, at_once, held, losses, plan, saved, started, window
from ops_backend.database import Sessions
from ops_backend.store import claims, studies, transitions
from ops_backend.store.sql import statement
from ops_contract.errors import OpsError
from ops_contract.lifecycle import Outcome, Status
from ops_contract.measurements import MeasurementConfig
from ops_contract.plans import GridAbout, TrainingResult
from ops_contract.reports import Fault, Result
from ops_contract.studies import NOT_RUN, Grid
from ops_contract.study_results import GridResult

GRID = {"type": "grid", "axes": {"config.name": ["a", "b"]}}
STUDY: dict[str, Any] = {"kind": "study", "study": GRID, "max_retries": 0}
NAMES = ("a", "b", "c")
FIVE = ("a", "b", "c", "d", "e")
STOPPING: dict[str, Any] = {"study": GRID | {"stop_after_failures": 2}}


@pytest.fixture
async def slots(store: Store) -> UUID:
    return await store.worker(slots=4)


async def test_a_plan_makes_its_children_in_one_transaction_and_the_study_waits(store: Store, slots: UUID) -> None:
    run = await store.running(**STUDY, labels={"team": "x"}, priority=3)

    await store.finish(run, Outcome.PLANNED, plan=plan(*NAMES))

    study = await store.get(run.operation_id)
    assert (study.status, study.children, study.ended_at) == (Status.WAITING, {Status.PENDING: 3}, None)
    assert study.progress is not None
    assert (study.progress.step, study.progress.steps_total) == (0, 3)
    for child, name in zip(await store.children(run.operation_id), NAMES, strict=True):
        operation = await store.get(child.operation_id)
        assert (operation.name, operation.kind, operation.parent_id) == (name, "training", run.operation_id)
        assert (operation.labels, operation.priority, operation.submitted_by) == ({"team": "x"}, 3, "me")
        assert operation.job.study is None


async def test_axes_and_points_keep_the_order_in_which_they_were_written(store: Store, slots: UUID) -> None:
    """A jsonb column sorts the names of an object by their length."""
    axes = {"config.long_name": [1, 2], "config.a": [3]}
    await store.submit(**STUDY | {"study": {"type": "grid", "axes": axes}})
    claim = await store.claim()
    assert claim is not None
    assert isinstance(claim.job.study, Grid)
    assert claim.job.study.axes_order == list(axes)
    about = GridAbout(point={"config.long_name": 1, "config.a": 3}, cycle=0)
    await store.finish(held(claim), Outcome.PLANNED, plan=plan("x", about=about))
    [child] = await store.children(claim.operation_id)
    assert isinstance(child.about, GridAbout)
    assert list(child.about.point) == list(axes)


async def test_children_run_in_the_order_of_the_plan_on_all_slots_at_once(store: Store, slots: UUID) -> None:
    run = await _planned(store, *NAMES)
    claims = [await store.claim() for _ in range(4)]
    assert [claim and (await store.get(claim.operation_id)).name for claim in claims] == [*NAMES, None]
    assert (await store.get(run.operation_id)).status == Status.WAITING


async def test_a_study_asks_for_no_gpu_and_no_cores_but_its_children_do(store: Store) -> None:
    gpu = await store.worker("gpu", device="cuda", slot={"device_uuid": "GPU-1"}, cores=8)
    cpu = await store.worker("cpu", cores=1)
    run = await store.running(**STUDY, execution={"accelerator": "cuda"}, resources={"cores": 8})
    assert run.incarnation == cpu
    wanted = {"execution": {"accelerator": "cuda"}, "resources": {"cores": 8}}
    await store.finish(run, Outcome.PLANNED, plan=plan("a", **wanted))
    claim = await store.claim()
    assert claim is not None
    assert claim.members[0].incarnation == gpu
    assert (await store.get(run.operation_id)).job.execution.threads is None


async def test_the_last_two_children_that_end_together_still_wake_it_once(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a", "b")
    first, second = await _claims(store, 2)

    await at_once(store.finish(first, Outcome.COMPLETED), store.finish(second, Outcome.COMPLETED), store.look())
    await at_once(store.look(), store.look(), store.look())

    study = await store.get(run.operation_id)
    assert (study.status, study.children) == (Status.PENDING, {Status.COMPLETED: 2})
    assert [name for name in await _events(store, run.operation_id) if name == "reduce"] == ["reduce"]
    claim = await store.claim()
    assert claim is not None
    assert claim.children is not None
    assert [child.name for child in claim.children] == ["a", "b"]


async def test_it_does_not_wake_while_a_child_lives(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a", "b")
    first, _ = await _claims(store, 2)
    await store.finish(first, Outcome.COMPLETED)
    await store.look()
    assert (await store.get(run.operation_id)).status == Status.WAITING


async def test_one_failed_child_does_not_lose_the_others_results(store: Store, slots: UUID) -> None:
    await _planned(store, "a", "b")
    first, second = await _claims(store, 2)
    await store.finish(first, Outcome.FAILED, permanent=True, error=Fault(code="exception", message="no luck"))
    second = await store.report(
        second, started(), losses((0, 3.0), (1, 2.0)), losses((1, 0.5), name="val_loss"), _result()
    )
    await store.book(second, window(1, steps=(0, 2)))
    await store.finish(second, Outcome.COMPLETED)
    await store.look()

    claim = await store.claim()

    assert claim is not None
    assert claim.children is not None
    failed, done = claim.children
    assert (failed.status, failed.error, failed.final, failed.energy_j) == (Status.FAILED, "no luck", {}, None)
    assert failed.energy_reason
    assert (done.status, done.final) == (Status.COMPLETED, {"loss": 2.0, "val_loss": 0.5})
    assert (done.training, done.energy_j) == (_result().content, 100.0)
    assert done.running_s is not None


async def test_the_final_values_are_those_of_the_lineage(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a")
    [child] = await _claims(store, 1)
    checkpoint = saved(child, 1)
    child = await store.report(child, started(), losses((0, 9.0)), checkpoint, losses((1, 8.0), (2, 7.0)))
    await store.finish(child, Outcome.PREEMPTED)
    [child] = await _claims(store, 1)
    assert [c.final for c in await store.children(run.operation_id)] == [{"loss": 9.0}]
    await store.report(child, started(1), losses((1, float("nan"))))
    [found] = await store.children(run.operation_id)
    assert str(found.final) == "{'loss': nan}"


async def test_a_resume_runs_only_what_is_missing_and_goes_on_inside_a_child(store: Store, slots: UUID) -> None:
    run = await _planned(store, *NAMES)
    done, cut, failed = await _claims(store, 3)
    await store.finish(done, Outcome.COMPLETED)
    await store.finish(failed, Outcome.FAILED, permanent=True)
    checkpoint = saved(cut, 5)
    cut = await store.report(cut, started(), checkpoint)
    assert await store.cancel(run.operation_id) is not None
    await store.look()
    assert (await store.get(cut.operation_id)).status == Status.CANCELLING
    assert (await store.get(run.operation_id)).status == Status.CANCELLING
    await store.finish(cut, Outcome.CANCELLED)
    await store.look()
    assert (await store.get(run.operation_id)).status == Status.CANCELLED

    await store.resume(run.operation_id)
    [again] = await _claims(store, 1)
    await store.finish(again, Outcome.PLANNED, plan=plan(*NAMES))
    assert (await store.get(run.operation_id)).status == Status.WAITING
    await at_once(store.look(), store.look(), store.look())

    claims = [await store.claim() for _ in range(3)]
    assert [c and (c.operation_id, c.checkpoint and c.checkpoint.step) for c in claims] == [
        (cut.operation_id, 5),
        (failed.operation_id, None),
        None,
    ]
    assert (await store.get(done.operation_id)).attempt == 1
    assert (await _events(store, cut.operation_id)).count("replan") == 1
    assert claims[0] is not None
    assert claims[1] is not None
    await store.finish(held(claims[0]), Outcome.COMPLETED)
    await store.finish(held(claims[1]), Outcome.FAILED, permanent=True)
    await store.look()
    assert (await store.get(failed.operation_id)).status == Status.FAILED  # not again for the same plan
    assert (await store.get(run.operation_id)).status == Status.PENDING


async def test_a_changed_plan_reuses_no_result_of_what_it_does_not_want(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a", "b")
    for child in await _claims(store, 2):
        await store.finish(child, Outcome.COMPLETED)
    await store.look()
    [reducing] = await _claims(store, 1)
    await store.finish(reducing, Outcome.FAILED, permanent=True)
    await store.resume(run.operation_id)
    [again] = await _claims(store, 1)

    await store.finish(again, Outcome.PLANNED, plan=plan("c", "a"))

    assert [(c.name, c.status) for c in await store.children(run.operation_id)] == [
        ("c", Status.PENDING),
        ("a", Status.COMPLETED),
    ]
    assert (await store.get(run.operation_id)).children == {Status.PENDING: 1, Status.COMPLETED: 1}


async def test_a_cancel_cascades_to_children_that_are_made_at_that_moment(store: Store, slots: UUID) -> None:
    for _ in range(5):
        run = await store.running(**STUDY)
        await at_once(
            store.finish(run, Outcome.PLANNED, plan=plan(*NAMES)), store.cancel(run.operation_id), store.look()
        )
        await store.look()
        study = await store.get(run.operation_id)
        assert study.status == Status.CANCELLED
        assert {child.status for child in await store.children(run.operation_id)} <= {Status.CANCELLED}
    assert await store.claim() is None


async def test_a_plan_that_comes_after_the_cancel_is_discarded(store: Store, slots: UUID) -> None:
    run = await store.running(**STUDY)
    await store.cancel(run.operation_id)
    await store.finish(run, Outcome.PLANNED, plan=plan(*NAMES))
    assert (await store.get(run.operation_id)).status == Status.CANCELLED
    assert await store.children(run.operation_id) == []


async def test_a_forced_cancel_reaches_the_children_also_later(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a")
    [child] = await _claims(store, 1)
    await store.cancel(run.operation_id)
    await store.look()
    [order] = (await store.heartbeat(child.incarnation, child)).cancelling
    assert (order.force, order.reason) == (False, "its study was cancelled")
    await store.cancel(run.operation_id, force=True)
    await store.look()
    [order] = (await store.heartbeat(child.incarnation, child)).cancelling
    assert order.force


async def test_a_child_of_a_cancelled_study_is_resumed_with_it_alone(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a")
    [child] = await _claims(store, 1)
    child = await store.report(child, started(), saved(child, 1))
    await store.cancel(run.operation_id)
    await store.look()
    await store.finish(child, Outcome.CANCELLED)
    await store.look()
    assert await store.resume(child.operation_id) is None
    async with store.sessions.begin() as session:
        refused = await transitions.explain_resume(session, child.operation_id, None)
    assert (refused.code, refused.message) == (
        "not_resumable",
        f"its study was cancelled: resume that (`ops resume {run.operation_id}`), which goes on with this one too",
    )
    assert refused.details == {"status": "cancelled", "parent_id": str(run.operation_id)}


async def test_a_child_that_lives_is_cancelled_also_when_its_study_has_ended_first(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a")
    [child] = await _claims(store, 1)
    child = await store.report(child, started(), saved(child, 1))
    await store.finish(child, Outcome.FAILED, permanent=True)
    await store.look()
    [reducing] = await _claims(store, 1)
    await store.finish(reducing, Outcome.FAILED, permanent=True)
    await store.resume(run.operation_id)
    [again] = await _claims(store, 1)
    await store.resume(child.operation_id)
    await store.cancel(run.operation_id)
    await store.finish(again, Outcome.CANCELLED)
    assert (await store.get(run.operation_id)).status == Status.CANCELLED
    assert await _stirs(store)
    await store.look()
    assert (await store.get(child.operation_id)).status == Status.CANCELLED
    assert not await _stirs(store)


async def test_a_study_waits_for_what_it_has_planned_again_before_that_is_queued(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a")
    [child] = await _claims(store, 1)
    await store.finish(child, Outcome.FAILED, permanent=True)
    await store.cancel(run.operation_id)
    await store.look()
    await store.resume(run.operation_id)
    [again] = await _claims(store, 1)
    await store.finish(again, Outcome.PLANNED, plan=plan("a"))
    async with store.sessions.begin() as session:
        assert await studies.reduce(session) == []
    await store.look()
    assert (await store.get(child.operation_id)).status == Status.PENDING


async def test_a_child_can_be_resumed_by_hand_while_its_study_waits(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a", "b")
    first, second = await _claims(store, 2)
    first = await store.report(first, started(), saved(first, 1))
    await store.finish(first, Outcome.FAILED, permanent=True)
    assert await store.resume(first.operation_id) is not None
    await store.finish(second, Outcome.COMPLETED)
    await store.look()
    assert (await store.get(run.operation_id)).status == Status.WAITING


async def test_a_lost_planner_plans_again_and_makes_no_child_twice(store: Store, slots: UUID) -> None:
    run = await store.running(**STUDY)
    run = await store.report(run, started())
    await store.expire(run)
    await store.lose(run)
    [again] = await _claims(store, 1)
    await store.finish(again, Outcome.PLANNED, plan=plan("a"))
    with pytest.raises(OpsError, match="ended"):  # the one that was lost wakes up
        await store.finish(run, Outcome.PLANNED, plan=plan("a", "b"))
    assert [child.name for child in await store.children(run.operation_id)] == ["a"]


async def test_the_same_plan_told_twice_is_one_plan(store: Store, slots: UUID) -> None:
    run = await store.running(**STUDY)
    await at_once(*(store.finish(run, Outcome.PLANNED, plan=plan(*NAMES)) for _ in range(4)))
    assert len(await store.fetch("SELECT id FROM operations WHERE parent_id IS NOT NULL")) == 3


async def test_only_a_study_can_plan(store: Store, slots: UUID) -> None:
    run = await store.running(max_retries=0)
    await store.finish(run, Outcome.PLANNED, plan=plan("a"))
    assert (await store.get(run.operation_id)).status == Status.FAILED
    assert await store.children(run.operation_id) == []


async def test_a_study_completes_with_its_result(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a")
    [child] = await _claims(store, 1)
    await store.finish(child, Outcome.COMPLETED)
    await store.look()
    [reducing] = await _claims(store, 1)
    reducing = await store.report(reducing, started(), Result(content=GridResult(rows=[], warnings=["w"])))
    await store.finish(reducing, Outcome.COMPLETED)
    assert (await store.get(run.operation_id)).status == Status.COMPLETED
    [row] = await store.fetch("SELECT attempt, content FROM results WHERE operation_id = :id", id=run.operation_id)
    assert (row.attempt, row.content["warnings"]) == (2, ["w"])


async def test_after_so_many_failures_in_a_row_what_waits_is_not_run_and_what_runs_goes_on(
    store: Store, slots: UUID
) -> None:
    run = await _planned(store, *FIVE, **STOPPING)
    first, second, third = await _claims(store, 3)
    await _fail(store, first)
    await store.look()
    assert (await store.get(run.operation_id)).children == {Status.FAILED: 1, Status.RUNNING: 2, Status.PENDING: 2}

    await _fail(store, second)
    await store.look()

    assert (await store.get(run.operation_id)).children == {Status.FAILED: 2, Status.RUNNING: 1, Status.CANCELLED: 2}
    assert (await store.get(run.operation_id)).status == Status.WAITING
    fourth = (await store.children(run.operation_id))[3]
    assert (fourth.status, fourth.error) == (Status.CANCELLED, NOT_RUN)
    [told] = await store.fetch(
        "SELECT detail FROM events WHERE operation_id = :id AND name = 'cancel'", id=fourth.operation_id
    )
    assert told.detail == {"reason": NOT_RUN}
    await store.finish(third, Outcome.COMPLETED)
    await store.look()
    claim = await store.claim()
    assert claim is not None
    assert (claim.operation_id, [child.error for child in claim.children or []]) == (
        run.operation_id,
        ["no luck", "no luck", None, NOT_RUN, NOT_RUN],
    )


async def test_one_that_completed_in_between_begins_the_count_anew(store: Store, slots: UUID) -> None:
    run = await _planned(store, *FIVE, **STOPPING)
    first, second, third = await _claims(store, 3)
    await _fail(store, first)
    await store.finish(second, Outcome.COMPLETED)
    await _fail(store, third)
    await store.look()
    assert (await store.get(run.operation_id)).children[Status.PENDING] == 2  # type: ignore[index]
    [fourth] = await _claims(store, 1)
    await _fail(store, fourth)
    await store.look()
    assert (await store.get(run.operation_id)).children[Status.CANCELLED] == 1  # type: ignore[index]


async def test_without_stop_after_failures_all_are_run(store: Store, slots: UUID) -> None:
    run = await _planned(store, *FIVE)
    for child in await _claims(store, 4):
        await _fail(store, child)
    await store.look()
    assert (await store.get(run.operation_id)).children == {Status.FAILED: 4, Status.PENDING: 1}


async def test_a_study_that_stopped_stays_so_though_the_backend_begins_anew_and_one_completes(
    store: Store, slots: UUID, database_url: str
) -> None:
    """As where so many wait that one statement does not reach all of them."""
    run = await _planned(store, *FIVE, **STOPPING)
    first, second, third = await _claims(store, 3)
    await _fail(store, first)
    await _fail(store, second)
    one = statement(studies.STOP_AFTER_FAILURES.text.replace(f"LIMIT {studies.AT_ONCE}", "LIMIT 1"))
    async with store.sessions.begin() as session:
        told = {"cancel_reason": NOT_RUN, "detail": {"reason": NOT_RUN}}
        assert len((await session.execute(one, told)).all()) == 1
    await store.finish(third, Outcome.COMPLETED)
    sessions = Sessions(database_url, 1)
    try:
        await Store(sessions).look()
    finally:
        await sessions.dispose()
    assert (await store.get(run.operation_id)).children == {
        Status.FAILED: 2,
        Status.COMPLETED: 1,
        Status.CANCELLED: 2,
    }
    assert (await store.get(run.operation_id)).status == Status.PENDING


async def test_a_resume_runs_the_failed_and_those_that_were_not_run_and_counts_from_zero(
    store: Store, slots: UUID
) -> None:
    run = await _planned(store, *FIVE, **STOPPING)
    first, second = await _claims(store, 2)
    await _fail(store, first)
    await _fail(store, second)
    await store.look()
    [reducing] = await _claims(store, 1)
    await store.finish(reducing, Outcome.FAILED, permanent=True)

    await store.resume(run.operation_id)
    [again] = await _claims(store, 1)
    await store.finish(again, Outcome.PLANNED, plan=plan(*FIVE, "new"))
    await store.look()

    assert (await store.get(run.operation_id)).children == {Status.PENDING: 6}
    claims = await _claims(store, 3)
    assert [child.attempt for child in claims] == [2, 2, 1]
    await _fail(store, claims[0])
    await store.look()
    assert (await store.get(run.operation_id)).children == {Status.FAILED: 1, Status.RUNNING: 2, Status.PENDING: 3}
    await _fail(store, claims[1])
    await store.look()
    assert (await store.get(run.operation_id)).children == {Status.FAILED: 2, Status.RUNNING: 1, Status.CANCELLED: 3}


async def test_a_child_that_is_claimed_while_its_study_stops_runs(store: Store, slots: UUID) -> None:
    for _ in range(5):
        run = await _planned(store, "a", "b", **STOPPING | {"study": GRID | {"stop_after_failures": 1}})
        [first] = await _claims(store, 1)
        await _fail(store, first)
        claimed, *_ = await at_once(store.claim(), store.look(), store.look())
        await store.look()
        [_, second] = await store.children(run.operation_id)
        assert second.status == (Status.RUNNING if _is(claimed, second.operation_id) else Status.CANCELLED)
        async with store.sessions.begin() as session:
            assert await studies.stop_after_failures(session) == []
        await store.cancel(run.operation_id)
        if claimed is not None:
            await store.finish(held(claimed), Outcome.CANCELLED)
        await store.look()


async def test_a_child_that_is_being_claimed_is_passed_over(store: Store, slots: UUID) -> None:
    run = await _planned(store, "a", "b", "c", **STOPPING | {"study": GRID | {"stop_after_failures": 1}})
    [first] = await _claims(store, 1)
    await _fail(store, first)
    async with store.sessions.begin() as claiming:
        claim = await claims.claim_next(claiming, LEASE_S)
        assert claim is not None
        await store.look()
        assert (await store.get(run.operation_id)).children == {
            Status.FAILED: 1,
            Status.PENDING: 1,
            Status.CANCELLED: 1,
        }
    await store.look()
    assert (await store.get(claim.operation_id)).status == Status.RUNNING


async def test_a_failed_measurement_runs_again_without_a_checkpoint(store: Store) -> None:
    await store.worker(workloads=[MEASURES])
    run = await store.running(**MEASURED, max_retries=0)
    await store.finish(run, Outcome.FAILED, permanent=True)
    assert await store.resume(run.operation_id) is not None
    [again] = await _claims(store, 1)
    assert (again.operation_id, again.attempt) == (run.operation_id, 2)


async def test_the_final_values_of_a_measurement_are_the_known_figures_of_its_newest_attempt(store: Store) -> None:
    await store.worker(workloads=[MEASURES], slots=2)
    grid = {"type": "grid", "axes": {"config.batch_size": [1, 2]}}
    run = await store.running(**MEASURED, study=grid, max_retries=1)
    config = MeasurementConfig.model_validate(MEASURED["config"]).model_dump(mode="json")
    await store.finish(run, Outcome.PLANNED, plan=plan("a", config=config))
    [child] = await _claims(store, 1)
    told = measured(tokens_per_s=100.5, energy_j=None, mfu=float("inf"))
    child = await store.report(child, started(), Result(content=told))
    [known] = await store.children(run.operation_id)
    assert (known.final, known.training) == ({"tokens_per_s": 100.5, "mfu": float("inf")}, None)
    await store.finish(child, Outcome.FAILED)
    await _claims(store, 1)
    [known] = await store.children(run.operation_id)
    assert known.final == {}


async def _stirs(store: Store) -> bool:
    async with store.sessions.begin() as session:
        return await studies.stirs(session)


async def _planned(store: Store, *names: str, **spec: Any) -> Held:
    run = await store.running(**STUDY | spec)
    await store.finish(run, Outcome.PLANNED, plan=plan(*names))
    return run


async def _fail(store: Store, child: Held) -> None:
    why = Fault(code="exception", message="no luck")
    await store.finish(child, Outcome.FAILED, permanent=True, error=why)


def _is(claim: claims.Claim | None, id: UUID) -> bool:
    return claim is not None and claim.operation_id == id


async def _claims(store: Store, number: int) -> list[Held]:
    claims = [await store.claim() for _ in range(number)]
    return [held(claim) for claim in claims if claim is not None]


async def _events(store: Store, id: UUID) -> list[str]:
    return [
        row.name for row in await store.fetch("SELECT name FROM events WHERE operation_id = :id ORDER BY seq", id=id)
    ]


def _result() -> Result:
    return Result(content=TrainingResult(steps=2, samples=8, units=64, params=100, embedding_params=10))
