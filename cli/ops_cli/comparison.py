"""Runs side by side: are they equal bit for bit, what did they cost, and how do they look."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self
from uuid import UUID

from ops_cli.plot import columns, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ops_contract.history import AttemptView
    from ops_contract.operations import Operation
    from relight.client import Client

NO_VALUES = "neither run reported a metric"

Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Run:
    """An operation with every point of its metrics; of a live one those so far."""

    label: str
    operation: "Operation"
    attempts: "Sequence[AttemptView]"
    curves: Curves

    @classmethod
    def fetch(cls, client: "Client", id: UUID, label: str) -> Self:
        curves = {name: client.metrics(id, name).points for name in client.metric_names(id)}
        return cls(label, client.get(id), client.attempts(id), curves)

    @property
    def interruptions(self) -> list[tuple[int, int]]:
        """For each: the step that the next attempt began with, and the last one reported before."""
        pairs = zip(self.attempts, self.attempts[1:], strict=False)
        return [(after.start_step, before.last_step) for before, after in pairs if before.last_step is not None]

    @property
    def redone_steps(self) -> int:
        return sum(max(0, last - start + 1) for start, last in self.interruptions)

    @property
    def steps(self) -> int:
        """Those of the metric that has most."""
        return max(map(len, self.curves.values()), default=0)

    @property
    def wall_s(self) -> float | None:
        """From its first start to its end, or to now; None before it has begun."""
        began_at, ended_at = self.operation.started_at, self.operation.ended_at or datetime.now(UTC)
        return (ended_at - began_at).total_seconds() if began_at else None

    def last(self, metric: str) -> float | None:
        return self.curves[metric][-1][1] if self.curves.get(metric) else None


@dataclass(frozen=True)
class Parting:
    """Where two runs first differ; None is a step that one of them does not have."""

    metric: str
    step: int
    values: tuple[float | None, float | None]

    def __str__(self) -> str:
        one, other = ("missing" if value is None else repr(value) for value in self.values)
        return f"at step {self.step} {self.metric} is {one} and {other}"


def first_difference(one: Curves, other: Curves) -> Parting | None:
    """None when every metric has the same steps with the same 64 bits; the sign of zero and NaN count as bits."""
    partings = []
    for metric in sorted(one.keys() | other.keys()):
        values, others = dict(one.get(metric, [])), dict(other.get(metric, []))
        differing = (step for step in values.keys() | others.keys() if _bits(values, step) != _bits(others, step))
        if (step := min(differing, default=None)) is not None:
            partings.append(Parting(metric, step, (values.get(step), others.get(step))))
    return min(partings, key=lambda parting: parting.step, default=None)


def _bits(values: dict[int, float], step: int) -> bytes | None:
    return struct.pack("<d", values[step]) if step in values else None


def draw(interrupted: Run, undisturbed: Run, path: Path) -> Path:
    """Both loss curves with the failure marked, and their difference below. Returns the absolute path of the PNG."""
    figure = new_figure()
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(above, interrupted, undisturbed)
    _draw_difference(below, interrupted, undisturbed)
    return save(figure, path)


def _draw_losses(axes: "Axes", interrupted: Run, undisturbed: Run) -> None:
    for run, colour, width, size in ((undisturbed, "lightskyblue", 4.0, 11.0), (interrupted, "black", 0.8, 4.0)):
        axes.plot(*columns(run.curves.get("loss", [])), color=colour, lw=width, label=f"loss, {run.label}")
        if "val_loss" in run.curves:
            axes.plot(*columns(run.curves["val_loss"]), "o", color=colour, ms=size, label=f"val_loss, {run.label}")
    for start, last in interrupted.interruptions:
        axes.axvline(last, color="tab:red", lw=1.2, label=f"killed after step {last}")
        axes.axvline(start, color="tab:green", lw=1.2, label=f"went on from the checkpoint at step {start}")
        if start <= last:
            axes.axvspan(start, last, color="tab:red", alpha=0.15, label="steps done twice")
    axes.set_ylabel("loss")
    axes.set_title(f"{interrupted.operation.workload}: killed and resumed, and left alone")
    axes.legend()


def _draw_difference(axes: "Axes", interrupted: Run, undisturbed: Run) -> None:
    other = dict(undisturbed.curves.get("loss", []))
    common = [(step, value - other[step]) for step, value in interrupted.curves.get("loss", []) if step in other]
    axes.plot(*columns(common), color="black", lw=0.8)
    axes.set_ylabel("difference")
    axes.set_xlabel("step")
