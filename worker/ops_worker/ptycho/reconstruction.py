"""What comes of a training: whole objects by the network, by ePIE beside it, and how good either is."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ops_worker.ptycho.config import PtychoConfig
from ops_worker.ptycho.epie import epie
from ops_worker.ptycho.pictures import strip, write_png
from ops_worker.ptycho.scores import aligned, scores
from ops_worker.ptycho.stitching import stitch
from relight.ptycho.data import Scan

_PATTERNS_AT_ONCE = 256
_DARK = 0.01  # of the probe's largest intensity: where it is less, a patch is not stitched
_COVERED = 0.05  # of the light on the best lit pixel
_PREFIXES = {"network": "", "epie": "epie_"}

Object = NDArray[np.complex64]


@dataclass(frozen=True)
class Reconstruction:
    """Objects (H, W) and seconds by method, "network" and "epie". `covered` (H, W) is where there was light enough."""

    objects: dict[str, Object]
    seconds: dict[str, float]
    covered: NDArray[np.bool_]
    truth: Object | None

    def scores(self, method: str) -> dict[str, float]:
        """Empty where the truth is not known."""
        return {} if self.truth is None else scores(self.objects[method], self.truth, self.covered)

    def shown(self, method: str) -> Object:
        """Without the plane, phase and scale that no pattern tells, where the truth does."""
        rebuilt = self.objects[method]
        return rebuilt if self.truth is None else aligned(rebuilt, self.truth, self.covered)


def reconstruct(scan: Scan, patches_of: Callable[[Tensor], Tensor], config: PtychoConfig, seed: int) -> Reconstruction:
    """`patches_of`: √counts (P, 1, N, N) → patches of the same shape."""
    scan, shape = _framed(scan)
    begun_s = time.perf_counter()
    stitched, coverage = _stitched(scan, patches_of, shape, config.synchronise_phases)
    network_s = time.perf_counter()
    iterated = epie(scan, config.epie_iterations, shape, seed)
    epie_s = time.perf_counter()
    return Reconstruction(
        objects={"network": stitched.astype(np.complex64), "epie": iterated.astype(np.complex64)},
        seconds={"network": network_s - begun_s, "epie": epie_s - network_s},
        covered=coverage > _COVERED * coverage.max(),
        truth=scan.object,
    )


def metrics_of(done: Mapping[str, Reconstruction]) -> dict[str, float]:
    """Scores, without seconds: an attempt that has to do this again takes others, and its metrics must be the same."""
    return {
        f"{_PREFIXES[method]}{name}_{score}": value
        for name, one in done.items()
        for method in one.objects
        for score, value in one.scores(method).items()
    }


def table(done: Mapping[str, Reconstruction]) -> str:
    """The network beside ePIE, for people."""
    lines = [f"{'':28}{'network':>10}{'ePIE':>10}"]
    for name, one in done.items():
        network, iterated = (one.scores(method) | {"seconds": one.seconds[method]} for method in one.objects)
        lines += [f"{f'{name} {score}':28}{network[score]:10.4f}{iterated[score]:10.4f}" for score in network]
    return "\n".join(lines)


def write(done: Mapping[str, Reconstruction], out: Path) -> None:
    """`reconstruction.npz`, `seconds.json`, and of each object and quantity a picture."""
    np.savez_compressed(out / "reconstruction.npz", **_arrays(done))
    seconds = {f"{_PREFIXES[m]}{name}": taken for name, one in done.items() for m, taken in one.seconds.items()}
    (out / "seconds.json").write_text(json.dumps(seconds, indent=2) + "\n")
    for name, one in done.items():
        objects = [one.shown(method) for method in one.objects]
        for quantity, of in (("amplitude", np.abs), ("phase", np.angle)):
            write_png(out / f"{name}-{quantity}.png", strip(objects, one.truth, one.covered, of))


def _framed(scan: Scan) -> tuple[Scan, tuple[int, int]]:
    """The scan, and the shape of its object. Where none is known, positions count from the first patch's corner."""
    if scan.object is not None:
        rows, columns = scan.object.shape
        return scan, (rows, columns)
    first = _corners(scan).min(axis=0)
    framed = replace(scan, positions=scan.positions - first)
    rows, columns = _corners(framed).max(axis=0) + len(scan.probe)
    return framed, (int(rows), int(columns))


def _stitched(
    scan: Scan, patches_of: Callable[[Tensor], Tensor], shape: tuple[int, int], synchronise: bool
) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
    """All patterns, each by itself; a patch counts as much as there was light on it."""
    parts = torch.from_numpy(scan.amplitudes).unsqueeze(1).split(_PATTERNS_AT_ONCE)
    patches = torch.cat([patches_of(part).squeeze(1).cpu() for part in parts]).numpy()
    light = np.abs(scan.probe) ** 2 / np.max(np.abs(scan.probe) ** 2)
    return stitch(patches, _corners(scan), np.where(light < _DARK, 0.0, light), shape, synchronise)


def _corners(scan: Scan) -> NDArray[np.int64]:
    return np.rint(scan.positions).astype(np.int64) - len(scan.probe) // 2


def _arrays(done: Mapping[str, Reconstruction]) -> dict[str, NDArray[Any]]:
    """`train_object` complex, `train_amplitude`, `train_phase` in radians, `train_covered`, `epie_train_object`, …"""
    arrays: dict[str, NDArray[Any]] = {}
    for name, one in done.items():
        arrays[f"{name}_covered"] = one.covered
        for method, rebuilt in one.objects.items():
            of = f"{_PREFIXES[method]}{name}"
            arrays |= {f"{of}_object": rebuilt, f"{of}_amplitude": np.abs(rebuilt), f"{of}_phase": np.angle(rebuilt)}
    return arrays
