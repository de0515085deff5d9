"""The workload: groups of diffraction patterns in, an object out. What it learns from is the physics alone."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ops_worker.ptycho.config import PtychoConfig
from ops_worker.ptycho.network import PatchNet
from ops_worker.ptycho.patterns import Groups, Patterns, prepare
from ops_worker.ptycho.physics import Diffraction, amplitude_error, deviance
from ops_worker.ptycho.reconstruction import metrics_of, reconstruct, table, write
from relight.ptycho.data import DataProblem, Scan
from relight.training.faults import TrainingFault
from relight.workload import Workload

_MEAN_INPUT = 0.25


class Ptycho(Workload[PtychoConfig]):
    """Ptychography: an object from overlapping diffraction patterns, by a network that is trained through the physics.

    `poisson_train_loss` is the deviance whatever the loss is, `poisson_val_loss` that of the points held out.
    """

    Config = PtychoConfig
    reports: ClassVar[dict[str, Literal["min", "max"]]] = {"poisson_val_loss": "min"}

    def data(self) -> tuple[Groups, Groups | None]:
        patterns = self._patterns
        held_out = Groups(patterns.scan, patterns.held_out) if len(patterns.held_out) else None
        return Groups(patterns.scan, patterns.training), held_out

    def data_digest(self) -> str:
        return self._patterns.digest()

    def model(self) -> "PtychoModel":
        return PtychoModel(self._patterns.scan, self.config)

    def units(self, batch: dict[str, Tensor]) -> int:
        """Patterns."""
        groups, patterns = batch["amplitudes"].shape[:2]
        return groups * patterns

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        amplitudes = batch["amplitudes"]
        intensities = model(amplitudes, batch["offsets"], batch["fractions"], self._patterns.canvas)
        poisson = deviance(intensities, amplitudes.double().square())
        loss = poisson if self.config.loss == "poisson" else amplitude_error(intensities, amplitudes)
        return loss, {"poisson_train_loss": poisson}

    def evaluate(self, model: nn.Module, loader: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        total, patterns = 0.0, 0
        for batch in loader:
            _, measured = self.loss(model, batch)
            total += float(measured["poisson_train_loss"]) * self.units(batch)
            patterns += self.units(batch)
        return {"poisson_val_loss": total / patterns}

    def finish(self, model: nn.Module, out: Path) -> Mapping[str, float]:
        """The object that it learned from and the one that it never saw, by the network and by ePIE beside it."""
        assert isinstance(model, PtychoModel)
        scans = {"train": self._patterns.scan, "test": self._patterns.unseen}
        done = {
            name: reconstruct(scan, model.patches, self.config, self.env.seed)
            for name, scan in scans.items()
            if scan is not None
        }
        write(done, out)
        print(table(done))
        return metrics_of(done)

    @cached_property
    def _patterns(self) -> Patterns:
        try:
            return prepare(self.config, self.env.seed)
        except DataProblem as problem:
            raise TrainingFault("bad_data", str(problem), permanent=True) from problem
        except (FileNotFoundError, PermissionError, IsADirectoryError) as problem:
            said = f"{problem.filename}: {problem.strerror}; give its absolute path, as workers see it"
            raise TrainingFault("bad_data", said, permanent=True) from problem


class PtychoModel(nn.Module):
    """Network and physics. Its buffers are the scales of one set of data: the network's input, and the photons."""

    input_scale: Tensor

    def __init__(self, scan: Scan, config: PtychoConfig) -> None:
        super().__init__()
        amplitudes = scan.amplitudes
        mean = float(amplitudes.mean(dtype="float64"))
        # Statistical, and nothing to do with the physical scale of the photons below.
        self.register_buffer("input_scale", torch.tensor(_MEAN_INPUT / mean))
        self.network = PatchNet(config.width)
        self.diffraction = Diffraction(scan.probe, scan.scale, config.mask_threshold)

    def forward(self, amplitudes: Tensor, offsets: Tensor, fractions: Tensor, canvas: int) -> Tensor:
        """√counts (B, C, N, N), (B, C, 2), (B, C, 2) → expected counts (B, C, N, N) float64."""
        intensities: Tensor = self.diffraction(self.patches(amplitudes), offsets, fractions, canvas)
        return intensities

    def patches(self, amplitudes: Tensor) -> Tensor:
        """√counts (B, C, N, N), on any device → the object's patches (B, C, N, N) complex64, on the model's."""
        patches: Tensor = self.network(amplitudes.to(self.input_scale.device) * self.input_scale)
        return patches
