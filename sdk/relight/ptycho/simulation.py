"""Scans that are made up: an object, a probe, positions, and the noise of photons."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from relight.ptycho.data import Array, DataProblem, Scan

ABSORPTION = 0.6  # nepers and radians of an object where it is thickest
PHASE_SHIFT = 1.2

_PIXELS_MAX = 2**28  # of all patterns together: 1 GB of float32
_PHOTO_PIXELS = 427  # the height of the two that scikit-learn has
_AT_ONCE = 256  # patterns; those of a large scan do not fit into memory as complex128


class Simulation(BaseModel):
    """What to make up. Amplitude and phase of an object are of one thickness f in 0…1, as those of one material are."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["lines", "gaussian", "dead_leaves", "photo"] = Field(
        "lines",
        description="lines, a Gaussian random field, dead leaves, or part of one of the two photographs "
        "of scikit-learn, by whether the seed is even",
    )
    size: int = Field(192, ge=16, le=1024, description="side of the object in pixels")
    n: int = Field(32, ge=8, le=512, description="side of a pattern, and of the probe, in pixels")
    step: float = Field(5.0, gt=0, le=512, description="pixels between neighbouring positions")
    jitter: float = Field(
        0.3, ge=0, le=1, description="a position is off its place by at most this many steps, each way"
    )
    nphotons: float = Field(1e5, ge=1, le=1e12, description="photons that the probe brings to each pattern")
    probe_fwhm: float = Field(
        0.3, ge=0.02, le=1, description="width of the probe at half of its intensity, in sides of a pattern"
    )
    probe_curvature: float = Field(
        1.0, ge=-10, le=10, description="how far it is out of focus: its phase, in radians, where its intensity is 1/e"
    )
    whole_pixels: bool = Field(False, description="round the positions")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of object, positions and noise")

    @model_validator(mode="after")
    def _fits(self) -> "Simulation":
        if self.n > self.size:
            raise ValueError(f"a pattern of n {self.n} pixels does not fit into an object of size {self.size}")
        if self.object == "photo" and self.size > _PHOTO_PIXELS:
            raise ValueError(f"size {self.size} is more than the {_PHOTO_PIXELS} pixels of the photograph")
        if (pixels := self.patterns * self.n**2) > _PIXELS_MAX:
            raise ValueError(
                f"{self.patterns} patterns (size {self.size}, step {self.step:g}) have {pixels} pixels; "
                f"{_PIXELS_MAX} is the most"
            )
        return self

    @property
    def patterns(self) -> int:
        return _per_axis(self) ** 2


def simulate(simulation: Simulation) -> Scan:
    """Counts are Poisson's, of mean |FFT(P·O)|² (orthonormal): the probe is in √photons. Raises DataProblem.

    Object, positions and noise have random numbers of their own: other photons leave object and positions as they are.
    """
    shapes, places, noise = (np.random.default_rng([simulation.seed, part]) for part in range(3))
    thickness = _OBJECTS[simulation.object](simulation, shapes)
    thickness = (thickness - thickness.min()) / (np.ptp(thickness) or 1.0)  # a photograph may have one colour there
    object = np.exp(-ABSORPTION * thickness + 1j * PHASE_SHIFT * (thickness - 0.5)).astype(np.complex64)
    probe = _probe(simulation)
    scan = Scan(_positions(simulation, places), np.empty(0, np.float32), probe.astype(np.complex64), object)
    counts = [
        noise.poisson(_intensities(scan, slice(begin, begin + _AT_ONCE)))
        for begin in range(0, len(scan.positions), _AT_ONCE)
    ]
    amplitudes = np.sqrt(np.concatenate(counts)).astype(np.float32)
    return Scan(scan.positions, amplitudes, scan.probe, object, np.arange(len(amplitudes)))


def _positions(simulation: Simulation, rng: np.random.Generator) -> Array:
    """(M, 2): a square grid in the middle of the object, every place jittered, every patch within the object."""
    size, n, step = simulation.size, simulation.n, simulation.step
    per_axis = _per_axis(simulation)
    margin = (size - n - (per_axis - 1) * step) / 2
    axis = n // 2 + margin + step * np.arange(per_axis)
    positions = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    positions += rng.uniform(-simulation.jitter * step, simulation.jitter * step, positions.shape)
    positions = np.clip(positions, n // 2, size - n + n // 2)
    return np.asarray(np.round(positions) if simulation.whole_pixels else positions)


def _per_axis(simulation: Simulation) -> int:
    return int((simulation.size - simulation.n) / simulation.step) + 1


def _probe(simulation: Simulation) -> Array:
    """(N, N) complex128, a Gaussian out of focus: |P|² = exp(-r²/w²), and a phase of curvature · r²/w²."""
    r = np.arange(simulation.n) - simulation.n // 2
    r2 = np.add.outer(r**2, r**2)
    w2 = (simulation.probe_fwhm * simulation.n) ** 2 / (4 * np.log(2))
    probe = np.exp((-0.5 + 1j * simulation.probe_curvature) * r2 / w2)
    return np.asarray(probe * np.sqrt(simulation.nphotons / np.sum(np.abs(probe) ** 2)))


def _intensities(scan: Scan, of: slice) -> Array:
    """(B, N, N) float64: photons expected in each pixel of these patterns."""
    assert scan.object is not None
    n = scan.n
    patches = np.stack([scan.object[y : y + n, x : x + n] for y, x in scan.corners[of]])
    waves = np.fft.fft2(patches * shifted(scan.probe, scan.fractions[of]), norm="ortho")
    return np.asarray(np.abs(np.fft.fftshift(waves, axes=(-2, -1))) ** 2)


def shifted(probe: Array, fractions: Array) -> Array:
    """(B, N, N) complex128: the probe moved by each of (B, 2) fractions of a pixel, by Fourier's shift theorem. It is
    periodic: what leaves on one side comes in on the other.
    """
    q = np.fft.fftfreq(len(probe))
    ramps = np.exp(-2j * np.pi * (fractions[:, 0, None, None] * q[:, None] + fractions[:, 1, None, None] * q))
    return np.asarray(np.fft.ifft2(np.fft.fft2(probe.astype(np.complex128)) * ramps))


def _lines(simulation: Simulation, rng: np.random.Generator) -> Array:
    """As many crossing strokes as cover the object about once."""
    size = simulation.size
    y, x = np.mgrid[:size, :size]
    thickness = np.zeros((size, size))
    for _ in range(size * 2 // 3):
        angle, centre = rng.uniform(0, np.pi), rng.uniform(0, size, 2)
        half_width, half_length = rng.uniform(1.0, 2.5), rng.uniform(size / 8, size / 2)
        along = (x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)
        across = (y - centre[1]) * np.cos(angle) - (x - centre[0]) * np.sin(angle)
        ends = np.clip((half_length - np.abs(along)) / 2, 0, 1)
        thickness += np.clip(1.5 - np.abs(across) / half_width, 0, 1) * ends
    return thickness


def _gaussian(simulation: Simulation, rng: np.random.Generator) -> Array:
    """A Gaussian random field whose power falls with the third power of the frequency."""
    q = np.fft.fftfreq(simulation.size)
    frequency = np.hypot(q[:, None], q)
    frequency[0, 0] = np.inf
    white = np.fft.fft2(rng.normal(size=frequency.shape))
    return np.asarray(np.fft.ifft2(white * frequency**-1.5).real)


def _dead_leaves(simulation: Simulation, rng: np.random.Generator) -> Array:
    """Discs that hide each other, of radii r distributed as r⁻³ (Lee, Mumford & Huang 2001)."""
    size = simulation.size
    smallest, largest = 2.0, size / 4
    thickness = np.full((size, size), np.nan)
    bare = thickness.size
    while bare:  # from the front to the back: a disc shows where nothing is yet
        share = rng.uniform()
        radius = (share * smallest**-2 + (1 - share) * largest**-2) ** -0.5
        centre, value = rng.uniform(-radius, size + radius, 2), rng.uniform()
        low, high = np.clip([centre - radius, centre + radius + 1], 0, size).astype(int)
        y, x = np.ogrid[low[0] : high[0], low[1] : high[1]]
        around = thickness[low[0] : high[0], low[1] : high[1]]
        shows = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2) & np.isnan(around)
        around[shows] = value
        bare -= int(shows.sum())
    return thickness


def _photo(simulation: Simulation, rng: np.random.Generator) -> Array:
    """A part of one of two photographs: objects of an even and of an odd seed have nothing in common."""
    try:
        from sklearn.datasets import load_sample_image

        photo = load_sample_image(("china.jpg", "flower.jpg")[simulation.seed % 2])
    except ImportError as error:
        raise DataProblem("object photo needs more packages: pip install scikit-learn pillow") from error
    top, left = (rng.integers(0, side - simulation.size + 1) for side in photo.shape[:2])
    return np.asarray(photo[top : top + simulation.size, left : left + simulation.size].mean(axis=2))


_OBJECTS: dict[str, Callable[[Simulation, np.random.Generator], Array]] = {
    "lines": _lines,
    "gaussian": _gaussian,
    "dead_leaves": _dead_leaves,
    "photo": _photo,
}
