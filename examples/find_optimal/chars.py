"""How large a model of characters should be, for its FLOPs: found on the text of Python's own modules, in minutes."""

import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import relight

CONTEXT = 16


class Model(nn.Module):
    """The next byte from the last ones, by two layers over their embeddings."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.table = nn.Embedding(256, width)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(CONTEXT * width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, 256)
        )

    def forward(self, x):
        return self.layers(self.table(x))


def text():
    """Each sample is a context and the byte that follows it: one token."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"".join(module.read_bytes() for module in modules)[:1_000_000]
    windows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().unfold(0, CONTEXT + 1, 1)
    return TensorDataset(windows[:, :-1], windows[:, -1])


if __name__ == "__main__":
    found = relight.find_optimal(
        Model,
        "width",
        {"dropout": 0.0},
        dataset=text(),
        loss_fn=F.cross_entropy,
        compute_budgets=[1e9, 3e9, 1e10],
        train="--plan" not in sys.argv,
        output_dir="outputs",
        val_share=0.005,
        per_budget=5,
        execution={"batch_size": 64, "learning_rate": 3e-3, "scheduler": "cosine"},
        predict=[1e11],
    )
    print(found)
