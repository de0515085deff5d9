"""A driver without a GPU: `nvml.c`, compiled, under the real pynvml. What it plays is in the C file's first lines."""

import ctypes
import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")
SONAME = "libnvidia-ml.so.1"


def compiled(directory: Path) -> Path:
    """The library, in `directory`. Raises FileNotFoundError where there is no gcc."""
    if shutil.which("gcc") is None:
        raise FileNotFoundError("no gcc: the fake driver cannot be compiled")
    library = directory / SONAME
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", f"-Wl,-soname,{SONAME}"]
    subprocess.run(["gcc", *flags, "-o", str(library), str(SOURCE), "-lm"], check=True)
    return library


def load(library: Path) -> None:
    """Into this process, for good: the loader then finds the name among what is loaded."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class FakeClock:
    """Seconds that move when told; the driver reads the same file."""

    def __init__(self, path: Path, now_s: float = 1000.0) -> None:
        path.write_bytes(struct.pack("d", now_s))
        self.path = path
        self._file = path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), 8)

    def __call__(self) -> float:
        (now_s,) = struct.unpack("d", self._map[:8])
        return float(now_s)

    def advance(self, by_s: float) -> None:
        self._map[:8] = struct.pack("d", self() + by_s)

    def close(self) -> None:
        self._map.close()
        self._file.close()


def environ(library: Path, script: Path, clock: FakeClock | None = None) -> dict[str, str]:
    """For a process that is to find this driver."""
    path = os.pathsep.join(filter(None, [str(library.parent), os.environ.get("LD_LIBRARY_PATH")]))
    return {"LD_LIBRARY_PATH": path, "FAKE_NVML": str(script), "FAKE_NVML_CLOCK": str(clock.path) if clock else ""}
