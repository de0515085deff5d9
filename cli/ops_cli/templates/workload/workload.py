"""What to train. Relight owns the loop, so that a resume is exact; put your model, data and loss in place of these."""

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from relight import Workload


class Config(BaseModel):
    """The settings: `--set config.hidden=64`. A mistyped one is refused."""

    model_config = ConfigDict(extra="forbid")

    hidden: int = Field(32, ge=1, description="width of the hidden layer")
    noise: float = Field(0.1, ge=0, description="standard deviation of what is added to each sample")


class Points:
    """Points on a sine. An item follows from its index; what it draws at random is seeded for each item."""

    def __init__(self, n: int, noise: float) -> None:
        self.x = torch.linspace(-3.0, 3.0, n).unsqueeze(1)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        return x, torch.sin(2 * x) + self.noise * torch.randn(1)


class Mine(Workload[Config]):
    """A small network that learns a sine."""

    Config = Config

    def data(self) -> tuple[Points, Points]:
        return Points(1024, self.config.noise), Points(128, 0.0)

    def model(self) -> nn.Module:
        hidden = self.config.hidden
        return nn.Sequential(
            nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        return nn.functional.mse_loss(model(x), y), {}
