"""Curves in a terminal: a cell of text is two by four dots of Braille."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ops_cli import show

if TYPE_CHECKING:
    from rich.text import Text

Points = Sequence[tuple[float, float]]

COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue")
BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column within a cell
ACROSS, DOWN = len(DOTS[0]), len(DOTS)
MARK = "●"


@dataclass(frozen=True)
class Curve:
    """`points` are joined by a line, `marks` are not. `restarts` are the steps at which later attempts went on."""

    label: str
    points: Points
    restarts: Sequence[int] = ()
    marks: Points = ()


def draw(
    curves: Sequence[Curve], columns: int, rows: int, log: bool = False, log_x: bool = False, across: str = "step"
) -> "Iterator[Text]":
    """Lines of text, with a legend. A logarithm leaves out what is not above zero; what is not finite leaves a gap.

    `across` names the axis of x.
    """
    from rich.text import Text

    scaled = [[_scaled(each, log_x, log) for each in curve.points] for curve in curves]
    marked = [[_scaled(each, log_x, log) for each in curve.marks] for curve in curves]
    known = [point for points in (*scaled, *marked) for point in points if point]
    if not known:
        yield Text("no value that can be drawn")
        return
    places, values = zip(*known, strict=True)
    bottom, top = min(values), max(values)
    if bottom == top:
        bottom, top = bottom - 0.5, top + 0.5
    names = [show.short(10**at if log else at) for at in (top, (top + bottom) / 2, bottom)]
    margin = max(map(len, names))
    canvas = _Canvas(columns - margin - 2, rows, (min(places), max(places)), (bottom, top))
    for number, points in enumerate(scaled):
        canvas.curve(points, _colour(number))
    for number, points in enumerate(marked):
        canvas.marks(points, _colour(number))
    at_row = {0: names[0], rows // 2: names[1], rows - 1: names[2]}
    for row, cells in enumerate(canvas.lines()):
        tick = "┤" if row in at_row else "│"
        yield Text.assemble(f"{at_row.get(row, ''):>{margin}} {tick}", cells)
    restarts = {canvas.column(step) for curve in curves for step in curve.restarts}
    axis = "".join("┴" if column in restarts else "─" for column in range(canvas.columns))
    yield Text(f"{'':>{margin}} └{axis}")
    first, last = (_place(10**each if log_x else each) for each in (min(places), max(places)))
    yield Text(f"{'':>{margin}}  {first}{f'{across} {last}':>{max(canvas.columns - len(first), 0)}}")
    for number, curve in enumerate(curves):
        if not curve.label:
            continue
        sign = "── " if curve.points else f"{MARK}  "
        yield Text.assemble((sign, _colour(number)), curve.label, no_wrap=True, overflow="ellipsis")
    if restarts:
        yield Text("┴ where a later attempt went on")


def _scaled(point: tuple[float, float], log_x: bool, log_y: bool) -> tuple[float, float] | None:
    x, y = point
    if not math.isfinite(y) or (log_x and x <= 0) or (log_y and y <= 0):
        return None
    return math.log10(x) if log_x else x, math.log10(y) if log_y else float(y)


def _place(x: float) -> str:
    """Every digit of a step."""
    return str(x) if isinstance(x, int) else show.short(x)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


class _Canvas:
    def __init__(self, columns: int, rows: int, places: tuple[float, float], values: tuple[float, float]) -> None:
        self.columns, self._rows = columns, rows
        self._places, self._values = places, values
        self._dots = [[0] * columns for _ in range(rows)]
        self._colours = [[""] * columns for _ in range(rows)]
        self._marks: set[tuple[int, int]] = set()

    def curve(self, points: Sequence[tuple[float, float] | None], colour: str) -> None:
        before: tuple[int, int] | None = None
        for point in points:
            here = self._dot(*point) if point else None
            if here:
                for x, y in _between(before or here, here):
                    self._dots[y // DOWN][x // ACROSS] |= DOTS[y % DOWN][x % ACROSS]
                    self._colours[y // DOWN][x // ACROSS] = colour
            before = here

    def marks(self, points: Sequence[tuple[float, float] | None], colour: str) -> None:
        for x, y in (self._dot(*point) for point in points if point):
            self._marks.add((y // DOWN, x // ACROSS))
            self._colours[y // DOWN][x // ACROSS] = colour

    def column(self, place: float) -> int:
        return self._x(place) // ACROSS

    def lines(self) -> "Iterator[Text]":
        from rich.text import Text

        for row, (dots, colours) in enumerate(zip(self._dots, self._colours, strict=True)):
            cells = ((self._cell(row, column, each), colours[column]) for column, each in enumerate(dots))
            yield Text.assemble(*((cell, colour) if colour else cell for cell, colour in cells))

    def _cell(self, row: int, column: int, dots: int) -> str:
        if (row, column) in self._marks:
            return MARK
        return chr(BRAILLE + dots) if dots else " "

    def _dot(self, place: float, value: float) -> tuple[int, int]:
        bottom, top = self._values
        return self._x(place), round((top - value) / (top - bottom) * (self._rows * DOWN - 1))

    def _x(self, place: float) -> int:
        first, last = self._places
        share = (place - first) / (last - first) if last > first else 0.0
        return round(min(max(share, 0.0), 1.0) * (self.columns * ACROSS - 1))


def _between(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    (x, y), (to_x, to_y) = start, end
    length = max(abs(to_x - x), abs(to_y - y), 1)
    for n in range(length + 1):
        yield x + round((to_x - x) * n / length), y + round((to_y - y) * n / length)
