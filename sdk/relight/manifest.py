"""What a published checkpoint says about itself, and checking it. Neither torch nor numpy: agents use it too."""

import errno
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import get_ident
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

from ops_contract.agents import CheckpointRef
from ops_contract.lifecycle import Phase
from ops_contract.wire import Sha256, Step, Wire

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK_BYTES = 64 * 2**20
_MAX_MANIFEST_BYTES = 64 * 2**20
_THREADS = 4  # each holds a chunk
_READ_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO does not make the reader wait
_READ_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _below(name: str) -> str:
    if any(part in (".", "..") or len(part.encode()) > 200 for part in name.split("/")):
        raise ValueError("not a path below the checkpoint")
    return name


# Files of the engine lie flat; those that a LoopWorkload wrote may be in directories.
FileName = Annotated[
    str,
    StringConstraints(pattern=r"^[^/\x00-\x1f\x7f]+(/[^/\x00-\x1f\x7f]+)*$", max_length=1000),
    AfterValidator(_below),
]


class CheckpointMissing(Exception):
    """There is no such checkpoint under this storage root."""


class CheckpointCorrupt(Exception):
    """It is there, but is not what was committed; says what differs."""


class FileEntry(Wire):
    """`sha256` has one digest for each chunk of `CHUNK_BYTES`, the last one shorter."""

    size_bytes: int = Field(ge=0)
    sha256: list[Sha256]

    @model_validator(mode="after")
    def _every_chunk(self) -> Self:
        if len(self.sha256) != -(-self.size_bytes // CHUNK_BYTES):
            raise ValueError(f"{len(self.sha256)} digests for {self.size_bytes} bytes")
        return self


class Manifest(Wire):
    """Where in its training a checkpoint was taken, under which numerics, and its files.

    `step`, `epoch` and `phase` are those of the report that commits it. `numerics` is what decides a run's bits besides
    code and data: device model, versions, threads. `code_files` are what `code_digest` is of, by path.
    """

    format: Literal[1] = 1
    operation_id: UUID
    attempt: int = Field(ge=1)
    step: Step
    epoch: Step
    phase: Phase
    workload: str
    code_digest: str | None
    code_files: dict[str, Sha256] = {}
    data_digest: str | None
    training_samples: int | None = None
    numerics: dict[str, str]
    files: dict[FileName, FileEntry]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())


def check_manifest(root: Path, ref: CheckpointRef) -> Manifest:
    """The manifest, if it is the committed one and all files are there in their sizes; their hashes are not taken.

    Raises CheckpointMissing, CheckpointCorrupt, and OSError when the storage cannot be read now.
    """
    with opened(root, ref) as (_, manifest):
        return manifest


def verify(root: Path, ref: CheckpointRef) -> Manifest:
    """`check_manifest`, and every byte against its hash. Raises as that one."""
    with opened(root, ref) as (directory, manifest):
        verify_files(directory, manifest.files.items())
    return manifest


def verify_files(directory: int, files: Iterable[tuple[str, FileEntry]]) -> None:
    """Every byte against its hash. Raises CheckpointCorrupt, OSError."""
    buffers = defaultdict[int, memoryview](lambda: memoryview(bytearray(CHUNK_BYTES)))  # one a thread
    for name, entry in files:
        read_chunks(directory, name, entry, lambda start, end: buffers[get_ident()][: end - start])


@contextmanager
def opened(root: Path, ref: CheckpointRef) -> Iterator[tuple[int, Manifest]]:
    """The checkpoint's directory, as a descriptor, and its checked manifest. Raises as `check_manifest`."""
    directory = _open_directory(root, ref.path)
    try:
        manifest = _read_manifest(directory, ref)
        for name, entry in manifest.files.items():
            os.close(open_file(directory, name, entry))
        yield directory, manifest
    finally:
        os.close(directory)


def open_file(directory: int, name: str, entry: FileEntry) -> int:
    """A descriptor of a regular file of the listed size."""
    try:
        file = _open_below(directory, name)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            raise CheckpointCorrupt(f"{name} is missing or a symbolic link") from error
        raise
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size_bytes:
        os.close(file)
        raise CheckpointCorrupt(f"{name} has {found.st_size} bytes, not {entry.size_bytes}")
    return file


def _open_below(directory: int, name: str) -> int:
    """Component by component, so that no symbolic link leads out."""
    first, _, rest = name.partition("/")
    if not rest:
        return os.open(first, _READ_FILE, dir_fd=directory)
    below = os.open(first, _READ_DIRECTORY, dir_fd=directory)
    try:
        return _open_below(below, rest)
    finally:
        os.close(below)


def read_chunks(directory: int, name: str, entry: FileEntry, into: Callable[[int, int], memoryview]) -> None:
    """A whole file, each chunk checked against its hash; `into` gives the memory for its bytes from start to end.

    Chunks are read and hashed side by side. Of several bad ones the first is told. Raises CheckpointCorrupt, OSError.
    """
    with open(open_file(directory, name, entry), "rb", buffering=0) as file:

        def read(i: int) -> None:
            start = i * CHUNK_BYTES
            _read_chunk(file.fileno(), name, entry, i, into(start, min(start + CHUNK_BYTES, entry.size_bytes)))

        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            list(threads.map(read, range(len(entry.sha256))))


def _read_chunk(file: int, name: str, entry: FileEntry, i: int, into: memoryview) -> None:
    left = into
    while left:
        n = os.preadv(file, [left], i * CHUNK_BYTES + len(into) - len(left))
        if n == 0:
            raise CheckpointCorrupt(f"{name} ends before its size")
        left = left[n:]
    if sha256(into).hexdigest() != entry.sha256[i]:
        raise CheckpointCorrupt(f"{name} differs from what was written, in bytes from {i * CHUNK_BYTES}")


def _open_directory(root: Path, path: str) -> int:
    """Component by component, so that neither `..` nor a symbolic link leads out of the root."""
    parts = path.split("/")
    if not all(part not in ("", ".", "..") for part in parts):
        raise CheckpointCorrupt(f"{path!r} is not a path below the storage root")
    try:
        current = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts:
            try:
                below = os.open(part, _READ_DIRECTORY, dir_fd=current)
            finally:
                os.close(current)
            current = below
    except FileNotFoundError as error:
        raise CheckpointMissing(f"there is no checkpoint {path} under {root}") from error
    except NotADirectoryError as error:
        raise CheckpointCorrupt(f"{path} is not a directory, or is a symbolic link") from error
    return current


def _read_manifest(directory: int, ref: CheckpointRef) -> Manifest:
    raw = _manifest_bytes(directory, ref.path)
    if sha256(raw).hexdigest() != ref.manifest_sha256:
        raise CheckpointCorrupt(f"{MANIFEST} of {ref.path} is not the one that was committed")
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointCorrupt(f"{MANIFEST} of {ref.path}: {where}: {first['msg']}") from error
    if (manifest.step, manifest.epoch, manifest.phase) != (ref.step, ref.epoch, ref.phase):
        raise CheckpointCorrupt(f"{MANIFEST} of {ref.path} is of step {manifest.step}, {manifest.phase}")
    return manifest


def _manifest_bytes(directory: int, path: str) -> bytes:
    try:
        file = os.open(MANIFEST, _READ_FILE, dir_fd=directory)
    except FileNotFoundError as error:
        raise CheckpointMissing(f"{path} has no {MANIFEST}: it was never published") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointCorrupt(f"{MANIFEST} of {path} is a symbolic link") from error
        raise
    with open(file, "rb") as stream:
        raw = stream.read(_MAX_MANIFEST_BYTES + 1)
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise CheckpointCorrupt(f"{MANIFEST} of {path} is larger than {_MAX_MANIFEST_BYTES} bytes")
    return raw
