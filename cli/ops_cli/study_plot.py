"""A study as a drawing: here or in a file, from its result, or from what its children have given so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import typer

from ops_cli import show
from ops_cli.exits import not_found
from ops_cli.plot import Figures, save, show_curves
from ops_contract.errors import OpsError
from ops_contract.lifecycle import Status
from ops_contract.measurements import MEASUREMENT, MeasurementResult
from ops_contract.plans import ChildResult, GridAbout
from ops_contract.problems import offer
from ops_contract.studies import IsoFlop
from ops_contract.study_results import GridGroup, GridResult, Statistic, SweepResult
from ops_studies import figures, isoflop, pareto, plots

if TYPE_CHECKING:
    from ops_cli.canvas import Curve
    from ops_contract.operations import Operation
    from relight.client import Client

PREFERRED = ("val_loss", "loss", "tokens_per_s")  # metrics of a grid, where none is asked for


@dataclass(frozen=True)
class Choice:
    metric: str | None
    to: Path | None
    log: bool
    figure: Figures | None
    axis: str | None


def plot(client: "Client", study: "Operation", choice: Choice) -> None:
    """Raises OpsError where nothing has a result yet."""
    result = client.results(study.id).content
    if not isinstance(result, SweepResult | GridResult) or not result.rows:
        result = so_far(client, study)
    if isinstance(result, SweepResult):
        if choice.metric or choice.axis:
            raise typer.BadParameter("it is for a grid", param_hint="--metric" if choice.metric else "--axis")
        found = plots.sweep(result)
        panels = [found[choice.figure]] if choice.figure else list(found.values())
        if not any(points.points for points in found["isoflop"].points):
            raise _nothing_yet(study)
    else:
        if choice.figure:
            raise typer.BadParameter("it is for a sweep", param_hint="--figure")
        panels = [_measured(client, study, result, choice) or _grid(study, result, choice)]
    if choice.log:
        panels = [replace(panel, log_y=True) for panel in panels]
    if choice.to is None:
        _show(panels[0])
    else:
        print(f"Drawn in {save(figures.draw(panels), choice.to)}")


def so_far(client: "Client", study: "Operation") -> SweepResult | GridResult:
    """From the children, without a fit: the loss of a sweep is the metric that its trainings monitor."""
    children = client.children(study.id)
    if not isinstance(study.job.study, IsoFlop):
        return GridResult(rows=[], groups=_groups(children))
    monitor = client.get(children[0].operation_id).job.execution.checkpoint_monitor if children else None
    rows = isoflop.rows(children, monitor or "loss")
    return SweepResult(flops=study.job.study.flops, embeddings=study.job.study.embeddings, rows=rows)


def _groups(children: Sequence[ChildResult]) -> list[GridGroup]:
    """Means alone: an interval is said once all cycles are there."""
    done = [(each.about.point, each) for each in children if isinstance(each.about, GridAbout) and _is_done(each)]
    done.sort(key=lambda pair: plots.named(pair[0]))
    groups = []
    for _, same in groupby(done, key=lambda pair: plots.named(pair[0])):
        cycles = list(same)
        values: dict[str, list[float]] = {}
        for name, value in (item for _, child in cycles for item in child.final.items()):
            if math.isfinite(value):
                values.setdefault(name, []).append(value)
        metrics = {name: Statistic(n=len(each), mean=fmean(each)) for name, each in values.items()}
        groups.append(GridGroup(point=cycles[0][0], metrics=metrics))
    return groups


def _is_done(child: ChildResult) -> bool:
    return child.status == Status.COMPLETED


def _measured(client: "Client", study: "Operation", result: GridResult, choice: Choice) -> plots.Panel | None:
    """Energy against throughput, of measurements where joules are known; where they are not, it is said why."""
    if study.workload != MEASUREMENT or choice.metric or choice.axis:
        return None
    if plots.any_joules(result):
        return plots.throughput(result)
    if result.groups:
        print(show.harmless(f"No joules per token are known: {_why_unknown(client, study)}."))
    return None


def _why_unknown(client: "Client", study: "Operation") -> str:
    """As the first run that completed has it; they ran on the same machines."""
    done = next((each for each in client.children(study.id) if _is_done(each)), None)
    content = client.results(done.operation_id).content if done else None
    figure = content.figures.get(pareto.ENERGY) if isinstance(content, MeasurementResult) else None
    return (figure and figure.reason) or "no run says why"


def _grid(study: "Operation", result: GridResult, choice: Choice) -> plots.Panel:
    metrics, axes = plots.grid_metrics(result), plots.grid_axes(result)
    if not metrics or not axes:
        raise _nothing_yet(study)
    metric = choice.metric or next((each for each in PREFERRED if each in metrics), metrics[0])
    axis = choice.axis or axes[0]
    for wanted, known, what in ((metric, metrics, "metrics"), (axis, axes, "axes")):
        if wanted not in known:
            raise not_found(f"{wanted}: nothing of it; of its {what} {offer(wanted, known)}")
    return plots.grid(result, metric, axis)


def _nothing_yet(study: "Operation") -> OpsError:
    return not_found(f"no child of {study.name} has a result yet; `ops watch {str(study.id)[:8]}` follows it")


def _show(panel: plots.Panel) -> None:
    print(show.harmless(f"{panel.title}: {panel.y} against {panel.x}"))
    show_curves(list(_curves(panel)), panel.log_y, panel.log_x, show.harmless(panel.x))
    for note in (*_named(panel), *_ticks(panel), *panel.notes):
        print(show.harmless(note))


def _curves(panel: plots.Panel) -> "list[Curve]":
    """One of each colour: its lines one after another, and all that is marked."""
    from ops_cli.canvas import Curve

    curves = []
    for colour in sorted({points.colour for points in panel.points}):
        own = [points for points in panel.points if points.colour == colour]
        label = next((points.label for points in own if points.label), "")
        line = [point for each in panel.lines if each.colour == colour for point in (*each.points, (1.0, math.nan))]
        curves.append(Curve(show.harmless(label), line, marks=[point for points in own for point in points.points]))
    return curves


def _named(panel: plots.Panel) -> list[str]:
    """What has a name in a figure has a line here."""
    return [
        f"{points.label}: {name}, {x:.4g} {panel.x}, {y:.4g} {panel.y}"
        for points in panel.points
        for (x, y), name in zip(points.points, points.names, strict=False)
    ]


def _ticks(panel: plots.Panel) -> list[str]:
    return [f"{panel.x}: {', '.join(f'{i} is {tick}' for i, tick in enumerate(panel.ticks))}"] if panel.ticks else []
