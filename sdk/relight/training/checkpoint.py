"""Checkpoints on disk: published whole or not at all, verified while they are read.

`<root>/<operation>/<attempt>-<step>/` (`-evaluate` appended when an evaluation is next) holds `state.json`,
`state.safetensors` and `manifest.json`. An attempt writes below its own number only, so one that was fenced and still
runs touches no file of its successor.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops_contract.agents import CheckpointRef
from ops_contract.lifecycle import Phase
from relight.manifest import (
    CHUNK_BYTES,
    MANIFEST,
    CheckpointCorrupt,
    FileEntry,
    Manifest,
    opened,
    read_chunks,
)
from relight.training import tensorfile
from relight.training.codec import CodecError, Encoded, decode

DOCUMENT = "state.json"
TENSORS = "state.safetensors"


@dataclass(frozen=True)
class Published:
    """`path` is relative to the storage root; `size_bytes` counts every file, the manifest too."""

    path: str
    size_bytes: int
    manifest_sha256: str


def publish(root: Path, about: Manifest, state: Encoded) -> Published:
    """Write, fsync, rename, fsync the parent: after a crash at any point the directory is whole or is not there.

    `about` is the manifest but for its files. Raises OSError; what was written is then removed.
    """
    name = _directory_name(about)
    with published_directory(root, str(about.operation_id), name) as directory:
        files = {
            DOCUMENT: write_file(directory, DOCUMENT, [memoryview(state.document)]),
            TENSORS: write_file(directory, TENSORS, tensorfile.chunks(state.tensors)),
        }
        manifest = about.model_copy(update={"files": files})
        raw = manifest.model_dump_json(indent=1).encode()
        write_file(directory, MANIFEST, [memoryview(raw)])
    return Published(f"{about.operation_id}/{name}", manifest.size_bytes + len(raw), sha256(raw).hexdigest())


def restore(root: Path, ref: CheckpointRef) -> tuple[Manifest, Any]:
    """The manifest and the state tree, every byte checked against the manifest's hashes as it is read.

    Raises CheckpointMissing, CheckpointCorrupt, and OSError when the storage cannot be read now.
    """
    with opened(root, ref) as (directory, manifest):
        contents = _read_all(directory, manifest.files)
    try:
        document = bytes(tensorfile.raw_bytes(contents[DOCUMENT]))
        return manifest, decode(document, tensorfile.parse(contents[TENSORS]))
    except (CodecError, tensorfile.TensorFileError, KeyError) as error:
        raise CheckpointCorrupt(f"{ref.path}: {error}") from error


@contextmanager
def published_directory(root: Path, operation: str, name: str) -> Iterator[int]:
    """A directory to write files in; when the block is done it has its name, durably. If it fails nothing is left."""
    with _operation_directory(root, operation) as parent:
        with _scratch(parent, f"{name}.tmp") as scratch:
            yield scratch
            os.fsync(scratch)
            # Fails when the name is taken: one attempt publishes a step once.
            os.rename(f"{name}.tmp", name, src_dir_fd=parent, dst_dir_fd=parent)
        os.fsync(parent)


def _directory_name(about: Manifest) -> str:
    suffix = "-evaluate" if about.phase is Phase.EVALUATE else ""
    return f"{about.attempt}-{about.step}{suffix}"


@contextmanager
def _operation_directory(root: Path, name: str) -> Iterator[int]:
    root.mkdir(parents=True, exist_ok=True)
    storage = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        directory = _make_directory(storage, name)
    finally:
        os.close(storage)
    try:
        yield directory
    finally:
        os.close(directory)


def _make_directory(parent: int, name: str) -> int:
    try:
        os.mkdir(name, dir_fd=parent)
        os.fsync(parent)
    except FileExistsError:
        pass
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)


@contextmanager
def _scratch(parent: int, name: str) -> Iterator[int]:
    """A new directory in place of what a crash left under its name; removed again if the block fails."""
    shutil.rmtree(name, ignore_errors=True, dir_fd=parent)
    os.mkdir(name, dir_fd=parent)
    directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
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
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=directory)
    try:
        for part in parts:
            _write_all(file, part)
            chunks.update(part)
        os.fsync(file)
    finally:
        os.close(file)
    return FileEntry(size_bytes=chunks.size_bytes, sha256=chunks.hexdigests())


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


def _read_all(directory: int, files: Mapping[str, FileEntry]) -> dict[str, Tensor]:
    """Each file's bytes (1-D uint8), checked chunk by chunk."""
    return {name: _read(directory, name, entry) for name, entry in files.items()}


def _read(directory: int, name: str, entry: FileEntry) -> Tensor:
    contents = torch.empty(entry.size_bytes, dtype=torch.uint8)
    buffer = contents.numpy().data
    read_chunks(directory, name, entry, lambda start, end: buffer[start:end])
    return contents
