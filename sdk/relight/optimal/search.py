"""`relight.find_optimal`: an IsoFLOP sweep in this process, planned, trained and fitted as the service does it."""

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind
from ops_contract.plans import Plan
from ops_contract.problems import problems_of
from ops_contract.studies import IsoFlop

try:
    from ops_studies import figures
    from ops_studies import plots as panels
    from ops_studies.isoflop import Data
    from ops_studies.points import Unplannable
except ModuleNotFoundError as error:
    raise ImportError(f"find_optimal needs {error.name}: pip install 'relight[studies]'") from error

from relight.optimal import contract, runs
from relight.optimal.content import Content, Unsteady, made_by
from relight.optimal.results import ResultsFile, SweepPlan, SweepResults
from relight.optimal.workload import Assembled, Parts, Settings, bound
from relight.training import planning
from relight.training.directory import say
from relight.training.faults import TrainingFault

_CONFIG = "config.model_kwargs."
_NO_DATA = [(torch.zeros(1), torch.zeros(1))] * 2  # where there are none: a plan counts models, and runs none
_PLENTY = 2**40  # samples, where there are no data: no training asks for more


M = TypeVar("M", bound=BaseModel)


def find_optimal(
    model_cls: Callable[..., torch.nn.Module],
    model_size_param: str,
    model_kwargs: Mapping[str, Any] | None = None,
    dataset: Any = None,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    compute_budgets: Sequence[float] | None = None,
    train: bool = True,
    output_dir: str | PathLike[str] = "outputs",
    resume: bool = True,
    *,
    model_sizes: Iterable[int] | None = None,
    val_dataset: Any = None,
    val_share: float = 0.1,
    tokens_per_sample: int | None = None,
    data_digest: str | None = None,
    execution: Execution | Mapping[str, Any] | None = None,
    plots: bool = False,
    **study: Any,
) -> SweepPlan | SweepResults:
    """Train models of several sizes under each budget of FLOPs, and fit which size and how many tokens are optimal.

    `model_cls(**model_kwargs, <model_size_param>=size)` makes a model; without `model_sizes`, sizes are found by
    trying. `dataset` is map-style, or a DataLoader, whose batch_size, collate_fn and num_workers count; `val_share` of
    it is held out where there is no `val_dataset`. `loss_fn` is (output, target), of batches (input, …, target), or
    (model, batch) where its first parameter is called `model`; it gives the mean over the batch. Tokens are
    `tokens_per_sample`, else the elements of the target. `execution` has the knobs of a job, such as learning_rate;
    `study` further fields of an isoflop study: per_budget, seeds, flops, embeddings, tokens_per_param, predict, …

    Without `train`, `dataset` or `loss_fn` it gives the plan. Else what is missing in `output_dir` is trained, by
    content: model, loss, data, size, tokens, seed, knobs; `results.json` is written after each training. `plots` writes
    PNGs beside it. Raises TypeError and ValueError for what it cannot work with, before anything is trained.
    """
    if plots and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'relight[plots]'")
    sweep = _Sweep(
        model_cls,
        model_size_param,
        dict(model_kwargs or {}),
        dataset,
        val_dataset,
        loss_fn,
        _knobs(execution, dataset),
        {"val_share": val_share, "tokens_per_sample": tokens_per_sample, "data_digest": data_digest},
    )
    with runs.as_it_was():
        job = sweep.job(_study(model_size_param, compute_budgets, model_sizes, study), model_sizes is None)
        workload_type = sweep.workload_type()
        sweep.check(job, workload_type)
        plan = sweep.plan(job, workload_type)
        if not (train and sweep.is_whole):
            return SweepPlan(plan)
        assert isinstance(job.study, IsoFlop)
        with ResultsFile(Path(output_dir), job.study, plan, resume) as results:
            notes = _train(results, plan, workload_type, runs.device_for(sweep.knobs.accelerator))
            found = results.finish([*sweep.doubts, *notes])
    if plots:
        _draw(found)
    return found


class _Sweep:
    """What `find_optimal` was given."""

    def __init__(
        self,
        model_cls: Callable[..., torch.nn.Module],
        size_param: str,
        model_kwargs: dict[str, Any],
        dataset: Any,
        val_dataset: Any,
        loss_fn: Callable[..., torch.Tensor] | None,
        knobs: Execution,
        settings: dict[str, Any],
    ) -> None:
        """Raises TypeError, ValueError."""
        self.is_whole = dataset is not None and loss_fn is not None
        self.has_data = dataset is not None
        self.knobs = knobs
        self.doubts: list[str] = []
        self._size_param = size_param
        self._build = contract.builder(model_cls, size_param, model_kwargs)
        if loss_fn is not None:
            contract.check_loss(loss_fn)
        said = {name: value for name, value in model_kwargs.items() if _is_json(value)}
        unsaid = {name: value for name, value in model_kwargs.items() if name not in said}
        if not self.has_data:
            dataset, val_dataset = _NO_DATA, _NO_DATA
            settings = settings | {"tokens_per_sample": settings["tokens_per_sample"] or 1}
        self._parts = Parts(model_cls, loss_fn or _no_loss, dataset, val_dataset, unsaid)
        # Before any of it is called: what counts its calls is another thing afterwards.
        self._objects = self._content()
        self._config = _checked(Settings, settings | {"model_kwargs": said}).model_dump()

    def job(self, study: IsoFlop, finds_sizes: bool) -> Job:
        if study.flops == "counted" and not self.is_whole:
            raise ValueError("flops='counted' runs the model on a batch: give dataset and loss_fn, or leave it 6N")
        if finds_sizes:
            sizes = contract.found_sizes(self._build, self._size_param, study)
            study = study.model_copy(update={"sizes": sizes})
        return Job(kind=Kind.STUDY, workload=runs.WORKLOAD, config=self._config, execution=self.knobs, study=study)

    def workload_type(self) -> type[Assembled[Settings]]:
        settings = Settings.model_validate(self._config)
        digest = settings.data_digest
        if self.is_whole and digest is None:
            try:
                content = self._parts.content_of_data(settings.val_share)
                self._doubt(content)
                digest = content.hexdigest()
            except Unsteady as error:
                self.doubts.append(f"{error}, so that other data would not be noticed: name them by data_digest")
        return bound(self._parts, digest)

    def check(self, job: Job, workload_type: type[Assembled[Settings]]) -> None:
        """The contract of model and loss. Raises TypeError, ValueError."""
        assert isinstance(job.study, IsoFlop)
        assert isinstance(job.study.sizes, list)
        size = contract.check_sizes(self._build, self._size_param, sorted(job.study.sizes))
        if self.is_whole:
            config = self._config | {"model_kwargs": self._config["model_kwargs"] | {self._size_param: size}}
            contract.check_step(workload_type, config, self.knobs.seed, runs.device_for(self.knobs.accelerator))

    def plan(self, job: Job, workload_type: type[Assembled[Settings]]) -> Plan:
        """Raises ValueError where there is nothing to train."""
        per_sample = self._config["tokens_per_sample"]
        base = replace(planning.base(job, workload_type), digests={"objects": self._objects})
        try:
            plan = planning.sweep(base, workload_type, data=None if self.has_data else Data(_PLENTY, per_sample))
        except (Unplannable, TrainingFault) as error:
            raise ValueError(str(error)) from error
        if self.has_data:
            return plan
        told = "without a dataset nobody can say whether it has tokens enough"
        return plan.model_copy(update={"tokens_there": None, "warnings": [*plan.warnings, told]})

    def _content(self) -> str:
        content, parts = Content(), self._parts
        content.add((parts.model, parts.loss_fn, parts.collate, dict(parts.model_kwargs), made_by(parts.dataset)))
        self._doubt(content)
        return content.hexdigest()

    def _doubt(self, content: Content) -> None:
        self.doubts += [
            f"of an object only its type {name} is known: where it has changed, begin anew with resume=False"
            for name in sorted(content.opaque)
        ]


def _train(results: ResultsFile, plan: Plan, workload_type: type[Assembled[Settings]], device: str) -> dict[str, None]:
    """What is missing; gives what there is to tell of it."""
    missing, notes = results.missing(), dict[str, None]()
    if done := len(plan.children) - len(missing):
        say(f"{done} of {len(plan.children)} trainings are in {results.path}")
    for number, child in enumerate(missing, 1):
        with runs.opened(results.run_directory(child)) as place:
            row = runs.run(workload_type, child, place, device)
        results.add(child, row)
        notes |= place.notes
        how = row.error_message or f"loss {row.final_loss:.4g}"
        say(f"{number}/{len(missing)} {child.name}: {how}")
    return notes


def _study(
    size_param: str, budgets: Sequence[float] | None, sizes: Iterable[int] | None, more: Mapping[str, Any]
) -> IsoFlop:
    if budgets is None or not list(budgets):
        raise ValueError("give compute_budgets, the FLOPs of one training: three or more, such as [1e15, 3e15, 1e16]")
    if sizes is not None and not (sizes := sorted({int(size) for size in sizes})):
        raise ValueError(f"model_sizes is empty; give values for {size_param}, or leave it out to have them found")
    fields: dict[str, Any] = {
        "budgets": [float(budget) for budget in budgets],
        "size": _CONFIG + size_param,
        "sizes": sizes or [1],
    }
    if sizes:
        more = {"per_budget": min(IsoFlop.model_fields["per_budget"].default, len(fields["sizes"])), **more}
    if taken := fields.keys() & more.keys():
        raise TypeError(f"{', '.join(sorted(taken))}: give compute_budgets, model_size_param and model_sizes")
    return _checked(IsoFlop, {**more, **fields})


def _knobs(given: Execution | Mapping[str, Any] | None, dataset: Any) -> Execution:
    said = given.model_dump(exclude_unset=True) if isinstance(given, Execution) else dict(given or {})
    if isinstance(dataset, DataLoader):
        if dataset.batch_size is None or type(dataset.sampler) not in (RandomSampler, SequentialSampler):
            raise ValueError(
                "dataset: the samples come in an order of their own, by seed and epoch; give the DataLoader batch_size "
                "and neither sampler nor batch_sampler"
            )
        said = {"batch_size": dataset.batch_size, "num_workers": dataset.num_workers} | said
    knobs = _checked(Execution, said)
    if knobs.devices > 1:
        raise ValueError(
            f"execution.devices: {knobs.devices}, but it trains in this process, on one; leave it out, or submit an "
            "isoflop study to a service (ops sweep), whose trainings may have several"
        )
    return knobs


def _checked(model: type[M], content: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ValueError("; ".join(f"{field}: {problem}" for field, problem in problems_of(error, model))) from None


def _is_json(value: Any) -> bool:
    """Whether JSON gives back the very same."""
    if type(value) is dict:
        return all(type(key) is str and _is_json(inner) for key, inner in value.items())
    if type(value) is list:
        return all(map(_is_json, value))
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def _no_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("a plan without loss_fn calls none")


def _draw(found: SweepResults) -> None:
    """One PNG for each panel."""
    for name in panels.sweep(found.result):
        figures.of_sweep(found.result, name).savefig(found.path.with_name(f"{name}.png"))
