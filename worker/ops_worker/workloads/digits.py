"""Scikit-learn's handwritten digits: seconds to train, and every kind of state that a resume must get right."""

from collections.abc import Iterable
from hashlib import sha256
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from relight.workload import Workload

if find_spec("sklearn") is None:  # found out now, and not by the first attempt
    raise ModuleNotFoundError("it needs scikit-learn: pip install scikit-learn")

_TRAINING_IMAGES = 1536  # of 1797; a multiple of the usual batch sizes, so that BatchNorm never sees a batch of one


class DigitsConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    channels: int = Field(
        16, ge=1, le=1024, description="channels of the first convolution; the second has twice as many"
    )
    hidden: int = Field(64, ge=1, le=65536, description="width of the hidden layer")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of hidden units dropped")


class Digits(Workload[DigitsConfig]):
    """Handwritten digits: a small convolutional network on scikit-learn's 8 × 8 images."""

    Config = DigitsConfig
    reports: ClassVar[dict[str, Literal["min", "max"]]] = {"val_loss": "min", "val_accuracy": "max"}

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        from sklearn.datasets import load_digits  # takes a second; listing the workloads does not need it

        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.float32).div(16.0).unsqueeze(1)
        labels = torch.from_numpy(digits.target).to(torch.int64)
        self._digest = sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        split = _TRAINING_IMAGES
        return TensorDataset(images[:split], labels[:split]), TensorDataset(images[split:], labels[split:])

    def data_digest(self) -> str:
        return self._digest

    def model(self) -> nn.Module:
        channels, hidden = self.config.channels, self.config.hidden
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 16, hidden),
            nn.ReLU(),
            nn.Dropout(self.config.dropout),
            nn.Linear(hidden, 10),
        )

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        return F.cross_entropy(model(images), labels), {}

    def evaluate(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
        loss, right, images_seen = 0.0, 0, 0
        for images, labels in loader:
            logits = model(images)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(dim=1) == labels).sum())
            images_seen += len(labels)
        return {"val_loss": loss / images_seen, "val_accuracy": right / images_seen}
