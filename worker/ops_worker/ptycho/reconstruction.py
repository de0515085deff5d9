"""What comes of a training: whole objects by the network, by ePIE beside it, and how good either is."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ops_worker.ptycho.config import PtychoConfig
from ops_worker.ptycho.epie import epie
from ops_worker.ptycho.pictures import strip
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
    begun_s = time.perf_counter()
    stitched, coverage = _stitched(scan, patches_of, config.synchronise_phases)
    network_s = time.perf_counter()
    iterated = epie(scan, config.epie_iterations, scan.shape, seed)
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
    arrays: dict[str, Any] = _arrays(done)
    np.savez_compressed(out / "reconstruction.npz", **arrays)
    seconds = {f"{_PREFIXES[m]}{name}": taken for name, one in done.items() for m, taken in one.seconds.items()}
    (out / "seconds.json").write_text(json.dumps(seconds, indent=2) + "\n")
    for name, one in done.items():
        objects = [one.shown(method) for method in one.objects]
        for quantity, of in (("amplitude", np.abs), ("phase", np.angle)):
            Image.fromarray(strip(objects, one.truth, one.covered, of)).save(out / f"{name}-{quantity}.png")


def _stitched(
    scan: Scan, patches_of: Callable[[Tensor], Tensor], synchronise: bool
) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
    """All patterns, each by itself; a patch counts as much as there was light on it."""
    inputs = torch.from_numpy(scan.amplitudes).unsqueeze(1)
    parts = [patches_of(inputs[at : at + _PATTERNS_AT_ONCE]).cpu() for at in range(0, len(inputs), _PATTERNS_AT_ONCE)]
    patches = torch.cat(parts).squeeze(1).numpy()
    light = np.abs(scan.probe) ** 2 / np.max(np.abs(scan.probe) ** 2)
    return stitch(patches, scan.corners, np.where(light < _DARK, 0.0, light), scan.shape, synchronise)


def _arrays(done: Mapping[str, Reconstruction]) -> dict[str, NDArray[Any]]:
    """`train_object` complex, `train_amplitude`, `train_phase` in radians, `train_covered`, `epie_train_object`, …"""
    arrays: dict[str, NDArray[Any]] = {}
    for name, one in done.items():
        arrays[f"{name}_covered"] = one.covered
        for method, rebuilt in one.objects.items():
            of = f"{_PREFIXES[method]}{name}"
            arrays |= {f"{of}_object": rebuilt, f"{of}_amplitude": np.abs(rebuilt), f"{of}_phase": np.angle(rebuilt)}
    return arrays
