"""`ops workloads check`: what `ops init` writes passes, and each way to break exactness is found and named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ops_cli.main import app

CLASSES = '''
import os, torch
from torch import nn
from pydantic import BaseModel, ConfigDict
from relight import Workload

class Good(Workload):
    Config = type("Config", (BaseModel,), {"model_config": ConfigDict(extra="forbid")})
    reports = {}
    def data(self): return Items(), None
    def model(self): return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    def loss(self, model, batch): return model(batch["x"]).square().mean(), {}

class Items:
    calls = 0
    def __len__(self): return 40
    def __getitem__(self, index):
        self.calls += 1
        return {"x": torch.randn(3) + index}

class OwnGenerator(Good):
    """Goes on drawing from a generator that nobody reseeds."""
    def data(self):
        generator = torch.Generator().manual_seed(1)
        class Impure(Items):
            def __getitem__(self, index): return {"i": index, "x": torch.randn(3, generator=generator)}
        return Impure(), None

class Sum(Good):
    def loss(self, model, batch): return model(batch["x"]).square().sum(), {}

class Links(Good):
    def finish(self, model, out): (out / "link").symlink_to("/etc/hostname")

class Hidden(Good):
    """Lasting state that no checkpoint has."""
    steps = 0
    def after_step(self, model, step): self.steps += 1
    def loss(self, model, batch): return super().loss(model, batch)[0] * (1 + self.steps), {}

class Forgets(Good):
    """Its state is saved, but not put back."""
    def state(self):
        class Average:
            seen = 0
            def state_dict(self): Average.seen += 1; return {"seen": self.seen}
            def load_state_dict(self, state): pass
        return {"average": Average()}

class Chance(Good):
    """Its loss goes by what no seed reaches."""
    def loss(self, model, batch):
        return super().loss(model, batch)[0] * (1 + int.from_bytes(os.urandom(6), "big") / 2**53), {}

class Shares(Good):
    """The loss looks at what the data set has counted: in another process it counts alone."""
    def data(self): self.items = Items(); return self.items, None
    def loss(self, model, batch): return super().loss(model, batch)[0] * (1 + self.items.calls), {}

class Loose(Good):
    Config = type("Config", (BaseModel,), {})

class Vector(Good):
    def loss(self, model, batch): return model(batch["x"]), {}

class Raises(Good):
    def model(self): raise LookupError("no weights")
'''
# In one process: to import torch takes longer than all checks.
MAIN = """
import json, sys
sys.path.insert(0, ".")
from ops_contract.jobs import Execution
from relight.training.check import CheckFailed, check
for name in sys.argv[1:]:
    problems = {}
    try:
        for finding in check(name, {}, Execution(batch_size=8, optimizer="sgd"), steps=3):
            problems[finding.check] = finding.problem
    except CheckFailed as error:
        problems["raised"] = str(error)
    print(json.dumps([name, problems]))
"""
BROKEN = {
    "OwnGenerator": ("items", "training item 0 is another one when asked for a second time: its field ['x'] differs"),
    "Sum": ("loss", "so it is a sum: return the mean over units(batch)"),
    "Links": ("finish", "link is a link or a special file"),
    "Hidden": ("resume", "3 steps, a new process, and 3 more are not 6 steps: loss of step 3 differs"),
    "Forgets": ("state", "load_state_dict does not give back what state_dict gave for state.average"),
    "Chance": ("repeat", "two runs with one seed are not the same: loss of step 0 differs"),
    "Shares": ("workers", "num_workers 2 is not num_workers 0: loss of step 0 differs"),
    "Loose": ("config", 'model_config = ConfigDict(extra="forbid")'),
    "Vector": ("loss", "loss() gives shape [8, 1]"),
    "Raises": ("raised", "LookupError: no weights"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str | None]]:
    directory = tmp_path_factory.mktemp("classes")
    (directory / "classes.py").write_text(CLASSES)
    CliRunner().invoke(app, ["init", str(directory)])
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "workload:Mine", *(f"classes:{name}" for name in ("Good", *BROKEN))],
        cwd=directory,
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", ["classes:Good", "workload:Mine"])
def test_a_class_that_keeps_the_contract_and_what_init_writes_pass_every_check(
    found: dict[str, dict[str, str | None]], name: str
) -> None:
    checks = ("config", "data", "items", "loss", "finish", "state", "kernels", "repeat", "resume", "workers")
    assert found[name] == dict.fromkeys(checks)


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_exactness_is_named(found: dict[str, dict[str, str | None]], name: str) -> None:
    check, said = BROKEN[name]
    assert said in str(found[f"classes:{name}"][check])


def test_init_refuses_to_overwrite_and_writes_nothing_then(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("mine")

    result = CliRunner().invoke(app, ["init", str(tmp_path)])

    assert result.exit_code == 4
    assert "job.yaml is there already" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


@pytest.mark.parametrize("kind", ["workload", "run", "command"])
def test_init_writes_a_job_that_is_one(tmp_path: Path, kind: str) -> None:
    from ops_cli.jobs import job_from_text

    result = CliRunner().invoke(app, ["init", str(tmp_path / "new"), "--kind", kind])

    assert result.exit_code == 0
    job = job_from_text((tmp_path / "new" / "job.yaml").read_text(), "job.yaml")
    assert job.workload == ("workload:Mine" if kind == "workload" else None)
    assert {".gitignore", "README.md"} <= {path.name for path in (tmp_path / "new").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "code", "said"), [("hidden=4", 0, "is exact"), ("hiden=4", 1, "config.hiden")])
def test_the_command_says_what_it_found_and_leaves_with_its_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    setting: str,
    code: int,
    said: str,
) -> None:
    CliRunner().invoke(app, ["init", str(tmp_path)])
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(
        app, ["workloads", "check", "workload:Mine", "--set", f"config.{setting}", "--steps", "1"]
    )

    assert result.exit_code == code
    assert said in capfd.readouterr().out


def test_an_installed_workload_is_checked_by_its_name_and_what_is_neither_says_how_to_write_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("ops_cli.workloads.subprocess.run", run)
    monkeypatch.setattr("relight.interpreter.checked_interpreter", lambda python, environ: python)

    assert CliRunner().invoke(app, ["workloads", "check", "digits"]).exit_code == 0
    assert "ops_worker.workloads.digits:Digits" in asked[-1]
    refused = CliRunner().invoke(app, ["workloads", "check", "mine"])
    assert (refused.exit_code, len(asked)) == (2, 1)
    assert "such as mine:Mine" in refused.output
