"""Judging a run by one metric: when it has stopped improving, and which state is the best so far."""

import math
from collections.abc import Mapping
from typing import Any

from ops_contract.jobs import Execution, SchedulerName
from relight.training.faults import TrainingFault


class Monitor:
    """The best value so far, and the evaluations since the last improvement. Without patience it never ends the run.

    An improvement is larger than `early_stop_min_delta`; the best is the best by whatever little.
    """

    def __init__(self, knobs: Execution) -> None:
        self.metric = knobs.checkpoint_monitor
        self._maximize = knobs.checkpoint_mode == "max"
        self._min_delta = knobs.early_stop_min_delta
        self._patience = knobs.early_stop_patience
        # With checkpoint_every auto, 1 is what nobody asked for: a run without validation data does without.
        unasked = int(knobs.checkpoint_every == "auto")
        self._required = (
            knobs.early_stop_patience is not None
            or knobs.scheduler is SchedulerName.PLATEAU
            or (knobs.checkpoint_save_top_k or 0) > unasked
        )
        self.best: float | None = None
        self.is_best = False  # the newest evaluation, that is
        self._improved_to: float | None = None
        self.evaluations_since = 0

    def check(self, evaluates: bool) -> None:
        """Raises a permanent TrainingFault where the knobs ask for a metric that nothing will measure."""
        if self._required and not evaluates:
            raise _missing("the workload has no validation data with this config")

    def judge(self, measured: Mapping[str, float]) -> float | None:
        """Take an evaluation; its monitored value. Raises a permanent TrainingFault when it has to be there and is not.

        NaN is no improvement, so that a run that diverged ends too.
        """
        if self.metric is None or self.metric not in measured:
            if self._required and measured:
                raise _missing(f"evaluate() gave {', '.join(sorted(measured))}, not {self.metric}")
            return None
        value = float(measured[self.metric])
        self.is_best = self._beats(self.best, value, 0.0)
        if self.is_best:
            self.best = value
        if self._beats(self._improved_to, value, self._min_delta):
            self._improved_to, self.evaluations_since = value, 0
        else:
            self.evaluations_since += 1
        return value

    @property
    def exhausted(self) -> bool:
        return self._patience is not None and self.evaluations_since >= self._patience

    @property
    def verdict(self) -> str:
        times = "one evaluation" if self.evaluations_since == 1 else f"{self.evaluations_since} evaluations in a row"
        return f"stopped early: {self.metric} did not improve on {self._improved_to} in {times}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "maximize": self._maximize,
            "best": self.best,
            "improved_to": self._improved_to,
            "evaluations_since": self.evaluations_since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was judged by another metric, or the other way round, says nothing here."""
        if (state["metric"], state["maximize"]) == (self.metric, self._maximize):
            self.best, self._improved_to = state["best"], state["improved_to"]
            self.evaluations_since = state["evaluations_since"]

    def _beats(self, before: float | None, value: float, min_delta: float) -> bool:
        if before is None:
            return not math.isnan(value)
        gain = value - before if self._maximize else before - value
        return gain > min_delta


def _missing(why: str) -> TrainingFault:
    return TrainingFault(
        "nothing_to_monitor",
        f"early_stop_patience, checkpoint_save_top_k and scheduler plateau need a metric: {why}",
        permanent=True,
    )
