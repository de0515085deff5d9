"""A small GPT on the bytes of Python's own standard library: real text that every machine already has."""

import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from relight.workload import Workload

_VOCABULARY = 256
_NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})


class ByteLMConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    max_bytes: int = Field(
        1_000_000, ge=1, description="length of the corpus, from its start; there are about twelve million"
    )
    validation_share: float = Field(0.05, ge=0, lt=1, description="share of the corpus, from its end, held out")
    validation_bytes: int | None = Field(
        None, ge=1, description="at most so many bytes are held out: a short training would only evaluate else"
    )
    block_size: int = Field(64, ge=1, le=65536, description="bytes of context")
    n_layer: int = Field(2, ge=1, le=1000, description="transformer blocks")
    n_head: int = Field(4, ge=1, le=1000, description="attention heads; divides d_model")
    d_model: int = Field(
        64,
        ge=1,
        le=65536,
        description="width; (256 + block_size) · d_model parameters are embeddings, for the positions are learned and "
        "the head is the embedding",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share dropped in attention and after each sublayer")

    @model_validator(mode="after")
    def _whole_heads(self) -> "ByteLMConfig":
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}")
        return self


class ByteLM(Workload[ByteLMConfig]):
    """Byte-level language model: a small GPT on the source of Python's standard library."""

    Config = ByteLMConfig

    def data(self) -> tuple["Windows", "Windows"]:
        corpus = standard_library_source(self.config.max_bytes)
        self._digest = sha256(corpus).hexdigest()
        held_out = int(len(corpus) * self.config.validation_share)
        split = len(corpus) - min(held_out, self.config.validation_bytes or held_out)
        block = self.config.block_size
        return Windows(corpus[:split], block), Windows(corpus[split:], block)

    def data_digest(self) -> str:
        return self._digest

    def model(self) -> nn.Module:
        return GPT(self.config)

    def units(self, batch: Tensor) -> int:
        """Predicted bytes."""
        return batch.shape[0] * (batch.shape[1] - 1)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats per byte; `batch` is (windows, block_size + 1) of uint8."""
        tokens = batch.long()
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), {}


class Windows(Dataset[Tensor]):
    """Consecutive windows of `block + 1` bytes; the last byte of one is the first of the next."""

    def __init__(self, text: bytes, block: int) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        self.block = block

    def __len__(self) -> int:
        return max(0, (len(self.text) - 1) // self.block)

    def __getitem__(self, index: int) -> Tensor:
        return self.text[index * self.block : (index + 1) * self.block + 1]


class GPT(nn.Module):
    """Pre-norm, causal, learned positions; the head is the embedding."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, config.d_model)
        self.positions = nn.Embedding(config.block_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, _VOCABULARY, bias=False)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(windows, length) of int64 → (windows, length, 256) logits."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        width = config.d_model
        self.heads = config.n_head
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.projection(self._attend(self.attention_norm(x))))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _attend(self, x: Tensor) -> Tensor:
        windows, length, width = x.shape
        q, k, v = self.qkv(x).view(windows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).reshape(windows, length, width)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def standard_library_source(max_bytes: int) -> bytes:
    """The first bytes of its modules without tests and installed packages: top-level ones by name, then packages.

    It differs between Python versions; its digest is recorded.
    """
    corpus = bytearray()
    for path in _modules(Path(sysconfig.get_paths()["stdlib"])):
        corpus += path.read_bytes()
        if len(corpus) >= max_bytes:
            break
    return bytes(corpus[:max_bytes])


def _modules(directory: Path) -> Iterator[Path]:
    entries = sorted(directory.iterdir(), key=lambda path: path.name)
    yield from (path for path in entries if path.suffix == ".py" and path.is_file())
    for path in entries:
        if path.name not in _NOT_THE_LIBRARY and path.is_dir():
            yield from _modules(path)
