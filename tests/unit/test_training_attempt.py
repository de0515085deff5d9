"""One attempt: what it does, tells and refuses; in this process, for nothing here is killed."""

import os
import platform
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_child import Listed, Operation, RandomItems, stopping_after, ticking

from ops_contract.jobs import CheckpointEvery, Execution
from ops_contract.lifecycle import Outcome
from ops_contract.plans import TrainingResult
from ops_contract.reports import Metrics, Note, Progress, Report, Result, Started
from relight.training import numerics, reporting
from relight.training.attempt import Attempt, Site
from relight.training.checkpoint import restore
from relight.training.faults import TrainingFault
from relight.workload import MapDataset, WarmupCosine, Workload

pytestmark = pytest.mark.usefixtures("numerics_given_back")


class TinyConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int = 1
    digest: str | None = "tiny"


class Tiny(Workload[TinyConfig]):
    Config = TinyConfig

    def data(self) -> tuple[MapDataset, MapDataset | None]:
        return RandomItems(8), None

    def data_digest(self) -> str | None:
        return self.config.digest

    def model(self) -> nn.Module:
        return nn.Linear(8, self.config.width)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch).square().mean(), {}


def attempt(
    operation: Operation,
    workload_type: type[Workload[Any]],
    stop_after: int | None = None,
    cores: int = 1,
    clock: Callable[[], float] | None = None,
) -> tuple[Outcome, list[Any]]:
    sink = Listed()
    site = Site(operation.root, "cpu", cores)
    should_stop = stopping_after(stop_after)
    try:
        outcome = Attempt(workload_type, operation.start(), site, sink, should_stop, clock or ticking()).run()
    finally:
        for report in sink.reports:
            operation.accept(report)
    return outcome, sink.reports


@pytest.fixture
def operation(tmp_path: Path) -> Operation:
    return Operation(tmp_path, "tiny", execution=Execution(batch_size=2))


def refused(operation: Operation, workload_type: type[Workload[Any]]) -> TrainingFault:
    with pytest.raises(TrainingFault) as caught:
        attempt(operation, workload_type)
    assert caught.value.permanent
    return caught.value


def test_a_config_is_checked_before_anything_runs(operation: Operation) -> None:
    operation.config = {"widht": 2}

    fault = refused(operation, Tiny)

    assert (fault.code, operation.reports) == ("bad_config", [])
    assert "widht: no such field; did you mean width?" in fault.message


def test_other_data_is_not_resumed_on(operation: Operation) -> None:
    attempt(operation, Tiny, stop_after=1)
    operation.config = {"digest": "other"}

    fault = refused(operation, Tiny)

    assert fault.code == "data_changed"
    assert "was tiny and is other" in fault.message
    assert f"ops resume {operation.id} --accept-changes" in fault.message


def test_accepted_other_data_makes_the_run_best_effort_until_a_checkpoint_knows_it(operation: Operation) -> None:
    attempt(operation, Tiny, stop_after=1)
    operation.config, operation.accept_changes = {"digest": "other"}, True

    _, reports = attempt(operation, Tiny, stop_after=2)  # one step
    operation.accept_changes = False
    outcome, later = attempt(operation, Tiny)

    assert reports[0].exactness.promise == "best_effort"
    assert reports[0].exactness.reasons == ["the data's digest was tiny and is other"]
    assert (outcome, later[0].exactness.promise) == (Outcome.COMPLETED, "promised")


class Shorter(Tiny):
    def data(self) -> tuple[MapDataset, MapDataset | None]:
        return RandomItems(4), None


def test_data_of_another_length_is_refused_once_a_step_was_counted_in_it(operation: Operation) -> None:
    """Position 6 lies beyond the end of 4 samples: accepted, the epoch would never end."""
    attempt(operation, Tiny, stop_after=3)

    assert "had 8 samples and has 4" in refused(operation, Shorter).message
    operation.accept_changes = True
    fault = refused(operation, Shorter)

    assert fault.code == "data_changed"
    assert "cannot be accepted at step 3" in fault.message


def test_data_of_another_length_can_be_accepted_before_the_first_step(operation: Operation) -> None:
    attempt(operation, Tiny, stop_after=0)
    assert refused(operation, Shorter).code == "data_changed"
    operation.accept_changes = True

    outcome, reports = attempt(operation, Shorter)

    assert (outcome, operation.checkpoints[-1].step) == (Outcome.COMPLETED, 2)
    assert "had 8 samples and has 4" in reports[0].exactness.reasons[0]


def test_another_version_of_relight_is_best_effort(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(operation, Tiny, stop_after=1)
    monkeypatch.setattr(numerics, "version", lambda name: "99.0")

    _, reports = attempt(operation, Tiny)

    [reason] = reports[0].exactness.reasons
    assert reason.startswith("relight was ")
    assert reason.endswith(" and is 99.0")


def test_another_python_is_best_effort_but_not_one_that_was_not_recorded_yet(
    operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = numerics.fingerprint
    with monkeypatch.context() as older:
        older.setattr(numerics, "fingerprint", lambda device: {**fingerprint(device), "python": "3.0"})
        attempt(operation, Tiny, stop_after=1)
    _, other = attempt(operation, Tiny, stop_after=2)
    with monkeypatch.context() as newer:
        newer.setattr(numerics, "fingerprint", lambda device: {**fingerprint(device), "a new name": "x"})
        _, unrecorded = attempt(operation, Tiny)

    assert other[0].exactness.reasons == [f"python was 3.0 and is {platform.python_version()}"]
    assert unrecorded[0].exactness.promise == "promised"


def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_what_differs(operation: Operation) -> None:
    attempt(operation, Tiny, stop_after=1)
    operation.config = {"width": 2}

    fault = refused(operation, Tiny)

    assert fault.code == "model_changed"
    assert "weight was [1, 8] torch.float32 and is [2, 8]" in fault.message


def test_training_without_data_is_refused(operation: Operation) -> None:
    class Empty(Tiny):
        def data(self) -> tuple[MapDataset, MapDataset | None]:
            return RandomItems(0), None

    assert refused(operation, Empty).code == "no_data"


class Plain(Tiny):
    """Three samples, and updates that are the gradients."""

    def data(self) -> tuple[MapDataset, MapDataset | None]:
        return RandomItems(3), None

    def optimizer(self, model: nn.Module, knobs: Execution) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-3)


class Forgetful:
    """Its state does not come back."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        self.count += 1
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Unkeepable(Forgetful):
    def state_dict(self) -> dict[str, Any]:
        return {"history": [0, object()]}


def with_state(stateful: Any) -> type[Workload[Any]]:
    class Stated(Tiny):
        def state(self) -> dict[str, Any]:
            return {"mine": stateful}

    return Stated


def test_state_that_does_not_come_back_is_named_after_the_first_step(operation: Operation) -> None:
    fault = refused(operation, with_state(Forgetful()))

    assert fault.code == "not_restorable"
    assert "state.mine.count" in fault.message


def test_an_optimizer_that_loses_state_is_named(operation: Operation) -> None:
    class Rounding(torch.optim.AdamW):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            for state in self.state.values():
                state["exp_avg"] = state["exp_avg"].bfloat16().float()

    class Rounded(Tiny):
        def optimizer(self, model: nn.Module, knobs: Execution) -> torch.optim.Optimizer:
            return Rounding(model.parameters())

    fault = refused(operation, Rounded)

    assert fault.code == "not_restorable"
    assert "optimizer.state[0].exp_avg" in fault.message


def test_state_that_the_codec_does_not_know_is_refused_before_the_first_step(operation: Operation) -> None:
    fault = refused(operation, with_state(Unkeepable()))

    assert fault.code == "not_restorable"
    assert "state.mine.history[1]: cannot keep a builtins.object" in fault.message
    assert not any(isinstance(report, Metrics) for report in operation.reports)


def test_an_operator_without_a_deterministic_kernel_is_noted_and_runs(operation: Operation) -> None:
    class Undetermined(Tiny):
        def after_step(self, model: nn.Module, step: int) -> None:
            torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))

    operation.execution = Execution(batch_size=2, checkpoint_every=EPOCH)
    outcome, reports = attempt(operation, Undetermined)

    [note] = [report for report in reports if isinstance(report, Note)]
    assert outcome is Outcome.COMPLETED
    assert note.inexact == "put_ has no deterministic kernel on this device"
    assert note.message == f"exactness is best effort: {note.inexact}"


def test_such_an_operator_before_the_start_is_among_its_reasons(operation: Operation) -> None:
    class Undetermined(Tiny):
        def model(self) -> nn.Module:
            torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
            return super().model()

    _, reports = attempt(operation, Undetermined)

    [started] = [report for report in reports if isinstance(report, Started)]
    assert started.exactness.promise == "best_effort"
    assert started.exactness.reasons == ["put_ has no deterministic kernel on this device"]


def test_a_loss_that_is_no_number_is_reported_and_does_not_stop_the_run(operation: Operation) -> None:
    class Diverging(Tiny):
        def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return super().loss(model, batch)[0] * float("nan"), {}

    outcome, _ = attempt(operation, Diverging)

    assert outcome is Outcome.COMPLETED
    assert all(value != value for value in operation.curves["loss"].values())
    assert len(operation.curves["loss"]) == 4


def test_a_metric_may_not_take_the_name_of_one_of_the_loop(operation: Operation) -> None:
    class Clashing(Tiny):
        def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = super().loss(model, batch)[0]
            return loss, {"loss": loss}

    with pytest.raises(ValueError, match="give another name"):
        attempt(operation, Clashing)


def test_a_resumed_attempt_told_to_stop_at_once_does_nothing_but_end(
    operation: Operation,
) -> None:
    attempt(operation, Tiny, stop_after=1)

    assert attempt(operation, Tiny, stop_after=0) == (Outcome.CANCELLED, [])


def test_metrics_wait_for_the_clock_but_never_for_a_checkpoint(operation: Operation) -> None:
    operation.execution = Execution(batch_size=2, max_epochs=2, checkpoint_every=CheckpointEvery(steps=4))

    _, reports = attempt(operation, Tiny, clock=lambda: 0.0)

    sent = [report.series[0].steps for report in reports if isinstance(report, Metrics)]
    assert sent == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [saved.step for saved in operation.checkpoints] == [0, 4, 8]


class Synchronisations(TorchDispatchMode):
    """Counts what waits for a device: a tensor's value that is read on the host."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        read_all = Tensor.tolist
        patch.setattr(Tensor, "tolist", lambda tensor: (self._counted(), read_all(tensor))[1])

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten._local_scalar_dense.default:
            self._counted()
        return op(*args, **(kwargs or {}))

    def _counted(self) -> None:
        self.count += 1


class Telling(Tiny):
    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = model(batch).square().mean()
        return loss, {"root": loss.sqrt()}


def test_no_step_waits_for_the_device_before_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "_at_hand", lambda value: False)  # as on a GPU

    def synchronisations(steps: int) -> int:
        knobs = Execution(batch_size=1, max_steps=steps, optimizer="sgd", gradient_clip=1.0)
        operation = Operation(tmp_path / str(steps), "telling", execution=knobs)
        with monkeypatch.context() as patch, Synchronisations(patch) as seen:
            _, reports = attempt(operation, Telling, clock=lambda: 0.0)
        told = [series for report in reports if isinstance(report, Metrics) for series in report.series]
        assert [len(series.steps) for series in told if series.name == "root"] == [steps]
        return seen.count

    assert synchronisations(2) == synchronisations(7) > 0


def test_progress_says_rate_and_time_left(operation: Operation) -> None:
    sink = Listed()

    Attempt(Tiny, operation.start(), Site(operation.root, "cpu", 1), sink, lambda: None, ticking()).run()

    first, second = sink.progresses[:2]
    assert (first.step, first.steps_total, second.step) == (1, 4, 2)
    assert second.eta_s is not None
    assert second.samples_per_s is not None
    # Two steps are left; every step has two samples, whatever the ticks between two reports are.
    assert second.eta_s * second.samples_per_s == pytest.approx(2 * 2)


def test_progress_is_told_before_the_metrics_that_carry_it_on(operation: Operation) -> None:
    """An agent sends the newest with its next report: one that came after would stand until the one after that."""
    told: list[Progress | Report] = []

    class InOrder(Listed):
        def report(self, report: Report) -> None:
            told.append(report)

        def progress(self, progress: Progress) -> None:
            told.append(progress)

    Attempt(Tiny, operation.start(), Site(operation.root, "cpu", 1), InOrder(), lambda: None, ticking()).run()

    carried = [(before, told[i]) for i, before in enumerate(told[1:]) if isinstance(before, Metrics)]
    assert carried
    for metrics, progress in carried:
        assert isinstance(progress, Progress)
        assert progress.step == 1 + max(step for series in metrics.series for step in series.steps)


def test_gradients_are_clipped_by_their_global_norm(operation: Operation) -> None:
    class Steep(Plain):
        def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return super().loss(model, batch)[0] * 1e6, {}

        def after_step(self, model: nn.Module, step: int) -> None:
            norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))

    norms: list[float] = []
    operation.execution = Execution(batch_size=2, gradient_clip=0.5)

    attempt(operation, Steep)

    assert norms == pytest.approx([0.5, 0.5], rel=1e-3)


def test_the_threads_of_the_first_attempt_hold_for_its_successors(operation: Operation) -> None:
    attempt(operation, Tiny, stop_after=1, cores=2)

    _, reports = attempt(operation, Tiny, cores=1)

    assert torch.get_num_threads() == 2
    assert reports[0].exactness.promise == "promised"


def test_other_numerics_make_it_best_effort_and_say_which(operation: Operation) -> None:
    attempt(operation, Tiny, stop_after=1, cores=2)
    operation.execution = Execution(batch_size=2, threads=1)

    _, reports = attempt(operation, Tiny)

    assert reports[0].exactness.promise == "best_effort"
    assert reports[0].exactness.reasons == ["threads was 2 and is 1"]


class Scripted(Tiny):
    """Evaluates to what `SCRIPT` says of the epoch."""

    SCRIPT = (5.0, 4.0, 4.5, 3.0, 3.5, 3.5)

    def data(self) -> tuple[MapDataset, MapDataset | None]:
        return RandomItems(4), RandomItems(2)

    def state(self) -> dict[str, Any]:
        self.epochs = Epochs()
        return {"epochs": self.epochs}

    def after_step(self, model: nn.Module, step: int) -> None:
        self.epochs.done = step // 2

    def evaluate(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
        return {"val_loss": self.SCRIPT[self.epochs.done]}


class Epochs:
    done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


EPOCH = CheckpointEvery(epochs=1)


def scripted(root: Path, **knobs: Any) -> Operation:
    monitoring = {"checkpoint_monitor": "val_loss", "checkpoint_mode": "min", "max_epochs": 6}
    return Operation(root, "scripted", execution=Execution.model_validate({"batch_size": 2} | monitoring | knobs))


def values(operation: Operation) -> list[tuple[int, float | None]]:
    return [(saved.step, saved.monitored) for saved in operation.checkpoints]


def test_a_checkpoint_carries_what_was_measured_on_that_very_state(tmp_path: Path) -> None:
    operation = scripted(tmp_path, checkpoint_every=CheckpointEvery(steps=3))
    attempt(operation, Scripted, stop_after=8)
    attempt(operation, Scripted)

    # Two steps an epoch. The stop came right after an evaluation, where no periodic checkpoint falls.
    assert values(operation) == [(0, None), (3, None), (6, 4.5), (8, 3.0), (9, None), (12, 3.5)]


def test_an_evaluation_that_was_interrupted_measured_nothing(tmp_path: Path) -> None:
    class Reading(Scripted):
        def evaluate(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
            list(loader)
            return super().evaluate(model, loader)

    operation = scripted(tmp_path, batch_size=4, checkpoint_every=EPOCH)
    attempt(operation, Reading, stop_after=3)  # a step, its evaluation, a step, and here

    assert values(operation) == [(0, None), (1, 5.0), (1, None)]


def test_with_top_k_the_best_evaluation_so_far_is_saved_whatever_the_period(tmp_path: Path) -> None:
    operation = scripted(tmp_path, checkpoint_every=CheckpointEvery(epochs=100), checkpoint_save_top_k=1)
    attempt(operation, Scripted, stop_after=5)
    attempt(operation, Scripted)

    assert values(operation) == [(0, None), (2, 5.0), (4, 4.0), (5, None), (8, 3.0), (12, 3.5)]


def test_an_early_stop_looks_finished(tmp_path: Path) -> None:
    operation = scripted(tmp_path, early_stop_patience=1, checkpoint_every=EPOCH)
    sink = Listed()

    outcome = Attempt(Scripted, operation.start(), Site(tmp_path, "cpu", 1), sink, lambda: None, ticking()).run()

    assert outcome is Outcome.COMPLETED
    last = sink.progresses[-1]
    assert (last.step, last.steps_total, last.eta_s) == (6, 6, 0)
    assert sink.progresses[0].steps_total == 12
    notes = [report.message for report in sink.reports if isinstance(report, Note)]
    assert notes == ["stopped early: val_loss did not improve on 4.0 in one evaluation"]


def test_patience_spent_at_the_last_step_is_no_early_stop(tmp_path: Path) -> None:
    operation = scripted(tmp_path, early_stop_patience=2, checkpoint_every=EPOCH)

    attempt(operation, Scripted)

    assert operation.checkpoints[-1].step == 12
    assert not any(isinstance(report, Note) for report in operation.reports)


def test_patience_without_validation_data_is_refused(operation: Operation) -> None:
    operation.execution = Execution(batch_size=2, early_stop_patience=1, checkpoint_monitor="val_loss")

    fault = refused(operation, Tiny)

    assert (fault.code, operation.checkpoints) == ("nothing_to_monitor", [])


def test_asking_for_speed_makes_it_best_effort(operation: Operation) -> None:
    operation.execution = Execution(batch_size=2, deterministic=False)

    _, reports = attempt(operation, Tiny)

    assert reports[0].exactness.reasons == ["deterministic is false"]
    assert not torch.are_deterministic_algorithms_enabled()


class PlainFive(Plain):
    def data(self) -> tuple[MapDataset, MapDataset | None]:
        return RandomItems(5), None


@pytest.mark.parametrize(("workload_type", "max_samples"), [(Plain, None), (PlainFive, 3)])
def test_gradients_of_a_window_are_those_of_its_units(
    operation: Operation, workload_type: type[Plain], max_samples: int | None
) -> None:
    """Three samples in batches of two: the single one weighs a third, as if all three had been one batch."""
    weights, losses = [], []
    for batch_size, batches in ((2, 2), (3, 1)):
        operation = Operation(operation.root, "tiny")
        operation.execution = Execution(batch_size=batch_size, accumulate_grad_batches=batches, max_samples=max_samples)
        attempt(operation, workload_type)
        losses.append(operation.curves["loss"][0])
        weights.append(restored_weight(operation))

    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


def restored_weight(operation: Operation) -> Tensor:
    ref = operation.start().checkpoint
    assert ref is not None
    weight: Tensor = restore(operation.root, ref)[1]["model"]["weight"]
    return weight


class Counted(Tiny):
    """Eight samples of three units each; it remembers the batches that it trained on."""

    sizes: ClassVar[list[int]] = []

    def data(self) -> tuple[MapDataset, MapDataset | None]:
        return RandomItems(8), RandomItems(2)

    def units(self, batch: Tensor) -> int:
        return 3 * len(batch)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if model.training:
            self.sizes.append(len(batch))
        return super().loss(model, batch)


def counted(root: Path, **execution: Any) -> Operation:
    Counted.sizes.clear()
    knobs = {"max_epochs": 3, "batch_size": 3, "checkpoint_every": {"epochs": 1000}} | execution
    return Operation(root, "counted", execution=Execution.model_validate(knobs))


def results(reports: list[Any]) -> list[TrainingResult]:
    return [report.content for report in reports if isinstance(report, Result)]


@pytest.mark.parametrize(
    ("max_samples", "accumulate", "sizes", "evaluated"),
    [
        (1, 1, [1], [0]),
        (5, 1, [3, 2], [1]),  # within a batch
        (8, 1, [3, 3, 2], [2]),  # an epoch
        (14, 1, [3, 3, 2, 3, 3], [2, 4]),  # a batch's end
        (13, 2, [3, 3, 2, 3, 2], [1, 2]),  # within a window
        (9, 2, [3, 3, 2, 1], [1, 2]),
        (24, 1, [3, 3, 2] * 3, [2, 5, 8]),
        (25, 2, [3, 3, 2] * 3, [1, 3, 5]),  # beyond max_epochs
    ],
)
def test_a_run_ends_after_exactly_so_many_samples(
    tmp_path: Path, max_samples: int, accumulate: int, sizes: list[int], evaluated: list[int]
) -> None:
    operation = counted(tmp_path, max_samples=max_samples, accumulate_grad_batches=accumulate, scheduler="cosine")

    outcome, reports = attempt(operation, Counted)

    steps, [result] = evaluated[-1] + 1, results(reports)
    assert (outcome, Counted.sizes) == (Outcome.COMPLETED, sizes)
    assert sorted(operation.curves["val_loss"]) == evaluated
    assert (result.steps, result.samples, result.units) == (steps, sum(sizes), 3 * sum(sizes))
    assert operation.curves["learning_rate"][steps - 1] == 1e-3 * WarmupCosine(steps)(steps - 1), "its own horizon"


def test_max_steps_ends_a_run_before_max_samples_does(tmp_path: Path) -> None:
    attempt(counted(tmp_path, max_samples=7, max_steps=2), Counted)

    assert Counted.sizes == [3, 3]


@pytest.mark.parametrize(
    ("max_samples", "accumulate", "num_workers"), [(13, 2, 0), (13, 2, 2), (13, 1, 0), (16, 2, 0), (30, 2, 0)]
)
def test_a_run_of_so_many_samples_resumes_exactly_at_every_poll(
    tmp_path: Path, max_samples: int, accumulate: int, num_workers: int
) -> None:
    knobs = {"max_samples": max_samples, "accumulate_grad_batches": accumulate, "num_workers": num_workers}
    reference = counted(tmp_path, **knobs | {"num_workers": 0})
    _, reports = attempt(reference, Counted)

    stopped = counted(tmp_path, **knobs)
    polls = len(reference.curves["loss"]) + len(reference.curves["val_loss"])
    attempt(stopped, Counted, stop_after=1)
    for _ in range(polls - 1):  # at each step and each validation batch; the first poll is the attempt's own
        outcome, later = attempt(stopped, Counted, stop_after=2)

    assert (outcome, stopped.attempts) == (Outcome.COMPLETED, polls)
    assert stopped.differences(reference) == []
    assert results(later) == results(reports)


def test_a_fork_goes_on_from_where_the_last_batch_was_cut(tmp_path: Path) -> None:
    """Its batches begin in the middle of others, so that there are more of them; its schedule goes to its own end."""
    parent = counted(tmp_path, max_samples=4, scheduler="cosine")
    attempt(parent, Counted)
    Counted.sizes.clear()
    fork = parent.fork(parent.checkpoints[-1], max_samples=15)

    _, reports = attempt(fork, Counted)

    assert Counted.sizes == [3, 1, 3, 3, 1]
    assert fork.curves["learning_rate"] == {step: 1e-3 * WarmupCosine(7)(step) for step in range(2, 7)}
    assert results(reports) == [TrainingResult(steps=7, samples=15, units=45, params=9, embedding_params=0)]
    again = parent.fork(parent.checkpoints[-1], max_samples=4)
    assert refused(again, Counted).code == "not_forkable"
    assert again.reports == []


def test_an_attempt_that_only_finishes_says_the_same_result(tmp_path: Path) -> None:
    operation = counted(tmp_path, max_samples=5)

    _, first = attempt(operation, Counted)
    _, second = attempt(operation, Counted)

    assert (
        results(first)
        == results(second)
        == [TrainingResult(steps=2, samples=5, units=15, params=9, embedding_params=0)]
    )


def test_a_replay_has_no_result(tmp_path: Path) -> None:
    operation = counted(tmp_path, max_samples=5)
    operation.until_step = 2

    assert results(attempt(operation, Counted)[1]) == []


def test_units_that_an_older_version_did_not_count_are_null_and_no_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(*args: Any) -> Any:
        manifest, tree = restore(*args)
        del tree["cursor"]["units"]
        return manifest, tree

    monkeypatch.setattr("relight.training.attempt.restore", older)
    found = {}
    for name, stop_after in {"before the first step": 0, "later": 1}.items():
        operation = counted(tmp_path, max_samples=5)
        attempt(operation, Counted, stop_after=stop_after)
        [found[name]] = results(attempt(operation, Counted)[1])

    assert found["before the first step"].units == 15
    assert (found["later"].units, found["later"].samples) == (None, 5)


def test_started_names_the_process_and_where_it_runs(operation: Operation) -> None:
    _, reports = attempt(operation, Tiny)

    started = reports[0]
    assert (started.trainer_pid, started.start_step) == (os.getpid(), 0)
    assert started.environment["data_digest"] == "tiny"
    assert started.environment["torch"] == torch.__version__
    assert "pydantic" in started.environment["packages"]
    assert len(started.environment["code_digest"]) == 64


class Overflowing(Tiny):
    """Gradients that no scale brings into float16, at these steps."""

    overflow_at: ClassVar[set[int]] = set()
    done: ClassVar[list[float]] = []

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = model(batch).float().square().mean() * 1e-4
        return loss * (float("inf") if len(self.done) in self.overflow_at else 1.0), {}

    def after_step(self, model: nn.Module, step: int) -> None:
        self.done.append(float(next(model.parameters()).detach().sum()))


def test_an_update_whose_gradients_overflow_is_skipped_and_still_a_step(operation: Operation) -> None:
    operation.execution = Execution(batch_size=1, precision="16", max_epochs=2, scheduler="cosine")
    whole = Operation(operation.root, "tiny", execution=operation.execution)
    Overflowing.overflow_at, Overflowing.done = {0, 2}, []
    attempt(whole, Overflowing)
    steps, Overflowing.done = Overflowing.done, []
    attempt(operation, Overflowing, stop_after=3)
    attempt(operation, Overflowing)

    assert sorted(whole.curves["loss"]) == list(range(len(steps)))
    assert [now == before for before, now in pairwise(steps)][:3] == [False, True, False]
    assert scale(whole) == scale(operation) == 65536 / 4
    assert (operation.attempts, operation.bits()) == (2, whole.bits())
    assert operation.final_state() == whole.final_state()


def scale(operation: Operation) -> float:
    ref = operation.start().checkpoint
    assert ref is not None
    found: float = restore(operation.root, ref)[1]["scaler"]["scale"]
    operation.attempts -= 1
    return found


def test_a_plateau_divides_the_rate_when_the_metric_stopped_improving_and_not_before(tmp_path: Path) -> None:
    class Flat(Scripted):
        def evaluate(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
            return {"val_loss": 1.0}

    whole = scripted(tmp_path, scheduler="plateau", max_epochs=14, learning_rate=0.5)
    stopped = scripted(tmp_path, scheduler="plateau", max_epochs=14, learning_rate=0.5)
    attempt(whole, Flat)
    attempt(stopped, Flat, stop_after=15)
    attempt(stopped, Flat)

    # Two steps an epoch: the twelfth evaluation is the eleventh that does not improve on the first.
    rates = whole.curves["learning_rate"]
    assert [rates[step] for step in (0, 23, 24, 27)] == pytest.approx([0.5, 0.5, 0.05, 0.05])
    assert stopped.bits() == whole.bits()


def test_auto_says_its_interval_with_the_reasons_once(tmp_path: Path) -> None:
    operation = scripted(tmp_path)

    _, reports = attempt(operation, Scripted, clock=lambda: 0.0)

    [note] = [report.message for report in reports if isinstance(report, Note)]
    assert note.startswith("a checkpoint every 1 s: one stops training for 0 ms")
    assert "of 0 ms of attempts 0 were lost or failed (mean time between failures 24 h" in note
