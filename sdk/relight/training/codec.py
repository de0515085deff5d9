"""State trees <-> tensors and tagged JSON, every bit kept. No pickle: reading a checkpoint runs no code.

A tree nests dicts, lists, tuples and sets of None, bool, int, float, complex, str, bytes, numpy arrays and scalars,
tensors, and `Sharded` for those whose parts lie elsewhere. Whatever JSON cannot say is an object whose key "$" names
its type. A tensor is
`{"$": "tensor", "of": name, "dtype", "shape", "stride", "offset"}`: a view of the stored tensor `name`, offset and
strides in items of `dtype`. Tensors that share memory are views of one, so tied tensors come back tied.
"""

import base64
import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from relight.training.tensorfile import MAX_DIMENSIONS, count, flat, raw_bytes

_MAX_DEPTH = 100


@dataclass(frozen=True)
class Sharded:
    """A tensor that is divided among ranks: this is its place in the tree. `dtype` is torch's name of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class CodecError(Exception):
    """A value that cannot be kept, or a document that does not say one. Names the path of it."""


@dataclass(frozen=True)
class Encoded:
    """`document` is JSON; `tensors` are dense and share memory with the live state: write or copy before it changes.

    `shown_at` has every path of the tree at which a stored tensor's memory is seen.
    """

    document: bytes
    tensors: dict[str, Tensor]
    shown_at: dict[str, list[str]]


def encode(tree: Any) -> Encoded:
    """Raises CodecError naming the first value of a type it does not know."""
    encoder = _Encoder()
    document = encoder.value(tree, "", 0)
    tensors = encoder.place()
    return Encoded(json.dumps(document).encode(), tensors, encoder.shown_at)


def decode(document: bytes, tensors: Mapping[str, Tensor]) -> Any:
    """The tree, on the CPU, in memory of its own. Raises CodecError on anything malformed."""
    try:
        parsed = json.loads(document, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"the document is not JSON: {error}") from error
    return _Decoder(tensors).value(parsed, "", 0)


def digests(encoded: Encoded) -> dict[str, str]:
    """What stands at each path, tensors by the SHA-256 of their bytes: equal digests are equal bits."""
    contents = {name: sha256(raw_bytes(tensor)).hexdigest() for name, tensor in encoded.tensors.items()}
    found: dict[str, str] = {}

    def visit(value: Any, path: str) -> None:
        tag = value.get("$", "dict") if isinstance(value, dict) else None
        if tag in ("tensor", "ndarray"):
            found[path] = f"{json.dumps(value)} {contents[value['of']]}"
        elif tag in ("dict", "OrderedDict", "Counter"):
            for key, part in value["items"] if "$" in value else value.items():
                visit(part, _join(path, key))
        elif tag in ("tuple", "set", "frozenset"):
            visit(value["items"], path)
        elif isinstance(value, list):
            for i, part in enumerate(value):
                visit(part, _join(path, i))
        else:
            found[path] = json.dumps(value)

    visit(json.loads(encoded.document), "")
    return found


class _Encoder:
    def __init__(self) -> None:
        self._leaves: list[tuple[str, Tensor, dict[str, Any]]] = []
        self._stored: dict[str, Tensor] = {}
        self.shown_at: dict[str, list[str]] = {}

    def value(self, value: Any, path: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise CodecError(f"{path or 'state'}: nested deeper than {_MAX_DEPTH}, or within itself")
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if value.bit_length() < 64 else {"$": "int", "hex": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "bits": struct.pack(">d", value).hex()}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(value, path)
        if kind in (list, tuple, set, frozenset, dict, OrderedDict, Counter):
            return self._container(value, path, depth)
        if kind is Sharded:
            return {"$": "sharded", "of": value.name, "shape": list(value.shape), "dtype": value.dtype}
        if kind is complex:
            return {"$": "complex", "bits": struct.pack(">2d", value.real, value.imag).hex()}
        if kind is bytes or kind is bytearray:
            return {"$": kind.__name__, "base64": base64.b64encode(value).decode()}
        raise CodecError(
            f"{path or 'state'}: cannot keep a {kind.__module__}.{kind.__qualname__}; "
            "give tensors, numpy arrays, numbers, strings, lists, tuples, sets or dicts of them"
        )

    def _container(self, value: Any, path: str, depth: int) -> Any:
        if isinstance(value, dict):
            return self._mapping(value, path, depth)
        items = [self.value(item, _join(path, i), depth + 1) for i, item in enumerate(value)]
        if isinstance(value, list):
            return items
        if isinstance(value, (set, frozenset)):
            items.sort(key=json.dumps)  # sets of strings are in another order in every process
        return {"$": type(value).__name__, "items": items}

    def _mapping(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        if type(value) is dict and all(type(key) is str and key != "$" for key in value):
            return {key: self.value(item, _join(path, key), depth + 1) for key, item in value.items()}
        pairs = [
            [self.value(key, f"{path} key", depth + 1), self.value(item, _join(path, key), depth + 1)]
            for key, item in value.items()
        ]
        return {"$": type(value).__name__, "items": pairs}

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise CodecError(
                f"{path or 'state'}: cannot keep a {tensor.layout} tensor on {tensor.device} of {tensor.dtype}"
            )
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise CodecError(f"{path or 'state'}: cannot keep a {type(tensor).__qualname__}; give a plain tensor")
        plain = tensor.detach().resolve_conj().resolve_neg()
        record: dict[str, Any] = {"$": "tensor"}
        self._leaves.append((path, plain, record))
        return record

    def _array(self, value: Any, path: str) -> dict[str, Any]:
        array = np.asarray(value)
        if array.dtype.kind not in "biufcSUmM" or type(value) not in (np.ndarray, type(array[()])):
            raise CodecError(
                f"{path or 'state'}: cannot keep a {type(value).__qualname__} of numpy dtype {array.dtype}"
            )
        order: Literal["F", "C"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        raw = torch.from_numpy(np.frombuffer(bytearray(array.tobytes(order)), dtype=np.uint8))
        return {
            "$": "ndarray",
            "of": self._store(path, raw),
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "order": order,
            "scalar": isinstance(value, np.generic),
        }

    def place(self) -> dict[str, Tensor]:
        """Store each piece of memory once, under the first path that shows it, and point every record at it."""
        shared: dict[Any, list[tuple[str, Tensor, dict[str, Any]]]] = {}
        for leaf in self._leaves:
            tensor = leaf[1]
            pointer = tensor.untyped_storage().data_ptr()
            # Empty tensors have no memory to share; their null pointers would make them all one.
            key = (tensor.device, pointer) if tensor.numel() else id(leaf)
            shared.setdefault(key, []).append(leaf)
        for leaves in shared.values():
            cover, start_bytes = _cover([tensor for _, tensor, _ in leaves])
            name = self._store(leaves[0][0], cover)
            self.shown_at[name] = [path for path, _, _ in leaves]
            for _, tensor, record in leaves:
                offset_bytes = tensor.storage_offset() * tensor.itemsize - start_bytes
                record.update(
                    of=name,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    shape=list(tensor.shape),
                    stride=list(tensor.stride()),
                    offset=offset_bytes // tensor.itemsize,
                )
        return self._stored

    def _store(self, path: str, tensor: Tensor) -> str:
        """Under its path; {"a.b": x} and {"a": {"b": y}} have the same, so the second gets a suffix."""
        name, n = path or "value", 1
        while name in self._stored or name == "__metadata__":
            n += 1
            name = f"{path}#{n}"
        self._stored[name] = tensor
        return name


def _cover(views: list[Tensor]) -> tuple[Tensor, int]:
    """A dense tensor with all that the views of one storage show, and the byte of the storage where it starts.

    Keeps shape and dtype where it can, so that the file of a plain model reads like one.
    """
    first = views[0]
    if first.is_contiguous() and all(_same_view(first, other) for other in views):
        return first, int(first.storage_offset()) * first.itemsize
    starts = [int(view.storage_offset()) * view.itemsize for view in views]
    ends = [(int(view.storage_offset()) + _reach(view.shape, view.stride()) + 1) * view.itemsize for view in views]
    several = any(view.dtype is not first.dtype for view in views)
    unit = torch.uint8 if several else first.dtype
    start = min(starts) // 16 * 16 if several else min(starts)  # aligned for every view's dtype
    length = (max(ends) - start) // unit.itemsize
    span = first.new_empty(0, dtype=unit)
    return span.set_(first.untyped_storage(), start // unit.itemsize, (length,), (1,)), start


def _same_view(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.storage_offset(), a.shape, a.stride()) == (b.dtype, b.storage_offset(), b.shape, b.stride())


def _reach(shape: Iterable[int], stride: Iterable[int]) -> int:
    """The last item that a view touches, counted from its offset."""
    return sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._stored = dict(tensors)
        self._copies: dict[str, Tensor] = {}
        self._tags: dict[str, Callable[[dict[str, Any], str, int], Any]] = {
            "int": lambda v, path, depth: int(_text(v, "hex"), 16),
            "float": lambda v, path, depth: struct.unpack(">d", bytes.fromhex(_text(v, "bits")))[0],
            "complex": lambda v, path, depth: complex(*struct.unpack(">2d", bytes.fromhex(_text(v, "bits")))),
            "bytes": lambda v, path, depth: base64.b64decode(_text(v, "base64"), validate=True),
            "bytearray": lambda v, path, depth: bytearray(base64.b64decode(_text(v, "base64"), validate=True)),
            "tuple": lambda v, path, depth: tuple(self._items(v, path, depth)),
            "set": lambda v, path, depth: set(self._items(v, path, depth)),
            "frozenset": lambda v, path, depth: frozenset(self._items(v, path, depth)),
            "dict": lambda v, path, depth: dict(self._pairs(v, path, depth)),
            "OrderedDict": lambda v, path, depth: OrderedDict(self._pairs(v, path, depth)),
            "Counter": lambda v, path, depth: Counter(dict(self._pairs(v, path, depth))),
            "tensor": lambda v, path, depth: self._tensor(v),
            "ndarray": lambda v, path, depth: self._array(v),
            "sharded": lambda v, path, depth: _sharded(v),
        }

    def value(self, value: Any, path: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise CodecError(f"{path or 'state'}: nested deeper than {_MAX_DEPTH}")
        if isinstance(value, list):
            return [self.value(item, _join(path, i), depth + 1) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if "$" not in value:
            return {key: self.value(item, _join(path, key), depth + 1) for key, item in value.items()}
        return self._tagged(value, path, depth)

    def _tagged(self, value: dict[str, Any], path: str, depth: int) -> Any:
        tag = value["$"]
        if not isinstance(tag, str) or tag not in self._tags:
            raise CodecError(f"{path or 'state'}: unknown type {tag!r}")
        try:
            return self._tags[tag](value, path, depth)
        except (KeyError, TypeError, ValueError, struct.error, RuntimeError, OverflowError) as error:
            raise CodecError(f"{path or 'state'}: not a {tag}: {error}") from error

    def _items(self, value: dict[str, Any], path: str, depth: int) -> list[Any]:
        return [self.value(item, _join(path, i), depth + 1) for i, item in enumerate(_list(value, "items"))]

    def _pairs(self, value: dict[str, Any], path: str, depth: int) -> list[tuple[Any, Any]]:
        decoded = []
        for key, item in _list(value, "items"):
            name = self.value(key, f"{path} key", depth + 1)
            decoded.append((name, self.value(item, _join(path, name), depth + 1)))
        return decoded

    def _tensor(self, record: dict[str, Any]) -> Tensor:
        dtype = dtype_named(_text(record, "dtype"))
        shape, stride, offset = _counts(record["shape"]), _counts(record["stride"]), count(record["offset"])
        if len(shape) != len(stride):
            raise ValueError(f"shape {shape} and strides {stride} differ in length")
        stored = self._memory(_text(record, "of")).view(torch.uint8)
        # Of views of several dtypes the last may end within an item of another.
        items = stored[: len(stored) // dtype.itemsize * dtype.itemsize].view(dtype)
        if math.prod(shape) and offset + _reach(shape, stride) >= items.numel():
            raise ValueError(f"shape {shape}, strides {stride} from {offset} reach past {items.numel()} items")
        return items.as_strided(shape, stride, offset)

    def _array(self, record: dict[str, Any]) -> Any:
        dtype = np.dtype(_text(record, "dtype"))
        # Of items without bytes there may be any number in none.
        if dtype.kind not in "biufcSUmM" or dtype.itemsize == 0:
            raise ValueError(f"numpy dtype {dtype}")
        shape, order = _counts(record["shape"]), _text(record, "order")
        if order not in ("C", "F"):
            raise ValueError(f"order {order!r}")
        # Stored for this one alone: a short document could copy a large array any number of times.
        raw = raw_bytes(self._stored.pop(_text(record, "of")))
        if raw.nbytes != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{raw.nbytes} bytes are not shape {shape} of {dtype}")
        array = np.ndarray(shape, dtype, buffer=raw, order="F" if order == "F" else "C").copy(order="K")
        return array[()] if record["scalar"] is True else array

    def _memory(self, name: str) -> Tensor:
        """One copy for all views of it, flat."""
        if name not in self._copies:
            self._copies[name] = flat(self._stored[name]).clone()
        return self._copies[name]


def dtype_named(name: str) -> torch.dtype:
    """Raises ValueError for what is none."""
    dtype = vars(torch).get(name)  # getattr would import what torch loads by name
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    return dtype


def _sharded(record: dict[str, Any]) -> Sharded:
    dtype_named(_text(record, "dtype"))
    return Sharded(_text(record, "of"), tuple(_counts(record["shape"])), _text(record, "dtype"))


def _join(path: str, key: Any) -> str:
    if isinstance(key, str):
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def _text(record: dict[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise TypeError(f"{key} is not text")
    return str(record[key])


def _list(record: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(record[key], list):
        raise TypeError(f"{key} is not a list")
    return list(record[key])


def _counts(values: Any) -> list[int]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list of sizes")
    if len(values) > MAX_DIMENSIONS:
        raise ValueError(f"{len(values)} dimensions")
    return [count(value) for value in values]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
