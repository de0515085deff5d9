"""The data of a run: whose patterns, in which groups, and where those lie."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ops_worker.ptycho.config import PtychoConfig
from ops_worker.ptycho.grouping import group, split
from ops_worker.ptycho.network import MULTIPLE
from relight.ptycho.data import DataProblem, Scan, load_scan
from relight.ptycho.simulation import Simulation, simulate


@dataclass(frozen=True)
class Patterns:
    """`training` and `held_out` are groups, (G, C) numbers of patterns of `scan`; no pattern is in both."""

    scan: Scan
    unseen: Scan | None
    training: NDArray[np.int64]
    held_out: NDArray[np.int64]

    @cached_property
    def canvas(self) -> int:
        """Pixels across, with room for the widest group."""
        reach = max(int(np.abs(offsets(self.scan, members)).max(initial=0)) for members in self._members)
        return self.scan.n + 2 * reach

    def digest(self) -> str:
        scans = [scan.digest() for scan in (self.scan, self.unseen) if scan is not None]
        return sha256("".join(scans).encode() + b"".join(members.tobytes() for members in self._members)).hexdigest()

    @property
    def _members(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.training, self.held_out


def prepare(config: PtychoConfig, seed: int) -> Patterns:
    """Raises DataProblem and OSError."""
    scan = _scan(config.train_data_file, config.simulate)
    assert scan is not None  # the config has one of the two
    scan = scan.first(config.n_images)
    unseen = _scan(config.test_data_file, config.simulate_test)
    _check(scan, unseen)
    kept, held_out = split(scan.positions, config.validation_fraction, seed)
    if config.gridsize > 1 and 0 < len(held_out) <= config.neighbor_count:
        raise DataProblem(
            f"validation_fraction {config.validation_fraction:g} holds out {len(held_out)} of {len(scan.positions)} "
            f"points, and neighbor_count {config.neighbor_count} needs more of them; or hold out none, with 0"
        )

    def grouped(points: NDArray[np.int64], n_groups: int) -> NDArray[np.int64]:
        knobs = (config.gridsize, config.neighbor_count, n_groups, seed, config.enable_oversampling)
        return points[group(scan.positions[points], *knobs)]

    return Patterns(
        scan=scan,
        unseen=unseen,
        training=grouped(kept, config.n_groups),
        held_out=grouped(held_out, len(held_out)) if len(held_out) else np.empty((0, config.gridsize**2), np.int64),
    )


def _check(scan: Scan, unseen: Scan | None) -> None:
    if scan.n % MULTIPLE:
        raise DataProblem(
            f"probeGuess is {scan.probe.shape}; the network takes patterns of a multiple of {MULTIPLE} pixels"
        )
    if unseen is not None and unseen.n != scan.n:
        raise DataProblem(
            f"probeGuess is {scan.probe.shape} of the training data, but {unseen.probe.shape} of the test data"
        )


class Groups:
    """An item is one group: amplitudes (C, N, N) float32, offsets (C, 2) int64, fractions (C, 2) float32."""

    def __init__(self, scan: Scan, members: NDArray[np.int64]) -> None:
        self._amplitudes = torch.from_numpy(scan.amplitudes)
        self._members = torch.from_numpy(members)
        self._offsets = torch.from_numpy(offsets(scan, members))
        self._fractions = torch.from_numpy(scan.fractions.astype(np.float32))

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        members = self._members[index]
        return {
            "amplitudes": self._amplitudes[members],
            "offsets": self._offsets[index],
            "fractions": self._fractions[members],
        }


def offsets(scan: Scan, members: NDArray[np.int64]) -> NDArray[np.int64]:
    """(G, C, 2) whole pixels of each pattern from the middle of its group."""
    corners = scan.corners[members]
    return np.asarray(corners - np.round(corners.mean(axis=1, keepdims=True)).astype(np.int64))


def _scan(file: str | None, simulation: Simulation | None) -> Scan | None:
    if simulation is not None:
        return simulate(simulation)
    return None if file is None else load_scan(Path(file))
