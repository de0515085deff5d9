"""Processes that a test did not start itself."""

from pathlib import Path


def alive(pid: int | None) -> bool:
    """False for a zombie: its memory and devices are free. One that dies while it is looked at has no status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
