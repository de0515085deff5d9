"""What `Workload.finish` leaves: published and reported once, however often the attempt died there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import safetensors.torch
import torch
from pydantic import BaseModel
from torch import nn
from training_child import Operation

from ops_contract.jobs import CheckpointEvery, Execution
from ops_contract.lifecycle import CheckpointType, Outcome
from ops_contract.reports import MODEL, ArtifactSaved, CheckpointSaved, Metrics, Report
from relight.training.faults import TrainingFault
from relight.training.finishing import finish
from relight.workload import Env, Workload


def finishing(root: Path) -> Operation:
    execution = Execution(max_steps=4, checkpoint_every=CheckpointEvery(steps=3))
    return Operation(root, "finishing", config={"channels": 2, "hidden": 8}, execution=execution)


def is_final(report: Report) -> bool:
    return isinstance(report, CheckpointSaved) and report.checkpoint_type is CheckpointType.FINAL


def is_score(report: Report) -> bool:
    return isinstance(report, Metrics) and any(series.name.startswith("final/") for series in report.series)


def test_what_finish_leaves_is_the_same_and_counts_once_after_a_kill_in_it(tmp_path: Path) -> None:
    straight, killed = finishing(tmp_path), finishing(tmp_path)
    assert straight.run() is Outcome.COMPLETED
    for kill_at in (is_final, is_score):
        assert killed.run(lambda n, report, at=kill_at: at(report)) in (None, Outcome.COMPLETED)  # type: ignore[misc]
    assert killed.run() is Outcome.COMPLETED

    for operation in (straight, killed):
        drawn, model = {a.name: a for a in operation.reports if isinstance(a, ArtifactSaved)}.values()
        assert (drawn.name, model.name, drawn.step) == ("files/deep/drawn.txt", MODEL, 4)
        assert drawn.path == f"{operation.id}/{operation.attempts}-4-finish/deep/drawn.txt"
        assert 0 < float((tmp_path / drawn.path).read_text()) < 1
        assert operation.curves["final/found"] == {4: 0.0}, "in eval mode, without gradients, after the last step"
        tensors = safetensors.torch.load_file(tmp_path / model.path)
        [bias] = [value for name, value in tensors.items() if name.endswith("bias") and len(value) == 10]
        assert not bias.any(), "published as finish left it"
    assert killed.bits()["final/drawn"] == straight.bits()["final/drawn"]


class Empty(BaseModel):
    pass


class Plain(Workload[Empty]):
    Config = Empty

    def data(self) -> Any: ...
    def model(self) -> Any: ...
    def loss(self, model: nn.Module, batch: Any) -> Any: ...


class Leaves(Plain):
    def __init__(self, leave: Callable[[Path], Any]) -> None:
        super().__init__(Empty(), Env(torch.device("cpu"), 0, 1, 0))
        self.leave = leave

    def finish(self, model: nn.Module, out: Path) -> Mapping[str, float] | None:
        return self.leave(out)


def left(workload: Workload[Any], root: Path) -> list[Report]:
    return finish(workload, nn.Linear(1, 1), root, UUID(int=7), 1, 9)


def test_scores_alone_leave_no_directory_and_no_finish_nothing(tmp_path: Path) -> None:
    [metrics] = left(Leaves(lambda out: {"a": 1, "b": torch.tensor(0.5), "c": float("nan")}), tmp_path)

    assert isinstance(metrics, Metrics)
    assert [(s.name, s.steps) for s in metrics.series] == [("final/a", [9]), ("final/b", [9]), ("final/c", [9])]
    assert left(Leaves(lambda out: None), tmp_path) == []
    assert left(Plain(Empty(), Env(torch.device("cpu"), 0, 1, 0)), tmp_path) == []
    assert list((tmp_path / str(UUID(int=7))).iterdir()) == []


@pytest.mark.parametrize(
    ("leave", "words"),
    [
        (lambda out: (out / "link").symlink_to("/etc/hostname"), "link is a link"),
        (lambda out: 0.5, "return a dict of scores"),
        (lambda out: {"a": "high"}, "could not convert"),
        (lambda out: {"a": torch.ones(2)}, "only one element"),
        (lambda out: {"a" * 1000: 1.0}, "at most"),
        (lambda out: [(out / str(n)).touch() for n in range(1001)] and None, "1001 files"),
    ],
)
def test_what_cannot_be_kept_is_a_permanent_fault_that_leaves_nothing(tmp_path: Path, leave: Any, words: str) -> None:
    with pytest.raises(TrainingFault, match=words) as raised:
        left(Leaves(leave), tmp_path)

    assert (raised.value.code, raised.value.permanent) == ("finish_refused", True)
    assert "--accept-changes" in raised.value.message
    assert list((tmp_path / str(UUID(int=7))).iterdir()) == []


def test_what_it_raises_goes_on_as_it_is_and_leaves_nothing(tmp_path: Path) -> None:
    def raises(out: Path) -> None:
        (out / "half").touch()
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        left(Leaves(raises), tmp_path)
    assert list((tmp_path / str(UUID(int=7))).iterdir()) == []
