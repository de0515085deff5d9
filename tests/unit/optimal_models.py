"""Models, data and losses for the tests of `find_optimal`, by names too."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import relight

SYMBOLS, LENGTH = 16, 8
BUDGETS = [4e6, 8e6]
WIDTHS = [4, 6, 8]
KNOBS = {"learning_rate": 1e-2, "threads": 1, "batch_size": 8}


class Net(nn.Module):
    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.table = nn.Embedding(SYMBOLS, width)
        self.hidden = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.dropout(torch.relu(self.hidden(self.table(tokens)))))
        return out


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def data(samples: int = 2000) -> TensorDataset:
    """Each symbol follows from the one before, but for a little noise."""
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(SYMBOLS, (samples, LENGTH + 1), generator=drawn)
    noise = torch.randint(2, tokens.shape, generator=drawn)
    for i in range(1, LENGTH + 1):
        tokens[:, i] = (3 * tokens[:, i - 1] + noise[:, i]) % SYMBOLS
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def find(output_dir: Path | str, **changes: Any) -> Any:
    given = {
        "model_cls": Net,
        "model_size_param": "width",
        "model_kwargs": {"dropout": 0.1},
        "dataset": data(),
        "loss_fn": cross_entropy,
        "compute_budgets": BUDGETS,
        "model_sizes": WIDTHS,
        "output_dir": output_dir,
        "execution": KNOBS,
    }
    return relight.find_optimal(**given | changes)


class Dying(nn.Module):
    """A loss with which the process gets a signal at its n-th call; what it is does not depend on the two."""

    calls = 0
    names = frozenset(("left", "right", "both"))  # in no order that two processes share

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        Dying.calls += 1
        if Dying.calls == int(os.environ["DIE_AT"]):
            os.kill(os.getpid(), int(os.environ["DIE_BY"]))
        return cross_entropy(output, target)


def dying(output_dir: Path | str, at: int, by: int) -> Any:
    os.environ |= {"DIE_AT": str(at), "DIE_BY": str(int(by))}
    Dying.calls = 0
    knobs = KNOBS | {"checkpoint_every": {"steps": 10}}
    return find(output_dir, loss_fn=Dying(), model_sizes=WIDTHS[:2], execution=knobs)
