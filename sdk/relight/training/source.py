"""The source that a workload is made of, as its user understands it: what is read for the code digest.

The workload's own file, and the files of its own package (of its own directory, for a module outside packages) that
can be reached from there by import statements, those within functions too. They are read from disk, not from what is
loaded, so neither the order of imports nor what else was loaded matters. Not covered: other packages, the engine
(its version is in the numerics fingerprint), modules imported under a computed name, files that are not Python.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

_INSTALLED = ("site-packages", "dist-packages")  # what lies beside a module there is not its author's


def source_files(*sources: Any) -> dict[str, str]:
    """SHA-256 by path, relative to the directory that the top-level name of each class or function lies in; nothing for
    one without a source."""
    found: dict[str, str] = {}
    for each in sources:
        with suppress(TypeError, OSError):
            if source := inspect.getsourcefile(each):
                found |= _Reachable(Path(source).resolve(), each.__module__).digests()
    return found


def script_files() -> dict[str, str]:
    """The same of the script that runs; empty where there is none, as in a notebook."""
    main = sys.modules["__main__"]
    if not (path := getattr(main, "__file__", None)):
        return {}
    module = main.__spec__.name if main.__spec__ else "__main__"
    return _Reachable(Path(path).resolve(), module).digests()


def source_digest(files: dict[str, str]) -> str | None:
    """One digest for all; None without a source."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    return sha256(lines.encode()).hexdigest() if files else None


class _Reachable:
    def __init__(self, start: Path, module: str) -> None:
        parts = module.split(".")
        depth = len(parts) - 1 + (start.name == "__init__.py")
        self._start = start
        self._root = start.parents[depth]
        self._package = parts[0] if depth else None

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = {}
        waiting = [self._start, *self._packages_above(self._start)]
        while waiting:
            file = waiting.pop()
            name = file.relative_to(self._root).as_posix()
            if name not in found:
                raw = file.read_bytes()
                found[name] = sha256(raw).hexdigest()
                package = list(file.relative_to(self._root).parent.parts)
                waiting += [path for wanted in _imports(raw, package) for path in self._files(wanted)]
        return found

    def _files(self, module: str) -> Iterator[Path]:
        """Those that importing it runs, as far as they are the workload's own."""
        parts = module.split(".")
        if parts[0] != self._package and (self._package or self._root.name in _INSTALLED):
            return
        base = self._root.joinpath(*parts)
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                yield file
                yield from self._packages_above(file)
                return

    def _packages_above(self, file: Path) -> list[Path]:
        above = [folder / "__init__.py" for folder in file.parents if folder.is_relative_to(self._root)]
        return [init for init in above if init.parent != self._root and init.is_file()]


def _imports(source: bytes, package: list[str]) -> Iterator[str]:
    """Every module that a file's import statements may name, in absolute terms; none where it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from filter(None, [module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)])
