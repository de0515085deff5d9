"""What the fits are made from: runs with N, D, C and a loss, and the budgets that they share."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ops_contract.study_results import SweepRow

Floats = NDArray[np.float64]
FloatOrFloats = TypeVar("FloatOrFloats", float, Floats)

MIN_SIZES = 3  # under a budget: a parabola has three parameters
SAME_BUDGET = 1.1  # what differs by less than this factor is one: of runs that say none, and for a law in C


@dataclass(frozen=True)
class Run:
    """N, D (trained), C (spent) and the final loss of one training; `budget` is what C was meant to be."""

    experiment_id: str
    params: float
    tokens: float
    flops: float
    loss: float
    budget: float | None = None


@dataclass(frozen=True)
class Slice:
    """The runs of one budget. `flops` is the geometric mean of what they spent."""

    budget: float
    flops: float
    index: NDArray[np.intp]


@dataclass(frozen=True)
class Runs:
    """Runs as columns; logarithms are natural."""

    ids: tuple[str, ...]
    log_n: Floats
    log_d: Floats
    log_c: Floats
    loss: Floats
    budget: Floats  # NaN where none was said

    @classmethod
    def of(cls, runs: Iterable[Run]) -> "Runs":
        listed = list(runs)
        columns = [(r.params, r.tokens, r.flops, r.loss, np.nan if r.budget is None else r.budget) for r in listed]
        n, d, c, loss, budget = np.array(columns, dtype=np.float64).reshape(-1, 5).T
        return cls(tuple(r.experiment_id for r in listed), np.log(n), np.log(d), np.log(c), loss, budget)

    def __len__(self) -> int:
        return len(self.ids)

    def without(self, left_out: NDArray[np.intp]) -> "Runs":
        keep = np.setdiff1d(np.arange(len(self)), left_out)
        ids = tuple(self.ids[i] for i in keep)
        return Runs(ids, *(each[keep] for each in (self.log_n, self.log_d, self.log_c, self.loss, self.budget)))

    def with_loss(self, loss: Floats) -> "Runs":
        return Runs(self.ids, self.log_n, self.log_d, self.log_c, loss, self.budget)

    @cached_property
    def slices(self) -> list[Slice]:
        """By budget, the smallest first."""
        return sorted(self._slices(), key=lambda each: each.budget)

    def _slices(self) -> Iterator[Slice]:
        said = ~np.isnan(self.budget)
        for budget in np.unique(self.budget[said]):
            index = np.flatnonzero(self.budget == budget)
            yield Slice(float(budget), _geometric_mean(self.log_c[index]), index)
        silent = np.flatnonzero(~said)
        silent = silent[np.argsort(self.log_c[silent], kind="stable")]
        while len(silent):
            near = self.log_c[silent] <= self.log_c[silent[0]] + np.log(SAME_BUDGET)
            mean = _geometric_mean(self.log_c[silent[near]])
            yield Slice(float(f"{mean:.6g}"), mean, silent[near])
            silent = silent[~near]


@dataclass(frozen=True)
class Cost:
    """C = k · N^m · D. With 6 FLOPs a parameter and token k = 6, m = 1; where they were counted k and m are fitted."""

    log_k: float
    m: float
    worst: float  # the largest deviation of a run's C from it, as a share

    @classmethod
    def of(cls, runs: Runs) -> "Cost":
        """Constant FLOPs per parameter and token, to a thousandth, are no trend in N."""
        log_k = runs.log_c - runs.log_n - runs.log_d
        slope, level = 0.0, float(log_k.mean())
        if np.ptp(log_k) > 1e-3 and np.ptp(runs.log_n) > 0:
            slope, level = np.polyfit(runs.log_n, log_k, 1)
        off = log_k - level - slope * runs.log_n
        return cls(float(level), 1 + float(slope), float(np.expm1(np.abs(off).max())))

    def log_tokens(self, log_c: float, log_n: FloatOrFloats) -> FloatOrFloats:
        return log_c - self.log_k - self.m * log_n


def runs_of(rows: Iterable[SweepRow]) -> tuple[list[Run], list[str]]:
    """The rows that have all that a fit needs, and in words which have not."""
    runs, left_out = [], []
    for row in rows:
        run = Run(
            experiment_id=row.experiment_id,
            params=row.model_size,
            tokens=row.num_tokens or np.nan,
            flops=row.actual_flops or np.nan,
            loss=np.nan if row.final_loss is None else row.final_loss,
            budget=row.compute_budget,
        )
        usable = all(0 < value < np.inf for value in (run.params, run.tokens, run.flops, run.loss))
        if usable:
            runs.append(run)
        else:
            left_out.append(f"{row.experiment_id} is not in the fits: {_why(row)}")
    return runs, left_out


def _why(row: SweepRow) -> str:
    if row.final_loss is not None and row.num_tokens and row.actual_flops:
        return f"its loss is {row.final_loss}"
    return row.error_message or f"it is {row.status}"


def _geometric_mean(logs: Floats) -> float:
    return float(np.exp(logs.mean()))
