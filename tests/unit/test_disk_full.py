"""A disk that is really full: a small tmpfs as storage root, under a real trainer."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_trainer_process import Trainer
from training_child import Operation, ref_of

from ops_contract.jobs import CheckpointEvery, Execution
from ops_contract.lifecycle import Outcome
from ops_contract.reports import CheckpointSaved, Finish, Metrics, Started
from relight.training.checkpoint import restore

SPARSE = Execution(max_epochs=1, seed=7)
OFTEN = SPARSE.model_copy(update={"checkpoint_every": CheckpointEvery(steps=1)})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Of half a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "relight-test", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def attempt(operation: Operation, tmp_path: Path) -> Finish:
    """By a trainer process whose output is on another disk."""
    trainer = Trainer(tmp_path)
    try:
        trainer.receive()
        trainer.root = operation.root
        trainer.run(operation)
        messages = trainer.until(lambda message: isinstance(message, Finish))
    finally:
        trainer.close()
    for message in messages:
        if isinstance(message, (Started, Metrics, CheckpointSaved)):
            operation.accept(message)
    assert isinstance(messages[-1], Finish)
    return messages[-1]


def digits(root: Path, execution: Execution) -> Operation:
    return Operation(root, "digits", {"channels": 2, "hidden": 256}, execution)


def files(operation: Operation) -> set[str]:
    place = operation.root / str(operation.id)
    return {f"{operation.id}/{path.name}" for path in place.iterdir()} if place.exists() else set()


def assert_disk_full(finish: Finish) -> None:
    assert finish.outcome is Outcome.FAILED
    assert not finish.permanent
    assert finish.error
    assert finish.error.code == "disk_full"
    assert "make room in the storage root" in finish.error.message


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_every_committed_checkpoint_good_and_the_resume_exact(
    disk: Path, tmp_path: Path
) -> None:
    undisturbed = digits(tmp_path / "calm", SPARSE)
    attempt(undisturbed, tmp_path)
    operation = digits(disk, OFTEN)

    full = attempt(operation, tmp_path)

    assert_disk_full(full)
    assert 1 < len(operation.checkpoints) < 49
    assert files(operation) == {saved.path for saved in operation.checkpoints}
    for saved in operation.checkpoints:
        restore(disk, ref_of(saved))

    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    again = attempt(operation, tmp_path)

    assert again == Finish(outcome=Outcome.COMPLETED)
    assert operation.bits() == undisturbed.bits()


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_is_a_fault_and_the_retry_begins_anew(disk: Path, tmp_path: Path) -> None:
    undisturbed = digits(tmp_path / "calm", SPARSE)
    attempt(undisturbed, tmp_path)
    operation = digits(disk, SPARSE)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(2**20))

    full = attempt(operation, tmp_path)

    assert_disk_full(full)
    assert operation.checkpoints == []
    assert files(operation) == set()

    filler.unlink()
    again = attempt(operation, tmp_path)

    assert again == Finish(outcome=Outcome.COMPLETED)
    assert operation.bits() == undisturbed.bits()
