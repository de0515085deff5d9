"""DIR/lock: one process at a time uses a data directory, and says there who it is."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ops_contract.system_words import system_words
from relight.private import make_private

# Who only looks takes the lock for a moment, too.
LOOKED_AT_S = 1.0
TURN_S = 0.02


class Taken(Exception):
    """Another process uses the directory; the message says which."""


@dataclass(frozen=True)
class Holder:
    """`doing` is its command. Of an `ops up`: its address once it has one, and whether it has come up there."""

    pid: int
    doing: str
    url: str | None = None
    port: int | None = None
    ready: bool = False
    by_systemd: bool = False


class Lock:
    """Held by us. What a predecessor wrote that was killed stays until we know better."""

    def __init__(self, file: IO[str], doing: str) -> None:
        self._file = file
        self.previous_port: int | None = _noted(file).get("port")
        self.doing = doing
        # At once, or a killed predecessor's pid, by now maybe a stranger's, would pass for ours.
        self.note(port=self.previous_port)

    def note(self, **facts: Any) -> None:
        self._write(json.dumps({"pid": os.getpid(), "doing": self.doing} | facts))

    def forget(self) -> None:
        self._write("")

    def fileno(self) -> int:
        return self._file.fileno()

    def _write(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()


@contextmanager
def only_one(data_dir: Path, doing: str) -> Iterator[Lock]:
    """Raises Taken that says who is there."""
    make_private(data_dir)
    with os.fdopen(os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        until_s = time.monotonic() + LOOKED_AT_S
        while not _try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > until_s:
                found = find_holder(data_dir) or Holder(0, "another process")
                raise Taken(describe(found, data_dir))
            time.sleep(TURN_S)
        yield Lock(file, doing)


def find_holder(data_dir: Path) -> Holder | None:
    """Who holds the lock now; one that has only just taken it has no name yet."""
    with suppress(FileNotFoundError, NotADirectoryError), (data_dir / "lock").open() as file:
        if not _try_lock(file, fcntl.LOCK_SH):
            noted = _noted(file)
            known: dict[str, Any] = {"pid": 0, "doing": "ops up"}
            known |= {name: noted[name] for name in Holder.__dataclass_fields__ if name in noted}
            return Holder(**known)
    return None


def holds(pid: int, data_dir: Path) -> bool:
    """Whether that process has the lock open. Raises OSError when it is gone, or another user's."""
    lock = (data_dir / "lock").stat()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.path.samestat(file.stat(), lock):
                return True
    return False


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def describe(holder: Holder, data_dir: Path) -> str:
    details = ", ".join([f"pid {holder.pid}", *([holder.url] if holder.url else [])])
    if holder.doing == "ops up":
        return f"another `ops up` ({details}) runs on {data_dir}; use that one, or give this one its own --data-dir"
    return f"`{holder.doing}` ({details}) is at work on {data_dir}; wait until it is done"


def unusable(data_dir: Path, error: OSError) -> str:
    what = system_words(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}; make room there, or give another --data-dir"
    return f"{data_dir} cannot be the data directory: {what}; mend that, or give another --data-dir"


def _noted(file: IO[str]) -> dict[str, Any]:
    try:
        noted = json.loads(file.read())
    except ValueError:
        return {}
    return noted if isinstance(noted, dict) else {}
