"""What decides a run's bits besides code and data, and the promise that follows from it."""

import os
import platform
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from ops_contract.jobs import Execution
from ops_contract.reports import Exactness
from relight.interpreter import packages
from relight.manifest import Manifest
from relight.training.team import Team

_ONE_DEVICE = {"devices": "1"}  # which a fingerprint does not say
# What some version of torch has MKL's vector library compute, in float32 and float64.
_ELEMENTARY = (
    *("abs", "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1"),
    *("lgamma", "log", "log10", "log1p", "log2", "sin", "sqrt", "tan", "tanh", "trunc"),
)
_NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")


def configure(threads: int, deterministic: bool) -> None:
    """Process-wide; before anything is built. An operator without a deterministic kernel warns and still runs."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    _find_kernels()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


@cache
def _find_kernels() -> None:
    """Each elementary function once, on too few values for a second thread.

    MKL looks for a function's kernel when it is first called; of two threads that do so at once, one may be given a
    kernel of 11 bits for that call (https://github.com/pytorch/pytorch/issues/188792; decision 55).
    """
    for dtype in (torch.float32, torch.float64):
        few = torch.full((8,), 0.5, dtype=dtype, device="cpu")
        for name in _ELEMENTARY:
            getattr(torch, name)(few)


def warm_up() -> None:
    """Load what a first step would: asked for determinism, torch imports its compiler, and that takes a second."""
    environment(torch.device("cpu"))  # what it has looked for once is kept
    configure(torch.get_num_threads(), deterministic=True)


def fingerprint(device: torch.device) -> dict[str, str]:
    """Equal fingerprints, code and data give equal bits. `threads` is the number that sums are split over.

    `relight` stands for the loop's own code, which the code digest leaves out.
    """
    return {
        "relight": version("relight"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "matmul_precision": torch.get_float32_matmul_precision(),
        **(_cuda_numerics() if device.type == "cuda" else {}),
    }


def _cuda_numerics() -> dict[str, str]:
    cudnn = torch.backends.cudnn
    version = cudnn.version()  # type: ignore[no-untyped-call]  # torch's own
    return {"cuda": str(torch.version.cuda), "cudnn": str(version), "cudnn_tf32": str(cudnn.allow_tf32)}


def of_gang(team: Team, strategy: str, device: torch.device) -> dict[str, str]:
    """What decides a gang's bits besides: how many ranks sum what, and of NCCL how they lie on hosts. One device has
    none of it."""
    if not team.is_gang:
        return {}
    found = {"devices": str(team.world_size), "strategy": strategy}
    if device.type == "cuda":
        hosts = team.gathered(socket.gethostname())
        found["placement"] = "+".join(str(len(list(same))) for _, same in groupby(hosts))
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]  # torch's own
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """For people: where an attempt ran."""
    return {
        **fingerprint(device),
        "accelerator": device.type,
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": os.cpu_count(),
        "packages": packages(),
    }


def exactness(knobs: Execution, now: dict[str, str], before: Manifest | None, more: list[str]) -> Exactness:
    """Best effort when asked for, when the predecessor that wrote `before` ran on something else, and for `more`."""
    reasons = [] if knobs.deterministic else ["deterministic is false"]
    if before is not None:
        # What the predecessor did not record yet says nothing; another device differs by its name too.
        old = _ONE_DEVICE | before.numerics
        pairs = [(name, was, (_ONE_DEVICE | now).get(name)) for name, was in sorted(old.items())]
        reasons += [f"{name} was {was} and is {new or 'none'}" for name, was, new in pairs if was != new]
        if "+" in now.get("placement", ""):
            reasons.append("how NCCL sums over hosts follows from their network, of which nothing is recorded")
    reasons += more
    return Exactness(promise="best_effort" if reasons else "promised", reasons=reasons)


@contextmanager
def operators_noted(note: Callable[[str], None]) -> Iterator[None]:
    """Within it each operator without a deterministic kernel is noted once, by name."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def watch(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            found = _NO_KERNEL.match(str(message))
            if found is None:
                show(message, category, filename, lineno, file, line)
            elif found[1] not in seen:
                seen.add(found[1])
                note(f"{found[1]} has no deterministic kernel on this device")

        warnings.showwarning = watch
        warnings.filterwarnings("default", message=_NO_KERNEL.pattern)
        yield


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
