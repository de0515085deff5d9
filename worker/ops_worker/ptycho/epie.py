"""ePIE with a known probe (Maiden & Rodenburg 2009): what a network is compared with."""

import numpy as np

from ops_worker.ptycho.stitching import places_of
from relight.ptycho.data import Array, Scan
from relight.ptycho.simulation import shifted

_FEEDBACK = 1.0  # α of eq. 5


def epie(scan: Scan, iterations: int, shape: tuple[int, int], seed: int) -> Array:
    """The object (H, W) complex64 of `shape`, 1 where no pattern was taken.

    For each pattern in a random order: the exit wave ψ = P·O, ψ' with the modulus that was measured in the far field
    (eqs. 2-4), and O + α conj(P)/max|P|² (ψ' - ψ) (eq. 5). P is moved by the fraction of a pixel that a position has.
    """
    rng = np.random.default_rng(seed)
    object = np.ones(shape, np.complex128)
    probes = shifted(scan.probe, scan.fractions)
    steps = _FEEDBACK * probes.conj() / (np.abs(probes) ** 2).max(axis=(1, 2), keepdims=True)
    measured = np.fft.ifftshift(scan.amplitudes, axes=(-2, -1)) / np.sqrt(scan.scale)
    places = places_of(scan.corners, scan.n)
    for _ in range(iterations):
        for i in rng.permutation(len(places)):
            wave = probes[i] * object[places[i]]
            far = np.fft.fft2(wave, norm="ortho")
            far *= measured[i] / np.maximum(np.abs(far), 1e-12)
            object[places[i]] += steps[i] * (np.fft.ifft2(far, norm="ortho") - wave)
    return object.astype(np.complex64)
