"""Environments of their own for those that we are measured against: what they install meets nothing of ours."""

import subprocess
import sys
import venv
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_of(name: str, *requirements: str, ours: bool = False) -> Path:
    """The interpreter of an environment in build/peers with these requirements, pinned as `name==version`; made once.

    `ours` keeps torch and what else constraints.txt pins at our versions, so that both run the same.
    """
    wanted = sha256("\n".join([sys.version, *sorted(requirements)]).encode()).hexdigest()[:12]
    place = ROOT / "build" / "peers" / f"{name}-{wanted}"
    python, made = place / "bin" / "python", place / "made"
    if not made.exists():
        print(f"making the environment of {name} in {place}", file=sys.stderr, flush=True)
        venv.create(place, clear=True, with_pip=True)
        constraints = ["-c", str(ROOT / "constraints.txt")] if ours else []
        subprocess.run([python, "-m", "pip", "install", "-q", *constraints, *requirements], check=True)
        made.touch()
    return python
