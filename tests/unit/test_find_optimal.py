"""`find_optimal`: what it takes, what it trains, what it goes on from, and that the service comes to the same."""

import importlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from optimal_models import BUDGETS, KNOBS, LENGTH, SYMBOLS, WIDTHS, Dying, Net, cross_entropy, data, dying, find
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from training_child import Listed, processes

import relight
from ops_cli import sweep_columns
from ops_contract.agents import StartTraining
from ops_contract.jobs import Job, JobSpec
from ops_contract.lifecycle import Kind, Outcome
from ops_contract.plans import ChildPlan
from ops_contract.study_results import SweepRow
from ops_studies import fits
from ops_worker import studies
from relight.importing import import_workload
from relight.optimal import runs
from relight.optimal.content import Content
from relight.optimal.results import SweepPlan, SweepResults
from relight.training.attempt import Attempt, Site
from relight.training.directory import locked
from relight.training.faults import TrainingFault

IN_THE_SECOND = 80  # of its calls: the first training has 67, and two are made before it
ONE = {"compute_budgets": BUDGETS[:1], "model_sizes": [4, 8]}


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Intervals are not what is tested here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fits, "fit_rows", partial(fits.fit_rows, bootstraps=20))
        yield


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is trained from now on."""
    names: list[str] = []
    run = runs.run

    def noted(workload_type: Any, child: ChildPlan, *rest: Any) -> SweepRow:
        names.append(child.name)
        return run(workload_type, child, *rest)

    monkeypatch.setattr(runs, "run", noted)
    return names


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SweepResults:
    found = find(tmp_path_factory.mktemp("whole"), predict=[1e8])
    assert isinstance(found, SweepResults)
    return found


def losses(found: SweepResults) -> dict[str, tuple[float | None, int | None]]:
    return {row.experiment_id: (row.final_loss, row.num_tokens) for row in found.rows}


def test_the_grid_is_trained_and_fitted(whole: SweepResults) -> None:
    assert [(row.compute_budget, row.size, row.status) for row in whole.rows] == [
        (budget, width, "completed") for budget in BUDGETS for width in WIDTHS
    ]
    for row in whole.rows:
        assert row.model_size == sum(parameter.numel() for parameter in Net(row.size).parameters())
        assert row.num_tokens is not None
        assert row.num_tokens % LENGTH == 0
        assert abs(6 * row.model_size * row.num_tokens / row.compute_budget - 1) < 0.01
        assert row.actual_flops == 6 * row.model_size * row.num_tokens
        assert row.final_loss is not None
        assert 0 < row.final_loss < np.log(SYMBOLS)
        assert row.wall_time_seconds is not None
        assert row.wall_time_seconds > 0
        assert row.timestamp is not None
        assert (row.energy_j, row.operation_id, row.error_message) == (None, None, None)
        assert "ops sweep run" in str(row.energy_reason)
    assert {each.budget for each in whole.predictions} == {*BUDGETS, 1e8}
    assert len(whole.chinchilla_table().splitlines()) == 2 + len(whole.predictions)
    predicted = whole.predict(1e8)
    assert predicted == next(e for e in whole.predictions if (e.approach, e.budget) == (predicted.approach, 1e8))
    assert (predicted.approach, predicted.extrapolates) == (3, True)
    assert "6 of 6 trainings completed" in str(whole)
    with pytest.raises(ValueError, match="FLOPs above 0"):
        whole.predict(-1)


def test_its_file_is_what_sweep_fit_reads(whole: SweepResults) -> None:
    rows, left_out = sweep_columns.read(whole.path)
    columns = sweep_columns.choose(rows, params="model_size", tokens=None, flops=None, loss="final_loss", budget=None)
    read = [columns.run(row) for row in rows]
    assert [(each.experiment_id, each.loss, each.budget) for each in read] == [
        (row.experiment_id, row.final_loss, row.compute_budget) for row in whole.rows
    ]
    assert left_out == []
    assert json.loads(whole.path.read_text())["fit"]["points"] == len(rows)
    assert list((whole.path.parent / "runs").iterdir()) == []


@pytest.mark.slow
def test_its_plots_are_written_beside_it(whole: SweepResults, trained: list[str]) -> None:
    find(whole.path.parent, predict=[1e8], plots=True)
    drawn = {file.stem: file.read_bytes()[:8] for file in whole.path.parent.glob("*.png")}
    assert "isoflop" in drawn
    assert set(drawn.values()) == {b"\x89PNG\r\n\x1a\n"}
    assert trained == []


def test_called_again_it_trains_only_what_is_missing(whole: SweepResults, trained: list[str]) -> None:
    again = find(whole.path.parent, predict=[1e8])
    assert (trained, again.rows, again.fit) == ([], whole.rows, whole.fit)

    more = find(whole.path.parent, compute_budgets=[4e6, 6e6], model_sizes=[4], seeds=2)
    assert trained == ["C=4e+6 width=4 seed=1", "C=6e+6 width=4 seed=0", "C=6e+6 width=4 seed=1"]
    assert losses(more)["C=4e+6 width=4 seed=0"] == losses(whole)["C=4e+6 width=4"]
    back = find(whole.path.parent, predict=[1e8])
    assert (len(trained), back.rows) == (3, whole.rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_kwargs": {"dropout": 0.2}},
        {"dataset": data(1999)},
        {"loss_fn": lambda output, target: 2 * cross_entropy(output, target)},
        {"execution": KNOBS | {"learning_rate": 2e-2}},
        {"val_share": 0.2},
        {"model_cls": type("Net", (Net,), {"forward": lambda self, tokens: 2 * Net.forward(self, tokens)})},
    ],
    ids=["kwargs", "data", "loss", "knobs", "split", "model"],
)
def test_nothing_stale_is_taken_for_it(
    whole: SweepResults, changes: dict[str, Any], trained: list[str], tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_bytes(whole.path.read_bytes())

    changed = find(tmp_path, **ONE, **changes)

    assert trained == ["C=4e+6 width=4", "C=4e+6 width=8"]
    assert losses(changed) != {name: losses(whole)[name] for name in trained}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(whole: SweepResults, tmp_path: Path) -> None:
    killed = processes.Process(target=dying, args=(tmp_path, IN_THE_SECOND, signal.SIGKILL))
    killed.start()
    killed.join()
    first = json.loads((tmp_path / "results.json").read_text())["rows"]

    finished = dying(tmp_path, at=0, by=0)

    assert killed.exitcode == -signal.SIGKILL
    assert [row["experiment_id"] for row in first] == ["C=4e+6 width=4"]
    assert finished.rows[0].timestamp == datetime.fromisoformat(first[0]["timestamp"])
    assert losses(finished).items() <= losses(whole).items()


@pytest.mark.parametrize(("by", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_stopped_it_saves_and_repeats_no_step(
    whole: SweepResults, tmp_path: Path, by: int, ends: type[BaseException]
) -> None:
    with pytest.raises(ends):
        dying(tmp_path, IN_THE_SECOND, by)
    begun = Dying.calls
    finished = dying(tmp_path, at=0, by=0)

    steps = sum(-(-(row.num_tokens or 0) // (LENGTH * 8)) for row in finished.rows)
    evaluations = len(finished.rows) * 200 // 8
    assert begun + Dying.calls == steps + evaluations + 2 * 2  # and what is tried before anything runs
    assert losses(finished).items() <= losses(whole).items()
    assert [row.wall_time_seconds is None for row in finished.rows] == [False, True, False, False]
    assert list((tmp_path / "runs").iterdir()) == []


class Brittle(Net):
    """Fails while it is trained, at a width of 6; at 8 it diverges."""

    def forward(self, tokens: Tensor) -> Tensor:
        out = super().forward(tokens)
        if out.shape[-1] and self.hidden.in_features == 6 and "MENDED" not in os.environ:
            raise RuntimeError("six is too much")
        return out * float("inf") if self.hidden.in_features == 8 else out


def test_what_fails_is_a_row_and_stops_nothing(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"compute_budgets": BUDGETS[:1], "model_cls": Brittle}
    found = find(tmp_path, **asked)
    four, six, eight = found.rows
    assert [row.status for row in found.rows] == ["completed", "failed", "failed"]
    assert "RuntimeError: six is too much" in str(six.error_message)
    assert "test_find_optimal.py" in str(six.error_message)
    assert six.final_loss is None
    assert (str(eight.final_loss), eight.error_message) == ("nan", "its val_loss is nan: it diverged")
    assert any("C=4e+6 width=6 is not in the fits" in warning for warning in found.warnings)
    with pytest.raises(ValueError, match="these runs allow no prediction"):
        found.predict(1e9)

    del trained[:]
    monkeypatch.setenv("MENDED", "1")
    again = find(tmp_path, **asked)
    assert trained == ["C=4e+6 width=6"]
    assert [row.status for row in again.rows] == ["completed", "completed", "failed"]
    assert again.rows[0] == four


def test_a_results_file_is_never_lost(
    whole: SweepResults, tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(whole.path.read_bytes())
    kept = file.read_bytes()
    find(tmp_path, **ONE, resume=False)
    assert len(trained) == 2
    assert (tmp_path / "results-1.json").read_bytes() == kept
    assert "what" in capsys.readouterr().err

    file.write_text(file.read_text()[:-100])
    torn = file.read_bytes()
    find(tmp_path, **ONE)
    assert len(trained) == 4
    assert (tmp_path / "results-2.json").read_bytes() == torn
    assert f"{file} cannot be read" in capsys.readouterr().err


def test_resume_false_leaves_the_checkpoints_of_what_was_not_done(tmp_path: Path, trained: list[str]) -> None:
    (tmp_path / "runs" / "of-before").mkdir(parents=True)
    find(tmp_path, **ONE, resume=False)
    assert (tmp_path / "runs-1" / "of-before").is_dir()


def test_a_directory_has_one_sweep_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relight.training.directory._LOCKED_S", 0.0)
    held = locked(tmp_path, "{}")
    with pytest.raises(TrainingFault, match=f"another find_optimal is at work in {tmp_path}"):
        find(tmp_path, **ONE)
    os.close(held)
    assert len(find(tmp_path, **ONE).rows) == 2


def test_the_process_is_afterwards_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    expected = torch.Generator().manual_seed(7)
    find(tmp_path, **ONE)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert random.random() == random.Random(7).random()
    assert np.random.rand() == np.random.RandomState(7).rand()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 2


def test_without_data_loss_or_train_it_is_a_plan(tmp_path: Path, trained: list[str]) -> None:
    for without in ({"train": False}, {"loss_fn": None}, {"dataset": None}):
        plan = find(tmp_path, **without)
        assert isinstance(plan, SweepPlan)
        assert [(each.budget, each.size) for each in plan.points] == [(c, w) for c in BUDGETS for w in WIDTHS]
        assert plan.flops == pytest.approx(3 * sum(BUDGETS), rel=0.01)
        assert "6 trainings, 3.6e+07 FLOPs in all" in str(plan)
        assert ("nobody can say whether it has tokens enough" in str(plan)) == ("dataset" in without)
    assert (trained, list(tmp_path.iterdir())) == ([], [])


def test_sizes_are_found_within_what_the_budgets_admit() -> None:
    plan = relight.find_optimal(Net, "width", compute_budgets=[1e9, 1e10])
    assert isinstance(plan, SweepPlan)
    assert len(plan) == 14
    assert all(0.5 <= each.tokens / each.params <= 1000 for each in plan.points)
    assert all(each.size % 2 ** max(0, each.size.bit_length() - 4) == 0 for each in plan.points)
    by_budget = [[each.tokens / each.params for each in plan.points if each.budget == c] for c in (1e9, 1e10)]
    assert all(max(ratios) > 500 and min(ratios) < 1 for ratios in by_budget)


def test_sizes_of_which_no_model_can_be_made_are_left_out() -> None:
    class Heads(Net):
        def __init__(self, width: int) -> None:
            if width % 16:
                raise ValueError("16 heads do not divide it")
            super().__init__(width)

    found = relight.find_optimal(Heads, "width", compute_budgets=[1e10])
    assert isinstance(found, SweepPlan)
    assert all(each.size % 16 == 0 for each in found.points)
    given = relight.find_optimal(Heads, "width", compute_budgets=[1e10], model_sizes=[60, 64, 96])
    assert isinstance(given, SweepPlan)
    assert [each.size for each in given.points] == [64, 96]
    assert "16 heads do not divide it" in given.skipped[0].reason


def test_sizes_are_not_tried_with_models_that_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Real(Net):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.head.weight.sum().item()  # which the meta device has not

    found = relight.find_optimal(Real, "width", compute_budgets=[1e8])
    assert isinstance(found, SweepPlan)
    assert "on the meta device" in str(found)
    monkeypatch.setattr("relight.optimal.contract._LARGEST_REAL", 1000)
    with pytest.raises(ValueError, match=r"are too large to try sizes with.*give model_sizes"):
        relight.find_optimal(Real, "width", compute_budgets=[1e8])


def with_num_params(says: Callable[[Net], int]) -> type[Net]:
    return type("Counts", (Net,), {"num_params": says})


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


class Empty(Dataset[int]):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> int:
        raise IndexError


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"compute_budgets": None}, ValueError, "give compute_budgets"),
        ({"compute_budgets": []}, ValueError, "give compute_budgets"),
        ({"compute_budgets": [1e6, -1]}, ValueError, "budgets.1: Input should be greater than 0"),
        ({"per_bugdet": 3}, ValueError, "did you mean per_budget"),
        ({"budgets": [1]}, TypeError, "give compute_budgets"),
        ({"execution": {"learning_rat": 3}}, ValueError, "did you mean learning_rate"),
        ({"execution": {"max_steps": 3}}, ValueError, "its budget says how long a training is"),
        ({"execution": {"accelerator": "mps"}}, ValueError, "torch finds no such device here"),
        ({"model_size_param": "d_model"}, TypeError, "Net takes no 'd_model': it takes width, dropout"),
        ({"model_size_param": "dropout", "model_kwargs": {"width": 4}}, ValueError, "cannot be made with dropout=4"),
        ({"model_kwargs": {"depth": 2}}, TypeError, "model_kwargs has depth, which Net does not take"),
        ({"model_kwargs": {"width": 2}}, ValueError, "model_kwargs has width, which is what the sweep varies"),
        ({"model_cls": lambda width, dropout: width}, TypeError, "makes a int; let it make a torch.nn.Module"),
        ({"model_cls": Net(4)}, TypeError, "model_cls is a Net"),
        ({"model_cls": 4}, TypeError, "model_cls is a int"),
        ({"model_cls": with_num_params(lambda net: 7)}, ValueError, r"num_params\(\) says 7, but 248 parameters"),
        ({"model_sizes": []}, ValueError, "model_sizes is empty"),
        ({"model_sizes": [0]}, ValueError, "no parameters|cannot be made"),
        ({"dataset": Stream()}, TypeError, "a Stream has no samples by number"),
        ({"dataset": iter([])}, TypeError, "has no samples by number"),
        ({"dataset": {"a": 1}}, TypeError, "has samples by key"),
        ({"dataset": Empty()}, ValueError, "dataset has 0 samples"),
        ({"val_dataset": []}, ValueError, "val_dataset has 0 samples"),
        ({"val_share": 1.5}, ValueError, "val_share: Input should be less than 1"),
        ({"dataset": DataLoader(data(9), sampler=WeightedRandomSampler([1] * 9, 9))}, ValueError, "neither sampler"),
        ({"dataset": [torch.zeros(8, dtype=torch.long)] * 99}, ValueError, r"batches \(input, …, target\)"),
        ({"dataset": [("a", 1)] * 9}, ValueError, "fails on the first batch"),
        ({"loss_fn": nn.CrossEntropyLoss}, TypeError, r"CrossEntropyLoss\(\)"),
        ({"loss_fn": "mse"}, TypeError, "loss_fn is a str"),
        ({"loss_fn": lambda output, target: output}, ValueError, "a tensor of shape"),
        ({"loss_fn": lambda output, target: 1.0}, ValueError, "gives a float; let it return the mean"),
        ({"loss_fn": lambda output, target: output.sum() * torch.nan}, ValueError, "gives nan on the first batch"),
        ({"loss_fn": lambda output, target: output.sum().detach()}, ValueError, "no gradient"),
        ({"loss_fn": lambda model, batch: model(batch)}, ValueError, r"loss_fn\(model, batch\) fails on the first"),
        ({"loss_fn": None, "flops": "counted"}, ValueError, "give dataset and loss_fn"),
        ({"compute_budgets": [10.0]}, ValueError, "no size can be trained"),
        ({"compute_budgets": [10.0], "model_sizes": None}, ValueError, "no width gives between"),
    ],
)
def test_what_it_cannot_work_with_is_said_before_anything_runs(
    changes: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        find(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_batches_of_dicts_and_a_loss_of_the_model(tmp_path: Path) -> None:
    samples = [{"tokens": x, "labels": y} for x, y in data(600)]  # type: ignore[misc]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(model(batch["tokens"]), batch["labels"])

    of_pairs = find(tmp_path / "pairs", **ONE, dataset=data(600))
    of_dicts = find(tmp_path / "dicts", **ONE, dataset=samples, loss_fn=loss)

    assert losses(of_dicts) == losses(of_pairs)


def test_a_loader_says_how_batches_are_made(tmp_path: Path, trained: list[str]) -> None:
    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*items, strict=True)
        return torch.stack(inputs) % 4, torch.stack(targets)

    loader = DataLoader(data(), batch_size=16, shuffle=True, collate_fn=collate)
    knobs = {name: value for name, value in KNOBS.items() if name != "batch_size"}
    by_loader = find(tmp_path, **ONE, dataset=loader, execution=knobs)
    alike = find(tmp_path, **ONE, dataset=loader, execution=knobs | {"batch_size": 16})
    assert len(trained) == 2
    assert alike.rows == by_loader.rows
    other = find(tmp_path, **ONE, dataset=data(), execution=knobs | {"batch_size": 16})
    assert losses(other) != losses(alike)


def test_tokens_are_those_of_the_target_unless_said_otherwise(tmp_path: Path) -> None:
    def tokens(**changes: Any) -> int:
        plan = find(tmp_path, train=False, **changes)
        return plan.plan.tokens_there

    assert tokens() == 1800 * LENGTH
    assert tokens(val_dataset=data(10)) == 2000 * LENGTH
    assert tokens(tokens_per_sample=5) == 1800 * 5
    assert tokens(dataset=None) is None


NAMES = {
    "model": "optimal_models:Net",
    "dataset": "optimal_models:data",
    "loss_fn": "optimal_models:cross_entropy",
    "model_kwargs": {"dropout": 0.1},
}


def test_the_service_comes_to_the_same_bits(whole: SweepResults, tmp_path: Path) -> None:
    study = {"type": "isoflop", "budgets": BUDGETS, "size": "config.model_kwargs.width", "sizes": WIDTHS}
    spec = JobSpec.model_validate(
        {"workload": runs.WORKLOAD, "config": NAMES, "execution": KNOBS, "study": study | {"per_budget": 3}}
    )
    named = import_workload(runs.WORKLOAD)
    job = Job(workload=runs.WORKLOAD, **spec.model_dump(include={"kind", "config", "execution", "study"}))

    plan = studies.plan(job, named)
    came_to = {}
    for child in plan.children:
        sink = Listed()
        training = Job(kind=Kind.TRAINING, workload=runs.WORKLOAD, config=child.config, execution=child.execution)
        start = StartTraining(
            incarnation=uuid4(), operation_id=uuid4(), attempt=1, slots=[0], deadline_s=60, job=training
        )
        assert Attempt(named, start, Site(tmp_path, "cpu", 1), sink, lambda: None).run() == Outcome.COMPLETED
        last = {s.name: s.floats()[-1] for r in sink.reports if hasattr(r, "series") for s in r.series}
        (units,) = (r.content.units for r in sink.reports if hasattr(r, "content"))
        came_to[child.name] = (last["val_loss"], units)

    assert came_to == losses(whole)
    assert plan.tokens_there == 1800 * LENGTH


def test_names_that_lead_nowhere_are_said_when_the_sweep_is_planned() -> None:
    study = {"type": "isoflop", "budgets": BUDGETS, "size": "config.model_kwargs.width", "sizes": WIDTHS}
    for wrong, said in (({"model": "optimal_models:Nett"}, "has no 'Nett'"), ({"loss_fn": "mse"}, "module:attr")):
        config = {"workload": runs.WORKLOAD, "config": NAMES | wrong, "study": study}
        spec = JobSpec.model_validate(config)
        job = Job(workload=runs.WORKLOAD, **spec.model_dump(include={"kind", "config", "execution", "study"}))
        with pytest.raises(TrainingFault, match=said):
            studies.plan(job, import_workload(runs.WORKLOAD))


MINE = """
import functools
import torch
from helping import scale
LIMIT = 3
def loss(output, target, power=2):
    return (scale(output - target).abs().clamp(max=LIMIT) ** power).mean()
def making(factor):
    return lambda output, target: factor * loss(output, target)
class Model(torch.nn.Module):
    sizes = {"small", "large"}
    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)
    def forward(self, x):
        return self.layer(x)
made = making(2)
partly = functools.partial(loss, power=2)
"""
HELPING = "def scale(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("", "", ""),
        ("import torch", "import torch\n# a comment, and another line\n", ""),
        ("import torch", "import torch\nUNUSED = 3", ""),
        ("LIMIT = 3", "LIMIT = 4", "loss made partly"),
        ("2 * x", "3 * x", "loss made partly"),
        ("power=2):", "power=3):", "loss made partly"),
        ("making(2)", "making(3)", "made"),
        ("(loss, power=2)", "(loss, power=3)", "partly"),
        ("width, 1)", "width, 2)", "Model"),
        ('"large"', '"huge"', "Model"),
        ("self.layer(x)", "self.layer(x) + 1", "Model"),
    ],
)
def test_content_is_what_the_code_does_and_the_values_that_it_uses(
    old: str, new: str, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)

    def contents() -> dict[str, str]:
        for module in ("mine", "helping"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        mine = importlib.import_module("mine")
        found = {}
        for name in ("loss", "made", "partly", "Model"):
            content = Content()
            content.add(getattr(mine, name))
            assert content.opaque == set()
            found[name] = content.hexdigest()
        return found

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helping.py").write_text(HELPING)
    before = contents()
    (tmp_path / "mine.py").write_text(MINE.replace(old, new))
    (tmp_path / "helping.py").write_text(HELPING.replace(old, new))
    after = contents()
    assert {name for name in before if before[name] != after[name]} == set(changed.split())


class Items(Dataset[Any]):
    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item = item

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    own, calls = np.random.default_rng(), count()
    x, y = data(1)[0]
    steady = find(tmp_path / "a", **ONE, dataset=Items(lambda index: (torch.randint(SYMBOLS, (LENGTH,)), y)))
    assert [each for each in steady.warnings if "other data" in each or "its type" in each] == []
    unsteady_items = Items(lambda index: ((x + next(calls)) % SYMBOLS, y))
    unsteady = find(tmp_path / "b", **ONE, dataset=unsteady_items)
    assert any("sample 0 is another one each time" in warning for warning in unsteady.warnings)
    random_loss = partial(lambda drawn, output, target: cross_entropy(output, target), own)
    named = find(tmp_path / "b", **ONE, dataset=unsteady_items, loss_fn=random_loss, data_digest="1")
    assert not any("another one" in warning for warning in named.warnings)
    assert any("only its type numpy.random._generator.Generator" in warning for warning in named.warnings)
