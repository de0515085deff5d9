"""Whose a directory or file is: the lock of a living process, on a file beside it."""

import fcntl
import os
from pathlib import Path


def lock(path: Path) -> int | None:
    """Until the descriptor is closed or its process has ended; None when another has it."""
    held = os.open(lock_path(path), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    return held


def lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")
