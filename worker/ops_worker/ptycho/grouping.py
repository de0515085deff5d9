"""Which patterns are looked at together, and which are held out. Without torch."""

import numpy as np

from relight.ptycho.data import Array, DataProblem


def check_rules(gridsize: int, neighbor_count: int, n_groups: int, points: int | None, oversample: bool) -> None:
    """What of a grouping can be refused before there is data, and with `points` all of it. Raises DataProblem."""
    members = gridsize**2
    if neighbor_count < members:
        raise DataProblem(
            f"neighbor_count {neighbor_count} is less than the {members} patterns of a group (gridsize {gridsize})"
        )
    if oversample and gridsize == 1:
        raise DataProblem(
            f"enable_oversampling needs a gridsize above 1, not {gridsize}: "
            f"n_groups {n_groups} of one pattern each would only repeat them"
        )
    if oversample and neighbor_count == members:
        raise DataProblem(
            f"enable_oversampling needs a neighbor_count above {members}, the patterns of a group "
            f"(gridsize {gridsize}), not {neighbor_count}: there has to be a choice"
        )
    if points is None:
        return
    if n_groups > points and not oversample:
        raise DataProblem(f"n_groups {n_groups} is more than the {points} points; it needs enable_oversampling")
    if gridsize > 1 and neighbor_count >= points:
        raise DataProblem(f"neighbor_count {neighbor_count} needs more points than the {points} there are")


def group(positions: Array, gridsize: int, neighbor_count: int, n_groups: int, seed: int, oversample: bool) -> Array:
    """(G, C) int64, C = gridsize²: a point, then C - 1 drawn from its `neighbor_count` nearest others.

    Points take turns in a random order, so that no point begins two groups more than another one. Drawn anew each time,
    two groups of one point may be the same. Raises DataProblem.
    """
    check_rules(gridsize, neighbor_count, n_groups, len(positions), oversample)
    rng = np.random.default_rng(seed)
    turns = [rng.permutation(len(positions)) for _ in range(-(-n_groups // len(positions)))]
    first = np.concatenate(turns)[:n_groups]
    if gridsize == 1:
        return first[:, None]
    near = _nearest(positions, neighbor_count)[first]
    drawn = rng.random(near.shape).argsort(axis=1)[:, : gridsize**2 - 1]
    return np.concatenate([first[:, None], np.take_along_axis(near, drawn, axis=1)], axis=1)


def split(positions: Array, fraction: float, seed: int) -> tuple[Array, Array]:
    """Indices of points to train on, and of those held out; both in the order of the scan.

    Held out are a random point and those nearest to it, `fraction` of all: one region of the scan. Grouped apart, both
    have neighbours about as near as the whole scan has, and no group of one shares a pattern with one of the other.
    What they share is object: patterns at the edge of the region overlap with some that are trained on.
    """
    if not 0 <= fraction < 1:
        raise DataProblem(f"validation_fraction {fraction:g} is not in 0…1")
    held_out = round(fraction * len(positions))
    if fraction and not 0 < held_out < len(positions):
        raise DataProblem(f"validation_fraction {fraction:g} of {len(positions)} points holds out {held_out}")
    centre = positions[np.random.default_rng(seed).integers(len(positions))]
    order = np.argsort(((positions - centre) ** 2).sum(axis=1), kind="stable")
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _nearest(positions: Array, count: int) -> Array:
    """(M, count): the nearest other points of each."""
    from scipy.spatial import cKDTree  # a config that only checks the rules need not wait for it

    near = cKDTree(positions).query(positions, k=count + 1)[1]
    others = near != np.arange(len(positions))[:, None]
    others[others.all(axis=1), -1] = False  # so many at one place that the point itself was not among them
    return np.asarray(near[others].reshape(-1, count))
