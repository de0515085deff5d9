"""The backend's one act on the storage root: deleting checkpoints that retention gave up."""

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_checkpoint(root: Path, path: str) -> None:
    """Delete `<operation>/<checkpoint>` below the root; no symbolic link is followed. Gone already is fine.

    Raises OSError when it cannot be deleted now; a root that is not there is one of these, since it may be unmounted.
    """
    operation, name = path.split("/")
    if {operation, name} & {"", ".", ".."}:
        raise OSError(f"{path!r} is not the place of a checkpoint")
    with suppress(FileNotFoundError):
        _remove_tree(root, operation, name)
    if os.path.lexists(root / path) or not root.is_dir():
        raise OSError(f"{path} is still there")


def _remove_tree(root: Path, operation: str, name: str) -> None:
    storage = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        directory = os.open(operation, _DIRECTORY, dir_fd=storage)
    finally:
        os.close(storage)
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)
