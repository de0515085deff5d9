"""`ops demo` on the real service: what it shows, and what it leaves behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-c", "from ops_cli.main import main; main()", "demo", "--workload", "digits"]
PNG = b"\x89PNG\r\n\x1a\n"


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """In a directory for temporary files of its own, so that what it leaves there is seen."""
    (tmp_path / "tmp").mkdir()
    environ = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path)}
    return subprocess.Popen([*PROGRAM, *arguments], env=environ, cwd=tmp_path, text=True, stdout=subprocess.PIPE)


def left_behind(tmp_path: Path) -> list[str]:
    """Files, and processes that have our home or a path in it."""
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
            ours = f"HOME={tmp_path}\0".encode() in (process / "environ").read_bytes()
        except OSError:
            continue  # another user's, or gone meanwhile
        if ours or str(tmp_path) in command:
            processes.append(command)
    return [*map(str, (tmp_path / "tmp").iterdir()), *processes]


@pytest.mark.slow
def test_the_demo_kills_a_worker_and_its_curves_are_equal_bit_for_bit(tmp_path: Path) -> None:
    with start(tmp_path, "--epochs", "30") as demo:
        out, _ = demo.communicate()

    assert demo.returncode == 0
    assert "SIGKILL to worker-" in out
    assert "Curves equal bit for bit: yes" in out
    [killed] = [line.split() for line in out.splitlines() if line.startswith("killed, resumed")]
    assert killed[2] == "2", "attempts"
    assert killed[3] == "1440", "steps"
    assert (tmp_path / "demo-out/curves.png").read_bytes().startswith(PNG)
    assert not left_behind(tmp_path)


@pytest.mark.slow
def test_a_stopped_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    with start(tmp_path, "--epochs", "1000") as demo:
        assert demo.stdout is not None
        assert any("is running" in line for line in demo.stdout)
        demo.send_signal(signal.SIGINT)
        demo.communicate()

    assert demo.returncode == 130
    assert not left_behind(tmp_path)
