"""Files that arrive whole or not at all: a part, a rename; those that have a hash are gone on with."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import ArtifactView

READ_BYTES = 1 << 20

# Called after every chunk with the bytes that are there; what it raises ends the download, and the part stays.
Progress = Callable[[ArtifactView, int], None]


class DownloadFailed(OpsError):
    """The file cannot be put where it was wanted; the message says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.INTERNAL, message)


class Part:
    """The beginning of a file, with the hash of what is there."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size_bytes = 0
        while chunk := file.read(READ_BYTES):
            self._count(chunk)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.hash, self.size_bytes = hashlib.sha256(), 0

    def _count(self, chunk: bytes) -> None:
        self.hash.update(chunk)
        self.size_bytes += len(chunk)


def newest(artifacts: Iterable[ArtifactView], names: Sequence[str] | None) -> list[ArtifactView]:
    """Of each name that of the latest attempt; all of them without `names`. Raises OpsError for an unknown name."""
    found = {each.name: each for each in sorted(artifacts, key=lambda each: (each.attempt, each.step))}
    if missing := [name for name in names or () if name not in found]:
        known = f"there are {', '.join(sorted(found))}" if found else "it has left none so far"
        raise OpsError(ErrorCode.NOT_FOUND, f"no artifact {', '.join(missing)}; {known}")
    return [found[name] for name in (sorted(found) if names is None else dict.fromkeys(names))]


def fetch(artifact: ArtifactView, to: Path, fill: Callable[[Part], None]) -> Path:
    """Below `to`, under its name. `fill` is called with what is there, unless all of it is.

    Raises DownloadFailed where another file is, for a name that leads elsewhere, and for content that is not what was
    saved.
    """
    target = _place(artifact.name, to)
    if target.exists():
        with target.open("rb") as file:
            if Part(file).hash.hexdigest() == artifact.sha256:
                return target
        raise DownloadFailed(f"{target} is there with other content: move it away, or choose another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    name = target.with_name(f".{target.name}.{artifact.sha256[:16]}.part")
    with _alone(name) as file:
        part = Part(file)
        if part.size_bytes != artifact.size_bytes:
            fill(part)
        if part.hash.hexdigest() != artifact.sha256:
            name.unlink()
            raise DownloadFailed(f"{artifact.name} did not arrive as it was saved (SHA-256 differs); download it again")
        file.flush()
        os.fsync(file.fileno())
        name.replace(target)
    return target


def replace(target: Path, fill: Callable[[Part], None]) -> Path:
    """What `fill` writes takes the place of what was there, when all of it is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # TensorBoard takes any file whose name says tfevents for one.
    name = target.with_name(f".relight-{hashlib.sha256(target.name.encode()).hexdigest()[:16]}.part")
    with _alone(name) as file:
        try:
            fill(Part(file))
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            name.unlink()
            raise
        name.replace(target)
    return target


def _place(name: str, to: Path) -> Path:
    """`files/out/a.pt` is `out/a.pt` in there; no name, and no link in there, leads out."""
    parts = PurePosixPath(name.removeprefix("files/")).parts
    target = to.joinpath(*parts)
    if not parts or {"/", ".."} & set(parts) or not target.parent.resolve().is_relative_to(to.resolve()):
        raise DownloadFailed(f"{name!r} leads outside {to}: it is not written")
    return target


@contextmanager
def _alone(name: Path) -> Iterator[BinaryIO]:
    """The file, held against others. Who held it before may have renamed it: then there is a new one."""
    while True:
        with open(os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DownloadFailed(f"another download writes {name}: let it end") from None
            if name.exists() and os.path.samestat(os.fstat(file.fileno()), name.stat()):
                yield file
                return
