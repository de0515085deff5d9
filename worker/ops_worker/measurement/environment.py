"""What a measurement ran on, for whoever wants to repeat it."""

import os
import platform
import re
import socket
from pathlib import Path
from typing import Any

from ops_worker.energy.sampler import INTERVAL_S
from ops_worker.measurement.instruments import Instruments

CPUINFO = Path("/proc/cpuinfo")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def environment(instruments: Instruments, engine: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {
        "host": socket.gethostname(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "cpu_governor": _first_line(GOVERNOR),
        "load_average_1m": os.getloadavg()[0],
        "energy_meters": [f"{meter.device}: {meter.source}, {meter.quality}" for meter in instruments.meters],
        "energy_interval_s": INTERVAL_S,
        "engine": engine,
    }
    if instruments.driver is not None:
        about |= {"driver": instruments.driver.version, "driver_cuda": instruments.driver.cuda_version}
    if instruments.gpus:
        about["gpus"] = [
            {
                "uuid": gpu.uuid,
                "name": gpu.name,
                "memory_bytes": gpu.memory_total_bytes,
                "power_limit_w": gpu.whole.power_limit_w,
                "persistence": gpu.persistence(),
                "mig": gpu.parent is not None,
            }
            for gpu in instruments.gpus
        ]
    return about


def _cpu() -> str | None:
    try:
        found = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else platform.machine()


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().partition("\n")[0]
    except OSError:
        return None
