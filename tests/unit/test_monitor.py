"""When a run has stopped improving."""

import pytest

from ops_contract.jobs import Execution
from relight.training.faults import TrainingFault
from relight.training.monitor import Monitor

NAN = float("nan")


def monitor(**knobs: object) -> Monitor:
    return Monitor(Execution.model_validate({"checkpoint_monitor": "m", "checkpoint_mode": "min"} | knobs))


def evaluations_until_exhausted(judge: Monitor, *values: float) -> int | None:
    for number, value in enumerate(values, 1):
        judge.judge({"m": value})
        if judge.exhausted:
            return number
    return None


@pytest.mark.parametrize(
    ("knobs", "values", "ends_at"),
    [
        ({"early_stop_patience": 5}, (3, 2, 2, 2, 2, 2, 2, 1), 7),
        ({"early_stop_patience": 5}, (3, 2, 2, 2, 2, 2, 1, 1), None),
        ({"early_stop_patience": 1}, (1, 1), 2),
        ({"early_stop_patience": 2, "checkpoint_mode": "max"}, (1, 2, 1, 1.5), 4),
        ({"early_stop_patience": 2, "early_stop_min_delta": 0.5}, (3, 2.75, 2.5), 3),  # exactly min_delta is too little
        ({"early_stop_patience": 2, "early_stop_min_delta": 0.5}, (3, 2.75, 2.25, 2, 1), None),  # against the best
        ({"early_stop_patience": 2}, (NAN, NAN), 2),
        ({"early_stop_patience": 2}, (NAN, 1, NAN, 0.5, NAN), None),
        ({}, (1, 2, 3, 4, 5, 6), None),
    ],
)
def test_patience_ends_a_run_when_it_must_and_not_before(
    knobs: dict[str, object], values: tuple[float, ...], ends_at: int | None
) -> None:
    assert evaluations_until_exhausted(monitor(**knobs), *values) == ends_at


@pytest.mark.parametrize("resumed_after", range(7))
def test_best_and_patience_survive_a_resume(resumed_after: int) -> None:
    """Scenario 12: decided alike, whichever evaluation was the last before it."""
    knobs = {"early_stop_patience": 3, "early_stop_min_delta": 0.5}
    values = (5.0, 4.0, 3.8, 4.5, 3.4, NAN, 3.3)
    whole, first, second = (monitor(**knobs) for _ in range(3))
    expected = [(whole.judge({"m": value}), whole.is_best, whole.exhausted) for value in values]

    evaluations_until_exhausted(first, *values[:resumed_after])
    second.load_state_dict(first.state_dict())

    decided = [(second.judge({"m": v}), second.is_best, second.exhausted) for v in values[resumed_after:]]
    assert repr(decided) == repr(expected[resumed_after:])
    assert second.state_dict() == whole.state_dict()


def test_the_best_is_the_best_by_whatever_little() -> None:
    judge = monitor(early_stop_patience=9, early_stop_min_delta=1.0)
    best = [judge.judge({"m": value}) == value and judge.is_best for value in (5.0, 4.9, 4.9, 5.0, NAN, 4.8)]
    assert best == [True, True, False, False, False, True]
    assert judge.evaluations_since == 5


def test_a_step_without_evaluation_is_not_one_without_improvement() -> None:
    judge = monitor(early_stop_patience=1)
    judge.judge({"m": 1.0})
    assert judge.judge({}) is None
    assert not judge.exhausted


def test_what_was_judged_by_another_metric_is_not_taken_over() -> None:
    before = monitor(early_stop_patience=2)
    before.judge({"m": 1.0})
    before.judge({"m": 1.0})
    same, maximal, other = monitor(), monitor(checkpoint_mode="max"), monitor(checkpoint_monitor="n")

    for judge in (same, maximal, other):
        judge.load_state_dict(before.state_dict())

    assert (same.best, same.evaluations_since) == (1.0, 1)
    assert maximal.best is other.best is None


def test_a_metric_that_is_needed_and_not_measured_ends_the_run_for_good() -> None:
    for judge in (monitor(checkpoint_save_top_k=1, checkpoint_every={"epochs": 1}), monitor(scheduler="plateau")):
        needs_a_metric(judge)
    assert monitor(checkpoint_save_top_k=1).judge({"other": 1.0}) is None  # with auto nobody asked for it


def needs_a_metric(judge: Monitor) -> None:
    for broken in (lambda: judge.judge({"other": 1.0}), lambda: judge.check(evaluates=False)):
        with pytest.raises(TrainingFault) as caught:
            broken()
        assert caught.value.permanent
