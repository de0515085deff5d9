"""Two runs of one job: are they equal bit for bit, and how do they look."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ops_cli.plot import columns, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ops_contract.operations import AttemptView, Operation

Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Run:
    """An operation that has ended, with every point of its metrics."""

    label: str
    operation: "Operation"
    attempts: "Sequence[AttemptView]"
    curves: Curves

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
        return len(self.curves.get("loss", []))

    @property
    def wall_s(self) -> float:
        if self.operation.started_at is None or self.operation.ended_at is None:
            raise ValueError(f"{self.operation.name} has not ended")
        return (self.operation.ended_at - self.operation.started_at).total_seconds()

    def last(self, metric: str) -> float | None:
        return self.curves[metric][-1][1] if self.curves.get(metric) else None


def first_difference(one: Curves, other: Curves) -> str | None:
    """None when every metric has the same steps with the same 64 bits; the sign of zero and NaN count as bits."""
    if not one and not other:
        return "neither run reported a metric"
    for name in sorted(one.keys() | other.keys()):
        points, others = one.get(name, []), other.get(name, [])
        for (step, value), (other_step, other_value) in zip(points, others, strict=False):
            if step != other_step or struct.pack("<d", value) != struct.pack("<d", other_value):
                return f"{name} is {value!r} at step {step} and {other_value!r} at step {other_step}"
        if len(points) != len(others):
            return f"{name} has {len(points)} points in one and {len(others)} in the other"
    return None


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
