"""A training of the user's own, from the snapshot that was submitted, whatever becomes of its source."""

import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from helpers.service import Service, kill
from relight.packing import pack

MINE = """
from ops_worker.workloads.digits import Digits
from lib import recipe

class Mine(Digits):
    '''The digits, by a recipe of the user's.'''
    def model(self):
        return recipe.changed(super().model())
"""
RECIPE = """
from torch import nn

def changed(model):
    model[9] = nn.Dropout({dropout})
    return model
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    (project / "lib").mkdir(parents=True)
    (project / "mine.py").write_text(MINE)
    (project / "lib" / "recipe.py").write_text(RECIPE.format(dropout=0.2))
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    return project


def submit(service: Service, project: Path) -> UUID:
    execution = {"max_epochs": 12, "learning_rate": 0.01, "checkpoint_every": {"steps": 20}}
    job: dict[str, Any] = {"workload": "mine:Mine", "execution": execution, "max_retries": 0}
    return service.client.submit(job | {"code": service.client.upload(pack(project))}).id


@pytest.mark.slow
def test_editing_and_deleting_the_source_between_kill_and_resume_leaves_the_curve_unchanged(
    service: Service, project: Path
) -> None:
    """Scenario 7."""
    undisturbed, killed = submit(service, project), submit(service, project)

    service.until_saved(killed, 1)
    kill(service.client.attempts(killed)[0].trainer_pid)
    (project / "lib" / "recipe.py").write_text(RECIPE.format(dropout=0.9))
    service.wait(killed, "failed")
    shutil.rmtree(project)
    service.client.resume(killed)

    service.wait(undisturbed, "completed")
    service.wait(killed, "completed")
    assert len(service.client.attempts(killed)) == 2
    assert service.curves(killed) == service.curves(undisturbed)
    assert not list(service.directory.glob(f"worker-*/attempts/*/{killed}-*"))


@pytest.mark.slow
def test_a_fork_with_other_code_runs_it_and_says_that_it_does(service: Service, project: Path) -> None:
    parent = submit(service, project)
    saved, *_ = service.until_saved(parent, 1)
    (project / "lib" / "recipe.py").write_text(RECIPE.format(dropout=0.9))
    other = service.client.upload(pack(project))

    fork = service.client.fork(parent, saved.id, {"code": other.model_dump()}, accept_changes=True).id
    service.wait(parent, "completed")
    forked = service.wait(fork, "completed")

    assert forked.job.code == other
    assert forked.exactness is not None
    assert any("lib/recipe.py was" in reason for reason in forked.exactness.reasons)
    ours, theirs = dict(service.metric(parent, "loss").points), dict(service.metric(fork, "loss").points)
    assert [step for step in theirs if ours[step] == theirs[step]] == []
