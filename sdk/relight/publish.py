"""Files below the storage root that appear whole or not at all. Without torch: commands publish too."""

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from ops_contract.modes import directory_mode, file_mode
from ops_contract.reports import ArtifactSaved
from relight.manifest import CHUNK_BYTES, FileEntry

MAX_ARTIFACTS = 1000  # files of the user's that are published at a time
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def published_directory(root: Path, operation: str, name: str) -> Iterator[int]:
    """A directory to write files in; when the block is done it has its name, durably. If it fails nothing is left."""
    with operation_directory(root, operation) as parent:
        with _scratch(parent, f"{name}.tmp") as scratch:
            yield scratch
            os.fsync(scratch)
            # Fails when the name is taken: one attempt publishes a step once.
            os.rename(f"{name}.tmp", name, src_dir_fd=parent, dst_dir_fd=parent)
        os.fsync(parent)


@contextmanager
def operation_directory(root: Path, name: str) -> Iterator[int]:
    root.mkdir(parents=True, exist_ok=True)
    storage = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        directory = have_directory(storage, name)
    finally:
        os.close(storage)
    try:
        yield directory
    finally:
        os.close(directory)


def have_directory(above: int, name: str) -> int:
    """A descriptor of one that is there, durably; made where it is not."""
    try:
        made = make_directory(above, name)
        os.fsync(above)
        return made
    except FileExistsError:
        return os.open(name, _DIRECTORY, dir_fd=above)


def make_directory(above: int, name: str) -> int:
    """A descriptor of a new one, as private as the one above."""
    os.mkdir(name, 0o700, dir_fd=above)
    made = os.open(name, _DIRECTORY, dir_fd=above)
    _set_mode(made, directory_mode(os.fstat(above).st_mode))
    return made


def _set_mode(file: int, mode: int) -> None:
    if stat.S_IMODE(os.fstat(file).st_mode) != mode:
        with suppress(PermissionError):  # a file system without modes of its own
            os.fchmod(file, mode)


@contextmanager
def _scratch(parent: int, name: str) -> Iterator[int]:
    """A new directory in place of what a crash left under its name; removed again if the block fails."""
    shutil.rmtree(name, ignore_errors=True, dir_fd=parent)
    directory = make_directory(parent, name)
    try:
        yield directory
    except BaseException:
        # A full disk gets its room back.
        shutil.rmtree(name, ignore_errors=True, dir_fd=parent)
        raise
    finally:
        os.close(directory)


def write_file(directory: int, name: str, parts: Iterable[memoryview]) -> FileEntry:
    """One new file, fsynced, and the hashes of its chunks."""
    chunks = _ChunkHashes()
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    try:
        _set_mode(file, file_mode(os.fstat(directory).st_mode))
        for part in parts:
            _write_all(file, part)
            chunks.update(part)
        os.fsync(file)
    finally:
        os.close(file)
    return FileEntry(size_bytes=chunks.size_bytes, sha256=chunks.hexdigests())


def hashed_tree(directory: Path) -> Iterator[tuple[str, FileEntry]]:
    """Every file below, by its path from there, made durable with the directories.

    Raises ValueError for what is neither a regular file nor a directory.
    """
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from ((f"{entry.name}/{path}", found) for path, found in hashed_tree(Path(entry.path)))
        elif entry.is_file(follow_symlinks=False):
            with open(entry.path, "rb", buffering=0) as file:
                yield entry.name, _hashed_file(file.fileno())
        else:
            raise ValueError(f"{entry.path} is a link or a special file; a checkpoint keeps regular files only")
    sync(directory)


def settled(directory: int, name: str) -> FileEntry:
    """Of a file that somebody else wrote there: as private as the directory, durable, and its hashes."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        _set_mode(file, file_mode(os.fstat(directory).st_mode))
        return _hashed_file(file)
    finally:
        os.close(file)


def _hashed_file(file: int) -> FileEntry:
    chunks, buffer = _ChunkHashes(), memoryview(bytearray(2**20))
    while n := os.readv(file, [buffer]):
        chunks.update(buffer[:n])
    os.fsync(file)
    return FileEntry(size_bytes=chunks.size_bytes, sha256=chunks.hexdigests())


def replace_file(path: Path, content: str) -> None:
    """Durably, in place of what is there: whoever reads it, after a power cut too, has the one or the other whole."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(content)
    sync(new)
    new.replace(path)
    sync(path.parent)


def sync(path: Path | str, above: int | None = None) -> None:
    """A file, or the names in a directory, are on disk when this returns. `above`: where its path begins."""
    file = os.open(path, os.O_RDONLY, dir_fd=above)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def file_artifact(
    operation_id: UUID, directory: str, path: str, step: int, size_bytes: int, digest: str
) -> ArtifactSaved:
    """A file of the user's that was published in this directory of the operation, under its path there."""
    return ArtifactSaved(
        artifact_id=uuid4(),
        name=f"files/{path}",
        step=step,
        path=f"{operation_id}/{directory}/{path}",
        size_bytes=size_bytes,
        sha256=digest,
    )


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


class _ChunkHashes:
    """SHA-256 of each `CHUNK_BYTES` of what goes by."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._hashes: list[Any] = []

    def update(self, data: memoryview) -> None:
        while data:
            room = CHUNK_BYTES - self.size_bytes % CHUNK_BYTES
            if room == CHUNK_BYTES:
                self._hashes.append(sha256())
            self._hashes[-1].update(data[:room])
            self.size_bytes += len(data[:room])
            data = data[room:]

    def hexdigests(self) -> list[str]:
        return [digest.hexdigest() for digest in self._hashes]
