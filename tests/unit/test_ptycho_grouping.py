"""Which patterns make a group, and which are held out."""

import numpy as np
import pytest

from ops_worker.ptycho.grouping import check_rules, group, split
from relight.ptycho.data import DataProblem
from relight.ptycho.simulation import Simulation, simulate

POSITIONS = simulate(Simulation(size=96, n=16, step=5)).positions  # 17 x 17


def nearest(positions: np.ndarray, i: int, count: int) -> set[int]:
    distance = ((positions - positions[i]) ** 2).sum(axis=1)
    distance[i] = -1
    return set(np.argsort(distance)[1 : count + 1].tolist())


@pytest.mark.parametrize(("gridsize", "neighbor_count"), [(2, 4), (2, 6), (3, 9), (3, 20)])
def test_a_group_is_a_point_and_others_of_its_nearest(gridsize: int, neighbor_count: int) -> None:
    groups = group(POSITIONS, gridsize, neighbor_count, 100, 0, False)

    assert (groups.shape, groups.dtype) == ((100, gridsize**2), np.int64)
    assert len(set(groups[:, 0])) == 100
    for first, *others in groups.tolist():
        assert len({first, *others}) == gridsize**2
        assert set(others) <= nearest(POSITIONS, first, neighbor_count)


def test_with_a_gridsize_of_1_each_point_is_a_group() -> None:
    groups = group(POSITIONS, 1, 6, len(POSITIONS), 0, False)

    assert groups.shape == (len(POSITIONS), 1)
    assert sorted(groups[:, 0]) == list(range(len(POSITIONS)))


def test_all_of_the_nearest_are_drawn() -> None:
    groups = group(POSITIONS, 2, 6, 40 * len(POSITIONS), 0, True)

    drawn = {i: set(groups[groups[:, 0] == i, 1:].ravel().tolist()) for i in range(len(POSITIONS))}
    assert drawn == {i: nearest(POSITIONS, i, 6) for i in range(len(POSITIONS))}


def test_with_more_groups_than_points_each_begins_as_many() -> None:
    groups = group(POSITIONS, 2, 6, 3 * len(POSITIONS) + 5, 0, True)

    begun = np.bincount(groups[:, 0], minlength=len(POSITIONS))
    assert (begun.min(), begun.max(), (begun == 4).sum()) == (3, 4, 5)
    assert len({frozenset(each) for each in groups.tolist()}) > 2 * len(POSITIONS)


def test_one_seed_is_one_grouping() -> None:
    one, same, other = (group(POSITIONS, 2, 6, 64, seed, False) for seed in (1, 1, 2))

    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_points_at_one_place_are_still_themselves() -> None:
    positions = np.zeros((12, 2))

    for first, *others in group(positions, 2, 4, 12, 0, False).tolist():
        assert first not in others
        assert len(set(others)) == 3


@pytest.mark.parametrize(
    ("gridsize", "neighbor_count", "n_groups", "oversample", "said"),
    [
        (2, 3, 64, False, r"neighbor_count 3 is less than the 4 patterns of a group \(gridsize 2\)"),
        (3, 8, 64, False, r"neighbor_count 8 is less than the 9 patterns of a group \(gridsize 3\)"),
        (2, 6, 300, False, "n_groups 300 is more than the 289 points; it needs enable_oversampling"),
        (1, 6, 300, False, "n_groups 300 is more than the 289 points"),
        (1, 6, 300, True, "enable_oversampling needs a gridsize above 1, not 1: n_groups 300 of one"),
        (2, 4, 300, True, r"enable_oversampling needs a neighbor_count above 4, .* \(gridsize 2\), not 4"),
        (2, 289, 64, False, "neighbor_count 289 needs more points than the 289 there are"),
    ],
)
def test_what_makes_no_groups_is_refused_with_both_numbers(
    gridsize: int, neighbor_count: int, n_groups: int, oversample: bool, said: str
) -> None:
    with pytest.raises(DataProblem, match=said):
        group(POSITIONS, gridsize, neighbor_count, n_groups, 0, oversample)


def test_what_depends_on_no_data_is_refused_without_it() -> None:
    check_rules(2, 6, 10**6, None, False)
    check_rules(2, 5, 10**6, None, True)
    for wrong in ((2, 3, 64, None, False), (1, 6, 64, None, True), (2, 4, 64, None, True)):
        with pytest.raises(DataProblem):
            check_rules(*wrong)


@pytest.mark.parametrize("seed", range(20))
def test_no_group_that_is_held_out_shares_a_pattern_with_one_that_is_trained_on(seed: int) -> None:
    training, held_out = split(POSITIONS, 0.1, seed)
    trained_on = training[group(POSITIONS[training], 2, 6, len(training), seed, False)]
    validated = held_out[group(POSITIONS[held_out], 2, 6, len(held_out), seed, False)]

    assert sorted([*training, *held_out]) == list(range(len(POSITIONS)))
    assert len(held_out) == 29
    assert not set(trained_on.ravel()) & set(validated.ravel())


def test_what_is_held_out_is_one_region_whose_groups_are_as_close_as_others() -> None:
    whole = spread(POSITIONS, group(POSITIONS, 2, 6, len(POSITIONS), 0, False))

    for seed in range(20):
        _, held_out = split(POSITIONS, 0.1, seed)
        validated = group(POSITIONS[held_out], 2, 6, len(held_out), 0, False)
        assert spread(POSITIONS[held_out], validated) < 1.5 * whole


def spread(positions: np.ndarray, groups: np.ndarray) -> float:
    """The mean distance of members from the point that begins their group, in pixels."""
    members = positions[groups]
    return float(np.hypot(*(members[:, 1:] - members[:, :1]).T).mean())


def test_one_seed_is_one_split_and_another_seed_another_region() -> None:
    one, same, other = (split(POSITIONS, 0.1, seed)[1] for seed in (1, 1, 2))

    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_nothing_may_be_held_out_but_not_everything() -> None:
    training, held_out = split(POSITIONS, 0.0, 0)
    assert (len(training), len(held_out)) == (289, 0)
    for fraction, said in ((0.999, "holds out 289"), (0.001, "0.001 of 289 points holds out 0"), (1.0, "is not in")):
        with pytest.raises(DataProblem, match=said):
            split(POSITIONS, fraction, 0)
