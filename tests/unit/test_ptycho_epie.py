"""The iterative reconstruction that a network is compared with."""

from dataclasses import replace

import numpy as np
import pytest

from ops_worker.ptycho.epie import epie
from ops_worker.ptycho.scores import scores
from ops_worker.ptycho.stitching import stitch
from relight.ptycho.data import Scan
from relight.ptycho.simulation import Simulation, simulate

SCAN = simulate(Simulation(size=80, n=24, step=5))
WEIGHTS = np.abs(SCAN.probe) ** 2


def scored(object: np.ndarray, scan: Scan) -> dict[str, float]:
    _, coverage = stitch(np.ones_like(scan.amplitudes), scan.corners, WEIGHTS, scan.shape, False)
    assert scan.object is not None
    return scores(object, scan.object, coverage > 0.05 * coverage.max())


def test_it_finds_the_object_when_the_probe_is_known() -> None:
    found = scored(epie(SCAN, 30, SCAN.shape, 0), SCAN)

    assert found["phase_pearson"] > 0.95
    assert found["amplitude_pearson"] > 0.95


@pytest.mark.parametrize("kind", ["photo", "dead_leaves"])
def test_it_finds_other_objects_too(kind: str) -> None:
    scan = simulate(Simulation(size=80, n=24, step=5, object=kind))  # type: ignore[arg-type]

    assert scored(epie(scan, 30, scan.shape, 0), scan)["phase_pearson"] > 0.9


def test_fractions_of_a_pixel_are_made_use_of() -> None:
    bright = simulate(Simulation(size=80, n=24, step=5, nphotons=1e7))
    rounded = replace(bright, positions=np.round(bright.positions))

    with_them, without = (scored(epie(scan, 100, scan.shape, 0), scan)["amplitude_mae"] for scan in (bright, rounded))

    assert with_them < 0.6 * without


def test_the_object_is_about_1_whatever_the_photons_and_1_where_nothing_was_measured() -> None:
    for factor in (1, 100):
        scan = replace(SCAN, amplitudes=SCAN.amplitudes * np.float32(factor))
        object = epie(scan, 5, (90, 90), 0)
        assert (object.shape, object.dtype) == ((90, 90), np.complex64)
        assert np.abs(object[30:50, 30:50]).mean() == pytest.approx(1, abs=0.15)
        assert (object[80:] == 1).all()


def test_one_seed_is_one_reconstruction() -> None:
    one, same, other = (epie(SCAN, 2, SCAN.shape, seed) for seed in (0, 0, 1))

    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
