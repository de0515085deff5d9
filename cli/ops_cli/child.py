"""One service process: it says on stdout when it is ready, logs to a file, and ends when its stdin does."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from relight.private import opener

TAIL_BYTES = 16_384
LOGS_KEPT = 3


class Child:
    """Started from and reaped by one thread, so that its pid is never a stranger's when it is signalled."""

    def __init__(self, name: str, module: Sequence[str], environ: Callable[[], Mapping[str, str]], log: Path) -> None:
        """`environ` is asked at every start: it may name what another child has said."""
        self.name = name
        self.log = log
        self.ready: dict[str, Any] | None = None
        self.started_at_s = 0.0
        # -P: a file of the directory that we happen to be in must not pass for a module.
        self._command = [sys.executable, "-P", "-m", *module, "--json", "--exit-on-eof"]
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.ready = None
        self.started_at_s = time.monotonic()
        with open(self.log, "ab", opener=opener) as log:
            # Its own session: a ctrl-C in the terminal is ours to turn into an orderly stop.
            # The pipe on stdin is what ends it should we be killed.
            self._process = subprocess.Popen(
                self._command,
                env=dict(self._environ()),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        threading.Thread(target=self._drain, args=(self._process.stdout,), daemon=True, name=self.name).start()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ending(self) -> str:
        """How it ended."""
        code = self._process.poll() if self._process else None
        if code is None:
            return "is still there"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def signal(self, number: int) -> None:
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """With what is left in its process group."""
        if self.running:
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """After it has ended."""
        if self._process and self._process.stdin:
            self._process.stdin.close()
            self._process.wait()

    def last_lines(self, count: int) -> list[str]:
        return last_lines(self.log, count)

    def _drain(self, stdout: IO[bytes]) -> None:
        """To its end, or a child that says much would stand still."""
        with stdout, self.log.open("ab") as log:
            for line in stdout:
                said = _json_object(line)
                if said.get("event") == "ready":
                    self.ready = said
                else:
                    log.write(line)
                    log.flush()


def last_lines(log: Path, count: int) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError as error:
        return [f"(its log cannot be read: {error})"]


def rotate(log: Path) -> None:
    """Every start of the stack begins a new log; a few older ones stay as .1, .2, …"""
    for number in range(LOGS_KEPT - 1, -1, -1):
        older = log.with_name(f"{log.name}.{number}") if number else log
        if older.exists():
            older.replace(log.with_name(f"{log.name}.{number + 1}"))


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
