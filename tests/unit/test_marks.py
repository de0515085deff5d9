"""What a training says its time went to, and when."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_child import Listed, Operation, RandomItems, stopping_after, ticking

from ops_contract.agents import StartTraining
from ops_contract.energy import Use
from ops_contract.jobs import Execution
from ops_contract.lifecycle import Outcome
from ops_contract.pipe import Mark
from ops_contract.reports import CheckpointSaved, Report
from relight.run import Run
from relight.training.attempt import Attempt, Site
from relight.training.directory import Directory
from relight.training.loop_attempt import LoopAttempt
from relight.training.marks import Marks
from relight.training.saving import Saver
from relight.training.state import Cursor
from relight.workload import LoopControl, LoopWorkload, MapDataset, Workload

pytestmark = pytest.mark.usefixtures("numerics_given_back")


class Config(BaseModel):
    pass


class Net(Workload[Config]):
    """8 samples: with batches of 2 an epoch has 4 steps."""

    Config = Config
    reports = {"score": "min"}

    def data(self) -> tuple[MapDataset, MapDataset | None]:
        return RandomItems(8), RandomItems(4)

    def model(self) -> nn.Module:
        return nn.Linear(8, 1)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch).square().mean(), {}

    def evaluate(self, model: nn.Module, loader: Any) -> dict[str, float]:
        return {"score": sum(float(model(batch).square().mean()) for batch in loader)}


class Counting(LoopWorkload[Config]):
    Config = Config

    def run(self, ctl: LoopControl) -> nn.Module | None:
        for step in range(2):
            ctl.report(step, total=step)
            ctl.save(step + 1, lambda directory: (directory / "a").touch())
        return None


class Told(Listed):
    """Reports and marks in their one order, as on the pipe."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Report | Mark] = []

    def report(self, report: Report) -> None:
        super().report(report)
        self.all.append(report)

    def mark(self, mark: Mark) -> None:
        super().mark(mark)
        self.all.append(mark)


def attempt(operation: Operation, start: StartTraining, stop_after: int | None = None) -> tuple[Outcome, Told]:
    told, site = Told(), Site(operation.root, "cpu", cores=1)
    outcome = Attempt(Net, start, site, told, stopping_after(stop_after), ticking()).run()
    for report in told.reports:
        operation.accept(report)
    return outcome, told


def uses(marks: list[Mark]) -> list[Use]:
    """What it was, one after the other."""
    return [use for use, _ in itertools.groupby(mark.use for mark in marks)]


@pytest.fixture
def operation(tmp_path: Path) -> Operation:
    every = {"epochs": 1}
    execution = Execution.model_validate({"batch_size": 2, "max_epochs": 2, "checkpoint_every": every})
    return Operation(tmp_path, "net", execution=execution)


def test_a_training_says_what_each_moment_went_to(operation: Operation) -> None:
    _, told = attempt(operation, operation.start())

    marks = told.marks
    assert uses(marks) == ["startup", "save", *["train", "evaluate"] * 2, "train", "save", "finish"]
    assert all(now.at_s <= then.at_s for now, then in itertools.pairwise(marks))
    assert [mark.then for mark in marks[:-1]] == [mark.use for mark in marks[1:]]
    assert sum(mark.units for mark in marks if mark.use is Use.TRAIN) == 16
    assert {mark.epoch for mark in marks if mark.use is Use.EVALUATE} == {0, 1}
    # The clock of the test makes every flush due: each step is there, and no mark is of two epochs.
    assert {(mark.epoch, mark.step) for mark in marks if mark.units} == {(n // 4, n + 1) for n in range(8)}


@pytest.mark.parametrize("waits", [False, True])
def test_the_boundary_of_every_checkpoint_is_an_edge_that_is_told_before_it(
    operation: Operation, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    if waits:
        monkeypatch.setattr(Saver, "_memory", lambda self, encoded: None)

    _, told = attempt(operation, operation.start())

    saved = [(n, it.step) for n, it in enumerate(told.all) if isinstance(it, CheckpointSaved)]
    assert [step for _, step in saved] == [0, 4, 8]
    for n, step in saved:
        assert any(isinstance(it, Mark) and it.edge and it.step == step for it in told.all[:n])
    saves = [mark.step for mark in told.marks if mark.use is Use.SAVE]
    assert saves == ([0, 4, 8] if waits else [0, 8])  # the one beside the training is none that it waits for


def test_a_resumed_one_says_what_was_restored(operation: Operation) -> None:
    assert attempt(operation, operation.start(), stop_after=3)[0] is Outcome.CANCELLED

    _, told = attempt(operation, operation.start())

    assert uses(told.marks)[:5] == ["startup", "restore", "startup", "restore", "startup"]
    assert told.marks[0].step == 3


def test_while_it_evaluates_its_last_update_is_done(operation: Operation) -> None:
    # Polls: four steps, then the first batch of the evaluation.
    outcome, told = attempt(operation, operation.start(), stop_after=4)

    edge = next(mark for mark in reversed(told.marks) if mark.edge)
    assert outcome is Outcome.CANCELLED
    assert (operation.checkpoints[-1].step, operation.checkpoints[-1].phase) == (3, "evaluate")
    assert (edge.step, edge.use, edge.then) == (4, Use.TRAIN, Use.SAVE)
    assert [mark.step for mark in told.marks if mark.use is Use.EVALUATE] == [4]


def test_a_loop_of_the_users_own_is_marked_where_it_reports_and_saves(operation: Operation) -> None:
    told = Told()
    LoopAttempt(Counting, operation.start(), Site(operation.root, "cpu", 1), told, lambda: None, ticking()).run()

    assert uses(told.marks) == ["startup", "save", "train", "save", "train", "save", "train"]
    assert [mark.step for mark in told.marks if mark.edge] == [0, 1, 2]


def test_a_run_marks_its_turns_and_its_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[Mark] = []
    monkeypatch.setattr(Directory, "mark", lambda self, mark: marks.append(mark))
    model, items = nn.Linear(8, 1), torch.randn(8, 8)

    run = Run(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data=DataLoader(TensorDataset(items), batch_size=2),
        directory=tmp_path,
    )
    for _ in run.epochs(2):
        for (x,) in run.batches():
            run._live.optimizer.zero_grad()
            model(x).square().mean().backward()
            run._live.optimizer.step()
    run.close()

    assert uses(marks) == [
        "startup",
        "restore",
        "startup",
        "save",
        *["train", "evaluate"] * 2,
        "train",
        "save",
        "finish",
    ]
    assert [mark.then for mark in marks[:-1]] == [mark.use for mark in marks[1:]]
    assert [(mark.step, mark.epoch) for mark in marks if mark.use is Use.EVALUATE] == [(4, 0), (8, 1)]
    assert sum(mark.units for mark in marks) == 8 * 2


def test_a_mark_waits_for_the_device_and_nothing_else_does(
    operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    told, cuda = Told(), torch.device("cuda:0")

    marks = Marks(told, cuda)
    for _ in range(100):
        marks.add(1)
    marks.mark(Cursor(step=100))
    with marks.doing(Use.SAVE, Cursor(step=100), edge=True):
        pass

    assert len(waits) == len(told.marks) == 3
    assert [mark.units for mark in told.marks] == [100, 0, 0]


def test_marks_come_with_flushes_not_with_steps(operation: Operation) -> None:
    """By a clock that hardly moves no flush is due: what remains are the boundaries."""
    told = Told()
    Attempt(Net, operation.start(), Site(operation.root, "cpu", 1), told, lambda: None, lambda: 0.0).run()

    # Of 8 steps: startup, save; of each epoch train, evaluation, its end; one checkpoint; the last save; finish.
    assert len(told.marks) <= 2 + 2 * 3 + 1 + 2 + 3
