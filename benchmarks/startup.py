"""How long one waits: a second `ops up`, `ops --help`, `ops status`, and the import of the API.

The second `ops up` finds a directory that the first one has initialised; it is timed from its spawn to its line that it
is up, by when Postgres, API and worker are ready and the worker has registered. Nothing comes near to what it does, so
it is held against its limit. The commands are whole processes, timed beside `python -c pass` of the same interpreter:
`ops status` asks the service that runs just then for a training that has completed, and finds it by the last `ops up`,
as users do. The import of the API is timed beside a process that makes a bare FastAPI app, uvicorn included. All have
run once before: their bytecode is there, and the page cache is warm.

    .venv/bin/python benchmarks/startup.py
"""

import argparse
import os
import platform
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import lines
from lines import Line

from ops_cli.up import free_port

OPS = str(Path(sys.executable).with_name("ops"))
BARE = [sys.executable, "-c", "pass"]
BARE_APP = [sys.executable, "-c", "import uvicorn; from fastapi import FastAPI; FastAPI()"]
API = [sys.executable, "-c", "import ops_backend.app"]
READY = "Relight is up: "
UP_LIMIT_S = 120.0
DOWN_LIMIT_S = 90.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="starts of `ops up`")
    parser.add_argument("--commands", type=int, default=15, help="rounds of the commands")
    lines.add_option(parser)
    given = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f}\n"
    )
    with tempfile.TemporaryDirectory() as directory:
        measured = measure(Place(Path(directory)), given.rounds, given.commands)
    print(lines.table(measured))
    lines.write(given.lines, measured)


@dataclass
class Place:
    """A home of its own: nothing of the user's service is found, nor changed. Bytecode is kept, as it is by default."""

    home: Path
    port: int = field(default_factory=free_port)

    @property
    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPS_", "XDG_", "PYTHON"))}
        return kept | {"HOME": str(self.home)}


def measure(place: Place, rounds: int, commands: int) -> list[Line]:
    with up(place):
        pass  # the first one, which initialises the directory
    starts = []
    for _ in range(rounds):
        with up(place) as start:
            starts.append(start)
    tell_parts(starts)
    with up(place):
        status = [OPS, "status", a_completed_training(place)]
        ways = {"bare": BARE, "help": [OPS, "--help"], "status": status, "bare app": BARE_APP, "API": API}
        took_ms = lines.in_turn(commands, {name: timed(command, place) for name, command in ways.items()})
    bare, pass_ = took_ms["bare"], "python -c pass"
    return [
        lines.limit("a second `ops up`, until it is up", [start.took_s for start in starts], "s", 2.5),
        lines.beyond("`ops --help`", pass_, took_ms["help"], bare, "ms", 150),
        lines.beyond("`ops status ID`", pass_, took_ms["status"], bare, "ms", 350),
        lines.beyond("import of the API", "a bare FastAPI app", took_ms["API"], took_ms["bare app"], "ms", 350),
    ]


@dataclass
class Start:
    """When it said what, in seconds from its spawn."""

    said_s: dict[str, float] = field(default_factory=dict)

    @property
    def took_s(self) -> float:
        return self.said_s[READY]


@contextmanager
def up(place: Place) -> Iterator[Start]:
    command = [OPS, "up", "--data-dir", str(place.home / "data"), "--port", str(place.port)]
    start, began_s = Start(), time.monotonic()
    with subprocess.Popen(command, env=place.environ, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            for line in said(process.stdout.fileno(), began_s + UP_LIMIT_S):
                word = READY if line.startswith(READY) else line.split()[0]
                start.said_s[word] = time.monotonic() - began_s
                if word == READY:
                    break
            else:
                raise RuntimeError(f"`ops up` did not come up within {UP_LIMIT_S:g} s")
            yield start
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=DOWN_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()  # its parts end with it


def said(pipe: int, until_s: float) -> Iterator[str]:
    """Lines as they come, to the end of the pipe or of the time."""
    rest = b""
    while select.select([pipe], [], [], max(0.0, until_s - time.monotonic()))[0]:
        if not (read := os.read(pipe, 65_536)):
            return
        *whole, rest = (rest + read).split(b"\n")
        yield from (line.decode() for line in whole if line.strip())


def a_completed_training(place: Place) -> str:
    """Its id, as short as people type it."""
    command = [OPS, "train", "digits", "--max-epochs", "1", "--watch"]
    output = subprocess.run(command, env=place.environ, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\b[0-9a-f]{8}", output)
    assert found is not None, output
    return found[0]


def timed(command: Sequence[str], place: Place) -> Callable[[], float]:
    """The wall-clock time of the whole process, ms."""

    def once() -> float:
        began_s = time.monotonic()
        subprocess.run(command, env=place.environ, stdout=subprocess.DEVNULL, check=True)
        return (time.monotonic() - began_s) * 1e3

    once()
    return once


def tell_parts(starts: Sequence[Start]) -> None:
    """What of a start went by until each of its lines."""
    for word in starts[0].said_s:
        print(f"{statistics.median(start.said_s[word] for start in starts):6.2f} s  {word}")
    print()


if __name__ == "__main__":
    main()
