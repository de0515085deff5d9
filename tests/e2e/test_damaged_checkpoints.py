"""Scenario 22, in the running service: what is damaged on the disk is told, and the checkpoint before it goes on."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from helpers.service import LONG, Service
from ops_contract.lifecycle import CheckpointStatus

Damage = Callable[[Path], None]


def truncate(directory: Path) -> None:
    tensors = directory / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])


def flip_a_bit(directory: Path) -> None:
    tensors = directory / "state.safetensors"
    raw = bytearray(tensors.read_bytes())
    raw[len(raw) // 2] ^= 1
    tensors.write_bytes(raw)


def lose_a_file(directory: Path) -> None:
    (directory / "state.json").unlink()


def lose_it_all(directory: Path) -> None:
    shutil.rmtree(directory)


def name_a_file_outside(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["../../../secret"] = manifest["files"].pop("state.json")
    (directory / "manifest.json").write_text(json.dumps(manifest))


def plant_a_pickle(directory: Path) -> None:
    """Of the very size, so that only reading tells."""

    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return Path.touch, (Path(str(directory) + ".exploded"),)  # type: ignore[return-value]

    tensors = directory / "state.safetensors"
    tensors.write_bytes(pickle.dumps(Bomb()).ljust(tensors.stat().st_size, b"."))


DAMAGES: list[tuple[Damage, str]] = [
    (truncate, "bytes, not"),
    (flip_a_bit, "differs from what was written"),
    (lose_a_file, "state.json is missing"),
    (name_a_file_outside, "is not the one that was committed"),
    (plant_a_pickle, "differs from what was written"),
    (lose_it_all, "there is no checkpoint"),
]


@pytest.fixture
def cancelled(service: Service) -> UUID:
    """With more checkpoints than there are damages."""
    id = service.submit(**LONG)
    service.until_saved(id, attempt=1, number=len(DAMAGES) + 1)
    service.client.cancel(id)
    service.wait(id, "cancelled")
    return id


@pytest.mark.slow
def test_each_damage_is_told_and_the_newest_good_checkpoint_goes_on(
    service: Service, cancelled: UUID, undisturbed: dict[str, list[tuple[int, float]]]
) -> None:
    *_, good = kept = service.checkpoints(cancelled)[: -len(DAMAGES)]
    damaged = service.checkpoints(cancelled)[len(kept) :][::-1]  # in the order in which they are tried
    for checkpoint, (damage, _) in zip(damaged, DAMAGES, strict=True):
        damage(service.storage / checkpoint.path)

    service.client.resume(cancelled)
    completed = service.wait(cancelled, "completed")

    told = [e.detail["error"]["message"] for e in service.client.events(cancelled) if e.name == "checkpoint_corrupt"]
    assert [said in message for message, (_, said) in zip(told, DAMAGES, strict=True)] == [True] * len(DAMAGES), told
    marked = {c.id for c in service.client.checkpoints(cancelled) if c.status is CheckpointStatus.CORRUPT}
    assert marked == {c.id for c in damaged}
    assert (completed.attempt, completed.failures) == (len(DAMAGES) + 2, 0)
    assert service.attempts(cancelled)[-1].start_step == good.step
    assert service.curves(cancelled) == undisturbed
    assert not list(service.storage.glob("**/*.exploded"))
