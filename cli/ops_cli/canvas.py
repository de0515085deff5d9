"""Curves in a terminal: a cell of text is two by four dots of Braille."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ops_cli import show

if TYPE_CHECKING:
    from rich.text import Text

Points = Sequence[tuple[int, float]]

COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue")
BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column within a cell
ACROSS, DOWN = len(DOTS[0]), len(DOTS)


@dataclass(frozen=True)
class Curve:
    """`restarts` are the steps at which later attempts went on."""

    label: str
    points: Points
    restarts: Sequence[int] = ()


def draw(curves: Sequence[Curve], columns: int, rows: int, log: bool = False) -> "Iterator[Text]":
    """Lines of text, with a legend. `log` leaves out what is not above zero; what is not finite leaves a gap."""
    from rich.text import Text

    scale = math.log10 if log else float
    drawn = [[(s, scale(v)) if math.isfinite(v) and (v > 0 or not log) else None for s, v in c.points] for c in curves]
    known = [point for points in drawn for point in points if point]
    if not known:
        yield Text("no value that can be drawn")
        return
    steps, values = zip(*known, strict=True)
    bottom, top = min(values), max(values)
    if bottom == top:
        bottom, top = bottom - 0.5, top + 0.5
    names = [show.number(10**at if log else at) for at in (top, (top + bottom) / 2, bottom)]
    margin = max(map(len, names))
    canvas = _Canvas(columns - margin - 2, rows, (min(steps), max(steps)), (bottom, top))
    for number, points in enumerate(drawn):
        canvas.curve(points, COLOURS[number % len(COLOURS)])
    at_row = {0: names[0], rows // 2: names[1], rows - 1: names[2]}
    for row, cells in enumerate(canvas.lines()):
        tick = "┤" if row in at_row else "│"
        yield Text.assemble(f"{at_row.get(row, ''):>{margin}} {tick}", cells)
    restarts = {canvas.column(step) for curve in curves for step in curve.restarts}
    axis = "".join("┴" if column in restarts else "─" for column in range(canvas.columns))
    yield Text(f"{'':>{margin}} └{axis}")
    first, last = str(min(steps)), str(max(steps))
    yield Text(f"{'':>{margin}}  {first}{f'step {last}':>{max(canvas.columns - len(first), 0)}}")
    for number, curve in enumerate(curves):
        yield Text.assemble(("── ", COLOURS[number % len(COLOURS)]), curve.label, no_wrap=True, overflow="ellipsis")
    if restarts:
        yield Text("┴ where a later attempt went on")


class _Canvas:
    def __init__(self, columns: int, rows: int, steps: tuple[int, int], values: tuple[float, float]) -> None:
        self.columns, self._rows = columns, rows
        self._steps, self._values = steps, values
        self._dots = [[0] * columns for _ in range(rows)]
        self._colours = [[""] * columns for _ in range(rows)]

    def curve(self, points: Sequence[tuple[int, float] | None], colour: str) -> None:
        before: tuple[int, int] | None = None
        for point in points:
            here = self._dot(*point) if point else None
            if here:
                for x, y in _between(before or here, here):
                    self._dots[y // DOWN][x // ACROSS] |= DOTS[y % DOWN][x % ACROSS]
                    self._colours[y // DOWN][x // ACROSS] = colour
            before = here

    def column(self, step: int) -> int:
        return self._x(step) // ACROSS

    def lines(self) -> "Iterator[Text]":
        from rich.text import Text

        for dots, colours in zip(self._dots, self._colours, strict=True):
            cells = zip(dots, colours, strict=True)
            yield Text.assemble(*((chr(BRAILLE + each), colour) if each else " " for each, colour in cells))

    def _dot(self, step: int, value: float) -> tuple[int, int]:
        bottom, top = self._values
        return self._x(step), round((top - value) / (top - bottom) * (self._rows * DOWN - 1))

    def _x(self, step: int) -> int:
        first, last = self._steps
        share = (step - first) / (last - first) if last > first else 0.0
        return round(min(max(share, 0.0), 1.0) * (self.columns * ACROSS - 1))


def _between(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    (x, y), (to_x, to_y) = start, end
    length = max(abs(to_x - x), abs(to_y - y), 1)
    for n in range(length + 1):
        yield x + round((to_x - x) * n / length), y + round((to_y - y) * n / length)
