"""The backend's acts on the storage root: deleting, finding what may be nobody's, writing logs, opening artifacts."""

import errno
import heapq
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from ops_contract.backup import RESTORING
from ops_contract.modes import directory_mode, file_mode

LOGS = "logs"
_ROOT = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY = _ROOT | os.O_NOFOLLOW
OPERATION = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PUBLISHED = re.compile(r"([1-9][0-9]{0,8})-(?:0|[1-9][0-9]{0,18})(?:-evaluate|-model|-files|-finish)?(?:\.tmp)?")


@dataclass(frozen=True)
class Found:
    """A directory that bears a name as trainers give them. `path` is relative to the root."""

    operation_id: UUID
    attempt: int
    path: str


def published_in(root: Path, after: str, limit: int) -> tuple[list[Found], str]:
    """What trainers published, or began to, in the first `limit` operations behind the name `after`; and the last name.

    That is "" when there are no more. Other names, files and symbolic links are passed over, and an operation whose
    directory cannot be read now. Raises OSError for a root that cannot, or is not there.
    """
    with os.scandir(root) as entries:
        names = heapq.nsmallest(limit, (e.name for e in entries if e.name > after and _is_ours(e, OPERATION)))
    found = []
    for name in names:
        with suppress(OSError), os.scandir(root / name) as entries:
            found += [
                Found(UUID(name), int(match[1]), f"{name}/{entry.name}")
                for entry in entries
                if (match := _is_ours(entry, _PUBLISHED))
            ]
    return found, names[-1] if len(names) == limit else ""


def _is_ours(entry: os.DirEntry[str], pattern: re.Pattern[str]) -> re.Match[str] | None:
    match = pattern.fullmatch(entry.name)
    return match if match and entry.is_dir(follow_symlinks=False) else None


def owner(path: str) -> dict[str, str]:
    """Whose directory this is below the root, for the log: `<operation>/<attempt>-…`."""
    operation, _, name = path.partition("/")
    return {"operation_id": operation, "attempt": name.partition("-")[0]}


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


def remove_operation(root: Path, operation: UUID) -> None:
    """Delete all that is in `<operation>` below the root; no symbolic link is followed. Raises as above."""
    with _opened(root) as storage:
        with suppress(FileNotFoundError):
            shutil.rmtree(str(operation), dir_fd=storage)
        if os.path.lexists(root / str(operation)):
            raise OSError(f"{operation} is still there")


def open_file(root: Path, path: str) -> int:
    """A descriptor of the regular file `path` below the root; no symbolic link is followed on the way.

    Raises OSError: FileNotFoundError for anything else that is there, NotADirectoryError for a root that is not.
    """
    *directories, name = path.split("/")
    with _opened(root, directories, _open_directory) as at:
        file = _open_below(at, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(path)
    return file


def _open_directory(above: int, name: str) -> int:
    return _open_below(above, name, _DIRECTORY)


def _open_below(directory: int, name: str, flags: int) -> int:
    if name in ("", ".", ".."):
        raise FileNotFoundError(name)
    try:
        return os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):  # a link, no directory, a socket
            raise FileNotFoundError(name) from error
        raise


def write_logs(root: Path, operation: str, files: Mapping[str, Callable[[BinaryIO], None]]) -> None:
    """Write files for `<operation>/logs/` beside those that are there. Nothing shows before `show_logs`.

    One writer at a time. No symbolic link is followed. Raises OSError; a root that is not there is not made.
    """
    with _opened(root, (operation, LOGS), _have_directory) as directory:
        for name, write in files.items():
            with suppress(FileNotFoundError):
                os.unlink(_unfinished(name), dir_fd=directory)
            try:
                _write(_unfinished(name), write, directory)
            except OSError:
                with suppress(OSError):
                    os.unlink(_unfinished(name), dir_fd=directory)  # a full disk has better use for its room
                raise


def show_logs(root: Path, operation: str, names: list[str]) -> None:
    """Put what `write_logs` wrote in the place of what was there, each file whole."""
    with _opened(root, (operation, LOGS), _have_directory) as directory:
        for name in names:
            os.replace(_unfinished(name), name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)


def _write(name: str, write: Callable[[BinaryIO], None], directory: int) -> None:
    with _new_file(directory, name) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _new_file(directory: int, name: str) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = open(os.open(name, flags, 0o600, dir_fd=directory), "wb")  # noqa: SIM115
    try:
        _set_mode(file.fileno(), file_mode(os.fstat(directory).st_mode))
    except OSError:
        file.close()
        raise
    return file


def _unfinished(name: str) -> str:
    return f".{name}.tmp"


def _have_directory(above: int, name: str) -> int:
    """A descriptor of it, which is made where it is not there: as private as the one above, durably."""
    try:
        os.mkdir(name, 0o700, dir_fd=above)
    except FileExistsError:
        return _directory_in(above, name)
    made = _directory_in(above, name)
    _set_mode(made, directory_mode(os.fstat(above).st_mode))
    os.fsync(above)
    return made


def _set_mode(file: int, mode: int) -> None:
    if stat.S_IMODE(os.fstat(file).st_mode) != mode:
        with suppress(PermissionError):  # a file system without modes of its own
            os.fchmod(file, mode)


def operations_in(root: Path) -> list[UUID]:
    """Whose directories there are; none in a root that is not there."""
    with suppress(FileNotFoundError), os.scandir(root) as entries:
        return [UUID(entry.name) for entry in entries if _is_ours(entry, OPERATION)]
    return []


def new_file(root: Path, path: str) -> BinaryIO:
    """To write, with the directories on its way; no symbolic link is followed. Raises OSError, also where one is."""
    *directories, name = path.split("/")
    with _opened(root, directories, _have_directory) as at:
        return _new_file(at, name)


def mark_restoring(root: Path, digest: str) -> None:
    """Durably, before anything of the backup is there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(root / RESTORING, flags, 0o600), "w") as file:
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(root)


def sync_directory(path: Path) -> None:
    """What was renamed or made in it is durable."""
    with _opened(path) as directory:
        os.fsync(directory)


def files_in(root: Path, path: str) -> Iterator[str]:
    """What is no directory, in the directory `path` below the root and in those below it; nothing where it is missing.

    No symbolic link is followed.
    """
    with _opened(root) as storage, suppress(FileNotFoundError):
        for directory, _, names, _ in os.fwalk(path, dir_fd=storage):
            yield from (f"{directory}/{name}" for name in sorted(names))


def _remove_tree(root: Path, operation: str, name: str) -> None:
    with _opened(root, (operation,)) as directory:
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)


def _directory_in(above: int, name: str) -> int:
    return os.open(name, _DIRECTORY, dir_fd=above)


@contextmanager
def _opened(
    directory: Path, below: Iterable[str] = (), step: Callable[[int, str], int] = _directory_in
) -> Iterator[int]:
    """A descriptor of a directory, or of the one that these names lead to below it, a `step` for each."""
    at = os.open(directory, _ROOT)
    try:
        for name in below:
            above, at = at, step(at, name)
            os.close(above)
        yield at
    finally:
        os.close(at)
