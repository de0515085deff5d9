"""In which order the points of a grid are run, cycle after cycle."""

import hashlib
from collections.abc import Sequence

from ops_contract.studies import Grid


def arranged(keys: Sequence[str], grid: Grid) -> list[tuple[int, int]]:
    """(index of a point, cycle), each pair once; `keys` are the points' own."""
    if grid.order == "sequential":
        return [(index, cycle) for index in range(len(keys)) for cycle in range(grid.cycles)]
    return [(index, cycle) for cycle in range(grid.cycles) for index in _in_cycle(keys, grid, cycle)]


def _in_cycle(keys: Sequence[str], grid: Grid, cycle: int) -> Sequence[int]:
    as_given = range(len(keys))
    if grid.order == "shuffle":
        return sorted(as_given, key=lambda index: _drawn(keys[index], grid.seed, cycle))
    if grid.order == "reverse":
        return as_given[::-1] if cycle % 2 else as_given
    if grid.order == "latin_square":
        return williams_row(len(keys), cycle)
    return as_given


def _drawn(key: str, seed: int, cycle: int) -> bytes:
    """A hash, and no generator: the order is the same under every version of Python, and the point's place in the study
    does not matter."""
    return hashlib.sha256(f"{seed} {cycle} {key}".encode()).digest()


def williams_rows(n: int) -> int:
    """After so many rows n points are balanced."""
    return n if n % 2 == 0 or n == 1 else 2 * n


def williams_row(n: int, number: int) -> list[int]:
    """In all rows together each of n stands in each place, and follows each other one, equally often (Williams 1949).

    For an odd n every row is followed by its reverse.
    """
    first, backwards = (number, 0) if n % 2 == 0 else divmod(number, 2)
    row = [(first + ((place + 1) // 2 if place % 2 else -(place // 2))) % n for place in range(n)]
    return row[::-1] if backwards else row
