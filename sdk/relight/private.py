"""Directories and files for their owner alone, whatever the umask."""

import os
from pathlib import Path


def make_private(directory: Path) -> None:
    """With those above that are not there: `mkdir(parents=True)` leaves them to the umask. Raises OSError."""
    if not directory.is_dir():
        make_private(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


def opener(path: str, flags: int) -> int:
    """For `open`: a new file is 0600."""
    return os.open(path, flags, 0o600)
