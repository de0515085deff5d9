"""A backup as one file: a tar, and after its end a line with the SHA-256 of all before.

relight-backup.json    versions, and what is in it
storage/…              as below the storage root
token                  of the data directory, where it has one
database/<table>       its rows, as COPY wrote them
"""

import fcntl
import hashlib
import io
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

from pydantic import BaseModel

from ops_backend.storage import OPERATION, new_file, sync_directory
from ops_backend.store.backup import TableRows

MANIFEST = "relight-backup.json"
TOKEN = "token"
FORMAT = 1
UNFINISHED = ".partial"
_TRAILER_BYTES = len("sha256 ") + 64 + 1
_BLOCK_BYTES = 1 << 20
_MAX_SMALL_BYTES = 1 << 20
_STORAGE = "storage/"
# tarfile follows headers about headers by calling itself, and reads as much of one as it says that it has.
_HOSTILE_HEADERS = (RecursionError, OverflowError, MemoryError)
_TABLE = re.compile(r"database/[a-z_]{1,63}")


class ArchiveError(Exception):
    """The file is no whole backup, or not one for this version; the message says what to do."""


class Manifest(BaseModel):
    """`revision` is that of the schema, which a restore makes first."""

    format: int = FORMAT
    relight: str
    postgres: str
    revision: str
    taken_at: datetime
    tables: list[TableRows]


class ArchiveWriter:
    """Everything in it is private: the token, and what users' code may hold."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._tar = tarfile.open(fileobj=self, mode="w|", bufsize=_BLOCK_BYTES)  # type: ignore[call-overload]  # noqa: SIM115
        self.changed: list[str] = []

    def write(self, data: bytes) -> int:
        """For the tar."""
        self._digest.update(data)
        return self._file.write(data)

    def add_manifest(self, manifest: Manifest) -> None:
        self.add_bytes(MANIFEST, manifest.model_dump_json(indent=1).encode())

    def add_bytes(self, name: str, data: bytes) -> None:
        self._tar.addfile(_member(name, len(data)), io.BytesIO(data))

    def add_file(self, name: str, file: IO[bytes]) -> None:
        """As long as it is now. Bytes that go while it is read are zeros, and `changed` has its name."""
        found = os.fstat(file.fileno())
        member = _member(name, found.st_size)
        member.mode, member.mtime = found.st_mode & 0o777, int(found.st_mtime)
        reading = _Padded(file)
        self._tar.addfile(member, reading)
        if reading.padded or os.fstat(file.fileno()).st_mtime_ns != found.st_mtime_ns:
            self.changed.append(os.fsencode(name).decode(errors="replace"))

    def close(self) -> None:
        """Durably."""
        self._tar.close()
        self._file.write(f"sha256 {self._digest.hexdigest()}\n".encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size_bytes, 0o600, int(datetime.now(UTC).timestamp())
    return member


class _Padded:
    """A file that never ends: tar has promised a length."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.padded = False

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.padded |= len(data) < size
        return data.ljust(size, b"\0")


@contextmanager
def new_archive(path: Path) -> Iterator[ArchiveWriter]:
    """At `path` when the block is done, and nothing there when it fails. Raises OSError."""
    if path.exists():
        raise FileExistsError(f"{path} is there already")
    unfinished = path.with_name(path.name + UNFINISHED)
    _clear_away([unfinished, *path.parent.glob(f"relight-*{UNFINISHED}")])
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        # As long as we live: a later backup deletes what nobody writes any more.
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            writer = ArchiveWriter(file)
            yield writer
            writer.close()
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
    sync_directory(path.parent)


def _clear_away(unfinished: Iterable[Path]) -> None:
    """What killed ones have left."""
    for path in unfinished:
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class ArchiveReader:
    """Of a file that `digest` has found whole. Raises ArchiveError."""

    def __init__(self, path: Path) -> None:
        try:
            with ExitStack() as unless_it_is_one:
                self._tar = unless_it_is_one.enter_context(tarfile.open(path, "r:"))
                self._members = _checked(self._tar, path.stat().st_size)
                self.manifest = Manifest.model_validate_json(self._open(self._members[MANIFEST]).read())
                tables = {f"database/{rows.name}" for rows in self.manifest.tables}
                if missing := tables - self._members.keys():
                    raise ArchiveError(f"it has no {missing.pop()}")
                unless_it_is_one.pop_all()
        except (tarfile.TarError, KeyError, ValueError, *_HOSTILE_HEADERS, ArchiveError) as error:
            raise ArchiveError(f"{path} is no backup of Relight: {error}") from error
        if self.manifest.format != FORMAT:
            raise ArchiveError(f"{path} has format {self.manifest.format}; restore it with the Relight that made it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    @property
    def size_bytes(self) -> int:
        return sum(member.size for member in self._members.values())

    def token(self) -> str | None:
        member = self._members.get(TOKEN)
        return self._open(member).read().decode() if member else None

    def rows(self) -> Iterator[tuple[TableRows, IO[bytes]]]:
        for rows in self.manifest.tables:
            yield rows, self._open(self._members[f"database/{rows.name}"])

    def extract_storage(self, root: Path) -> int:
        """Into a root that has none of it yet; how many files."""
        files = {name: member for name, member in self._members.items() if name.startswith(_STORAGE)}
        for name, member in files.items():
            with new_file(root, name.removeprefix(_STORAGE)) as file:
                shutil.copyfileobj(self._open(member), file, _BLOCK_BYTES)
                file.flush()
                os.utime(file.fileno(), (member.mtime, member.mtime))
                if member.mode & 0o100:
                    os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) | 0o100)
        return len(files)

    def _open(self, member: tarfile.TarInfo) -> IO[bytes]:
        opened: Any = self._tar.extractfile(member)
        return opened  # type: ignore[no-any-return]


def _checked(tar: tarfile.TarFile, size_bytes: int) -> dict[str, tarfile.TarInfo]:
    """By name. Whoever made it could also write its SHA-256, so nothing of it is believed. Raises ArchiveError."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        # A sparse file may claim any size, and a negative one has the next member be this one again.
        if member.type != tarfile.REGTYPE or member.issparse() or not 0 <= member.size <= size_bytes:
            raise ArchiveError(f"{member.name!a} is not a plain file")
        if member.name in (MANIFEST, TOKEN) and member.size > _MAX_SMALL_BYTES:
            raise ArchiveError(f"{member.name!a} has more than {_MAX_SMALL_BYTES} bytes")
        if not 0 <= member.mtime < 2**40:
            raise ArchiveError(f"{member.name!a} has a time that is none")
        if member.name in members:
            raise ArchiveError(f"{member.name!a} is in it twice")
        if member.name not in (MANIFEST, TOKEN) and not _TABLE.fullmatch(member.name) and not _is_stored(member.name):
            raise ArchiveError(f"{member.name!a} is not the place of a file of ours")
        members[member.name] = member
    return members


def _is_stored(name: str) -> bool:
    """`storage/<operation>/…`, and no way out of there."""
    operation, *parts = name.removeprefix(_STORAGE).split("/")
    return bool(
        name.startswith(_STORAGE)
        and OPERATION.fullmatch(operation)
        and parts
        and not {"", ".", ".."} & {*parts}
        and "\0" not in name
    )


def digest(path: Path) -> str:
    """The SHA-256 of a whole backup. Raises ArchiveError for one with any byte changed or missing, OSError."""
    found, left = hashlib.sha256(), path.stat().st_size - _TRAILER_BYTES
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
            found.update(block)
            left -= len(block)
        if file.read() != f"sha256 {found.hexdigest()}\n".encode():
            raise ArchiveError(f"{path} is damaged, cut short or no backup: it does not end with its SHA-256")
    return found.hexdigest()
