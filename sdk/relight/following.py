"""Following an operation: what changed since the last look, what it prints, a server that is away, and a bar."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ops_contract.lifecycle import TERMINAL
from ops_contract.measurements import MeasurementProgress
from ops_contract.operations import Operation
from relight.transport import Unreachable


class Changes:
    """Looks at an operation, without waiting: `poll` between pauses of `poll_s` until `ended`."""

    def __init__(self, look: Callable[[], Operation], poll_s: float, patience_s: float) -> None:
        self._look = look
        self.poll_s, self._patience_s = poll_s, patience_s
        self._away_s = 0.0
        self._last: Operation | None = None

    @property
    def ended(self) -> bool:
        return self._last is not None and self._last.status in TERMINAL

    def poll(self) -> Operation | None:
        """None when nothing has changed. Raises what `look` does once the server was away for `patience_s`."""
        try:
            now = self._look()
        except Unreachable:
            if self._away_s >= self._patience_s:
                raise
            self._away_s += self.poll_s
            return None
        self._away_s = 0.0
        if now == self._last:
            return None
        self._last = now
        return now


@dataclass(frozen=True)
class LogPart:
    """A part of an operation's output, without a gap. Offsets count all of it in bytes, also what was left out.

    `end` is that of what there is so far. `complete`: the operation has ended, and this is the end of it.
    """

    start: int
    data: bytes
    end: int
    complete: bool


class Output:
    """Reads an operation's output, without waiting: `poll` until `ended`, with a pause where it gives nothing."""

    def __init__(
        self,
        look: Callable[[int], LogPart],
        offset: int,
        follow: bool,
        poll_s: float,
        patience_s: float,
        tell: Callable[[str], None] | None,
    ) -> None:
        self._look, self._tell = look, tell
        self._offset, self._follow = offset, follow
        self._poll_s, self._patience_s = poll_s, patience_s if follow else 0.0
        self._away_s = 0.0
        self._line_begins = True
        self.ended = False

    def poll(self) -> bytes:
        """What comes next, after a line that says what was left out before it. Raises as `Changes.poll`."""
        try:
            part = self._look(self._offset)
        except Unreachable as away:
            if self._away_s >= self._patience_s:
                raise
            self._away_s += self._poll_s
            if self._tell is not None:
                self._tell(str(away))
            return b""
        self._away_s = 0.0
        left_out = part.start - self._offset if part.data and self._offset >= 0 else 0
        self._offset = part.start + len(part.data)
        self.ended = part.complete or (not self._follow and self._offset >= part.end)
        gap = f"{'' if self._line_begins else chr(10)}[… {left_out:,} bytes left out …]\n" if left_out > 0 else ""
        self._line_begins = part.data.endswith(b"\n") if part.data else self._line_begins
        return gap.encode() + part.data


class Bar:
    """Progress in a terminal or a notebook; elsewhere silent."""

    def __init__(self, wanted: bool) -> None:
        self._notebook = wanted and "ipykernel" in sys.modules
        self._on = self._notebook or (wanted and sys.stderr.isatty())
        self._shown: Any = None

    def __enter__(self) -> Self:
        if self._on:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
            console = Console(stderr=True, force_jupyter=False)
            self._progress = Progress(*columns, TimeElapsedColumn(), console=console)
            self._task = self._progress.add_task("", total=None, figures="")
            if not self._notebook:
                self._progress.start()
        return self

    def show(self, operation: Operation) -> None:
        if not self._on:
            return
        told = operation.progress
        step, total, loss = (told.step, told.steps_total, told.loss) if told else (None, None, None)
        figures = f"step {step}" + (f"/{total}" if total else "") if step is not None else "no step yet"
        figures += f" loss {loss:.4g}" if loss is not None else ""
        if told and told.measurement:
            figures = phase_line(told.measurement)
        name = operation.name.replace("[", r"\[")
        self._progress.update(
            self._task, description=f"{name} {operation.status}", total=total, completed=step or 0, figures=figures
        )
        if self._notebook:
            self._display()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on and not self._notebook:
            self._progress.stop()

    def _display(self) -> None:
        """One output that is replaced: rich's own way needs ipywidgets."""
        from importlib import import_module

        if self._shown is None:
            self._shown = import_module("IPython.display").display(self._progress, display_id=True)
        else:
            self._shown.update(self._progress)


def phase_line(told: MeasurementProgress) -> str:
    """`window, 32 of 64 prompts, 311.5 W, 64 °C`: as much of it as is known."""
    of = f" of {told.total:,.0f}" if told.total is not None else ""
    parts = {
        told.phase.replace("_", " "): True,
        f"{math.floor(told.done):,}{of} {told.unit}": told.unit is not None,
        f"{told.power_w or 0:.4g} W": told.power_w is not None,
        f"{told.temperature_c or 0:.0f} °C": told.temperature_c is not None,
    }
    return ", ".join(text for text, is_known in parts.items() if is_known)
