"""A workload with a loop and files of its own: what it saved is what it goes on from, or is refused."""

import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from test_checkpoint_files import about
from torch import nn
from training_child import Listed, Operation, processes, ref_of, stopping_after, ticking

from ops_contract.jobs import Execution
from ops_contract.lifecycle import CheckpointType, Outcome
from ops_contract.reports import ArtifactSaved, Note, Started
from relight import LoopControl, LoopWorkload
from relight.manifest import CheckpointCorrupt, FileEntry, Manifest, check_manifest
from relight.training.attempt import Site
from relight.training.checkpoint import publish_files
from relight.training.faults import TrainingFault
from relight.training.loop_attempt import LoopAttempt

pytestmark = pytest.mark.usefixtures("numerics_given_back")


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: int = 7


class Counting(LoopWorkload[Config]):
    """Sums what it counts; saves every third step, in files of its own."""

    Config = Config
    reports = {"total": "max"}

    def run(self, ctl: LoopControl) -> nn.Module | None:
        restored = ctl.restored()
        begin, total = map(int, (restored / "deep" / "a=1 b.txt").read_text().split()) if restored else (0, 0)
        for step in range(begin, self.config.steps):
            total += step
            ctl.report(step, total=total, loss=torch.tensor(1.0 / (step + 1)))
            stop = ctl.should_stop()
            if stop or step % 3 == 2:
                ctl.save(step + 1, lambda directory, now=(step + 1, total): write(directory, *now))
            if stop:
                return None
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, total)
        return model


def write(directory: Path, step: int, total: int) -> None:
    (directory / "deep").mkdir()
    (directory / "deep" / "a=1 b.txt").write_text(f"{step} {total}")
    (directory / "empty").touch()


def attempt(
    operation: Operation,
    workload_type: type[LoopWorkload[Any]] = Counting,
    stop_after: int | None = None,
    clock: Callable[[], float] | None = None,
) -> tuple[Outcome, list[Any]]:
    sink = Listed()
    site = Site(operation.root, "cpu", 1)
    stop = stopping_after(stop_after)
    try:
        outcome = LoopAttempt(workload_type, operation.start(), site, sink, stop, clock or ticking()).run()
    finally:
        for report in sink.reports:
            operation.accept(report)
    return outcome, sink.reports


@pytest.fixture
def operation(tmp_path: Path) -> Operation:
    return Operation(tmp_path, "counting", execution=Execution(checkpoint_monitor="total"))


def test_it_completes_with_its_metrics_saves_and_final_model(operation: Operation) -> None:
    outcome, reports = attempt(operation)

    started = next(report for report in reports if isinstance(report, Started))
    model = next(report for report in reports if isinstance(report, ArtifactSaved))
    assert (outcome, started.exactness.promise) == (Outcome.COMPLETED, "best_effort")
    assert "the workload's own" in started.exactness.reasons[0]
    assert operation.curves["total"] == {0: 0, 1: 1, 2: 3, 3: 6, 4: 10, 5: 15, 6: 21}
    assert [(saved.step, saved.monitored) for saved in operation.checkpoints] == [(0, None), (3, 3.0), (6, 15.0)]
    assert load_file(operation.root / model.path)["weight"].item() == 21


def test_a_stop_saves_and_a_resume_goes_on_from_those_files(operation: Operation) -> None:
    outcome, _ = attempt(operation, stop_after=4)
    stopped = operation.checkpoints[-1]
    final, reports = attempt(operation)

    started = next(report for report in reports if isinstance(report, Started))
    assert (outcome, final) == (Outcome.CANCELLED, Outcome.COMPLETED)
    assert stopped.checkpoint_type is CheckpointType.CANCEL
    assert started.start_step == stopped.step == 5
    assert operation.curves["total"] == {0: 0, 1: 1, 2: 3, 3: 6, 4: 10, 5: 15, 6: 21}


def test_before_its_first_save_it_begins_anew(operation: Operation) -> None:
    class Impatient(Counting):
        def run(self, ctl: LoopControl) -> None:
            assert ctl.restored() is None
            assert ctl.should_stop()

    outcome, _ = attempt(operation, Impatient, stop_after=0)
    operation.accept_changes = True
    final, _ = attempt(operation)

    assert [saved.step for saved in operation.checkpoints[:1]] == [0]
    assert (outcome, final) == (Outcome.CANCELLED, Outcome.COMPLETED)


def test_a_file_that_is_not_what_was_saved_is_refused(operation: Operation) -> None:
    attempt(operation, stop_after=4)
    saved = operation.checkpoints[-1]
    file = operation.root / saved.path / "files" / "deep" / "a=1 b.txt"
    good = file.read_text()

    file.write_text("9" + good[1:])
    with pytest.raises(CheckpointCorrupt, match=r"files/deep/a=1 b\.txt differs"):
        attempt(operation)
    file.rename(operation.root / "elsewhere")
    file.symlink_to(operation.root / "elsewhere")
    with pytest.raises(CheckpointCorrupt, match="missing or a symbolic link"):
        attempt(operation)
    file.parent.rename(operation.root / "outside")
    file.parent.symlink_to(operation.root / "outside")
    with pytest.raises(CheckpointCorrupt, match="missing or a symbolic link"):
        check_manifest(operation.root, ref_of(saved))


@pytest.mark.parametrize(
    "name", ["../x", "a/../x", "/x", "a//x", "a/./x", "a/", ".", "", "a\x00b", "a\nb", "x" * 201, "a/" * 500 + "a"]
)
def test_a_manifest_names_files_below_its_directory_only(name: str) -> None:
    entry = FileEntry(size_bytes=0, sha256=[])
    with pytest.raises(ValidationError):
        Manifest.model_validate(about(1).model_dump() | {"files": {name: entry}})
    Manifest.model_validate(about(1).model_dump() | {"files": {"files/epoch=1 .x/..y": entry}})


@pytest.mark.parametrize(
    "spoil",
    [lambda d: (d / "link").symlink_to("/etc/hostname"), lambda d: os.mkfifo(d / "pipe"), lambda d: 1 / 0],
    ids=["link", "fifo", "error"],
)
def test_a_save_that_fails_leaves_nothing(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)):
        publish_files(tmp_path, about(1), spoil)

    assert list((tmp_path / str(about(1).operation_id)).iterdir()) == []


def test_a_kill_at_any_fsync_of_a_save_leaves_all_or_nothing(tmp_path: Path) -> None:
    outcomes = []
    for at in count():
        child = processes.Process(target=_publish_and_die, args=(str(tmp_path), at))
        child.start()
        child.join()
        directory = tmp_path / str(about(1).operation_id)
        whole = (directory / f"1-{at}").exists()
        outcomes.append(whole)
        if whole:
            files = {str(path.relative_to(directory)) for path in (directory / f"1-{at}").rglob("*") if path.is_file()}
            assert files == {f"1-{at}/{name}" for name in ("manifest.json", "files/deep/a=1 b.txt", "files/empty")}
        if child.exitcode == 0:
            break
    # Both files, their two directories, the manifest, the checkpoint's directory; then it has its name.
    assert outcomes.index(True) >= 6
    assert all(outcomes[outcomes.index(True) :])


def _publish_and_die(root: str, at: int) -> None:
    calls, fsync = count(), os.fsync

    def dying(file: int) -> None:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = dying
    publish_files(Path(root), about(at), lambda directory: write(directory, 1, 1))


def test_what_is_reported_late_is_left_out_and_told_once(operation: Operation) -> None:
    class Late(Counting):
        def run(self, ctl: LoopControl) -> None:
            for step in (0, 3, 2, 1, 4):
                ctl.report(step, loss=step)
            with pytest.raises(ValueError, match="shape"):
                ctl.report(5, loss=torch.zeros(2))

    _, reports = attempt(operation, Late)

    assert operation.curves["loss"] == {0: 0, 3: 3, 4: 4}
    assert len([report for report in reports if isinstance(report, Note)]) == 1


def test_a_step_is_saved_once_and_steps_rise(operation: Operation) -> None:
    class Twice(Counting):
        def run(self, ctl: LoopControl) -> None:
            ctl.report(0, loss=0.0)
            ctl.report(1, loss=0.0)
            for _ in range(2):
                ctl.save(2, lambda directory: None)
            with pytest.raises(ValueError, match="steps rise"):
                ctl.save(1, lambda directory: None)

    attempt(operation, Twice)

    assert [saved.step for saved in operation.checkpoints] == [0, 2]


def test_a_bad_config_and_a_replay_are_refused(operation: Operation) -> None:
    operation.until_step = 3
    with pytest.raises(TrainingFault, match="cannot be redone"):
        attempt(operation)
    operation.until_step, operation.config = None, {"stesp": 3}
    with pytest.raises(TrainingFault, match="stesp: no such field; did you mean steps"):
        attempt(operation)


def test_other_code_is_refused_until_it_is_accepted(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(operation, stop_after=2)
    monkeypatch.setattr("relight.training.loop_attempt.source_files", lambda workload_type: {"train.py": "0" * 64})

    with pytest.raises(TrainingFault, match=f"ops resume {operation.id} --accept-changes"):
        attempt(operation)
    operation.accept_changes = True

    assert attempt(operation)[0] is Outcome.COMPLETED
