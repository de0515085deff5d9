"""`ops plot`: a metric of one operation or several, and what the demo's drawing shares with it."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli.connect import with_client
from ops_cli.exits import ExitCode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ops_contract.operations import MetricPoints
    from relight.client import Client

FORMATS = (".png", ".svg", ".pdf")
DRAWN_POINTS = 5000  # more than the figure has columns


def register(app: typer.Typer) -> None:
    app.command()(plot)


@with_client
def plot(
    client: "Client",
    operation_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Operations, by a beginning of the id.")],
    metric: Annotated[str, typer.Option()] = "loss",
    to: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf; else METRIC.png in this directory.")] = None,
) -> None:
    """Draw a metric of one operation or several.

    A dotted line is where a later attempt went on.
    """
    path = to or Path(f"{metric.replace('/', '-')}.png")
    if path.suffix not in FORMATS:
        raise typer.BadParameter(f"{path}: give a file that ends in one of {', '.join(FORMATS)}", param_hint="--to")
    require_matplotlib()
    figure = new_figure()
    axes = figure.subplots()
    for each in operation_ids:
        operation = client.get(client.resolve(each))
        series = client.metrics(operation.id, metric, max_points=DRAWN_POINTS)
        if not series.points:
            known = ", ".join(client.metric_names(operation.id)) or "none yet"
            print(f"ops: {operation.name} has no points of {metric}; its metrics: {known}", file=sys.stderr)
            raise typer.Exit(ExitCode.NOT_FOUND)
        _draw(axes, series, f"{operation.name} ({str(operation.id)[:8]})")
    axes.set(xlabel="step", ylabel=metric)
    axes.legend()
    print(f"Drawn in {save(figure, path)}")


def require_matplotlib() -> None:
    """Leaves with a hint where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("ops: drawing needs more packages: pip install 'relight[plots]'", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED)


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


def columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _draw(axes: "Axes", series: "MetricPoints", label: str) -> None:
    few = "." if len(series.points) < 50 else ""
    [line] = axes.plot(*columns(series.points), marker=few, lw=1.2, label=label.replace("_", " "))
    for step, attempt in series.attempt_starts:
        if attempt > 1:
            axes.axvline(step, color=line.get_color(), lw=0.8, ls=":")
