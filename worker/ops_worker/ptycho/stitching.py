"""Patches of the object put together."""

import numpy as np

from relight.ptycho.data import Array

_SWEEPS = 3  # more of them turn no patch by a hundredth of a radian


def stitch(
    patches: Array, corners: Array, weights: Array, shape: tuple[int, int], synchronise: bool
) -> tuple[Array, Array]:
    """The weighted mean of (P, N, N) patches, each at its (y, x) of (P, 2) corners, with (N, N) weights.

    Of `shape` both: the object, complex64, 0 where no patch is, and the coverage, float64, the sum of the weights. A
    pattern does not tell the phase of its patch as a whole; `synchronise` turns each patch to fit the others.
    """
    phases = synchronised(patches, corners, weights, shape) if synchronise else np.ones(len(patches))
    total, coverage = np.zeros(shape, np.complex128), np.zeros(shape)
    for patch, at, phase in zip(patches, places_of(corners, len(weights)), phases, strict=True):
        total[at] += phase * weights * patch
        coverage[at] += weights
    object = np.divide(total, coverage, out=np.zeros_like(total), where=coverage > 0)
    return object.astype(np.complex64), coverage


def synchronised(patches: Array, corners: Array, weights: Array, shape: tuple[int, int]) -> Array:
    """(P,) complex128 of modulus 1: by what to multiply each patch.

    They are placed one by one, outwards from the middle one, each turned to what is there by the phase of its inner
    product with the sum: a mean of all of them would average random phases away. Then each in turn is taken out and
    turned again, which is coordinate ascent of the sum of the inner products of all pairs.
    """
    phases, total = np.ones(len(patches), np.complex128), np.zeros(shape, np.complex128)
    places = places_of(corners, len(weights))
    distance = ((corners - np.median(corners, axis=0)) ** 2).sum(axis=1)
    outwards = np.argsort(((corners - corners[distance.argmin()]) ** 2).sum(axis=1), kind="stable")
    placed = np.zeros(len(patches))
    for _ in range(1 + _SWEEPS):
        for i in outwards:
            weighted = weights * patches[i]
            total[places[i]] -= placed[i] * phases[i] * weighted
            fit = np.vdot(weighted, total[places[i]])
            phases[i] = fit / abs(fit) if fit else phases[i]
            total[places[i]] += phases[i] * weighted
            placed[i] = 1
    return phases


def places_of(corners: Array, n: int) -> list[tuple[slice, slice]]:
    """Of patches of n × n pixels, in the object."""
    return [(slice(y, y + n), slice(x, x + n)) for y, x in corners.tolist()]
