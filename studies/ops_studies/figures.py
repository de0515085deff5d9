"""Panels as figures, by matplotlib (`relight[plots]`), which is imported when the first one is drawn."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ops_studies.plots import Mark, Panel, sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ops_contract.study_results import SweepResult

COLUMNS = 2
SIZE_INCHES = (6.5, 4.5)  # of a panel
LEGEND = 12  # more names than this hide what they name

# What else is drawn of a point, over its colour.
MARKS: dict[Mark, dict[str, Any]] = {
    "run": {"marker": "o", "ms": 4, "alpha": 0.75},
    "optimum": {"marker": "D", "ms": 7, "mec": "black", "mew": 0.8},
    "extrapolated": {"marker": "D", "ms": 7, "mfc": "none"},
    "flop_optimal": {"marker": "o", "ms": 11, "mfc": "none", "mew": 1.6},
    "joule_optimal": {"marker": "*", "ms": 13, "mec": "black", "mew": 0.6},
}
NAMES: dict[Mark, str] = {"flop_optimal": "FLOP-optimal", "joule_optimal": "joule-optimal"}


def of_sweep(result: "SweepResult", name: str | None = None) -> "Figure":
    """All panels of `plots.sweep`, or the one of that name; `.savefig(path)` writes it."""
    panels = sweep(result)
    return draw(list(panels.values()) if name is None else [panels[name]])


def draw(panels: Sequence[Panel]) -> "Figure":
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(SIZE_INCHES[0] * columns, SIZE_INCHES[1] * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        _panel(axes, panel)
    return figure


def _panel(axes: "Axes", panel: Panel) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogFormatter

    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    colour = [colours[i % len(colours)] for i in range(1 + max((p.colour for p in panel.points), default=0))]
    for band in panel.bands:
        axes.fill_between(band.x, band.low, band.high, color=colour[band.colour], alpha=0.15, lw=0)
    for line in panel.lines:
        axes.plot(*zip(*line.points, strict=True), color=colour[line.colour], lw=1.3, ls="--" if line.dashed else "-")
    marks = {points.mark for points in panel.points if points.points}
    for points in panel.points:
        if not points.points:
            continue
        x, y = zip(*points.points, strict=True)
        axes.plot(x, y, color=colour[points.colour], ls="none", label=points.label or "_", **MARKS[points.mark])
        if any(points.intervals):
            known = [interval or (math.nan, math.nan) for interval in points.intervals]
            axes.vlines(x, [low for low, _ in known], [high for _, high in known], color=colour[points.colour], lw=1)
        if any(points.x_intervals):
            known = [interval or (math.nan, math.nan) for interval in points.x_intervals]
            axes.hlines(y, [low for low, _ in known], [high for _, high in known], color=colour[points.colour], lw=1)
    for mark in (mark for mark in NAMES if mark in marks):
        axes.plot([], [], color="grey", ls="none", label=NAMES[mark], **MARKS[mark])
    axes.set(xscale="log" if panel.log_x else "linear", yscale="log" if panel.log_y else "linear")
    if panel.log_y:
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(
            LogFormatter(minor_thresholds=(1, 0.5))
        )  # 20 and 30 where there is no 10 and 100
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, parse_math=False)
    for setter, text in ((axes.set_title, panel.title), (axes.set_xlabel, panel.x), (axes.set_ylabel, panel.y)):
        setter(text, parse_math=False)
    _names(axes, panel)
    _legend(axes)
    if told := [text for text in (panel.legend, *panel.notes) if text]:
        axes.text(0, -0.16, "\n".join(told), transform=axes.transAxes, va="top", size=7, parse_math=False)


def _names(axes: "Axes", panel: Panel) -> None:
    """Towards the middle, so that they stay within."""
    low, high = axes.get_xlim()
    for points in panel.points:
        for (x, y), name in zip(points.points, points.names, strict=False):
            side = ("right", -7) if x > (low + high) / 2 else ("left", 7)
            axes.annotate(name, (x, y), (side[1], 5), textcoords="offset points", ha=side[0], size=7, parse_math=False)


def _legend(axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if 0 < len(labels) <= LEGEND:
        for text in axes.legend(handles, labels, fontsize=8).get_texts():
            text.set_parse_math(False)
