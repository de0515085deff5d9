"""Who may read what a service leaves on the disk: its owner alone, whatever the umask of the shell that started it."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops_cli.up import free_port


def modes_in(top: Path) -> Iterator[tuple[str, int]]:
    """Of `top` and all below it but sockets, whose directory decides."""
    for path in (top, *sorted(top.rglob("*"))):
        found = path.lstat()
        if not stat.S_ISSOCK(found.st_mode) and not stat.S_ISLNK(found.st_mode):
            yield str(path), stat.S_IMODE(found.st_mode)


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o000, 0o022], ids=oct)
def test_a_service_that_has_run_leaves_nothing_for_others(tmp_path: Path, umask: int) -> None:
    home, project, port = tmp_path / "home", tmp_path / "project", str(free_port())
    home.mkdir(mode=0o755)
    project.mkdir()
    (project / "mine.py").write_text("import os; open(os.environ['RELIGHT_OUTPUT_DIR'] + '/made', 'w').write('x')")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OPS_", "XDG_"))}

    def ops(*arguments: str) -> None:
        command = [sys.executable, "-m", "ops_cli", *arguments]
        done = subprocess.run(
            command, env=inherited | {"HOME": str(home)}, cwd=project, umask=umask, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr

    ops("up", "-d", "--port", port)
    try:
        ops("train", "digits", "--max-epochs", "1", "--watch")
        ops("run", "--watch", "--", "python", "mine.py")
        ops("backup", "--to", str(home))
        left = dict(modes_in(home))
    finally:
        ops("down", "--now")

    users = {path for path in left if "/output/" in path}
    assert [Path(path).name for path in users] == ["made"]
    open_to_others = {path: oct(mode) for path, mode in left.items() if mode & 0o077 and path not in users}
    assert open_to_others == {str(home): "0o755"}
    known = {"token", "lock", "up.json", "worker-1.log", "outbox", "attempts", "manifest.json", "state.safetensors"}
    assert known <= {Path(path).name for path in left}
