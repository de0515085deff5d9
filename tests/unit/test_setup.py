"""`deploy/setup.sh` on machines that lack something: one clear line each. Stand-ins play what is missing."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLD = "exit 1"
NO_VENV = 'case "$2" in *version_info*) exit 0;; *) exit 1;; esac'
GOOD = 'case "$1" in --version) echo Python 3.11.0;; -m) exit 1;; *) exit 0;; esac'
FULL = "echo header; echo disk 100 100 1000 99% /"
ROOMY = "echo header; echo disk 100 100 99999999 1% /"


@pytest.mark.parametrize(
    ("python", "df", "said"),
    [
        (OLD, ROOMY, "setup: no Python 3.11 or newer found: install one, or name it"),
        (NO_VENV, ROOMY, "setup: python3 has no venv module: install it"),
        (GOOD, FULL, "setup: this disk has less than 4 GB free"),
        (GOOD, ROOMY, "setup: python3 cannot make a virtual environment"),
    ],
)
def test_a_missing_prerequisite_gets_one_clear_line(tmp_path: Path, python: str, df: str, said: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {"python3": python, "df": df}.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    for name in ("bash", "cat", "cksum", "dirname", "awk", "rm"):
        (tools / name).symlink_to(str(shutil.which(name)))
    clone = tmp_path / "clone"
    (clone / "deploy").mkdir(parents=True)
    for name in ("deploy/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, clone / name)

    ran = subprocess.run([clone / "deploy/setup.sh"], env={"PATH": str(tools)}, capture_output=True, text=True)

    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-1].startswith(said)
    assert len(ran.stderr.strip().splitlines()) == 1
