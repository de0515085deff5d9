"""Ptychography through the whole service: the smoke preset, refused and run, killed and resumed."""

import os
import random
import secrets
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml

from helpers.service import Service, eventually, kill
from ops_contract.errors import OpsError

PRESETS = Path(__file__).parents[2] / "cli" / "ops_cli" / "presets" / "ptycho"
SEED = int(os.environ.get("PTYCHO_KILL_SEED", secrets.randbelow(2**32)))


def preset(name: str) -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((PRESETS / name).read_text())
    return job


def test_fewer_neighbours_than_a_group_has_patterns_are_refused_at_submit(service: Service) -> None:
    job = preset("smoke.yaml")
    job["config"]["neighbor_count"] = 3

    with pytest.raises(OpsError) as refused:
        service.client.submit(job)  # it waits longer than httpx does: a worker imports torch to judge

    assert refused.value.http_status == 422
    [error] = refused.value.details["errors"]
    assert "neighbor_count 3 is less than the 4 patterns" in error["problem"]


def test_the_smoke_preset_leaves_its_two_best_its_last_and_a_reconstruction(service: Service) -> None:
    id = service.client.submit(preset("smoke.yaml")).id
    service.wait(id, "completed")
    service.until_logged(id)

    measured = {step + 1: value for step, value in service.metric(id, "poisson_val_loss").points}
    best = sorted(measured, key=lambda step: measured[step])[:2]
    eventually(lambda: {saved.step for saved in service.client.checkpoints(id)} == {*best, 96}, "they alone are left")
    assert len(service.metric(id, "poisson_train_loss").points) == 96
    names = {artifact.name for artifact in service.client.artifacts(id)}
    assert {"files/reconstruction.npz", "files/train-phase.png", "model.safetensors"} <= names
    logs = service.storage / str(id) / "logs"
    columns = (logs / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"epoch", "step", "learning_rate", "poisson_train_loss", "poisson_val_loss"} <= set(columns)
    assert yaml.safe_load((logs / "hparams.yaml").read_text())["config"]["gridsize"] == 2


@pytest.mark.slow
def test_killed_at_a_random_step_it_equals_the_run_that_was_not(service: Service) -> None:
    """In every metric, the scores of both objects too, and in every file that has no clock in it."""
    print(f"PTYCHO_KILL_SEED={SEED}")
    job = preset("smoke.yaml")
    job["config"]["simulate_test"] = job["config"]["simulate"] | {"seed": 1}
    undisturbed, killed = (service.client.submit(job).id for _ in range(2))

    service.until_step(killed, random.Random(SEED).randrange(1, 90))
    kill(service.attempts(killed)[0].trainer_pid)
    for id in (undisturbed, killed):
        service.wait(id, "completed")

    assert [attempt.outcome for attempt in service.attempts(killed)] == ["failed", "completed"]
    assert service.get(killed).exactness.promise == "promised"  # type: ignore[union-attr]
    assert "final/test_phase_pearson" in service.curves(killed)
    assert service.curves(killed) == service.curves(undisturbed)
    assert files_of(service, killed) == files_of(service, undisturbed)


def files_of(service: Service, id: UUID) -> dict[str, str]:
    artifacts = service.client.artifacts(id)
    return {artifact.name: artifact.sha256 for artifact in artifacts if artifact.name != "files/seconds.json"}
