"""A workload by its import path: each way in which it cannot be had is one clear, permanent fault."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import AfterValidator, BaseModel, Field, model_validator
from typer.testing import CliRunner

from ops_cli.main import app
from relight.importing import checks_by_code, import_workload
from relight.interpreter import InterpreterError, checked_interpreter
from relight.training.faults import TrainingFault

GOOD = """
from pydantic import BaseModel
from relight import Workload
class Mine(Workload):
    Config = type("Config", (BaseModel,), {})
    def data(self): ...
    def model(self): ...
    def loss(self, model, batch): ...
class Outer:
    Inner = Mine
class Half(Workload):
    Config = Mine.Config
    def data(self): ...
class Bare(Mine):
    Config = None
"""
FILES = {
    "of_mine/__init__.py": "",
    "of_mine/good.py": GOOD,
    "of_mine/broken.py": "import json\n\ndef f():\n    return 1 / 0\n\nf()\n",
    "of_mine/needs.py": "import a_library_that_is_absent\n",
    "of_mine/unclear.py": "x = 1\nclass Mine(\n",
    "of_mine/reads.py": "open('data/absent.csv')\n",
    "of_mine/leaves.py": "import sys\nsys.exit('enough')\n",
    "colorsys.py": GOOD,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import colorsys  # noqa: F401 - as something that a warm trainer has loaded already

    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("of_mine")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_class_and_a_nested_one_are_found(project: Path) -> None:
    assert import_workload("of_mine.good:Mine").__name__ == "Mine"
    assert import_workload("of_mine.good:Outer.Inner").__name__ == "Mine"


@pytest.mark.parametrize(
    ("path", "said", "trace"),
    [
        ("nowhere.at_all:Mine", "there is no module 'nowhere' in", ""),
        ("of_mine.absent:Mine", "there is no module 'of_mine.absent' in", ""),
        ("of_mine.broken:Mine", "ZeroDivisionError: division by zero ({}/of_mine/broken.py:6)", "return 1 / 0"),
        ("of_mine.needs:Mine", "No module named 'a_library_that_is_absent' ({}/of_mine/needs.py:1)", "needs.py"),
        (
            "of_mine.unclear:Mine",
            "SyntaxError: '(' was never closed (unclear.py, line 2) ({}/of_mine/unclear.py:2)",
            "^",
        ),
        ("of_mine.reads:Mine", "No such file or directory: 'data/absent.csv' ({}/of_mine/reads.py:1)", "reads.py"),
        ("of_mine.leaves:Mine", "SystemExit: enough ({}/of_mine/leaves.py:2)", "sys.exit"),
        ("of_mine.good:Absent", "has no 'Absent'; its workloads are: Bare, Half, Mine", ""),
        (
            "of_mine.good:Outer",
            "or relight.LoopWorkload; its workloads are: Bare, Half, Mine",
            "",
        ),
        ("of_mine.good:Half", "does not define loss, model()", ""),
        ("of_mine.good:Bare", "needs a class attribute Config", ""),
        ("colorsys:Mine", "which hides colorsys.py of the working directory (rename that)", ""),
    ],
)
def test_what_cannot_be_had_says_why_and_where(project: Path, path: str, said: str, trace: str) -> None:
    with pytest.raises(TrainingFault) as raised:
        import_workload(path)

    fault = raised.value
    assert (fault.code, fault.permanent) == ("import_failed", True)
    assert said.format(project) in fault.message
    assert (trace in fault.traceback) if trace else not fault.traceback
    assert "importlib" not in fault.traceback


class Plain(BaseModel):
    width: int = Field(3, ge=1)


class CrossField(Plain):
    @model_validator(mode="after")
    def check(self) -> "CrossField":
        return self


class OwnType(BaseModel):
    width: Annotated[int, AfterValidator(abs)] = 1


class Nested(BaseModel):
    parts: list[CrossField] = []


@pytest.mark.parametrize(("config", "by_code"), [(Plain, False), (CrossField, True), (OwnType, True), (Nested, True)])
def test_a_config_that_a_schema_cannot_say_is_told_from_one_that_it_can(config: type[BaseModel], by_code: bool) -> None:
    assert checks_by_code(config) is by_code


# ---- the interpreter


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "there is no program"),
        ("exec /bin/ls", "is no Python that works"),
        ("echo relight-probe 3.10.2", "is Python 3.10.2; trainers need 3.11 or newer"),
        ("echo relight-probe 3.12.0 torch", "-m pip install torch"),
        (f'exec {sys.executable} -S -E "$@"', "-m pip install 'relight=="),
    ],
)
def test_an_interpreter_in_which_no_trainer_could_run_is_refused(tmp_path: Path, script: str | None, said: str) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)

    with pytest.raises(InterpreterError, match=r".") as raised:
        checked_interpreter(str(python), os.environ)

    assert said in str(raised.value)


def test_an_interpreter_is_known_by_its_path_as_it_was_given(tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    link.chmod(0o755)

    assert checked_interpreter("python", {**os.environ, "PATH": str(tmp_path)}) == str(link)


def test_up_with_a_wrong_interpreter_says_so_and_starts_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["up", "--data-dir", str(tmp_path), "--python", "/absent/python"])

    assert result.exit_code == 1
    assert "there is no program /absent/python" in result.stderr
    assert not (tmp_path / "logs").exists()


def test_a_worker_with_a_wrong_interpreter_says_so_and_does_not_start(tmp_path: Path) -> None:
    settings = {"OPS_API_URL": "http://127.0.0.1:1", "OPS_API_TOKEN": "t", "OPS_STORAGE_ROOT": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "ops_worker", "--python", "/absent/python"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().endswith(
        "there is no program /absent/python; give the path of a Python, like ~/my-env/bin/python"
    )
