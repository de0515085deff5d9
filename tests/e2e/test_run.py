"""`relight.Run` as a command of the service: cancelled, resumed, killed, damaged, and bit for bit the same."""

from pathlib import Path
from uuid import UUID

import pytest

from helpers.service import Service, kill
from relight.packing import pack

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop" / "train.py"
EPOCHS = 30  # of 30 steps


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    project.mkdir()
    often = EXAMPLE.read_text().replace('"average": average}', '"average": average}, checkpoint_every={"steps": 50}')
    (project / "train.py").write_text(often)
    return project


def submit(service: Service, project: Path) -> UUID:
    code = service.client.upload(pack(project))
    command = ["python", "train.py", str(EPOCHS)]
    return service.client.submit({"command": command, "code": code, "max_retries": 0}).id


@pytest.mark.slow
def test_a_loop_of_ones_own_is_cancelled_resumed_killed_and_damaged_and_nothing_of_it_shows(
    service: Service, project: Path
) -> None:
    undisturbed, id = submit(service, project), submit(service, project)

    service.until_step(id, 60)
    service.client.cancel(id)
    cancelled = service.wait(id, "cancelled")
    resumed = service.client.resume(id).resumed_from
    service.until_saved(id, 2, 2)
    kill(service.attempts(id)[-1].trainer_pid)
    service.wait(id, "failed")
    *_, before, newest = sorted(service.checkpoints(id), key=lambda checkpoint: checkpoint.step)
    tensors = service.storage / newest.path / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\xff")
    service.client.resume(id)
    ended = [service.wait(each, "completed", "failed") for each in (undisturbed, id)]

    assert [operation.status for operation in ended] == ["completed"] * 2, ended[1].error
    assert not cancelled.exit_unconfirmed
    assert resumed is not None
    outcomes = [(attempt.outcome, attempt.error and attempt.error.code) for attempt in service.attempts(id)]
    assert outcomes == [
        ("cancelled", None),
        ("failed", "command_failed"),
        ("checkpoint_corrupt", "checkpoint_corrupt"),
        ("completed", None),
    ]
    assert service.attempts(id)[-1].start_step == before.step
    assert [operation.exactness.promise for operation in ended if operation.exactness] == ["promised"] * 2
    curves = service.curves(id)
    assert len(curves["loss"]) == 30 * EPOCHS
    assert len(curves["val_accuracy"]) == EPOCHS
    assert curves == service.curves(undisturbed)
    models = [{a.name: a.sha256 for a in service.client.artifacts(each)} for each in (undisturbed, id)]
    assert models[0] == models[1]
    assert list(models[0]) == ["model.safetensors"]
