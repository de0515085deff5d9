"""The safetensors format, streamed: writing holds no second copy of the state, reading trusts no byte of it.

The `safetensors` package reads these files; its writer would first copy every tensor to `bytes`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the package's own limit
MAX_DIMENSIONS = 64  # torch's and numpy's own; the product of a million sizes would take hours


class TensorFileError(Exception):
    """The bytes are not a safetensors file; says what is wrong with them."""


def chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    """The file's bytes: header, then each tensor. A dtype that the format lacks goes as U8 with its bytes.

    Tensors must be dense in row-major order.
    """
    # Largest items first, as the package does: every tensor is then aligned to its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-_stored(item[1]).itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in ordered:
        stored = _stored(tensor)
        end = at + stored.nbytes
        header[name] = {"dtype": _NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        yield raw_bytes(tensor)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a dense tensor; of one on the CPU without a copy."""
    return flat(tensor).view(torch.uint8).numpy().data


def flat(tensor: Tensor) -> Tensor:
    """Its items on the CPU in one dimension of stride 1, whatever the strides of dimensions of one item or none."""
    return tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))


def parse(data: Tensor) -> dict[str, Tensor]:
    """Views into the file's bytes `data` (1-D uint8). Raises TensorFileError for anything malformed."""
    header, start = _header(data)
    named = {name: _Entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
    at = 0
    for entry in sorted(named.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != at:
            raise TensorFileError(f"tensor {entry.name!r} starts at byte {entry.begin}, not at {at}")
        at = entry.end
    if start + at != data.numel():
        raise TensorFileError(f"tensors end at byte {start + at} of {data.numel()}")
    return {name: entry.view(data[start + entry.begin : start + entry.end]) for name, entry in named.items()}


class _Entry:
    def __init__(self, name: str, entry: Any) -> None:
        self.name = name
        try:
            self.dtype = _DTYPES[entry["dtype"]]
            self.shape = [count(n) for n in entry["shape"]]
            self.begin, self.end = (count(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise TensorFileError(f"tensor {name!r} is not described in full: {error!r}") from error
        if len(self.shape) > MAX_DIMENSIONS:
            raise TensorFileError(f"tensor {name!r} has {len(self.shape)} dimensions")
        if self.end - self.begin != math.prod(self.shape) * self.dtype.itemsize:
            raise TensorFileError(f"tensor {name!r}: {self.end - self.begin} bytes are not its shape {self.shape}")

    def view(self, raw: Tensor) -> Tensor:
        """Copied only when a foreign writer left it unaligned."""
        aligned = raw if raw.storage_offset() % self.dtype.itemsize == 0 else raw.clone()
        return aligned.view(self.dtype).reshape(self.shape)


def _header(data: Tensor) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors start."""
    size = int.from_bytes(bytes(data[:8].numpy()), "little")
    if data.numel() < 8 or size > min(_MAX_HEADER_BYTES, data.numel() - 8):
        raise TensorFileError(f"a header of {size} bytes does not fit into a file of {data.numel()}")
    try:
        header = json.loads(bytes(data[8 : 8 + size].numpy()))
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise TensorFileError("the header is not a JSON object")
    return header, 8 + size


def count(value: Any) -> int:
    """A size, as a document says it. Raises ValueError for what is none."""
    if type(value) is not int or value < 0 or value >= 2**63:
        raise ValueError(f"{value!r} is not a size")
    return value


def _stored(tensor: Tensor) -> Tensor:
    """As the format can name it; keeps no data of its own."""
    if tensor.dtype in _NAMES:
        return tensor
    return torch.empty(tensor.numel() * tensor.itemsize, dtype=torch.uint8, device="meta")
