"""The user's own Workload, in the user's own interpreter: refused with a reason, trained, killed, resumed."""

import site
import sys
import venv
from pathlib import Path

import pytest

from helpers.service import Service, eventually
from ops_contract.errors import OpsError

CODE = """
import os, signal, sys
import torch
from pydantic import BaseModel, ConfigDict, model_validator
from relight import Workload

# The agent's own: no trainer needs them.
assert not {"fastapi", "uvicorn", "sqlalchemy", "sklearn"} & sys.modules.keys()

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    low: int = 1
    high: int = 2
    killed: str = "a file that is made when it is"

    @model_validator(mode="after")
    def ordered(self):
        if self.low >= self.high: raise ValueError("low must be below high")
        return self

class Mine(Workload):
    Config = Config
    reports = {"error": "min", "score": "max"}
    def data(self): return [torch.randn(4) for _ in range(64)], [torch.ones(4)]
    def model(self): return torch.nn.Linear(4, 1)
    def loss(self, model, batch): return model(batch).square().mean(), {}
    def after_step(self, model, step):
        if step == 30 and not os.path.exists(self.config.killed):
            open(self.config.killed, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
    def evaluate(self, model, loader): return {"error": 1.0, "score": 2.0}
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> str:
    """A virtual environment with this one's packages, and the user's module."""
    venv.create(tmp_path / "venv", symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "venv" / "lib" / version / "site-packages"
    (packages / "these.pth").write_text(f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n")
    (packages / "users_own.py").write_text(CODE)
    return str(tmp_path / "venv" / "bin" / "python")


@pytest.mark.slow
def test_a_workload_of_ones_own_runs_in_ones_own_interpreter(
    service: Service, tmp_path: Path, interpreter: str
) -> None:
    config = {"high": 9, "killed": str(tmp_path / "killed")}
    execution = {"max_epochs": 30, "checkpoint_every": {"steps": 10}}
    job = {"workload": "users_own:Mine", "config": config, "execution": execution}
    for worker in service.workers:
        worker.kill()
    service.have_workers(0)
    unchecked = service.client.submit(job).id  # with no worker that could say

    service.only_worker(OPS_USER_CODE="1", OPS_WORKER_PYTHON=interpreter)
    eventually(lambda: sum(worker.live for worker in service.client.workers()) == 1, "the dead count as such")
    with pytest.raises(OpsError, match="low must be below high"):
        service.client.submit({**job, "config": {"low": 3}})
    checked = service.client.submit(job)
    ended = [service.wait(id, "completed", "failed") for id in (unchecked, checked.id)]

    assert [operation.status for operation in ended] == ["completed"] * 2
    # What nobody could say at submit was decided at the start, in the same way.
    threads = ended[0].job.execution.threads
    assert ended[0].job.execution == checked.job.execution.model_copy(update={"threads": threads})
    assert ended[0].job.execution.checkpoint_monitor == "error"
    assert ended[0].job.config == checked.job.config == {"low": 1, **config}
    assert service.curves(unchecked) == service.curves(checked.id)
    # Besides it may have been offered to a worker that was dead already.
    began = [attempt.environment for attempt in service.attempts(unchecked) if attempt.environment]
    assert len(began) == 2
    assert began[0]["executable"] == interpreter
