"""What a training tells while it runs. Values stay on a GPU until a flush, so that no step waits for one."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ops_contract.pipe import Mark
from ops_contract.reports import Metrics, Note, Progress, Report, Series
from relight.training.state import Cursor
from relight.training.team import Team

FLUSH_S = 0.5
MAX_WAITING = 10_000  # values; a step of a loop that does next to nothing takes microseconds
_Parts = dict[tuple[str, int], list[tuple[int, Tensor | float]]]  # units and values by name and step
_RESERVED = frozenset({"loss", "learning_rate", "epoch", "step"})  # "step" heads a column of metrics.csv


class Sink(Protocol):
    """Where reports go, in their order. Called from the training thread, and `report` from the saver's too."""

    def report(self, report: Report) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def mark(self, mark: Mark) -> None: ...


class Unheard:
    """The sink of a rank that does not lead: what its time goes to is told, the rest is rank 0's to say."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def report(self, report: Report) -> None:
        pass

    def progress(self, progress: Progress) -> None:
        pass

    def mark(self, mark: Mark) -> None:
        self._sink.mark(mark)


class Reporter:
    """Collects metrics by step and sends them about every `FLUSH_S`. `clock` is monotonic, in seconds.

    Of a gang every rank flushes at the same boundaries: means of what micro-batches gave are over all ranks.
    """

    def __init__(
        self, sink: Sink, steps_total: int | None, clock: Callable[[], float], team: Team | None = None
    ) -> None:
        self._sink = sink
        self._team = team or Team()
        self._steps_total = steps_total
        self._clock = clock
        self._flushed_at_s = clock()
        self._parts: _Parts = {}
        self._values: dict[tuple[str, int], float] = {}
        self._newest: tuple[int, dict[str, float]] = (-1, {})
        self._steps = 0
        self._samples = 0
        self._samples_per_s: float | None = None
        self._step_s: float | None = None

    def add_micro_batch(self, step: int, units: int, loss: Tensor, extras: Mapping[str, Tensor]) -> None:
        """One part of the step's unit-weighted means."""
        _check_names(extras)
        for name, value in {"loss": loss, **extras}.items():
            self._add_part(name, step, units, value, "loss()")

    def add(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Single values; the newest of a name counts."""
        for name, value in values.items():
            self._parts.pop((name, step), None)
            self._values.pop((name, step), None)
            if isinstance(value, Tensor):
                self._add_part(name, step, 1, value, "report()")
            else:
                self._values[name, step] = float(value)

    def add_step(self, step: int, epoch: int, learning_rate: float, samples: int) -> None:
        self._values["epoch", step] = float(epoch)
        self._values["learning_rate", step] = learning_rate
        self._steps += 1
        self._samples += samples

    def add_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        _check_names(values)
        self.add_again(step, {name: float(value) for name, value in values.items()})

    def add_again(self, step: int, values: Mapping[str, float]) -> None:
        """What a predecessor reported of a step that it did not end."""
        self._values.update({(name, step): value for name, value in values.items()})

    def end_at(self, step: int, why: str) -> None:
        """The run ends before its planned number of steps: what is reported from now on is of a run that long."""
        self._steps_total = step
        self._sink.report(Note(message=why))

    def is_due(self) -> bool:
        waiting = len(self._parts) + len(self._values)
        return waiting >= MAX_WAITING or self._clock() - self._flushed_at_s >= FLUSH_S

    def flush_if_due(self, cursor: Cursor) -> bool:
        due = self.is_due()
        if due:
            self.flush(cursor)
        return due

    def flush(self, cursor: Cursor) -> None:
        """Send the progress, and every value so far: progress goes on with the reports that come after it."""
        series = self._collect()
        self._sink.progress(self._progress(cursor))
        if series:
            self._sink.report(Metrics(series=[Series.of(name, points) for name, points in series.items()]))

    def newest(self, step: int) -> dict[str, float]:
        """What was flushed of this step, the newest one."""
        return dict(self._newest[1]) if self._newest[0] == step else {}

    def _add_part(self, name: str, step: int, units: int, value: Tensor, by: str) -> None:
        if value.numel() != 1:
            raise ValueError(f"{by} gave {name!r} of shape {list(value.shape)}; give scalars")
        self._parts.setdefault((name, step), []).append((units, _copied(value)))

    def _collect(self) -> dict[str, list[tuple[int, float]]]:
        means = _means_over(self._team, self._parts) if self._team.is_gang else _means(self._parts)
        values = {**means, **self._values}
        self._parts, self._values = {}, {}
        series: dict[str, list[tuple[int, float]]] = {}
        for (name, step), value in sorted(values.items()):
            series.setdefault(name, []).append((step, value))
            if step > self._newest[0]:
                self._newest = (step, {})
            if step == self._newest[0]:
                self._newest[1][name] = value
        return series

    def _progress(self, cursor: Cursor) -> Progress:
        now_s = self._clock()
        elapsed_s = now_s - self._flushed_at_s
        if self._steps and elapsed_s > 0:
            # A loop that draws its own batches does not say how many samples they have.
            self._samples_per_s = self._samples / elapsed_s if self._samples else None
            self._step_s = elapsed_s / self._steps
        self._flushed_at_s, self._steps, self._samples = now_s, 0, 0
        return Progress(
            step=cursor.step,
            steps_total=self._steps_total,
            epoch=cursor.epoch,
            loss=self._newest[1].get("loss"),
            samples_per_s=self._samples_per_s,
            eta_s=self._eta_s(cursor),
        )

    def _eta_s(self, cursor: Cursor) -> float | None:
        if self._step_s is None or self._steps_total is None:
            return None
        return (self._steps_total - cursor.step) * self._step_s


def _copied(value: Tensor) -> Tensor | float:
    """In float64. A value may be a view of something that the next step changes."""
    return float(value.item()) if _at_hand(value) else value.detach().to(torch.float64, copy=True).reshape(())


def _at_hand(value: Tensor) -> bool:
    """To read it waits for nothing, and takes less than to copy it."""
    return value.device.type == "cpu"


def _means(parts: _Parts) -> dict[tuple[str, int], float]:
    """Unit-weighted means in float64; a single part is kept as it is, bit for bit."""
    return {key: _mean(of_step) for key, of_step in _numbers(parts).items()}


def _means_over(team: Team, parts: _Parts) -> dict[tuple[str, int], float]:
    """The same over all ranks, on every rank. A part without units says nothing, be it NaN."""
    mine = [[name, at, *_sum(of_step)] for (name, at), of_step in _numbers(parts).items()]
    sums: dict[tuple[str, int], tuple[int, float]] = {}
    for of_rank in team.gathered(mine):
        for name, at, units, total in of_rank:
            before = sums.get((name, at), (0, 0.0))
            sums[name, at] = (before[0] + units, before[1] + total)
    return {key: total / units if units else math.nan for key, (units, total) in sums.items()}


def _numbers(parts: _Parts) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """One transfer for all that lie on a device."""
    on_device = [value for of_step in parts.values() for _, value in of_step if isinstance(value, Tensor)]
    flat = iter(torch.stack(on_device).tolist() if on_device else [])

    def number(value: Tensor | float) -> float:
        return next(flat) if isinstance(value, Tensor) else value

    return {key: [(units, number(value)) for units, value in of_step] for key, of_step in parts.items()}


def _sum(parts: list[tuple[int, float]]) -> tuple[int, float]:
    return sum(units for units, _ in parts), sum(units * value for units, value in parts if units)


def _mean(parts: list[tuple[int, float]]) -> float:
    if len(parts) == 1:
        return parts[0][1]
    return sum(units * value for units, value in parts) / sum(units for units, _ in parts)


def _check_names(values: Mapping[str, object]) -> None:
    if taken := _RESERVED & values.keys():
        raise ValueError(f"the workload reports {', '.join(sorted(taken))}, which the loop does; give another name")
