"""A run that was killed and went on equals one that never was: every loss, the final state, bit for bit."""

import os
import random
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from training_child import Operation

from ops_contract.agents import FailureRecord
from ops_contract.jobs import CheckpointEvery, Execution, SchedulerName
from ops_contract.lifecycle import CheckpointType, Outcome, Phase
from ops_contract.reports import Metrics, Note, Report, Started

BASE_SEED = int(os.environ.get("EXACTNESS_SEED", secrets.randbelow(2**32)))
KILLS = [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 24))]

Maker = Callable[..., Operation]

# Short last windows: 48 batches in fives, 9 in twos. Checkpoints fall at epochs' ends, and off them.
CASES: dict[str, dict[str, Any]] = {
    "digits": {
        "config": {"channels": 2, "hidden": 8},
        "execution": Execution(
            max_epochs=2,
            accumulate_grad_batches=5,
            scheduler=SchedulerName.COSINE,
            gradient_clip=1.0,
            checkpoint_every=CheckpointEvery(steps=3),
        ),
    },
    "bytelm": {
        "config": {
            "max_bytes": 1200,
            "block_size": 16,
            "n_layer": 1,
            "n_head": 2,
            "d_model": 16,
            "dropout": 0.1,
            "validation_share": 0.1,
        },
        "execution": Execution(
            max_epochs=3,
            batch_size=8,
            accumulate_grad_batches=2,
            scheduler=SchedulerName.COSINE,
            checkpoint_every=CheckpointEvery(steps=2),
        ),
    },
    "zoo": {
        "config": {"scheduler": "plateau"},
        "execution": Execution(
            max_epochs=3, batch_size=5, accumulate_grad_batches=2, checkpoint_every=CheckpointEvery(steps=4)
        ),
    },
    # The metric is noise; the run ends where three evaluations in a row are no better than the best.
    "early stop": {
        "workload": "zoo",
        "config": {"scheduler": "plateau", "samples": 15},
        "execution": Execution(
            max_epochs=40,
            batch_size=5,
            accumulate_grad_batches=2,
            checkpoint_monitor="val_noise",
            checkpoint_mode="min",
            early_stop_patience=3,
            checkpoint_every=CheckpointEvery(steps=5),
        ),
    },
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    def make(workload: str, config: dict[str, Any] | None = None, **execution: Any) -> Operation:
        case = CASES[workload]
        return Operation(
            root=tmp_path_factory.mktemp(workload),
            workload=case.get("workload", workload),
            config=case["config"] | (config or {}),
            execution=Execution.model_validate(case["execution"].model_dump() | execution),
            record=FailureRecord(failures=10**6),  # auto saves as often as it may
        )

    return make


@pytest.fixture(scope="module")
def uninterrupted(make: Maker) -> Callable[..., Operation]:
    known: dict[str, Operation] = {}

    def uninterrupted(workload: str, **different: Any) -> Operation:
        key = repr((workload, different))
        if key not in known:
            known[key] = make(workload, **different)
            assert known[key].run() is Outcome.COMPLETED
        return known[key]

    return uninterrupted


def assert_equal(operation: Operation, reference: Operation) -> None:
    assert operation.differences(reference) == []


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("workload", ["digits", "bytelm", "early stop"])
def test_a_run_killed_at_random_reports_equals_an_uninterrupted_one(
    make: Maker, uninterrupted: Callable[..., Operation], workload: str, kill: int
) -> None:
    print(f"EXACTNESS_SEED={BASE_SEED}")
    chance = random.Random(f"{BASE_SEED} {workload} {kill}")
    reference = uninterrupted(workload)
    operation = make(workload)

    for _ in range(chance.choice([1, 1, 2])):
        at = chance.randrange(len(reference.reports))
        operation.run(kill_at=lambda n, report, at=at: n == at)
    while operation.run() is not Outcome.COMPLETED:
        pass

    assert_equal(operation, reference)


@pytest.mark.parametrize(
    ("knobs", "rates"),
    [
        # Three updates are 30 % of ten: up from a twenty-fifth to the rate itself, and then down.
        ({"scheduler": "onecycle"}, {0: 0.04, 2: 1.0, 9: 4e-6}),
        (
            {"scheduler": "multistep", "scheduler_milestones": [3, 7]},
            {0: 1.0, 2: 1.0, 3: 0.1, 6: 0.1, 7: 0.01, 9: 0.01},
        ),
    ],
)
def test_schedulers_by_name_do_what_they_say(
    uninterrupted: Callable[..., Operation], knobs: dict[str, Any], rates: dict[int, float]
) -> None:
    operation = uninterrupted("bytelm", **knobs, max_steps=10, learning_rate=0.01)

    curve = operation.curves["learning_rate"]
    assert {step: curve[step] / 0.01 for step in rates} == pytest.approx(rates)


def test_a_run_ends_early_at_the_evaluation_where_patience_is_spent(uninterrupted: Callable[..., Operation]) -> None:
    """Without periodic checkpoints too."""
    operation = uninterrupted("early stop", checkpoint_every=CheckpointEvery(epochs=1000))

    evaluations = list(operation.curves["val_noise"].items())
    best = min(range(len(evaluations)), key=lambda i: evaluations[i][1])
    assert len(evaluations) - 1 - best == 3 < len(evaluations) < 40
    assert all(longest_run_without_a_best([v for _, v in evaluations[:n]]) < 3 for n in range(len(evaluations)))
    last = evaluations[-1][0]
    assert max(operation.curves["loss"]) == last
    assert [(saved.step, saved.checkpoint_type) for saved in operation.checkpoints[1:]] == [
        (last + 1, CheckpointType.FINAL)
    ]
    [note] = [report for report in operation.reports if isinstance(report, Note)]
    assert note.message == (
        f"stopped early: val_noise did not improve on {evaluations[best][1]} in 3 evaluations in a row"
    )


def test_a_plateau_and_an_early_stop_are_decided_alike_wherever_the_run_was_stopped(
    make: Maker, uninterrupted: Callable[..., Operation]
) -> None:
    reference = uninterrupted("early stop")
    operation = make("early stop", checkpoint_every=CheckpointEvery(epochs=1000))

    outcomes: list[Outcome | None] = []
    while not outcomes or outcomes[-1] is not Outcome.COMPLETED:
        outcomes.append(operation.run(stop_after_polls=5))

    assert len(outcomes) > 3
    assert len(set(reference.curves["learning_rate"].values())) > 1
    assert_equal(operation, reference)


def test_an_early_stop_whose_finish_was_lost_stays_one(make: Maker, uninterrupted: Callable[..., Operation]) -> None:
    operation = make("early stop")

    assert operation.run() is Outcome.COMPLETED
    assert operation.run() is Outcome.COMPLETED

    assert_equal(operation, uninterrupted("early stop"))


def test_saving_every_step_equals_saving_never(make: Maker, uninterrupted: Callable[..., Operation]) -> None:
    measured = {"checkpoint_monitor": "val_loss", "checkpoint_mode": "min"}
    often = uninterrupted("zoo", checkpoint_every=CheckpointEvery(steps=1), **measured)
    never = uninterrupted("zoo", checkpoint_every=CheckpointEvery(epochs=1000), **measured)

    # Those of steps between may be passed over when the disk is slower than the steps; epochs' ends are not.
    assert {saved.step for saved in often.checkpoints} >= {0, 1, 5, 10, 15}
    assert [saved.step for saved in never.checkpoints] == [0, 15]
    assert_equal(often, never)


@pytest.mark.parametrize("every", ["auto", {"seconds": 5}])
def test_saving_by_time_equals_saving_never(uninterrupted: Callable[..., Operation], every: Any) -> None:
    by_time = uninterrupted("zoo", checkpoint_every=every)
    never = uninterrupted("zoo", checkpoint_every=CheckpointEvery(epochs=1000))

    assert CheckpointType.PERIODIC in {saved.checkpoint_type for saved in by_time.checkpoints}
    assert_equal(by_time, never)


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({"precision": "bf16", "num_workers": 2}, marks=pytest.mark.slow),
        {"precision": "16", "gradient_clip": 1.0, "checkpoint_every": {"steps": 1}},
        pytest.param({"precision": "16", "checkpoint_every": "auto"}, marks=pytest.mark.slow),
    ],
)
def test_mixed_precision_and_time_resume_exactly(
    make: Maker, uninterrupted: Callable[..., Operation], knobs: dict[str, Any]
) -> None:
    reference = uninterrupted("zoo", **knobs | {"num_workers": 0, "checkpoint_every": {"epochs": 1000}})
    operation = make("zoo", **knobs)

    assert operation.run(stop_after_polls=8) is Outcome.CANCELLED  # the first update of the second epoch
    operation.run(kill_at=lambda n, report: reported_step(report) == 7)
    operation.run()

    assert operation.attempts == 3
    assert_equal(operation, reference)
    assert operation.bits()["loss"] != uninterrupted("zoo").bits()["loss"]


@pytest.mark.parametrize("num_workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_loader_processes_do_not_change_a_bit(
    make: Maker, uninterrupted: Callable[..., Operation], num_workers: int
) -> None:
    """Its samples and its batches are transformed at random."""
    operation = make("zoo", num_workers=num_workers)

    operation.run(kill_at=lambda n, report: reported_step(report) == 6)
    operation.run()

    assert_equal(operation, uninterrupted("zoo"))


@pytest.mark.parametrize("workload", [pytest.param("bytelm", marks=pytest.mark.slow), "zoo"])
def test_a_stop_at_any_boundary_saves_right_there_and_resumes_exactly(
    make: Maker, uninterrupted: Callable[..., Operation], workload: str
) -> None:
    reference = uninterrupted(workload)
    operation = make(workload, checkpoint_every=CheckpointEvery(epochs=1000))

    # One more poll is answered each time: every step and every evaluation batch is a place to stop.
    outcomes = []
    while not outcomes or outcomes[-1] is not Outcome.COMPLETED:
        before = progress_made(operation)
        outcomes.append(operation.run(stop_after_polls=3))
        assert outcomes[-1] is Outcome.COMPLETED or progress_made(operation) > before

    assert len(outcomes) > 5
    assert {saved.checkpoint_type for saved in operation.checkpoints[1:-1]} == {CheckpointType.CANCEL}
    assert_equal(operation, reference)


def test_a_stop_during_evaluation_is_saved_as_such_and_the_evaluation_redone(
    make: Maker, uninterrupted: Callable[..., Operation]
) -> None:
    reference = uninterrupted("zoo")
    operation = make("zoo")

    # Five updates make an epoch; of the two batches of its evaluation the second is not begun.
    assert operation.run(stop_after_polls=6) is Outcome.CANCELLED

    stopped = operation.checkpoints[-1]
    assert (stopped.step, stopped.epoch, stopped.phase) == (4, 0, Phase.EVALUATE)
    assert stopped.path.endswith("/1-4-evaluate")
    assert operation.run() is Outcome.COMPLETED
    started = [report for report in operation.reports if isinstance(report, Started)]
    assert started[1].start_step == 4
    assert_equal(operation, reference)


def test_a_stop_before_the_first_step_leaves_the_initial_checkpoint(make: Maker) -> None:
    operation = make("digits")

    assert operation.run(stop_after_polls=0) is Outcome.CANCELLED

    assert [(saved.step, saved.checkpoint_type) for saved in operation.checkpoints] == [(0, CheckpointType.INITIAL)]
    assert operation.run() is Outcome.COMPLETED


def test_a_boundary_is_published_once(make: Maker) -> None:
    operation = make("zoo", max_steps=8, checkpoint_every=CheckpointEvery(steps=4))

    # The stop comes at the boundary whose periodic checkpoint is just written; the attempt after it does nothing.
    assert operation.run(stop_after_polls=4) is Outcome.CANCELLED
    assert operation.run(stop_after_polls=0) is Outcome.CANCELLED
    assert operation.run() is Outcome.COMPLETED
    assert operation.run() is Outcome.COMPLETED  # its finish was lost: nothing is left to do

    kinds = [(saved.step, saved.checkpoint_type) for saved in operation.checkpoints]
    assert kinds == [(0, CheckpointType.INITIAL), (4, CheckpointType.PERIODIC), (8, CheckpointType.FINAL)]


def test_the_last_step_is_evaluated_also_within_an_epoch(uninterrupted: Callable[..., Operation]) -> None:
    operation = uninterrupted("zoo", max_steps=7)

    assert sorted(operation.curves["val_loss"]) == [4, 6]
    assert sorted(operation.curves["loss"]) == list(range(7))
    assert operation.checkpoints[-1].epoch == 1


def test_the_loss_of_a_step_is_reported_once_with_learning_rate_and_extras(
    uninterrupted: Callable[..., Operation],
) -> None:
    operation = uninterrupted("zoo")

    steps = {name: sorted(curve) for name, curve in operation.curves.items()}
    every, ends = list(range(15)), [4, 9, 14]
    assert steps == {
        "loss": every,
        "learning_rate": every,
        "epoch": every,
        "scale": every,
        "val_loss": ends,
        "val_noise": ends,
    }
    assert not any(isinstance(report, Note) for report in operation.reports)


def longest_run_without_a_best(values: list[float]) -> int:
    best, longest, run = float("inf"), 0, 0
    for value in values:
        run = 0 if value < best else run + 1
        best, longest = min(best, value), max(longest, run)
    return longest


def reported_step(report: Report) -> int:
    if not isinstance(report, Metrics):
        return -1
    return max(step for series in report.series for step in series.steps)


def progress_made(operation: Operation) -> tuple[int, bool]:
    newest = operation.checkpoints[-1] if operation.checkpoints else None
    return (newest.step, newest.phase is Phase.EVALUATE) if newest else (-1, False)
