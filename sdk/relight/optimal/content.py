"""What live objects are, as digests that are the same in every process: code as it was compiled, values as they are.

Of functions and classes outside of installed packages everything counts that they refer to there: what they call, the
globals and closures that they use, and whole modules by their files. Of an installed package only the names count.
"""

import functools
import logging
import site
import sys
import sysconfig
from argparse import Namespace
from collections.abc import Iterable, Mapping, Set
from enum import Enum
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from relight.training.randomness import seed_everything
from relight.training.source import source_files

MOST_SAMPLES = 64  # read of a data set that is not in memory
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, Path)
_VALUES = (tuple, frozenset, CodeType)  # whether equal ones are one object is the compiler's and the loader's to say
_NOT_OF_A_CLASS = (
    {"__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__orig_bases__", "__parameters__"}
    | {"__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
    | {"__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl"}
)


class Content:
    """`opaque` are the names of types of which nothing but the name is known."""

    def __init__(self) -> None:
        self._hash = sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # the object too: an id is given again when its owner is gone
        self.opaque: set[str] = set()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        if isinstance(value, Enum):
            return self._say("enum", _name(type(value)), value.name)
        if isinstance(value, _PLAIN):
            return self._say(type(value).__name__, repr(value))
        if isinstance(value, type) and not is_own(value):
            return self._say("of a package", _name(value))
        if not isinstance(value, _VALUES):
            if (seen := self._seen.get(id(value))) is not None:
                return self._say("again", str(seen[0]))
            self._seen[id(value)] = (len(self._seen), value)
        self._add_new(value)

    def _add_new(self, value: Any) -> None:
        match value:
            case Tensor() if value.layout is torch.strided and not (value.is_quantized or value.is_meta):
                raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                self._say("tensor", str(value.dtype), str(tuple(value.shape)))
                self._hash.update(raw.data)
            case np.ndarray() if not value.dtype.hasobject:
                self._say("array", str(value.dtype), str(value.shape))
                self._hash.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            case np.generic():
                self._say("array", str(value.dtype), repr(value))
            case Mapping():
                self._say("mapping", _name(type(value)))
                if all(isinstance(key, str) for key in value):
                    self.add([each for key in sorted(value) for each in (key, value[key])])
                else:
                    self._add_unordered(value.items())
            case Set():
                self._say("set", _name(type(value)))
                self._add_unordered(value)
            case list() | tuple():
                self._say("sequence", _name(type(value)), str(len(value)))
                for inner in value:
                    self.add(inner)
            case CodeType():
                self._add_code(value)
            case CellType():
                self.add(_contents(value))
            case partial():
                self._say("partial")
                self.add((value.func, value.args, value.keywords))
            case MethodType():
                self.add((value.__self__, value.__func__))
            case property() | functools.cached_property():
                self.add((value.fget, value.fset) if isinstance(value, property) else value.func)
            case staticmethod() | classmethod():
                self.add(value.__func__)
            case FunctionType() if is_own(value):
                self._add_function(value)
            case type():
                self._add_class(value)
            case ModuleType():
                self._add_module(value)
            case FunctionType() | BuiltinFunctionType():
                self._say("of a package", f"{value.__module__}.{value.__qualname__}")
            case logging.Logger():
                self._say("logger", value.name)
            case _:
                self._add_instance(value)

    def _add_unordered(self, values: Iterable[Any]) -> None:
        """In the order of their digests: of their own they have none that two processes share."""
        digests = []
        for value in values:
            inner = Content()
            inner._seen = dict(self._seen)
            inner.add(value)
            self.opaque |= inner.opaque
            digests.append(inner.hexdigest())
        self._say(*sorted(digests))

    def _add_function(self, function: FunctionType) -> None:
        self._say("function")
        self.add(function.__code__)
        self.add((function.__defaults__, function.__kwdefaults__))
        self.add([_contents(cell) for cell in function.__closure__ or ()])
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                self._say("global", name)
                self.add(function.__globals__[name])

    def _add_code(self, code: CodeType) -> None:
        """Without where it stands: a line that is added above changes nothing."""
        self._say("code", code.co_name, *code.co_names, *code.co_varnames, *code.co_freevars)
        self._hash.update(code.co_code)
        for constant in code.co_consts:
            self.add(constant)

    def _add_class(self, given: type) -> None:
        self._say("class", given.__qualname__)
        for base in given.__bases__:
            self.add(base)
        for name, value in sorted(vars(given).items()):
            if name not in _NOT_OF_A_CLASS:
                self._say("attribute", name)
                self.add(value)

    def _add_module(self, module: ModuleType) -> None:
        self._say("module", module.__name__)
        if is_own(module):
            files = source_files(type("Any", (), {"__module__": module.__name__}))
            self.add(sorted(files.items()))

    def _add_instance(self, value: Any) -> None:
        self._say("instance", _name(type(value)))
        self.add(type(value))
        if hasattr(value, "__wrapped__"):  # such as functools.cache
            return self.add(value.__wrapped__)
        state = getattr(value, "__dict__", None)
        if state is not None and (is_own(value) or isinstance(value, nn.Module | Namespace | SimpleNamespace)):
            return self.add(state)
        self.opaque.add(f"{type(value).__module__}.{type(value).__qualname__}")

    def _say(self, *words: str) -> None:
        for word in words:
            raw = word.encode("utf-8", "surrogatepass")
            self._hash.update(len(raw).to_bytes(8, "little") + raw)


def add_data(content: Content, data: Any) -> None:
    """Every bit of what is in memory; of another data set its length and some of its samples, evenly spaced.

    Raises Unsteady.
    """
    match data:
        case TensorDataset() | Tensor() | np.ndarray() | list() | tuple():
            content.add(list(data.tensors) if isinstance(data, TensorDataset) else data)
        case Subset():
            content.add(np.asarray(data.indices))
            add_data(content, data.dataset)
        case _:
            content.add((_name(type(data)), len(data)))
            for index in np.linspace(0, len(data) - 1, min(len(data), MOST_SAMPLES)).round().astype(int).tolist():
                first, again = _content_of_sample(data, index), _content_of_sample(data, index)
                if first.hexdigest() != again.hexdigest():
                    raise Unsteady(f"sample {index} is another one each time, the global generators seeded")
                content.opaque |= first.opaque
                content.add(first.hexdigest())


class Unsteady(Exception):
    """A sample is not the same each time that it is asked for, under the same seed."""


def is_own(value: Any) -> bool:
    """Whether it is of nobody's package: of a script, a notebook, a module that is not installed."""
    made = made_by(value)
    name = value.__name__ if isinstance(value, ModuleType) else getattr(made, "__module__", None)
    top = (name or "builtins").partition(".")[0]
    if top == "__main__":
        return True
    if top in sys.stdlib_module_names or top == "torch":
        return False
    file = getattr(sys.modules.get(name or ""), "__file__", None)
    return file is not None and not any(Path(file).is_relative_to(place) for place in _installed())


def made_by(value: Any) -> Any:
    """A class or function that stands for it."""
    if isinstance(value, DataLoader):
        return made_by(value.dataset)
    if isinstance(value, Subset):
        return made_by(value.dataset)
    if isinstance(value, partial):
        return made_by(value.func)
    return value if isinstance(value, type | FunctionType | MethodType | BuiltinFunctionType) else type(value)


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return (paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages())


def _content_of_sample(data: Any, index: int) -> Content:
    seed_everything(index)
    content = Content()
    content.add(data[index])
    return content


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*(_names(each) for each in inner))


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty yet
        return None


def _name(given: type) -> str:
    """A module that runs as a script is the same as imported."""
    return given.__qualname__ if is_own(given) else f"{given.__module__}.{given.__qualname__}"
