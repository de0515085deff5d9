"""Which points of a study nobody could better in both throughput and energy."""

import math
from collections.abc import Sequence

from ops_contract.measurements import FigureName
from ops_contract.study_results import GridGroup

THROUGHPUT: FigureName = "tokens_per_s"
ENERGY: FigureName = "j_per_output_token"

Point = tuple[float, float]


def front(points: Sequence[Point | None]) -> list[bool]:
    """Of (throughput, energy) each: whether no other is at least as good in both, and better in one.

    Points that are equal in both are on it together, or not at all. None, or what is not finite, is not on it and keeps
    nothing from it.
    """
    found, least = set[Point](), math.inf
    known = {point for point in points if point is not None and all(map(math.isfinite, point))}
    for throughput, energy in sorted(known, key=lambda point: (-point[0], point[1])):
        if energy < least:
            found.add((throughput, energy))
            least = energy
    return [point in found for point in points]


def of_groups(groups: Sequence[GridGroup]) -> list[bool]:
    """By the means of their cycles."""
    return front([place(group) for group in groups])


def place(group: GridGroup) -> Point | None:
    """None where one of the two is not known."""
    throughput, energy = group.metrics.get(THROUGHPUT), group.metrics.get(ENERGY)
    return None if throughput is None or energy is None else (throughput.mean, energy.mean)
