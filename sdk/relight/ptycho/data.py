"""What a scan measured, and the file that it is kept in. Without torch."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# Positions in another unit than pixels would ask for an object of any size: this is 2 GB of complex64.
OBJECT_PIXELS_MAX = 2**28

# What zipfile and numpy raise for files that were cut short, changed or made to mislead.
_UNREADABLE = (ValueError, TypeError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class DataProblem(ValueError):
    """Data that cannot be used; the message names the file, the array and its shape."""


class _Kind(NamedTuple):
    of: str  # of numpy's dtype.kind
    kept_as: type
    said: str


_REQUIRED = {
    "probeGuess": _Kind("c", np.complex64, "complex numbers"),
    "diff3d": _Kind("f", np.float32, "floating-point numbers, the square roots of counts"),
    "xcoords": _Kind("fiu", np.float64, "real numbers, in pixels"),
    "ycoords": _Kind("fiu", np.float64, "real numbers, in pixels"),
}
_OPTIONAL = {
    "objectGuess": _Kind("c", np.complex64, "complex numbers"),
    "scan_index": _Kind("iu", np.int64, "integers"),
}
_KINDS = _REQUIRED | _OPTIONAL


@dataclass(frozen=True, eq=False)
class Scan:
    """M diffraction patterns of N × N pixels, and where each was taken.

    `positions` (M, 2) float64, (y, x) of the probe's centre in pixels of the object; `amplitudes` (M, N, N) float32,
    √counts, zero frequency in the middle; `probe` (N, N) complex64, its centre at pixel N // 2; `object` (H, W)
    complex64 where the truth is known; `scan_index` (M,) int64.
    """

    positions: Array
    amplitudes: Array
    probe: Array
    object: Array | None = None
    scan_index: Array | None = None

    @property
    def n(self) -> int:
        return int(self.probe.shape[0])

    @property
    def corners(self) -> Array:
        """(M, 2) int64: the first pixel of each patch of the object. A patch lies on whole pixels."""
        return np.round(self.positions).astype(np.int64) - self.n // 2

    @property
    def fractions(self) -> Array:
        """(M, 2) float64, at most half a pixel: by this the probe is off the middle of its patch."""
        return np.asarray(self.positions - np.round(self.positions))

    @property
    def shape(self) -> tuple[int, int]:
        """Of the object; where there is none, of the smallest that holds every patch."""
        height, width = self.corners.max(axis=0) + self.n if self.object is None else self.object.shape
        return int(height), int(width)

    @property
    def scale(self) -> float:
        """s² of counts = s²·|FFT(P·O)|²: such that an object of |O| = 1 has the mean count of the data.

        The orthonormal transform keeps the sum of squares (Parseval).
        """
        counts = np.square(self.amplitudes, dtype=np.float64)
        return float(counts.mean() / (np.abs(self.probe.astype(np.complex128)) ** 2).mean())

    def digest(self) -> str:
        """SHA-256 of all arrays, with their names, types and shapes."""
        digest = sha256()
        for name, array in _named(self).items():
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def first(self, n: int | None) -> "Scan":
        """Of the first n patterns alone."""
        index = None if self.scan_index is None else self.scan_index[:n]
        return replace(self, positions=self.positions[:n], amplitudes=self.amplitudes[:n], scan_index=index)


def load_scan(path: Path) -> Scan:
    """Raises DataProblem, and OSError where there is no such file.

    Without an object, positions may have any origin: they are moved by whole pixels, so that the patches begin at 0.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise DataProblem(f"{path} is no .npz file, or was cut short")
        file.seek(0)
        return _scan(path, _arrays(path, file))


def save_scan(path: Path, scan: Scan) -> None:
    """Atomically: whoever reads has the old file or the new one. Raises DataProblem, before anything is written."""
    arrays = _named(scan)
    _scan(path, arrays)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its own options have other names
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise


def overlap(scan: Scan) -> float:
    """1 - d/D (Bunk et al. 2008). Below 0 where neighbours do not touch.

    d is the median distance to the nearest other position, of the first 1000, and D the probe's diameter.
    """
    if len(scan.positions) < 2:
        return 0.0
    nearest = [np.partition(np.hypot(*(scan.positions - each).T), 1)[1] for each in scan.positions[:1000]]
    return 1 - float(np.median(nearest)) / probe_diameter(scan.probe)


def probe_diameter(probe: Array) -> float:
    """In pixels, of a disc as large as the probe's area (Σ|P|²)² / Σ|P|⁴."""
    intensity = np.abs(probe.astype(np.complex128)) ** 2
    return float(2 * np.sqrt(intensity.sum() ** 2 / (intensity**2).sum() / np.pi))


def _named(scan: Scan) -> dict[str, Array]:
    """As the file has them."""
    arrays: dict[str, Array | None] = {
        "xcoords": scan.positions[:, 1],
        "ycoords": scan.positions[:, 0],
        "diff3d": scan.amplitudes,
        "probeGuess": scan.probe,
        "objectGuess": scan.object,
        "scan_index": scan.scan_index,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def _arrays(path: Path, file: IO[bytes]) -> dict[str, Array]:
    """Those of the contract; what else the file has is not read."""
    name = ""
    try:
        with np.load(file, allow_pickle=False) as members:
            there = members.files
            if missing := [name for name in _REQUIRED if name not in there]:
                raise DataProblem(f"{path} has no array {', '.join(missing)}; it has {', '.join(there) or 'none'}")
            arrays = {}
            for name in [name for name in _KINDS if name in there]:
                arrays[name] = members[name]
            return arrays
    except DataProblem:
        raise
    except _UNREADABLE as error:
        raise DataProblem(f"{path}: {name or 'the file'} cannot be read: {error}") from error


def _scan(path: Path, arrays: Mapping[str, Array]) -> Scan:
    """Raises DataProblem where the arrays are not what the contract says, or do not fit each other."""
    arrays = {name: _of_kind(path, name, array) for name, array in arrays.items()}
    _check_shapes(path, arrays)
    _check_values(path, arrays)
    positions = np.stack([arrays["ycoords"], arrays["xcoords"]], axis=1)
    scan = Scan(positions, arrays["diff3d"], arrays["probeGuess"], arrays.get("objectGuess"), arrays.get("scan_index"))
    return _placed(path, scan)


def _of_kind(path: Path, name: str, array: Array) -> Array:
    kind = _KINDS[name]
    if not isinstance(array, np.ndarray):  # numpy gives the bytes of a member that is no array
        raise DataProblem(f"{path}: {name} is no array")
    if array.dtype.kind not in kind.of:
        raise _problem(path, name, array, f"it has to be of {kind.said}")
    with np.errstate(over="ignore"):  # is infinite then, and refused as such
        return array.astype(kind.kept_as, copy=False)


def _check_shapes(path: Path, arrays: Mapping[str, Array]) -> None:
    """M is how many patterns there are, N the side of the probe."""
    probe, patterns = arrays["probeGuess"], arrays["diff3d"]
    if probe.ndim != 2 or probe.shape[0] != probe.shape[1] or len(probe) < 2:
        raise _problem(path, "probeGuess", probe, "it has to be (N, N)")
    if patterns.ndim != 3 or patterns.shape[1:] != probe.shape or not len(patterns):
        n = len(probe)
        raise _problem(path, "diff3d", patterns, f"it has to be (M, {n}, {n}), as probeGuess is {probe.shape}")
    for name in ("xcoords", "ycoords", "scan_index"):
        if name in arrays and arrays[name].shape != (len(patterns),):
            wanted = f"it has to be ({len(patterns)},), as diff3d is {patterns.shape}"
            raise _problem(path, name, arrays[name], wanted)
    if "objectGuess" in arrays and arrays["objectGuess"].ndim != 2:
        raise _problem(path, "objectGuess", arrays["objectGuess"], "it has to be (H, W)")


def _check_values(path: Path, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        if not (finite := np.isfinite(array)).all():
            at = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise _problem(path, name, array, f"it is {array[at]} at {at}, and {(~finite).sum()} are not finite in all")
    if (patterns := arrays["diff3d"]).min() < 0:
        at = tuple(int(i) for i in np.unravel_index(patterns.argmin(), patterns.shape))
        raise _problem(path, "diff3d", patterns, f"it is {patterns[at]:g} at {at}; amplitudes are not negative")
    for name in ("diff3d", "probeGuess"):
        if not arrays[name].any():
            raise _problem(path, name, arrays[name], "it is 0 everywhere")


def _placed(path: Path, scan: Scan) -> Scan:
    """With every patch within the object."""
    if scan.object is None:
        origin = np.floor(scan.positions.min(axis=0) + 0.5) - scan.n // 2
        extent = np.ptp(scan.positions, axis=0) + scan.n
        if extent.prod() > OBJECT_PIXELS_MAX:
            spans = f"positions of {len(scan.positions)} patterns span {extent[0]:.0f} x {extent[1]:.0f} pixels"
            raise DataProblem(f"{path}: ycoords, xcoords: the {spans}; are they in another unit?")
        return replace(scan, positions=scan.positions - origin)
    outside = (scan.positions < -0.5) | (scan.positions > np.array(scan.object.shape) + 0.5)  # no integer holds 1e300
    if not outside.any():
        outside = (scan.corners < 0) | (scan.corners + scan.n > scan.object.shape)
    if outside.any():
        i = int(np.argmax(outside.any(axis=1)))
        y, x = scan.positions[i]
        patch = f"the patch of {scan.n} x {scan.n} pixels around ({y:g}, {x:g}), of pattern {i},"
        raise _problem(
            path, "objectGuess", scan.object, f"{patch} is not within it; without an object any origin will do"
        )
    return scan


def _problem(path: Path, name: str, array: Array, wanted: str) -> DataProblem:
    return DataProblem(f"{path}: {name} is {array.shape} of {array.dtype}; {wanted}")
