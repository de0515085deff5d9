"""`ops up` as a real process over stand-ins for its children: order, restarts, and what is left behind."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ops_cli.child import Child, rotate
from ops_cli.comparison import first_difference
from ops_cli.up import free_port

# Each child notes what it does in one file. `broken` names those that end at once.
STAND_IN = """
import json, os, pathlib, signal, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

name = os.environ.get("OPS_WORKER_NAME") or sys.argv[1]
journal = pathlib.Path(os.environ["JOURNAL"])

def note(what):
    with journal.open("a") as file:
        file.write(json.dumps([what, name, os.getpid()]) + "\\n")

def end(*_):
    note("end")
    os._exit(0)

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health/ready" else 404)
        self.end_headers()

if name in os.environ.get("BROKEN", "").split(","):
    sys.exit(f"{name} has no disk")
signal.signal(signal.SIGTERM, end)
if name == "server":
    assert os.environ["OPS_DATABASE_URL"] == "postgresql://stand-in"
    http = HTTPServer((os.environ["OPS_HOST"], int(os.environ["OPS_PORT"])), Healthy)
    threading.Thread(target=http.serve_forever, daemon=True).start()
note("start")
print(json.dumps({"event": "ready", "url": "postgresql://stand-in"}), flush=True)
while os.read(0, 4096):
    pass
end()
"""


@dataclass
class House:
    """Where `ops up` runs: its directories, its environment, and the journal of its children."""

    root: Path

    @property
    def data_dir(self) -> Path:
        return self.root / "data"

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "PYTHONPATH": str(self.root / "modules"),
            "JOURNAL": str(self.root / "journal"),
            **environ,
        }
        program = [sys.executable, "-c", "from ops_cli.main import main; main()"]
        command = [*program, "up", "--data-dir", str(self.data_dir), *arguments]
        return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def journal(self) -> list[tuple[str, str, int]]:
        with contextlib.suppress(FileNotFoundError):
            return [tuple(json.loads(line)) for line in (self.root / "journal").read_text().splitlines()]
        return []

    def noted(self, what: str) -> list[str]:
        return [name for noted, name, _ in self.journal() if noted == what]


@pytest.fixture
def house(tmp_path: Path) -> House:
    for module in ("ops_backend", "ops_worker"):
        (tmp_path / "modules" / module).mkdir(parents=True)
        (tmp_path / "modules" / module / "__init__.py").touch()
        (tmp_path / "modules" / module / "__main__.py").write_text(STAND_IN)
    return House(tmp_path)


@contextlib.contextmanager
def running(house: House, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """From the moment that it says it is up; ended by SIGTERM unless the test has ended it."""
    with house.start("--port", str(free_port()), *arguments, **environ) as up:
        try:
            wait_for_line(up, "Relight is up")
            yield up
        finally:
            up.terminate()
            up.communicate()


def wait_for_line(up: subprocess.Popen[str], words: str) -> None:
    assert up.stdout is not None
    assert any(words in line for line in up.stdout), up.communicate()[1]


def wait_until(true: Callable[[], bool]) -> None:
    """Without a limit of its own: pytest's is the limit."""
    while not true():
        time.sleep(0.02)


def test_up_starts_database_server_workers_and_ends_them_the_other_way_round(house: House) -> None:
    with running(house, "--workers", "2") as up:
        started = house.noted("start")
        up.terminate()
        up.communicate()

    assert started[:2] == ["db", "server"]
    assert sorted(started[2:]) == ["worker-1", "worker-2"]
    assert sorted(house.noted("end")[:2]) == ["worker-1", "worker-2"]
    assert house.noted("end")[2:] == ["server", "db"]
    assert up.returncode == 0


def test_the_state_for_clients_is_private_and_goes_with_up(house: House) -> None:
    state = house.root / ".local/state/relight/up.json"

    with running(house):
        told = json.loads(state.read_text())
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        assert told["token"] == (house.data_dir / "token").read_text()
        assert stat.S_IMODE((house.data_dir / "token").stat().st_mode) == 0o600

    assert not state.exists()


def test_a_second_up_on_the_directory_says_who_is_there(house: House) -> None:
    with running(house) as first, house.start() as second:
        _, err = second.communicate()

    assert second.returncode == 1
    assert f"pid {first.pid}" in err
    assert house.noted("start").count("db") == 1


def test_a_killed_up_leaves_no_child_and_nothing_in_the_way_of_the_next(house: House) -> None:
    with running(house) as up:
        up.kill()
        wait_until(lambda: sorted(house.noted("end")) == ["db", "server", "worker-1"])

    with running(house):
        assert house.noted("start").count("worker-1") == 2


def test_a_worker_that_dies_is_started_again(house: House) -> None:
    with running(house) as up:
        [first] = [pid for _, name, pid in house.journal() if name == "worker-1"]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: house.noted("start").count("worker-1") == 2)
        up.terminate()
        _, err = up.communicate()

    assert "worker-1 was ended by SIGKILL" in err


def test_a_child_that_keeps_ending_ends_up_with_its_last_words(house: House) -> None:
    with house.start(BROKEN="server") as up:
        out, err = up.communicate()

    assert up.returncode == 1
    assert "server has no disk" in err
    assert "Relight is up" not in out
    assert house.noted("end") == ["db"]


def test_a_wanted_port_that_is_busy_is_named(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with house.start("--port", str(port)) as up:
            _, err = up.communicate()

    assert up.returncode == 1
    assert f"port {port}" in err
    assert not house.journal()


def test_logs_are_rotated_and_bounded_in_number(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    for start in range(6):
        rotate(log)
        log.write_text(str(start))

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "server.log": "5",
        "server.log.1": "4",
        "server.log.2": "3",
        "server.log.3": "2",
    }


def test_a_child_that_says_much_is_drained(tmp_path: Path) -> None:
    (tmp_path / "talker.py").write_text("print('{\"event\": \"ready\"}')\nprint('x' * 10_000_000, flush=True)\n")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    child = Child("talker", ["talker"], lambda: environ, tmp_path / "talker.log")

    child.start()
    wait_until(lambda: not child.running)
    child.close()

    assert child.ending == "ended with code 0"
    assert child.ready == {"event": "ready"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"loss": [(0, 1.0), (1, float("nan"))]}, None),
        ({"loss": [(0, 1.0), (1, 2.0)]}, "step 1"),
        ({"loss": [(0, 1.0)]}, "step 1 loss is nan and missing"),
        ({"loss": [(0, 1.0), (1, float("nan"))], "val_loss": [(1, 1.0)]}, "val_loss"),
        ({"loss": [(0, 1.0000000000000002), (1, float("nan"))]}, "step 0"),
    ],
)
def test_curves_are_equal_when_every_bit_is(other: dict[str, list[tuple[int, float]]], said: str | None) -> None:
    found = first_difference({"loss": [(0, 1.0), (1, float("nan"))]}, other)

    assert (found is None) == (said is None)
    assert said is None or said in str(found)
