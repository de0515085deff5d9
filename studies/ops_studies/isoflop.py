"""An IsoFLOP sweep (Hoffmann et al. 2022, § 3.2): which sizes are trained on how many tokens, and what that gave."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np

from ops_contract.jobs import Execution, Job, SchedulerName
from ops_contract.lifecycle import Status
from ops_contract.plans import ChildPlan, ChildResult, IsoFlopAbout, Plan, Skipped
from ops_contract.studies import MAX_CHILDREN, IsoFlop, Point
from ops_contract.study_results import JouleOptimum, SweepFit, SweepResult, SweepRow
from ops_studies.points import Base, Refused, Unplannable, as_name
from ops_studies.runs import MIN_SIZES


@dataclass(frozen=True)
class Candidate:
    """A size that may be trained. N, `params`, and the FLOPs are counted as the study declares."""

    size: int
    params: int
    flops_per_token: float

    @classmethod
    def of(cls, study: IsoFlop, size: int, params: int, embedding_params: int, counted: float) -> "Candidate":
        """`counted` FLOPs per token are heeded only where the study says so."""
        n = params - (embedding_params if study.embeddings == "excluded" else 0)
        return cls(size, n, 6.0 * n if study.flops == "6N" else counted)


@dataclass(frozen=True)
class Data:
    """One epoch of training."""

    samples: int
    units_per_sample: float

    @property
    def tokens(self) -> int:
        return int(self.samples * self.units_per_sample)


def sizes(base: Base) -> tuple[dict[int, Job], list[Skipped]]:
    """The job of each size that the workload accepts, to be measured; rising."""
    study, found, skipped = _study(base), dict[int, Job](), list[Skipped]()
    for size in study.asked():
        try:
            found[size] = base.at({study.size: size})
        except Refused as error:
            skipped.append(Skipped(what=f"{study.size}={size}", reason=str(error)))
    return found, skipped


def plan(base: Base, candidates: Sequence[Candidate], data: Data, skipped: Sequence[Skipped] = ()) -> Plan:
    """Small budgets come first: a mistake shows, and the first curve is there, before most of the FLOPs are spent.

    Raises Unplannable where nothing can be trained, or the base says itself how long each training is.
    """
    study, left_out, warnings = _study(base), list(skipped), list[str]()
    _check_base(base, data)
    distinct = _distinct(study, candidates, left_out)
    chosen: list[_Run] = []
    for budget in sorted(study.budgets):
        admissible, refusals = _admissible(study, base.job.execution, data, budget, distinct)
        picked = [admissible[i] for i in spread([run.params for run in admissible], study.per_budget)]
        if not picked:
            reason = f"no size can be trained: {_in_words(refusals) or 'there are none'}"
            left_out.append(Skipped(what=f"budget {_short(budget)}", reason=reason))
        else:
            warnings += _lacking(study, data, budget, len(picked), refusals)
        chosen += picked
    if not chosen:
        raise Unplannable.because(left_out)
    if (count := len(chosen) * study.seeds) > MAX_CHILDREN:
        problem = f"{count:,} trainings; a study has at most {MAX_CHILDREN:,}: ask for fewer"
        raise Unplannable.of("study.per_budget", problem)
    children = list(_children(base, study, chosen, left_out))
    if not children:
        raise Unplannable.because(left_out)
    about = [each.about for each in children if isinstance(each.about, IsoFlopAbout)]
    return Plan(
        children=children,
        skipped=left_out,
        warnings=[*warnings, *_warnings(base, children, about)],
        flops=math.fsum(each.flops_per_token * each.tokens for each in about),
        tokens_needed=max(each.tokens for each in about),
        tokens_there=data.tokens,
    )


def spread(params: Sequence[int], count: int) -> list[int]:
    """Indices of `count` of the rising `params`, or of all where there are no more.

    Their logarithms are those nearest to evenly spaced ones from the first to the last, in the sum of squares.
    """
    from scipy.optimize import linear_sum_assignment  # here: who reads rows may have no scipy

    if len(params) <= count:
        return list(range(len(params)))
    logs = np.log(params)
    targets = np.linspace(logs[0], logs[-1], count) if count > 1 else np.array([(logs[0] + logs[-1]) / 2])
    _, chosen = linear_sum_assignment((targets[:, None] - logs) ** 2)
    return sorted(map(int, chosen))


def rows(children: Sequence[ChildResult], monitor: str) -> list[SweepRow]:
    """One for each child, whatever became of it; D is what was trained, never what was planned."""
    return [_row(each, each.about, monitor) for each in children if isinstance(each.about, IsoFlopAbout)]


def reduce(
    study: IsoFlop,
    children: Sequence[ChildResult],
    monitor: str,
    fit: Callable[[list[SweepRow]], SweepFit],
    joules: Callable[[list[SweepRow]], list[JouleOptimum]],
    skipped: Sequence[Skipped] = (),
    warnings: Sequence[str] = (),
) -> SweepResult:
    """What its children come to."""
    return result(study, rows(children, monitor), fit, joules, skipped, warnings)


def result(
    study: IsoFlop,
    every: Sequence[SweepRow],
    fit: Callable[[list[SweepRow]], SweepFit],
    joules: Callable[[list[SweepRow]], list[JouleOptimum]],
    skipped: Sequence[Skipped] = (),
    warnings: Sequence[str] = (),
) -> SweepResult:
    """`fit` and `joules` are given the completed rows with a finite loss and counted tokens; which are not is told."""
    usable = [row for row in every if row.has_loss and row.num_tokens]
    told = [
        f"{row.experiment_id} is not in the fits: {row.error_message or f'it is {row.status}'}"
        for row in every
        if not (row.has_loss and row.num_tokens)
    ]
    return SweepResult(
        flops=study.flops,
        embeddings=study.embeddings,
        rows=list(every),
        fit=fit(usable) if usable else None,
        joules=joules(usable),
        skipped=list(skipped),
        warnings=[*warnings, *told],
    )


@dataclass(frozen=True)
class _Run:
    budget: float
    candidate: Candidate
    samples: int
    tokens: int
    epochs: int

    @property
    def params(self) -> int:
        return self.candidate.params


def _study(base: Base) -> IsoFlop:
    if not isinstance(base.job.study, IsoFlop):
        raise TypeError("the job's study is no isoflop sweep")
    return base.job.study


def _check_base(base: Base, data: Data) -> None:
    """What the study decides is not to be said in the base too. Raises Unplannable."""
    given, plain = base.job.execution, Execution()
    said = {
        "max_epochs": "study.repeat_data allows more than one",
        "max_steps": "leave it out",
        "max_samples": "leave it out",
        "early_stop_patience": "leave it out, or it could end before",
    }
    for name, cure in said.items():
        if getattr(given, name) != getattr(plain, name):
            raise Unplannable.of(f"execution.{name}", f"its budget says how long a training is; {cure}")
    if not base.reports:
        raise Unplannable.of("workload", "it reports no metric, and a sweep compares held-out losses: let it evaluate")
    monitor = given.checkpoint_monitor or next(iter(base.reports))
    if (given.checkpoint_mode or base.reports.get(monitor)) == "max":
        raise Unplannable.of("execution.checkpoint_monitor", f"{monitor} is no loss, which is better when it is lower")
    if data.tokens < 1:
        raise Unplannable.of("workload", "its training data is empty")


def _distinct(study: IsoFlop, candidates: Sequence[Candidate], left_out: list[Skipped]) -> list[Candidate]:
    """By N, rising. Raises Unplannable where `size` changes nothing."""
    found: dict[int, Candidate] = {}
    for each in sorted(candidates, key=lambda each: (each.params, each.size)):
        what = f"{study.size}={each.size}"
        if each.params < 1 or not each.flops_per_token > 0:
            left_out.append(Skipped(what=what, reason="no parameters or no FLOPs, as the study counts them"))
        elif (first := found.setdefault(each.params, each)) is not each:
            reason = f"has {each.params:,} parameters, as {study.size}={first.size} has"
            left_out.append(Skipped(what=what, reason=reason))
    if len(found) == 1 and len(candidates) > 1:
        raise Unplannable.of("study.size", f"{study.size} does not change how many parameters the model has")
    return list(found.values())


def _admissible(
    study: IsoFlop, execution: Execution, data: Data, budget: float, candidates: list[Candidate]
) -> tuple[list[_Run], Counter[str]]:
    """Also how many of the others are not, for which reason."""
    low, high = study.tokens_per_param
    runs, refusals = [], Counter[str]()
    for each in candidates:
        samples = round(budget / each.flops_per_token / data.units_per_sample)
        tokens = round(samples * data.units_per_sample)
        if tokens < low * each.params:
            refusals[f"fewer than {low:g} tokens per parameter"] += 1
        elif tokens > high * each.params:
            refusals[f"more than {high:g} tokens per parameter"] += 1
        elif _updates(samples, data.samples, execution) < study.min_steps:
            refusals[f"fewer than {study.min_steps:,} updates"] += 1
        elif samples > data.samples and not study.repeat_data:
            refusals[_beyond(data)] += 1
        else:
            runs.append(_Run(budget, each, samples, tokens, epochs=-(-samples // data.samples)))
    return runs, refusals


def _updates(samples: int, samples_per_epoch: int, execution: Execution) -> int:
    """As the engine counts them: the last one of an epoch, and of the run, may be short."""
    of_update = execution.batch_size * execution.accumulate_grad_batches
    epochs, rest = divmod(samples, samples_per_epoch)
    return epochs * -(-samples_per_epoch // of_update) + -(-rest // of_update)


def _beyond(data: Data) -> str:
    return f"more than the {data.tokens:,} tokens of the data"


def _lacking(study: IsoFlop, data: Data, budget: float, picked: int, refusals: Counter[str]) -> Iterator[str]:
    what = f"budget {_short(budget)}: {picked} of {study.per_budget} sizes"
    if picked < study.per_budget:
        few = f"; no parabola goes through fewer than {MIN_SIZES}" if picked < MIN_SIZES else ""
        yield f"{what}{few}; {_in_words(refusals) or 'there are no more'}"
    elif count := refusals[_beyond(data)]:
        yield f"{what}, without the smallest: {count} would have {_beyond(data)}; repeat_data allows more epochs"


def _in_words(refusals: Counter[str]) -> str:
    return ", ".join(f"{count} would have {what}" for what, count in refusals.items())


def _children(base: Base, study: IsoFlop, chosen: list[_Run], left_out: list[Skipped]) -> Iterator[ChildPlan]:
    """By budget, seed, and N: the first seed of a budget is a whole curve."""
    rule, given = study.learning_rate_rule, base.job.execution
    reference = rule.reference_params or min(run.params for run in chosen)
    seen = dict[str, str]()
    for _, runs in groupby(chosen, key=lambda run: run.budget):
        for seed, run in product(range(given.seed, given.seed + study.seeds), list(runs)):
            name = _name(study, run, seed)
            point: Point = {
                study.size: run.candidate.size,
                "execution.max_samples": run.samples,
                "execution.max_epochs": run.epochs,
                "execution.learning_rate": given.learning_rate * (run.params / reference) ** rule.power,
                "execution.seed": seed,
            }
            try:
                child = base.child(base.at(point), name, _about(run, seed))
            except Refused as error:
                left_out.append(Skipped(what=name, reason=str(error)))
                continue
            if child.key in seen:
                left_out.append(Skipped(what=name, reason=f"comes to the same training as {seen[child.key]}"))
                continue
            seen[child.key] = name
            yield child


def _about(run: _Run, seed: int) -> IsoFlopAbout:
    each = run.candidate
    return IsoFlopAbout(
        budget=run.budget,
        size=each.size,
        params=each.params,
        flops_per_token=each.flops_per_token,
        tokens=run.tokens,
        seed=seed,
    )


def _name(study: IsoFlop, run: _Run, seed: int) -> str:
    size = f"{study.size.rpartition('.')[2]}={run.candidate.size}"
    return as_name(f"C={_short(run.budget)} {size}", f" seed={seed}" if study.seeds > 1 else "")


def _warnings(base: Base, children: list[ChildPlan], about: list[IsoFlopAbout]) -> Iterator[str]:
    if len({each.budget for each in about}) == 1:
        yield "there is one budget: a scaling law takes the optima of two, and three to say how well it fits"
    if base.job.execution.scheduler is SchedulerName.MULTISTEP:
        yield "scheduler multistep has the same milestones in every training, however long; cosine goes by the length"
    if (most := max(each.execution.max_epochs for each in children)) > 1:
        yield f"data are repeated, up to {most} epochs: a repeated token teaches less than a new one"


def _row(child: ChildResult, about: IsoFlopAbout, monitor: str) -> SweepRow:
    units = child.training.units if child.training else None
    loss = child.final.get(monitor)
    return SweepRow(
        experiment_id=child.name,
        operation_id=child.operation_id,
        compute_budget=about.budget,
        size=about.size,
        model_size=about.params,
        num_tokens=units,
        final_loss=loss,
        actual_flops=None if units is None else about.flops_per_token * units,
        wall_time_seconds=child.running_s,
        energy_j=child.energy_j,
        energy_reason=child.energy_reason,
        seed=about.seed,
        status=child.status,
        timestamp=child.ended_at,
        error_message=child.error or _missing(child, monitor, loss, units),
    )


def _missing(child: ChildResult, monitor: str, loss: float | None, units: int | None) -> str | None:
    """What a completed training lacks to be in a fit."""
    if child.status is not Status.COMPLETED:
        return None
    if loss is None:
        return f"it reported no {monitor}"
    if not math.isfinite(loss):
        return f"its {monitor} is {loss}: it diverged"
    return None if units else "nobody counted its tokens"


def _short(budget: float) -> str:
    """Every digit that tells it from another one: 1e+15, 2.5e+12."""
    return str(np.format_float_scientific(budget, trim="-", exp_digits=1))
