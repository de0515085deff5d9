"""What a job needs that is to run on a GPU, looked at before it starts: all that is wrong, in one answer."""

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from ops_contract.agents import CheckpointRef
from ops_worker.energy.nvml import Gpu, others
from relight.memory import MEMINFO, available_bytes

# The context of CUDA alone takes a third of a GiB, more than this of no GPU that is in use today.
LEAST_FREE = 0.1
# A checkpoint that nobody has seen yet is taken for this large.
LEAST_BYTES = 256 * 2**20


@dataclass
class Preflight:
    """`failures` keep a job from starting; `warnings` go into the attempt's environment."""

    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def preflight(
    gpu: Gpu,
    driver_cuda: str,
    torch: str | None,
    checkpoint: CheckpointRef | None,
    storage_root: Path,
    meminfo: Path = MEMINFO,
) -> Preflight:
    """Blocks, for good when the driver hangs."""
    found = preflight_gpu(gpu)
    _driver(driver_cuda, torch, found)
    _room(checkpoint.size_bytes if checkpoint else 0, storage_root, meminfo, found)
    return found


def preflight_gpu(gpu: Gpu) -> Preflight:
    """Of the device alone. Blocks, for good when the driver hangs."""
    if problem := gpu.answers():
        return Preflight([f"{gpu.uuid} ({gpu.name}) does not answer: {problem}; `nvidia-smi`, and dmesg, say more"])
    found = Preflight()
    processes = [str(pid) for pid in others(gpu.processes())]
    if memory := gpu.memory():
        free, total = memory
        if free < total * LEAST_FREE:
            whose = f"; processes {', '.join(processes)} are on it" if processes else ""
            found.failures.append(f"{gpu.uuid} has {_mib(free)} of {_mib(total)} of its memory free{whose}")
    if processes:
        whose = f"others compute on {gpu.uuid} (processes {', '.join(processes)})"
        found.warnings.append(f"{whose}: its joules are an upper bound, and in no sum")
    if gpu.persistence() is False:
        found.warnings.append("persistence mode is off, so that the driver may unload between jobs: `nvidia-smi -pm 1`")
    return found


def _driver(driver_cuda: str, torch: str | None, found: Preflight) -> None:
    """Within a major version of CUDA an older driver will do."""
    built = re.search(r"\+cu(\d+)\d$", torch or "")
    if built and int(built[1]) > int(driver_cuda.partition(".")[0]):
        advice = "install a newer driver, or a torch for this one"
        found.failures.append(f"torch {torch} needs CUDA {built[1]}, and the driver has {driver_cuda}: {advice}")


def _room(checkpoint_bytes: int, storage_root: Path, meminfo: Path, found: Preflight) -> None:
    on_disk, in_memory = max(2 * checkpoint_bytes, LEAST_BYTES), max(checkpoint_bytes, LEAST_BYTES)
    try:
        free = shutil.disk_usage(storage_root).free
        if free < on_disk:
            advice = "make room"
            found.failures.append(f"{storage_root} has {_mib(free)} free, a checkpoint needs {_mib(on_disk)}: {advice}")
    except OSError as error:
        found.failures.append(f"{storage_root} cannot be looked at: {error.strerror}")
    available = available_bytes(meminfo)
    if available is not None and available < in_memory:
        wanted = f"the copy of a checkpoint needs {_mib(in_memory)}"
        found.failures.append(f"{os.uname().nodename} has {_mib(available)} of memory available, {wanted}")


def _mib(size: int) -> str:
    return f"{size // 2**20} MiB"
