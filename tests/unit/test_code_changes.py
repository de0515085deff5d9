"""The code digest: what of a workload's source it covers, and what becomes of a run whose code changed."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_child import Listed, Operation, stopping_after, ticking

from ops_contract.jobs import Execution
from ops_worker.workloads.bytelm import ByteLM
from ops_worker.workloads.digits import Digits
from relight.training.attempt import Attempt, Site
from relight.training.faults import TrainingFault
from relight.training.source import source_digest, source_files
from relight.workload import Workload

TASK = """
import numpy
from torch import nn, randn
from pydantic import BaseModel
from relight.workload import Workload
from . import near
from ..models.net import Net

class Nothing(BaseModel): ...

class Task(Workload):
    Config = Nothing

    def data(self):
        return [randn(8) for _ in range(4)], None

    def model(self):
        import mine.lazy
        return Net()

    def loss(self, model, batch):
        return model(batch).square().mean(), {}
"""
FILES = {
    "mine/__init__.py": "",
    "mine/tasks/__init__.py": "",
    "mine/tasks/task.py": TASK,
    "mine/tasks/near.py": "import mine.tasks.task",
    "mine/tasks/unrelated.py": "",
    "mine/models/__init__.py": "from .net import Net",
    "mine/models/net.py": "from torch.nn import Linear\ndef Net(): return Linear(8, 1)",
    "mine/lazy.py": "",
    "beside.py": "",
}
COVERED = set(FILES) - {"mine/tasks/unrelated.py", "beside.py"}

Load = Callable[[], type[Workload[Any]]]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def load(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    monkeypatch.syspath_prepend(package)

    def load() -> type[Workload[Any]]:
        """As a new process would."""
        for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        loaded: type[Workload[Any]] = importlib.import_module("mine.tasks.task").Task
        return loaded

    threads = torch.get_num_threads()
    yield load
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_it_covers_what_the_workload_imports_of_its_own_package(load: Load) -> None:
    """Through cycles, relative imports, packages and functions; neither torch nor the engine."""
    assert source_files(load()).keys() == COVERED


@pytest.mark.parametrize("name", sorted(FILES))
def test_it_changes_with_every_file_that_it_covers_and_with_no_other(load: Load, package: Path, name: str) -> None:
    before = source_digest(source_files(load()))

    (package / name).write_text(FILES[name] + "\n# changed")

    assert (source_digest(source_files(load())) != before) == (name in COVERED)


def test_what_else_was_loaded_does_not_matter(load: Load) -> None:
    before = source_files(load())

    importlib.import_module("mine.tasks.unrelated")

    assert source_files(sys.modules["mine.tasks.task"].Task) == before
    assert source_files(Digits).keys() == {
        "ops_worker/__init__.py",
        "ops_worker/workloads/__init__.py",
        "ops_worker/workloads/digits.py",
    }
    assert "ops_worker/workloads/digits.py" not in source_files(ByteLM)


@pytest.mark.parametrize(
    ("folder", "files"), [("site-packages", {"task_alone.py"}), ("mine", {"task_alone.py", "near.py"})]
)
def test_a_module_outside_packages_covers_its_directory_unless_that_is_everybodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, files: set[str]
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "task_alone.py").write_text("import near, os\nclass Task: ...")
    (tmp_path / folder / "near.py").write_text("this does not parse")
    monkeypatch.syspath_prepend(tmp_path / folder)
    monkeypatch.setitem(sys.modules, "near", sys)
    monkeypatch.setitem(sys.modules, "task_alone", None)
    del sys.modules["task_alone"]

    assert source_files(importlib.import_module("task_alone").Task).keys() == files


def test_a_class_without_a_source_has_no_digest() -> None:
    assert source_digest(source_files(type("Typed", (), {"__module__": "builtins"}))) is None


def run(operation: Operation, workload_type: type[Workload[Any]], stop_after: int | None = None) -> list[Any]:
    sink = Listed()
    site = Site(operation.root, "cpu", 1)
    Attempt(workload_type, operation.start(), site, sink, stopping_after(stop_after), ticking()).run()
    for report in sink.reports:
        operation.accept(report)
    return sink.reports


def test_other_code_is_refused_by_its_files_until_it_is_accepted(load: Load, package: Path, tmp_path: Path) -> None:
    operation = Operation(tmp_path / "storage", "task", execution=Execution(batch_size=1))
    run(operation, load(), stop_after=1)
    net = package / "mine/models/net.py"
    net.write_text(net.read_text() + "\n# changed")

    with pytest.raises(TrainingFault) as refused:
        run(operation, load())
    assert (refused.value.code, refused.value.permanent) == ("code_changed", True)
    assert "mine/models/net.py was " in refused.value.message
    assert "task.py" not in refused.value.message
    assert f"ops resume {operation.id} --accept-changes" in refused.value.message

    operation.accept_changes = True
    accepted = run(operation, load(), stop_after=2)[0].exactness
    assert (accepted.promise, len(accepted.reasons)) == ("best_effort", 1)
    assert "mine/models/net.py was " in accepted.reasons[0]

    # Its checkpoint is of the new code: that is what the next attempt is compared with.
    operation.accept_changes = False
    assert run(operation, load(), stop_after=2)[0].exactness.promise == "promised"
    net.write_text(FILES["mine/models/net.py"])
    with pytest.raises(TrainingFault, match=r"net\.py was"):
        run(operation, load())


def test_putting_the_old_code_back_is_enough(load: Load, package: Path, tmp_path: Path) -> None:
    operation = Operation(tmp_path / "storage", "task", execution=Execution(batch_size=1))
    run(operation, load(), stop_after=1)
    (package / "mine/lazy.py").unlink()
    with pytest.raises(TrainingFault, match=r"lazy\.py was \w+ and is not there"):
        run(operation, load())

    (package / "mine/lazy.py").write_text("")

    assert run(operation, load())[0].exactness.promise == "promised"
    assert operation.checkpoints[-1].checkpoint_type == "final"
