"""What reading the meters costs: the share of a core that the sampler takes at its interval, with fake GPUs.

The peer is the same process with the same loop that reads nothing. What the driver itself would take is not in it: a
real NVML call takes some 10 to 100 µs more of its own. CPU time is counted by the kernel, of the whole process.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers.fake_nvml import compiled, environ  # noqa: E402 - beside the tests

GOAL = 0.01
CHILD = """
import sys, time
from ops_contract.energy import Quality
from ops_worker.energy.nvml import Driver, nvml_meter
from ops_worker.energy.sampler import Sampler

gpus = Driver.open().gpus()[:int(sys.argv[1])]
sampler = Sampler([nvml_meter(gpu, Quality.MEASURED) for gpu in gpus], gpus, float(sys.argv[3]))
if not gpus:
    sampler.sample = lambda: None
    sampler._tracks = {"": None}  # something to read, so that it starts
sampler.start()
time.sleep(0.5)
began = time.process_time(), time.monotonic()
time.sleep(float(sys.argv[2]))
print((time.process_time() - began[0]) / (time.monotonic() - began[1]))
sampler._stopping.set()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--interval", type=float, default=0.1)
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, every {given.interval:g} s")
    shares: dict[int, list[float]] = {0: [], 1: [], 8: []}
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "script"
        one = "device GPU-{}\npower 0 300\ntick 0.1 0\ntemperature 0 60\nused 0 100\nprocess 0 1"
        script.write_text("\n".join([f"epoch {time.monotonic()}", *(one.format(n) for n in range(8))]))
        has = os.environ | environ(compiled(Path(directory)), script)
        for _ in range(given.rounds):
            for gpus, found in shares.items():
                call = [sys.executable, "-c", CHILD, str(gpus), str(given.seconds), str(given.interval)]
                found.append(float(subprocess.run(call, env=has, capture_output=True, text=True, check=True).stdout))
    print("GPUs | of a core, median (smallest to largest) | beyond the loop that reads nothing")
    idle = statistics.median(shares[0])
    for gpus, found in shares.items():
        median = statistics.median(found)
        spread = f"{median:.2%} ({min(found):.2%} to {max(found):.2%})"
        print(f"{gpus or 'none':>4} | {spread} | {median - idle:.2%}")
    reached = all(statistics.median(found) <= GOAL for found in shares.values())
    print(f"goal of {GOAL:.0%}: {'reached' if reached else 'NOT reached'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
