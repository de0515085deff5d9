"""What the benchmarks share: turns, medians with their spread, and the lines of the one table of `make bench`.

A benchmark measures its ways in turn, in one run on one machine, and gives a value of each for every round; what is
compared with a goal is made of the values of the same round.
"""

import json
import statistics
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Values = Sequence[float]


@dataclass(frozen=True)
class Line:
    """`figure` is what the goal speaks of, a value a round, in `figure_unit`: "×" for a ratio of ours to theirs."""

    what: str
    against: str
    ours: Values
    theirs: Values
    unit: str
    figure: Values
    figure_unit: str
    sign: Literal["≤", "≥"]
    goal: float

    @property
    def is_reached(self) -> bool:
        """By the median."""
        found = statistics.median(self.figure)
        return found <= self.goal if self.sign == "≤" else found >= self.goal


def ratio(
    what: str, against: str, ours: Values, theirs: Values, unit: str, sign: Literal["≤", "≥"], goal: float
) -> Line:
    """Ours by theirs of the same round."""
    figure = [mine / its for mine, its in zip(ours, theirs, strict=True)]
    return Line(what, against, ours, theirs, unit, figure, "×", sign, goal)


def beyond(what: str, against: str, ours: Values, theirs: Values, unit: str, goal: float) -> Line:
    """What ours takes more than theirs of the same round, at most `goal`."""
    figure = [mine - its for mine, its in zip(ours, theirs, strict=True)]
    return Line(what, against, ours, theirs, unit, figure, unit, "≤", goal)


def limit(what: str, ours: Values, unit: str, goal: float) -> Line:
    """Ours, at most `goal`."""
    return Line(what, "the goal itself", ours, [], unit, ours, unit, "≤", goal)


def in_turn(rounds: int, ways: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """A value of each way in each round; another one begins each time."""
    values: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for round in range(rounds):
        for i in range(len(names)):
            name = names[(i + round) % len(names)]
            values[name].append(ways[name]())
    return values


def spread(values: Values, form: str = "") -> str:
    """The median; in brackets the smallest and the largest."""
    form = form or _form(values)
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def add_option(parser: ArgumentParser) -> None:
    parser.add_argument("--lines", type=Path, help="a file for the lines of the one table, as JSON")


def write(path: Path | None, lines: Sequence[Line]) -> None:
    if path is not None:
        path.write_text(json.dumps([asdict(line) for line in lines]))


def read(path: Path) -> list[Line]:
    return [Line(**line) for line in json.loads(path.read_text())]


def table(lines: Sequence[Line]) -> str:
    head = "| what | ours | against | theirs | of it | goal | reached |\n|---|---|---|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(_cells(line))} |\n" for line in lines)


def _cells(line: Line) -> list[str]:
    theirs = f"{spread(line.theirs)} {line.unit}" if line.theirs else "–"
    goal = f"{line.sign} {line.goal:g} {line.figure_unit}"
    figure = f"{spread(line.figure)} {line.figure_unit}" if line.theirs else "–"
    reached = "yes" if line.is_reached else "**no**"
    return [line.what, f"{spread(line.ours)} {line.unit}", line.against, theirs, figure, goal, reached]


def _form(values: Values) -> str:
    """Three digits, or as many as stand before the point."""
    size = abs(statistics.median(values))
    return ".0f" if size >= 100 else ".1f" if size >= 10 else ".2f" if size >= 1 else ".3f"


def quantile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
