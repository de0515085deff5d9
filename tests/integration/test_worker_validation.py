"""What a worker says of a job that it is asked about: a real agent, a real child."""

import hashlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from helpers.agents import AgentProcess, running_agent
from helpers.fake_api import FakeApi
from ops_contract.agents import Validate, Validated
from ops_contract.jobs import Code, Execution, Job
from ops_contract.lifecycle import Kind
from relight.archive import Entry, write_archive

MODULES = {
    "fussy.py": """
import torch
from pydantic import BaseModel, model_validator
from relight import Workload

print("to stdout")

class Config(BaseModel):
    low: int = 1
    high: int = 2
    @model_validator(mode="after")
    def ordered(self):
        if self.low >= self.high: raise ValueError("low must be below high")
        return self

class Mine(Workload):
    Config = Config
    reports = {"score": "max"}
    def data(self): return [torch.ones(2)], None
    def model(self): return torch.nn.Linear(2, 1)
    def loss(self, model, batch): return model(batch).mean(), {}
""",
    "dying.py": "import os; os._exit(3)",
}
TRAINER = [sys.executable, "-P", "-m", "ops_worker.trainer"]


@pytest.fixture(scope="module")
async def agent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentProcess]:
    site = tmp_path_factory.mktemp("site")
    for name, source in MODULES.items():
        (site / name).write_text(source)
    async with FakeApi() as api:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(site))
            patch.setenv("OPS_USER_CODE", "1")
            patch.setenv("OPS_SECRET_TOKEN", "of the worker")
            async with running_agent(api, tmp_path_factory.mktemp("agent"), command=TRAINER) as agent:
                yield await agent.ready()


@pytest.mark.parametrize(
    ("workload", "config", "field", "problem"),
    [
        ("fussy:Mine", {"low": 5}, "config", "low must be below high"),
        ("absent:Mine", {}, "workload", "there is no module 'absent'"),
    ],
)
async def test_a_worker_says_what_is_wrong(
    agent: AgentProcess, workload: str, config: dict[str, Any], field: str, problem: str
) -> None:
    told = await validated(agent, workload, config)

    assert [p.field for p in told.problems] == [field]
    assert problem in told.problems[0].problem


async def test_a_worker_says_the_defaults_and_what_is_reported(agent: AgentProcess) -> None:
    told = await validated(agent, "fussy:Mine", {"high": 7})

    assert (told.problems, told.config, told.reports) == ([], {"low": 1, "high": 7}, {"score": "max"})
    assert set(told.config_schema["properties"]) == {"low", "high"}
    assert list((agent.state_dir / "attempts").glob("*/*")) == []


async def test_a_child_that_dies_is_no_verdict(agent: AgentProcess) -> None:
    answer = await agent.post("/validate", question(agent, "dying:Mine", {}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


SUBMITTED = b"""
import os
assert os.environ["TOKEN"] == "of the worker"
from fussy import Mine
"""


async def test_a_worker_judges_the_code_that_was_submitted_with_its_secrets(agent: AgentProcess) -> None:
    archive = write_archive({"lib/mine.py": Entry(SUBMITTED)})
    code = Code(sha256=hashlib.sha256(archive).hexdigest())
    agent.api.snapshots[code.sha256] = archive

    told = await validated(agent, "mine:Mine", {"low": 5}, code=code, workdir="lib", secrets=["TOKEN"])

    assert [p.problem for p in told.problems] == ["low must be below high"]


async def test_code_that_cannot_be_had_is_a_problem_of_its_field(agent: AgentProcess) -> None:
    told = await validated(agent, "mine:Mine", {}, code=Code(sha256="0" * 64))
    assert [p.field for p in told.problems] == ["code"]


async def test_a_worker_without_the_secret_gives_no_verdict(agent: AgentProcess) -> None:
    answer = await agent.post("/validate", question(agent, "fussy:Mine", {}, secrets=["ANOTHER"]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


async def validated(agent: AgentProcess, workload: str, config: dict[str, Any], **setup: Any) -> Validated:
    answer = await agent.post("/validate", question(agent, workload, config, **setup))
    while answer.status_code == 503:  # a machine so busy that torch does not load in time
        answer = await agent.post("/validate", question(agent, workload, config, **setup))
    assert answer.status_code == 200, answer.text
    return Validated.model_validate_json(answer.content)


def question(agent: AgentProcess, workload: str, config: dict[str, Any], **setup: Any) -> Validate:
    job = Job(kind=Kind.TRAINING, workload=workload, config=config, execution=Execution(), **setup)
    return Validate(incarnation=agent.incarnation, job=job)
