"""The final model is a safetensors file that the safetensors package and numpy open, published once a completed run."""

import errno
import os
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn
from training_child import WORKLOADS, Operation

from ops_contract.jobs import CheckpointEvery, Execution
from ops_contract.lifecycle import CheckpointType, Outcome
from ops_contract.reports import ArtifactSaved, CheckpointSaved, Report, Result
from relight.training.checkpoint import restore
from relight.training.final import publish_model
from relight.workload import Env

OPERATION = UUID(int=7)
BYTELM = {"max_bytes": 1200, "block_size": 16, "n_layer": 1, "n_head": 2, "d_model": 16, "validation_share": 0.1}
DIGITS = {"channels": 2, "hidden": 8}


def saved_model(root: Path, model: nn.Module) -> Path:
    return root / publish_model(root, OPERATION, 1, 5, model).path


def built(workload: str, config: dict[str, Any]) -> nn.Module:
    kind = WORKLOADS[workload]
    return kind(kind.Config.model_validate(config), Env(torch.device("cpu"), 0, 1, 0)).model()


class Odd(nn.Module):
    """What makes writing a model hard."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.brain = nn.Parameter(torch.randn(4).bfloat16())
        self.field = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("none_too", torch.zeros(0, 3))
        self.tied = nn.Linear(2, 2)
        self.again = nn.Linear(2, 2)
        self.again.weight = self.tied.weight
        self.register_buffer("row", self.tied.weight.detach()[0])


@pytest.mark.parametrize(
    "make", [lambda: built("bytelm", BYTELM), lambda: built("digits", DIGITS), Odd], ids=["bytelm", "digits", "odd"]
)
def test_the_package_loads_it_strictly_into_a_model(tmp_path: Path, make: Any) -> None:
    model, other = make(), make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()

    missing, unexpected = safetensors.torch.load_model(other, saved_model(tmp_path, model), strict=True)

    assert (set(missing), unexpected) == (set(), [])
    for name, value in model.state_dict().items():
        loaded = other.state_dict()[name]
        assert (loaded.dtype, loaded.shape, torch.equal(loaded, value)) == (value.dtype, value.shape, True), name


def test_plain_readers_find_every_name_or_its_alias(tmp_path: Path) -> None:
    model = built("bytelm", BYTELM)
    path = saved_model(tmp_path, model)

    arrays = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()

    names = model.state_dict().keys()
    aliases = {name: metadata[name] for name in names - arrays.keys()}
    assert len(aliases) == 1, "the head is tied to the embedding"
    assert set(aliases.values()) <= arrays.keys() <= names
    assert metadata["format"] == "pt"
    assert safetensors.torch.load_file(path).keys() == arrays.keys()
    reference = tmp_path / "reference.safetensors"
    safetensors.torch.save_model(model, str(reference))
    assert safetensors.torch.load_file(reference).keys() == arrays.keys()


def test_parts_of_a_memory_that_no_name_shows_whole_are_each_stored(tmp_path: Path) -> None:
    """`load_model` refuses any file for such a model; the others read it."""
    model, memory = nn.Module(), torch.randn(6)
    for name, part in {"first": memory[:3], "second": memory[2:5]}.items():
        model.register_buffer(name, part)

    arrays = safetensors.numpy.load_file(saved_model(tmp_path, model))

    assert {name: array.tolist() for name, array in arrays.items()} == {
        "first": memory[:3].tolist(),
        "second": memory[2:5].tolist(),
    }


def test_state_that_is_no_tensor_is_left_out_and_named(tmp_path: Path) -> None:
    class Talkative(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"words": ["any", "thing"]}

        def set_extra_state(self, state: Any) -> None: ...

    path = saved_model(tmp_path, Talkative(2, 2))

    assert safetensors.torch.load_file(path).keys() == {"weight", "bias"}
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["relight.left_out"] == '["_extra_state"]'


def test_it_says_what_was_written_and_leaves_nothing_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = publish_model(tmp_path, OPERATION, 2, 9, nn.Linear(2, 2))
    raw = (tmp_path / said.path).read_bytes()
    assert said.path == f"{OPERATION}/2-9-model/model.safetensors"
    assert (said.size_bytes, said.sha256) == (len(raw), sha256(raw).hexdigest())

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        publish_model(tmp_path, OPERATION, 3, 9, nn.Linear(2, 2))

    assert [path.name for path in (tmp_path / str(OPERATION)).iterdir()] == ["2-9-model"]


def digits(root: Path, **execution: Any) -> Operation:
    knobs = {"max_steps": 6, "checkpoint_every": CheckpointEvery(steps=3)} | execution
    return Operation(root, "digits", config=DIGITS, execution=Execution.model_validate(knobs))


def artifacts(operation: Operation) -> list[ArtifactSaved]:
    return [report for report in operation.reports if isinstance(report, ArtifactSaved)]


def is_final(report: Report) -> bool:
    return isinstance(report, CheckpointSaved) and report.checkpoint_type is CheckpointType.FINAL


@pytest.mark.parametrize(
    "kill_at",
    [lambda n, report: False, lambda n, report: is_final(report), lambda n, report: isinstance(report, ArtifactSaved)],
    ids=["undisturbed", "killed after the final checkpoint", "killed before the finish"],
)
def test_the_attempt_that_completes_has_published_the_model(tmp_path: Path, kill_at: Any) -> None:
    operation = digits(tmp_path)

    outcome = operation.run(kill_at) or operation.run()

    assert outcome is Outcome.COMPLETED
    told = [artifact.path.split("/")[1] for artifact in artifacts(operation)]
    assert told[-1] == f"{operation.attempts}-6-model"  # a kill may come too late, when it has just completed
    assert isinstance(operation.reports[-2], ArtifactSaved), "after everything else, before the finish"
    assert isinstance(operation.reports[-1], Result)
    _, tree = restore(tmp_path, ref_of_newest(operation))
    model = safetensors.torch.load_file(tmp_path / artifacts(operation)[-1].path)
    assert {name: value.tolist() for name, value in model.items()} == {
        name: value.tolist() for name, value in tree["model"].items() if name in model
    }


def ref_of_newest(operation: Operation) -> Any:
    from training_child import ref_of

    return ref_of(operation.checkpoints[-1])


def test_a_run_that_stops_early_leaves_its_model_and_a_cancelled_one_none(tmp_path: Path) -> None:
    early = Operation(
        tmp_path,
        "zoo",
        config={"samples": 15},
        execution=Execution(
            max_epochs=40,
            batch_size=5,
            checkpoint_monitor="val_noise",
            checkpoint_mode="min",
            early_stop_patience=1,
            early_stop_min_delta=10.0,
        ),
    )
    assert early.run() is Outcome.COMPLETED
    [model] = artifacts(early)
    assert model.step == early.checkpoints[-1].step < 120

    cancelled = digits(tmp_path)
    assert cancelled.run(stop_after_polls=2) is Outcome.CANCELLED
    assert artifacts(cancelled) == []
