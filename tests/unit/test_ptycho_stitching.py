"""Patches put together."""

import numpy as np
import pytest

from ops_worker.ptycho.stitching import stitch
from relight.ptycho.simulation import Simulation, simulate

SCAN = simulate(Simulation(size=80, n=24, step=6))
WEIGHTS = (np.abs(SCAN.probe) ** 2 > 0.01 * (np.abs(SCAN.probe) ** 2).max()) * np.abs(SCAN.probe) ** 2
TRUTH: np.ndarray = SCAN.object  # type: ignore[assignment]
PATCHES = np.stack([TRUTH[y : y + 24, x : x + 24] for y, x in SCAN.corners])
RNG = np.random.default_rng(0)
TURNS = np.exp(2j * np.pi * RNG.random(len(PATCHES)))


def off(object: np.ndarray, coverage: np.ndarray) -> float:
    """The greatest distance from the truth where something is, once one phase for all is taken out."""
    covered = coverage > 0
    phase = np.angle(np.vdot(TRUTH[covered], object[covered]))
    return float(np.abs(object * np.exp(-1j * phase) - TRUTH)[covered].max())


def test_true_patches_make_the_object_where_they_are_and_nothing_elsewhere() -> None:
    object, coverage = stitch(PATCHES, SCAN.corners, WEIGHTS, TRUTH.shape, False)

    assert (object.shape, object.dtype, coverage.dtype) == (TRUTH.shape, np.complex64, np.float64)
    assert object[coverage > 0] == pytest.approx(TRUTH[coverage > 0], abs=1e-6)
    assert not object[coverage == 0].any()
    assert 0.5 < (coverage > 0).mean() < 1
    assert coverage.sum() == pytest.approx(len(PATCHES) * WEIGHTS.sum())


def test_a_mean_is_weighted() -> None:
    patches = np.stack([np.full((2, 2), 1.0), np.full((2, 2), 4.0)]).astype(np.complex64)
    weights = np.array([[1.0, 2.0], [1.0, 2.0]])

    object, coverage = stitch(patches, np.array([[0, 0], [0, 1]]), weights, (2, 4), False)

    assert object[0].tolist() == [1, 2, 4, 0]
    assert coverage[0].tolist() == [1, 3, 2, 0]


def test_patches_of_random_phases_are_turned_to_each_other() -> None:
    turned = PATCHES * TURNS[:, None, None]

    assert off(*stitch(turned, SCAN.corners, WEIGHTS, TRUTH.shape, False)) > 0.5
    assert off(*stitch(turned, SCAN.corners, WEIGHTS, TRUTH.shape, True)) < 1e-5


def test_patches_of_random_phases_and_noise_are_about_as_good_as_without_the_phases() -> None:
    noise = 0.3 * (RNG.normal(size=PATCHES.shape) + 1j * RNG.normal(size=PATCHES.shape))
    wide = 0.2 * WEIGHTS.max() < WEIGHTS

    def error(phases: np.ndarray | float, synchronise: bool) -> float:
        object, coverage = stitch((PATCHES + noise) * phases, SCAN.corners, wide * 1.0, TRUTH.shape, synchronise)
        covered = coverage > 0
        phase = np.angle(np.vdot(TRUTH[covered], object[covered]))
        return float(np.abs(object * np.exp(-1j * phase) - TRUTH)[covered].std())

    assert error(TURNS[:, None, None], True) < 1.1 * error(1.0, False) < 0.5 * error(TURNS[:, None, None], False)


def test_patches_that_touch_nothing_keep_their_phase() -> None:
    corners = np.array([[0, 0], [50, 50]])

    object, _ = stitch(PATCHES[:2], corners, WEIGHTS, TRUTH.shape, True)

    alone, _ = stitch(PATCHES[:2], corners, WEIGHTS, TRUTH.shape, False)
    assert np.array_equal(object, alone)


def test_nothing_depends_on_anything_but_the_arguments() -> None:
    turned = PATCHES * TURNS[:, None, None]
    one, same = (stitch(turned, SCAN.corners, WEIGHTS, TRUTH.shape, True)[0] for _ in range(2))

    assert np.array_equal(one, same)
