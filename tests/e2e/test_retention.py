"""Early stopping and retention in the running service, with the trainer killed in between."""

import pytest
import safetensors.torch

from helpers.service import Service, eventually, kill


@pytest.mark.slow
def test_an_early_stop_leaves_the_best_and_the_last_on_disk_also_after_a_kill(service: Service) -> None:
    """Scenario 12."""
    id = service.submit(
        max_epochs=100,
        checkpoint_monitor="val_accuracy",
        early_stop_patience=3,
        early_stop_min_delta=0.02,
        checkpoint_save_top_k=1,
    )
    service.until_step(id, 60)
    kill(service.attempts(id)[-1].trainer_pid)

    operation = service.wait(id, "completed")

    accuracy = dict(service.metric(id, "val_accuracy").points)
    best, last = max(accuracy, key=lambda step: accuracy[step]), max(accuracy)
    assert operation.attempt == 2
    assert last + 1 < 4800
    assert operation.progress is not None
    assert (operation.progress.step, operation.progress.percent) == (last + 1, 100)
    assert [step for step, _ in service.metric(id, "loss").points] == list(range(last + 1))
    assert list(accuracy) == list(range(47, last + 1, 48))
    notes = [event.detail["message"] for event in service.client.events(id) if event.name == "note"]
    assert any(note.startswith("stopped early") for note in notes)

    eventually(
        lambda: {saved.step for saved in service.client.checkpoints(id)} == {best + 1, last + 1},
        "no row but theirs is left",
    )
    [model] = service.client.artifacts(id)
    kept = {saved.path.split("/")[1] for saved in (*service.client.checkpoints(id), model)}
    on_disk = {path.name for path in (service.storage / str(id)).iterdir()} - {"logs"}
    assert kept <= on_disk
    assert safetensors.torch.load_file(service.storage / model.path)
    assert len(on_disk - kept) <= 1  # what the kill left half-way is nobody's
