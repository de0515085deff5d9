"""`ops service`: the unit that it writes, and what it asks of systemd, which does not run here."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.units import environment, exec_start, setting
from ops_cli.service import NAME, unit

ANALYZE = shutil.which("systemd-analyze")
# A home such as nobody should have.
STRANGE = 'home of 50%h $HOME "x"'

# Notes what it is asked, and answers as a systemd that runs.
SYSTEMCTL = """#!/bin/sh
echo "$@" >>"$HOME/asked"
case "$2" in
is-system-running) echo running ;;
is-active) cat "$HOME/active" 2>/dev/null || echo inactive ;;
is-enabled) echo enabled ;;
restart) test ! -e "$HOME/broken" || { echo "it does not start" >&2; exit 1; } ;;
esac
"""


class Home:
    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bin").mkdir(parents=True)

    @property
    def unit(self) -> Path:
        return self.root / ".config" / "systemd" / "user" / NAME

    @property
    def environment(self) -> Path:
        return self.root / ".config" / "relight" / "environment"

    def service(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        environ = {"HOME": str(self.root), "PATH": f"{self.root / 'bin'}:/usr/bin:/bin", **more}
        command = [sys.executable, "-m", "ops_cli", "service", *arguments]
        return subprocess.run(command, env=environ, text=True, capture_output=True)

    def have_systemd(self) -> None:
        for program, text in {"systemctl": SYSTEMCTL, "loginctl": "#!/bin/sh\necho no\n"}.items():
            (self.root / "bin" / program).write_text(text)
            (self.root / "bin" / program).chmod(0o755)

    def asked(self) -> list[str]:
        return [line.removeprefix("--user ") for line in (self.root / "asked").read_text().splitlines()]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / STRANGE)


def test_the_unit_passes_systemds_own_check_and_means_what_was_asked(home: Home, tmp_path: Path) -> None:
    done = home.service("install", "--port", "8999", "--workers", "2", OPS_CANCEL_GRACE_S="100")

    assert done.returncode == 0, done.stderr
    written = home.unit.read_text()
    data_dir = home.root / ".local/share/relight"
    assert exec_start(written) == [
        *[sys.executable, "-P", "-m", "ops_cli", "up", "--data-dir", str(data_dir)],
        *["--host", "127.0.0.1", "--port", "8999", "--workers", "2"],
    ]
    assert float(setting(written, "TimeoutStopSec")) > 100 + 10 + 70
    check(home.unit, tmp_path)


def test_a_program_in_a_strange_place_is_found_by_systemd(tmp_path: Path) -> None:
    program = tmp_path / "50%h $HOME" / "py thon$1%h"
    program.parent.mkdir()
    program.symlink_to(sys.executable)
    path = tmp_path / NAME
    path.write_text(unit([str(program), "up"], tmp_path / "environment", 60))

    check(path, tmp_path)

    program.unlink()
    with pytest.raises(AssertionError, match="not executable"):
        check(path, tmp_path)


def check(path: Path, runtime: Path) -> None:
    if ANALYZE is None:
        pytest.skip("no systemd-analyze here (apt install systemd)")
    command = [ANALYZE, "verify", "--user", "--man=no", path]
    done = subprocess.run(command, env={"XDG_RUNTIME_DIR": str(runtime)}, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_its_variables_are_a_private_file_that_stays_the_users(home: Home) -> None:
    home.service("install", OPS_SECRET_KEY='a "b" $c `d` \\', OPS_LEASE_S="20", OTHER="x")

    assert stat.S_IMODE(home.environment.stat().st_mode) == 0o600
    kept = environment(home.unit.read_text())
    assert kept["OPS_SECRET_KEY"] == 'a "b" $c `d` \\'
    assert kept["OPS_LEASE_S"] == "20"
    assert kept.keys() == {"PATH", "OPS_LEASE_S", "OPS_SECRET_KEY"}

    home.environment.write_text("OPS_LEASE_S=30\n")
    again = home.service("install", OPS_LEASE_S="20")

    assert "stays as it is" in again.stdout
    assert home.environment.read_text() == "OPS_LEASE_S=30\n"


def test_where_systemd_runs_it_is_started_and_told_to_come_back(home: Home) -> None:
    home.have_systemd()

    done = home.service("install")

    assert done.returncode == 0, done.stderr
    assert [asked for asked in home.asked() if not asked.startswith("is-")] == [
        "daemon-reload",
        f"enable {NAME}",
        f"restart {NAME}",
    ]
    assert "loginctl enable-linger" in done.stdout
    (home.root / "active").write_text("active")
    state = home.service("status")
    assert (state.returncode, "active, enabled" in state.stdout) == (0, True)

    gone = home.service("uninstall")

    assert gone.returncode == 0
    assert home.asked()[-3:] == [f"disable --now {NAME}", "is-system-running", "daemon-reload"]
    assert not home.unit.exists()
    assert home.environment.exists()


def test_a_unit_that_does_not_start_is_said(home: Home) -> None:
    home.have_systemd()
    (home.root / "broken").touch()

    done = home.service("install")

    assert done.returncode == 1
    assert "it does not start" in done.stderr


def test_where_systemd_does_not_run_it_is_said_what_to_do(home: Home) -> None:
    done = home.service("install")

    assert done.returncode == 0
    assert f"systemctl --user enable --now {NAME}" in done.stdout
    assert "loginctl enable-linger" in done.stdout
    assert home.service("status").returncode == 1
    assert home.service("uninstall").returncode == 0
    assert not home.unit.exists()
    assert home.service("uninstall").stdout == "There is no unit.\n"


def test_a_line_feed_cannot_get_into_the_unit(home: Home) -> None:
    done = home.service("install", "--data-dir", "a\nExecStart=/bin/false")

    assert done.returncode == 2
    assert not home.unit.exists()
