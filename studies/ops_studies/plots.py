"""What a study's plots show, as plain data: the figures of files and of the terminal are drawn from the same."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pydantic import JsonValue

from ops_contract.lifecycle import Status
from ops_contract.study_results import (
    BudgetOptimum,
    Estimate,
    GridGroup,
    GridResult,
    Prediction,
    Statistic,
    SweepResult,
    SweepRow,
)
from ops_studies import pareto
from ops_studies.points import as_text

Point = tuple[float, float]
Interval = tuple[float, float]
Mark = Literal["run", "optimum", "extrapolated", "flop_optimal", "joule_optimal"]

PARABOLA_POINTS = 61
NAMED = 16  # more names than these hide what they name
LOG_FROM = 30.0  # an axis whose values span this factor is logarithmic


@dataclass(frozen=True)
class Line:
    """A curve. `colour` counts from 0: what belongs together shares it. Only one of them carries a `label`."""

    colour: int
    points: Sequence[Point]
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """95 % intervals between `low` and `high`, at each x."""

    colour: int
    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Points:
    """`intervals` of y, and `x_intervals`, one for each point; None where one is not known. `names` stand beside."""

    colour: int
    points: Sequence[Point]
    mark: Mark = "run"
    label: str = ""
    intervals: Sequence[Interval | None] = ()
    x_intervals: Sequence[Interval | None] = ()
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """One drawing. `notes` say in words what it does not show; `ticks` name 0, 1, … of an axis without numbers.

    `legend` says how to read it, where there are bands and dashes.
    """

    title: str
    x: str
    y: str
    points: Sequence[Points] = ()
    lines: Sequence[Line] = ()
    bands: Sequence[Band] = ()
    log_x: bool = True
    log_y: bool = False
    ticks: Sequence[str] = ()
    legend: str = ""
    notes: Sequence[str] = ()


def sweep(result: SweepResult) -> dict[str, Panel]:
    """By name: what `ops plot --figure` takes. All of them, before there is a fit too."""
    return {
        "isoflop": isoflop(result),
        "scaling": scaling(result),
        "tokens": tokens_per_parameter(result),
        "energy": energy(result),
    }


def isoflop(result: SweepResult) -> Panel:
    """Loss against N, a colour for each budget; the parabolas with their vertices once they are fitted."""
    optima = {each.budget: each for each in _optima(result)}
    points, lines, notes = list[Points](), list[Line](), list[str]()
    for colour, (budget, rows) in enumerate(_by_budget(result)):
        points.append(Points(colour, [(row.model_size, row.final_loss or 0.0) for row in rows], label=flops(budget)))
        optimum = optima.get(budget)
        if optimum is None:
            continue
        sizes = [row.model_size for row in rows] + ([optimum.params] if optimum.usable else [])
        lines.append(Line(colour, parabola(optimum, min(sizes), max(sizes)), dashed=not optimum.usable))
        if optimum.usable:
            points.append(Points(colour, [(optimum.params, optimum.loss)], "optimum"))
        if doubt := _doubt(optimum):
            notes.append(f"{flops(budget)}: {doubt}")
    return Panel("IsoFLOP curves", "parameters N", "loss (nats)", points, lines, notes=[*notes, *_without_loss(result)])


def parabola(optimum: BudgetOptimum, low: float, high: float) -> list[Point]:
    """The fitted loss from N = `low` to `high`: a + b·x + c·x², x = ln N."""
    a, b, c = optimum.coefficients
    start, end = math.log(low), math.log(high)
    places = [start + (end - start) * i / (PARABOLA_POINTS - 1) for i in range(PARABOLA_POINTS)]
    return [(math.exp(x), a + b * x + c * x * x) for x in places]


def _doubt(optimum: BudgetOptimum) -> str | None:
    if optimum.usable:
        return "its optimum lies outside of the sizes that were run" if optimum.at_edge else None
    opens = "opens downwards" if optimum.curvature <= 0 else "is lowest far outside of the sizes that were run"
    return f"no optimum, its parabola {opens}"


def scaling(result: SweepResult) -> Panel:
    """N_opt and D_opt against C. Between budgets the bands are straight, and so a little wider than they could be."""
    quantities: dict[str, tuple[Callable[[BudgetOptimum], float], Callable[[Prediction], Estimate]]] = {
        "parameters N": (lambda optimum: optimum.params, lambda prediction: prediction.params),
        "tokens D": (lambda optimum: optimum.tokens, lambda prediction: prediction.tokens),
    }
    made = [
        _law(result, colour, label, of_optimum, of_prediction)
        for colour, (label, (of_optimum, of_prediction)) in enumerate(quantities.items())
    ]
    return _laws_panel("Scaling laws", "compute-optimal N and D", result, made)


def tokens_per_parameter(result: SweepResult) -> Panel:
    law = _law(result, 0, "D/N", lambda optimum: optimum.tokens / optimum.params, lambda each: each.tokens_per_param)
    return _laws_panel("Tokens per parameter", "compute-optimal D/N", result, [law])


def energy(result: SweepResult) -> Panel:
    """Loss against joules, a colour for each budget. A run whose joules are not known is left out, and told."""
    points = list[Points]()
    unknown = Counter[str]()
    for colour, (budget, rows) in enumerate(_by_budget(result)):
        known = {row.experiment_id: (row.energy_j, row.final_loss or 0.0) for row in rows if row.energy_j is not None}
        unknown.update(_reason(row) for row in rows if row.energy_j is None)
        points.append(Points(colour, list(known.values()), label=flops(budget)))
        for best in (each for each in result.joules if each.budget == budget):
            marked: dict[Mark, str] = {"flop_optimal": best.flop_optimal, "joule_optimal": best.joule_optimal}
            points += [Points(colour, [known[id]], mark) for mark, id in marked.items() if id in known]
    notes = [f"{count} of the runs left out, energy unknown: {reason}" for reason, count in sorted(unknown.items())]
    return Panel("Energy against loss", "energy (J)", "loss (nats)", points, notes=notes)


def grid_metrics(result: GridResult) -> list[str]:
    return sorted({name for group in result.groups for name in group.metrics})


def grid_axes(result: GridResult) -> list[str]:
    """The fields that the points vary, those with the most values first."""
    values = {field: _values(result, field) for field in {field for group in result.groups for field in group.point}}
    return sorted(values, key=lambda field: (-len(values[field]), field))


def grid(result: GridResult, metric: str, axis: str) -> Panel:
    """The mean of a metric against a field of the points; those that agree in all other fields share a colour."""
    values = _values(result, axis)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    is_scale = len(numbers) == len(values)
    log = is_scale and min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_FROM
    place = {_key(v): float(v) if is_scale else float(i) for i, v in enumerate(values)}  # type: ignore[arg-type]
    others: dict[str, list[tuple[Point, Interval | None]]] = {}
    for group in result.groups:
        found = group.metrics.get(metric)
        if found is None or axis not in group.point or not math.isfinite(found.mean):
            continue
        at = place[_key(group.point[axis])], found.mean
        others.setdefault(named(group.point, axis), []).append((at, _interval(found)))
    points, lines = list[Points](), list[Line]()
    for colour, (label, known) in enumerate(others.items()):
        known.sort()
        series = [point for point, _ in known]
        points.append(Points(colour, series, label=label, intervals=[interval for _, interval in known]))
        lines.append(Line(colour, series))
    ticks = [] if is_scale else [as_text(value) for value in values]
    without = sum(metric not in group.metrics or axis not in group.point for group in result.groups)
    notes = [f"{without} of {len(result.groups)} points left out: without {metric} or {axis}"] if without else []
    return Panel(metric, axis, metric, points, lines, log_x=log, ticks=ticks, notes=notes)


def throughput(result: GridResult) -> Panel:
    """Joules per generated token against tokens per second, with the Pareto front: what nobody betters in both."""
    on_front = pareto.of_groups(result.groups)
    points, lines = list[Points](), list[Line]()
    for colour, label, wanted in ((0, "bettered by another", False), (1, "Pareto front", True)):
        groups = [group for group, on in zip(result.groups, on_front, strict=True) if on is wanted]
        if known := [(place, group) for group in groups if (place := pareto.place(group)) is not None]:
            points.append(_measured(colour, label, known, wanted or len(result.groups) <= NAMED))
        if wanted and len(known) > 1:
            lines.append(Line(colour, _stairs([place for place, _ in known])))
    without = sum(pareto.place(group) is None for group in result.groups)
    notes = [f"{without} of {len(result.groups)} points left out: joules per token are not known"] if without else []
    return Panel(
        "Energy against throughput", "tokens/s", "J per generated token", points, lines, log_x=False, notes=notes
    )


def any_joules(result: GridResult) -> bool:
    return any(pareto.place(group) is not None for group in result.groups)


def _measured(colour: int, label: str, known: Sequence[tuple[Point, GridGroup]], is_named: bool) -> Points:
    metrics = [group.metrics for _, group in known]
    return Points(
        colour,
        [place for place, _ in known],
        "optimum" if colour else "run",
        label,
        intervals=[_interval(each[pareto.ENERGY]) for each in metrics],
        x_intervals=[_interval(each[pareto.THROUGHPUT]) for each in metrics],
        names=[named(group.point) or "base" for _, group in known] if is_named else (),
    )


def _stairs(front: Sequence[Point]) -> list[Point]:
    """The least energy at which so many tokens per second, or more, were seen: what lies between two is not."""
    ordered = sorted(set(front))
    corners = [((x, y), (x, next_y)) for (x, y), (_, next_y) in pairwise(ordered)]
    return [point for pair in corners for point in pair] + ordered[-1:]


def _interval(found: Statistic) -> Interval | None:
    return None if found.low is None or found.high is None else (found.low, found.high)


def named(point: Mapping[str, JsonValue], but: str = "") -> str:
    """A point in words, by the last names of its fields."""
    return ", ".join(f"{field.rpartition('.')[2]}={as_text(value)}" for field, value in point.items() if field != but)


def flops(budget: float) -> str:
    return f"{budget:.3g} FLOPs".replace("e+", "e")


def _values(result: GridResult, field: str) -> list[JsonValue]:
    """In the order in which they come; numbers rise."""
    found = {_key(group.point[field]): group.point[field] for group in result.groups if field in group.point}
    values = list(found.values())
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return sorted(numbers) if len(numbers) == len(values) else values  # type: ignore[return-value]


def _key(value: JsonValue) -> str:
    return json.dumps(value, sort_keys=True)


def _by_budget(result: SweepResult) -> list[tuple[float, list[SweepRow]]]:
    """The completed runs of each budget with a loss that can be drawn."""
    budgets = sorted({row.compute_budget for row in result.rows})
    return [(b, [row for row in result.rows if row.compute_budget == b and row.has_loss]) for b in budgets]


def _without_loss(result: SweepResult) -> Iterator[str]:
    states = Counter(
        "completed without a finite loss" if row.status is Status.COMPLETED else str(row.status)
        for row in result.rows
        if not row.has_loss
    )
    if states:
        yield f"not drawn: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}"


def _reason(row: SweepRow) -> str:
    return (row.energy_reason or "no reason given").replace("_", " ")


def _optima(result: SweepResult) -> Sequence[BudgetOptimum]:
    return result.fit.approach2.optima if result.fit and result.fit.approach2 else ()


@dataclass(frozen=True)
class _Law:
    points: list[Points]
    lines: list[Line]
    bands: list[Band]


def _law(
    result: SweepResult,
    colour: int,
    label: str,
    of_optimum: Callable[[BudgetOptimum], float],
    of_prediction: Callable[[Prediction], Estimate],
) -> _Law:
    """Approach 2 as a line, Approach 3 dashed, each with its band; past the budgets that were run marked as such."""
    known = [(each.budget, of_optimum(each)) for each in _optima(result) if each.usable]
    law = _Law([Points(colour, known, "optimum", label)], [], [])
    for approach in (2, 3):
        told = _distinct(each for each in result.fit.predictions if each.approach == approach) if result.fit else []
        drawn = [(each.budget, of_prediction(each), each.extrapolates) for each in told]
        drawn = [each for each in drawn if 0 < each[1].value < math.inf]
        beyond = [(c, estimate.value) for c, estimate, extrapolates in drawn if extrapolates]
        law.lines.append(Line(colour, [(c, estimate.value) for c, estimate, _ in drawn], dashed=approach == 3))
        law.points.append(Points(colour, beyond, "extrapolated"))
        bounds = [(c, e.low, e.high) for c, e, _ in drawn if e.low is not None and e.high is not None]
        finite = [(c, low, high) for c, low, high in bounds if low > 0 and high < math.inf]
        if len(finite) > 1:
            law.bands.append(Band(colour, *zip(*finite, strict=True)))
    return law


def _laws_panel(title: str, y: str, result: SweepResult, laws: Sequence[_Law]) -> Panel:
    return Panel(
        title,
        "compute C (FLOPs)",
        y,
        [points for law in laws for points in law.points if points.points],
        [line for law in laws for line in law.lines if len(line.points) > 1],
        [band for law in laws for band in law.bands],
        log_y=True,
        legend="line: approach 2, dashed: approach 3, bands: 95 %, hollow: extrapolated" if result.fit else "",
        notes=[] if result.fit else ["not fitted yet"],
    )


def _distinct(predictions: Iterable[Prediction]) -> list[Prediction]:
    """By budget, rising."""
    ordered = sorted(predictions, key=lambda each: each.budget)
    return ordered[:1] + [later for earlier, later in pairwise(ordered) if later.budget != earlier.budget]
