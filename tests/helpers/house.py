"""`ops up` as a real process over stand-ins for its children."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ops_cli.up import free_port

# Each child notes what it does in one file. BROKEN names those that end at once, MUTE those that are never ready,
# PATIENT those that end when they are asked a second time.
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

def end_when_asked_twice(*_):
    signal.signal(signal.SIGTERM, end)

def named(variable):
    return name in os.environ.get(variable, "").split(",")

if named("BROKEN"):
    sys.exit(f"{name} has no disk")
signal.signal(signal.SIGTERM, end_when_asked_twice if named("PATIENT") else end)
assert "NOTIFY_SOCKET" not in os.environ
if name == "server":
    assert os.environ["OPS_DATABASE_URL"] == "postgresql://stand-in"
    http = HTTPServer((os.environ["OPS_HOST"], int(os.environ["OPS_PORT"])), Healthy)
    threading.Thread(target=http.serve_forever, daemon=True).start()
note("start")
if not named("MUTE"):
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
        """`ops up`."""
        command = self.command("up", *arguments)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=self.environ(**environ), text=True, **pipes)

    def ops(self, verb: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Another command on the same directory, to its end."""
        command = self.command(verb, *arguments)
        return subprocess.run(command, env=self.environ(**environ), text=True, capture_output=True)

    def command(self, verb: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ops_cli", verb, "--data-dir", str(self.data_dir), *arguments]

    def environ(self, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "PYTHONPATH": str(self.root / "modules"),
            "JOURNAL": str(self.root / "journal"),
            **more,
        }

    def journal(self) -> list[tuple[str, str, int]]:
        with contextlib.suppress(FileNotFoundError):
            return [tuple(json.loads(line)) for line in (self.root / "journal").read_text().splitlines()]
        return []

    def noted(self, what: str) -> list[str]:
        return [name for noted, name, _ in self.journal() if noted == what]


def make_house(root: Path) -> House:
    for module in ("ops_backend", "ops_worker"):
        (root / "modules" / module).mkdir(parents=True)
        (root / "modules" / module / "__init__.py").touch()
        (root / "modules" / module / "__main__.py").write_text(STAND_IN)
    return House(root)


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
