"""`ops plot`: a metric of operations, or a study; and what the demo's drawing shares with it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ops_cli.connect import OperationIds, with_client
from ops_cli.exits import not_found, require
from ops_cli.read import no_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ops_cli.canvas import Curve
    from ops_contract.operations import Operation
    from relight.client import Client

FORMATS = (".png", ".svg", ".pdf")
DRAWN_POINTS = 5000  # more than the figure has columns
ROWS = 18

Points = Sequence[tuple[int, float]]
Figures = Literal["isoflop", "scaling", "tokens", "energy"]


def register(app: typer.Typer) -> None:
    app.command()(plot)


@with_client
def plot(
    client: "Client",
    operation_ids: OperationIds,
    metric: Annotated[
        str | None,
        typer.Option(help="One of `ops metrics ID`, or of a grid's runs; else loss.", show_default=False),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="A .png, .svg or .pdf; else it is drawn here. Of --pictures the directory.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="A logarithmic scale; what is not above 0 is left out.")] = False,
    smooth: Annotated[
        float, typer.Option(min=0, max=0.999, help="The weight of what was before: 0.9 averages about ten points.")
    ] = 0,
    figure: Annotated[
        Figures | None, typer.Option(help="Of a sweep; else isoflop here, and all four in a file.", show_default=False)
    ] = None,
    axis: Annotated[
        str | None, typer.Option(help="Of a grid: the field along x, such as execution.learning_rate.")
    ] = None,
    pictures: Annotated[bool, typer.Option("--pictures", help="Fetch the PNGs that an operation left.")] = False,
) -> None:
    """Draw a metric of one operation or several, or a study.

    In the terminal, or into a file. It is marked where a later attempt went on. A study is drawn while it runs too;
    one of measurements as joules per token against tokens per second, with the Pareto front.

    \b
    ops plot 1f6e 9ab2 --metric val_loss
    ops plot 1f6e --log --smooth 0.9 --to loss.svg
    ops plot STUDY --to sweep.png
    ops plot 1f6e --pictures --to pictures/
    """
    if pictures:
        if len(operation_ids) > 1 or metric or log or smooth or figure or axis:
            raise typer.BadParameter("they are fetched of one operation, as they are", param_hint="--pictures")
        _fetch_pictures(client, operation_ids[0], to or Path("."))
        return
    if to is not None:
        if to.suffix not in FORMATS:
            raise typer.BadParameter(f"{to}: give a file that ends in one of {', '.join(FORMATS)}", param_hint="--to")
        require_matplotlib()
    operations = [client.get(client.resolve(each)) for each in operation_ids]
    if any(operation.kind == "study" for operation in operations):
        if len(operations) > 1 or smooth:
            raise typer.BadParameter("a study is drawn alone, and not smoothed", param_hint="ID")
        from ops_cli import study_plot

        study_plot.plot(client, operations[0], study_plot.Choice(metric, to, log, figure, axis))
        return
    if figure or axis:
        raise typer.BadParameter("it is for a study", param_hint="--figure" if figure else "--axis")
    metric = metric or "loss"
    curves = [_curve(client, operation, metric, smooth) for operation in operations]
    if to is None:
        print(metric)
        show_curves(curves, log)
    else:
        print(f"Drawn in {_save(curves, metric, log, to)}")


def _fetch_pictures(client: "Client", operation_id: str, to: Path) -> None:
    """Raises OpsError where there is none."""
    from ops_cli.files import fetch

    id = client.resolve(operation_id)
    names = sorted({each.name for each in client.artifacts(id) if each.name.lower().endswith(".png")})
    if not names:
        raise not_found(f"{str(id)[:8]} has left no PNG; see `ops artifacts {str(id)[:8]}`")
    print(*(path.resolve() for path in fetch(client, id, to, names)), sep="\n")


def _curve(client: "Client", operation: "Operation", metric: str, smooth: float) -> "Curve":
    """Down-sampled by the server; smoothed only from every point."""
    from ops_cli.canvas import Curve

    id = operation.id
    series = client.metrics(id, metric, max_points=None if smooth else DRAWN_POINTS)
    if not series.points:
        raise no_points(client, id, metric)
    restarts = [step for step, attempt in series.attempt_starts if attempt > 1]
    return Curve(f"{operation.name} ({str(id)[:8]})", smoothed(series.points, smooth), restarts)


def smoothed(points: Points, weight: float) -> Points:
    """The exponential moving average, unbiased at its beginning too; it passes over what is no number."""
    if not weight:
        return points
    average, total, result = 0.0, 0.0, []
    for step, value in points:
        if math.isfinite(value):
            average, total = weight * average + (1 - weight) * value, weight * total + 1 - weight
            result.append((step, average / total))
    return result


def show_curves(curves: "Sequence[Curve]", log: bool, log_x: bool = False, across: str = "step") -> None:
    from rich.console import Console

    from ops_cli.canvas import draw

    console = Console(highlight=False)
    rows = min(max(console.height - len(curves) - 5, 6), ROWS)
    for line in draw(curves, console.width, rows, log, log_x, across):
        console.print(line)


def _save(curves: "Sequence[Curve]", metric: str, log: bool, path: Path) -> Path:
    figure = new_figure()
    axes = figure.subplots()
    for curve in curves:
        few = "." if len(curve.points) < 50 else ""
        [line] = axes.plot(*columns(curve.points), marker=few, lw=1.2, label=curve.label.replace("_", " "))
        for step in curve.restarts:
            axes.axvline(step, color=line.get_color(), lw=0.8, ls=":")
    axes.set(xlabel="step", ylabel=metric, yscale="log" if log else "linear")
    axes.legend()
    return save(figure, path)


def require_matplotlib() -> None:
    require("matplotlib", "plots", "ops: drawing")


def new_figure() -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Returns the absolute path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path.resolve()


def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
