"""How large a model of characters should be, for its FLOPs: found on the text of Python's own modules, in a minute."""

import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import relight

CONTEXT, LENGTH = 8, 64


class Model(nn.Module):
    """Each byte from the eight before it: a causal convolution over their embeddings."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.table = nn.Embedding(256, width)
        self.mix = nn.Conv1d(width, 4 * width, CONTEXT)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv1d(4 * width, 256, 1)

    def forward(self, x):
        """(batch, length) → (batch, 256, length) logits, as cross_entropy takes them."""
        past = F.pad(self.table(x).transpose(1, 2), (CONTEXT - 1, 0))
        return self.head(self.dropout(F.gelu(self.mix(past))))


def text():
    """Windows of bytes, and for each byte the one that follows it."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"".join(module.read_bytes() for module in modules)
    windows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().unfold(0, LENGTH + 1, LENGTH)
    return TensorDataset(windows[:, :-1], windows[:, 1:])


if __name__ == "__main__":
    found = relight.find_optimal(
        Model,
        "width",
        {"dropout": 0.0},
        dataset=text(),
        loss_fn=F.cross_entropy,
        compute_budgets=[3e9, 1e10, 3e10],
        train="--plan" not in sys.argv,
        output_dir="outputs",
        val_share=0.01,
        per_budget=5,
        execution={"batch_size": 16, "learning_rate": 3e-3, "scheduler": "cosine"},
        predict=[1e12],
    )
    print(found)
