"""A fork begins with its parent's tensors at its checkpoint, and goes on under its own job."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from training_child import Operation, Zoo, ZooConfig, ref_of

from ops_contract.jobs import CheckpointEvery, Execution, SchedulerName
from ops_contract.lifecycle import Outcome, Phase
from ops_contract.reports import CheckpointSaved, Started
from relight.training.checkpoint import restore
from relight.training.faults import TrainingFault
from relight.training.fork import forked_tree
from relight.training.monitor import Monitor
from relight.training.state import Live
from relight.workload import Env

Runs = Callable[..., Operation]
ZOO = Execution(max_epochs=3, batch_size=5, accumulate_grad_batches=2, checkpoint_every=CheckpointEvery(steps=4))


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """An uninterrupted run of the zoo, 5 steps an epoch; the same one for the same question."""
    known: dict[str, Operation] = {}

    def completed(scheduler: str, **execution: Any) -> Operation:
        key = repr((scheduler, execution))
        if key not in known:
            knobs = Execution.model_validate(ZOO.model_dump() | execution)
            known[key] = Operation(tmp_path_factory.mktemp("zoo"), "zoo", {"scheduler": scheduler}, knobs)
            assert known[key].run(waits=True) is Outcome.COMPLETED
        return known[key]

    return completed


def at(operation: Operation, step: int) -> CheckpointSaved:
    return next(saved for saved in operation.checkpoints if saved.step == step)


def from_step(operation: Operation, step: int) -> dict[str, dict[int, str]]:
    bits = {name: {s: v for s, v in curve.items() if s >= step} for name, curve in operation.bits().items()}
    return {name: curve for name, curve in bits.items() if curve}


@pytest.mark.parametrize(
    ("scheduler", "step"),
    [("plateau", 8), ("multistep", 8), ("onecycle", 4), pytest.param("onecycle", 12, marks=pytest.mark.slow)],
)
def test_a_fork_that_changes_nothing_goes_on_as_its_parent_did(completed: Runs, scheduler: str, step: int) -> None:
    parent = completed(scheduler)
    fork = parent.fork(at(parent, step))

    fork.run(kill_at=lambda n, report: n == 3)  # it has no checkpoint of its own yet
    assert not fork.checkpoints
    assert fork.run() is Outcome.COMPLETED

    assert min(fork.curves["loss"]) == step
    assert fork.bits() == from_step(parent, step)
    assert fork.final_state() == parent.final_state()


@pytest.mark.parametrize("step", [0, 4])
def test_a_replay_ends_before_its_step_under_the_schedules_of_the_whole_run(completed: Runs, step: int) -> None:
    parent = completed("onecycle")
    replay = parent.fork(at(parent, step))
    replay.until_step = 13

    replay.run(kill_at=lambda n, report: isinstance(report, CheckpointSaved) and report.step == 8)
    assert replay.run() is Outcome.COMPLETED

    wanted = {name: {s: v for s, v in curve.items() if s < 13} for name, curve in from_step(parent, step).items()}
    assert replay.bits() == wanted
    assert replay.checkpoints[-1].step == 13


def test_a_fork_of_a_stopped_evaluation_tells_its_step_again(completed: Runs) -> None:
    whole = completed("plateau")
    parent = Operation(whole.root, "zoo", whole.config, whole.execution)
    assert parent.run(stop_after_polls=6) is Outcome.CANCELLED
    stopped = parent.checkpoints[-1]
    assert (stopped.step, stopped.phase) == (4, Phase.EVALUATE)
    fork = parent.fork(stopped)

    assert fork.run() is Outcome.COMPLETED

    assert fork.bits() == from_step(whole, 4)


@pytest.mark.parametrize("scheduler", ["plateau", "multistep"])
def test_a_completed_run_is_extended_as_if_it_had_been_longer(completed: Runs, scheduler: str) -> None:
    parent, longer = completed(scheduler), completed(scheduler, max_epochs=5)
    fork = parent.fork(parent.checkpoints[-1], max_epochs=5)  # the optimizer is rebuilt for multistep: its moments stay

    assert fork.run() is Outcome.COMPLETED

    assert sorted(fork.curves["loss"]) == list(range(15, 25))
    assert fork.bits() == from_step(longer, 15)
    assert fork.final_state() == longer.final_state()


@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (8, 12))])
def test_a_scheduler_is_rebuilt_for_the_new_length_and_advanced(completed: Runs, step: int) -> None:
    parent, longer = completed("onecycle"), completed("onecycle", max_epochs=5)
    fork = parent.fork(at(parent, step), max_epochs=5)

    fork.run(kill_at=lambda n, report: isinstance(report, CheckpointSaved))
    assert fork.run() is Outcome.COMPLETED

    rates, wanted = fork.bits()["learning_rate"], from_step(longer, step)["learning_rate"]
    assert rates == wanted
    assert rates != from_step(parent, step)["learning_rate"]
    first = next(report for report in fork.reports if isinstance(report, Started))
    assert first.start_step == step
    assert fork.bits()["loss"][step] == parent.bits()["loss"][step]  # the same weights, before the new rate shows


def test_hyper_parameters_are_those_of_the_new_job(completed: Runs) -> None:
    parent = completed("multistep")
    fork = parent.fork(at(parent, 8), learning_rate=0.5)

    assert fork.run() is Outcome.COMPLETED

    assert [fork.curves["learning_rate"][step] for step in (8, 9, 10)] == [0.15, 0.15, 0.045]
    assert fork.bits()["loss"][8] == parent.bits()["loss"][8]
    assert fork.bits()["loss"][9] != parent.bits()["loss"][9]


def test_a_fork_may_change_the_precision(completed: Runs) -> None:
    parent = completed("multistep")
    half = parent.fork(at(parent, 4), precision="16")
    assert half.run() is Outcome.COMPLETED
    back = half.fork(half.checkpoints[-1], precision="32", max_epochs=4)
    assert back.run() is Outcome.COMPLETED

    assert half.bits()["loss"] != from_step(parent, 4)["loss"]
    assert sorted(back.curves["loss"]) == list(range(15, 20))


def test_a_fork_of_step_0_is_a_run_of_the_new_job(completed: Runs) -> None:
    changes = {"batch_size": 9, "accumulate_grad_batches": 1, "optimizer": "sgd", "learning_rate": 0.02}
    anew = completed("onecycle", **changes)
    parent = completed("onecycle")
    fork = parent.fork(at(parent, 0), **changes)

    assert fork.run() is Outcome.COMPLETED

    assert fork.bits() == anew.bits()
    assert fork.final_state() == anew.final_state()


@pytest.mark.parametrize(
    ("scheduler", "config", "execution", "words"),
    [
        ("plateau", {}, {"learning_rate": 0.1}, "goes by metrics"),
        ("multistep", {"scheduler": "plateau"}, {}, "goes by metrics"),
        ("multistep", {}, {"optimizer": "sgd", "scheduler": SchedulerName.COSINE}, "another optimizer"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(
    completed: Runs, scheduler: str, config: dict[str, Any], execution: dict[str, Any], words: str
) -> None:
    parent = completed(scheduler)
    fork = parent.fork(at(parent, 8), config, **execution)
    _, tree = restore(parent.root, ref_of(at(parent, 8)))
    workload = Zoo(ZooConfig.model_validate(fork.config), Env(torch.device("cpu"), 0, 1, 0))
    model = workload.model()
    optimizer = workload.optimizer(model, fork.execution)
    built, when = workload.scheduler(optimizer, fork.execution, 15)

    live = Live(model, optimizer, built, workload.state(), Monitor(fork.execution))

    with pytest.raises(TrainingFault, match=words) as refused:
        forked_tree(tree, live, when, parent.job(), fork.job())
    assert (refused.value.code, refused.value.permanent) == ("not_forkable", True)
