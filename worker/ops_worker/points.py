"""Metric values on their way from a command to the agent, many to a report."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ops_contract.reports import Metrics, Progress, Series
from ops_contract.wire import Name

MAX_NAMES = 1000
MAX_WAITING = 10_000
MAX_JSON_BYTES = 65_536
LARGEST_STEP = 2**63 - 1
_name = TypeAdapter[str](Name)


class Points:
    """Values wait here until `taken`. Of each name the steps rise: what goes back is dropped."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.waiting = 0
        self.notes: list[str] = []  # to be told, and forgotten by who tells them
        self._noted = set[str]()
        self._loss: float | None = None
        self._series: dict[str, list[tuple[int, float]]] = {}
        self._last_steps: dict[str, int] = {}

    def add(self, name: str, step: int, value: float) -> None:
        last_step = self._last_steps.get(name, -1)
        if last_step < 0 and len(self._last_steps) == MAX_NAMES:
            return self._note("names", f"only {MAX_NAMES} names of metrics are kept; {name!r} and others are not")
        if step <= last_step:
            what = f"{name!r} at step {step} came after step {last_step}"
            return self._note("steps", f"steps of a metric have to rise: {what}; it and all such values are dropped")
        self._last_steps[name] = step
        self._series.setdefault(name, []).append((step, value))
        self.waiting += 1
        self.step = max(step, self.step or 0)
        if name == "loss":
            self._loss = value

    def add_json(self, line: bytes) -> None:
        """The numbers of an object with an integer `step`; any other line is none of ours."""
        if not line.lstrip().startswith(b"{"):
            return
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return
        step = found.pop("step", None)
        if type(step) is int and 0 <= step <= LARGEST_STEP:
            for name, value in numbers(found).items():
                self.add(name, step, value)

    def taken(self) -> Metrics | None:
        """What has come since the last call."""
        series = [Series.of(name, points) for name, points in self._series.items()]
        self._series.clear()
        self.waiting = 0
        return Metrics(series=series) if series else None

    def progress(self) -> Progress:
        return Progress(step=self.step or 0, loss=self._loss, epoch=None)

    def _note(self, kind: str, message: str) -> None:
        """The first of a kind says it for all."""
        if kind not in self._noted:
            self.notes.append(message)
        self._noted.add(kind)


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Those values that are numbers of float64, under a name that a metric may have."""
    values = {}
    for name, value in found.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(ValidationError, OverflowError):
                values[_name.validate_python(name)] = float(value)
    return values
