"""The Python in which trainers run: is everything there that they need?"""

import os
import shutil
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version

PROBE_S = 60.0
# Found, not imported: a second would be spent on torch.
_PROBE = """
import sys
from importlib.util import find_spec
wanted = ("torch", "ops_worker", "relight", "pydantic", "numpy", "safetensors")
print("relight-probe", sys.version.split()[0], *(name for name in wanted if find_spec(name) is None))
"""
_OLDEST = (3, 11)


class InterpreterError(Exception):
    """Trainers cannot run there; the message has the command that mends it."""


def checked_interpreter(python: str, environ: Mapping[str, str]) -> str:
    """Its absolute path, symbolic links as they are: a virtual environment is known by them.

    Raises InterpreterError when it is no Python, too old, or lacks torch or Relight.
    """
    found = shutil.which(python, path=environ.get("PATH"))
    if found is None:
        raise InterpreterError(f"there is no program {python}; give the path of a Python, like ~/my-env/bin/python")
    path = os.path.abspath(found)
    said = _said(path, environ)
    numbers, missing = tuple(int(part) for part in said[1].split(".")[:2]), said[2:]
    if numbers < _OLDEST:
        raise InterpreterError(f"{path} is Python {said[1]}; trainers need 3.11 or newer")
    if set(missing) - {"torch"}:
        raise InterpreterError(
            f"{path} lacks {', '.join(missing)}. Install Relight there: {install_command(path)}"
            + (", and a torch that suits the machine" if "torch" in missing else "")
        )
    if missing:
        raise InterpreterError(f"{path} has no torch. Install it there: {path} -m pip install torch")
    return path


def install_command(python: str) -> str:
    """Of this very version: agent and trainer speak one language."""
    return f"{python} -m pip install 'relight=={version('relight')}'"


def versions_of(*names: str) -> dict[str, str]:
    """Of those that are installed for this interpreter."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def packages() -> dict[str, str]:
    """Versions of all that is installed for this interpreter, by name."""
    found = {found.name: found.version for found in distributions() if found.name}
    return dict(sorted(found.items(), key=lambda each: each[0].lower()))


def _said(path: str, environ: Mapping[str, str]) -> list[str]:
    try:
        probe = subprocess.Popen(
            [path, "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",  # -c puts the working directory into sys.path
            env=dict(environ),
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise InterpreterError(f"{path} does not run as a Python: {error}") from error
    # Instead of a timeout, which polls the clock: nothing of a worker's start may depend on it.
    patience = threading.Timer(PROBE_S, probe.kill)
    patience.start()
    output, errors = probe.communicate()
    patience.cancel()
    words = (output.splitlines() or [""])[-1].split()
    if probe.returncode or words[:1] != ["relight-probe"]:
        last = (errors.strip().splitlines() or [f"it ended with code {probe.returncode}"])[-1]
        raise InterpreterError(f"{path} is no Python that works: {last[:300]}")
    return words
