"""`ops` in a real pseudo-terminal, and what its screen shows."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import pyte

OPS = Path(sys.executable).with_name("ops")
WAIT_S = 180.0
CTRL_C = "\x03"


class Terminal:
    """The program believes in `columns` and `rows`; unless `exact` the screen has more: too long a line shows."""

    def __init__(
        self, environ: Mapping[str, str], *words: object, columns: int = 80, rows: int = 24, exact: bool = False
    ) -> None:
        self.screen = pyte.Screen(columns if exact else 4 * columns, rows if exact else 200)
        self.screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._ours, theirs = pty.openpty()
        self.resize(columns, rows, exact)
        self._process = subprocess.Popen(
            [str(OPS), *map(str, words)],
            env={**environ, "TERM": "xterm-256color"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # ctrl-C goes to who has the terminal
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def resize(self, columns: int, rows: int, exact: bool = True) -> None:
        self.columns = columns
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if exact:
            self.screen.resize(rows, columns)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def until(self, *shown: str) -> None:
        """All of it is on the screen."""
        until_s = time.monotonic() + WAIT_S
        while not all(each in self.text for each in shown):
            assert time.monotonic() < until_s, f"never shown: {shown}\n{self.text}"
            assert self._read(until_s), f"ended without {shown}:\n{self.text}"

    def leave(self) -> int:
        """Its exit code, once it has ended and all is on the screen. No traceback, no line too long."""
        until_s = time.monotonic() + WAIT_S
        while self._read(until_s):
            assert time.monotonic() < until_s, f"does not end:\n{self.text}"
        assert "Traceback" not in self.text
        assert not [line for line in self.lines if len(line) > self.columns], self.text
        return self._process.wait()

    def _read(self, until_s: float) -> bool:
        """False when the program has closed the terminal."""
        ready, _, _ = select.select([self._ours], [], [], max(0.0, until_s - time.monotonic()))
        if not ready:
            return True
        try:
            piece = os.read(self._ours, 65_536)
        except OSError:  # EIO: nobody has it open any more
            return False
        self.raw += piece
        self._stream.feed(piece)
        return bool(piece)
