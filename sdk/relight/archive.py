"""A snapshot's archive: a plain tar of files and links, the same bytes for the same contents."""

import io
import os
import posixpath
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# What Linux takes for a path and for a name in it.
_MAX_PATH_BYTES, _MAX_NAME_BYTES = 4095, 255


class BadArchive(Exception):
    """It is no snapshot, or one that does not stay in its directory; the message says which entry."""


@dataclass(frozen=True)
class Entry:
    """A file, or with `link` a symbolic link to there."""

    data: bytes = b""
    executable: bool = False
    link: str | None = None


def write_archive(entries: Mapping[str, Entry]) -> bytes:
    """Neither times nor owners are in it, and no compression, whose bytes change with its library."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, entry in sorted(entries.items()):
            member = tarfile.TarInfo(path)
            member.mode = 0o755 if entry.executable else 0o644
            member.size = len(entry.data)
            if entry.link is not None:
                member.type, member.linkname = tarfile.SYMTYPE, entry.link
            tar.addfile(member, io.BytesIO(entry.data))
    return buffer.getvalue()


def read_archive(archive: bytes) -> dict[str, Entry]:
    """By path, without directories: that of a file is made with it. Raises BadArchive for anything but files and links.

    Those of `git archive` and `tar -c .` are read too.
    """
    entries: dict[str, Entry] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for member in tar:
                member.name = member.name.removeprefix("./")
                if member.isdir():
                    continue
                _check(member, entries, len(archive))
                file = tar.extractfile(member) if member.isreg() else None
                link = None if file else member.linkname
                entries[member.name] = Entry(file.read() if file else b"", bool(member.mode & 0o100), link)
    # tarfile follows headers about headers by calling itself, and reads as much of one as it says that it has.
    except (tarfile.TarError, OSError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise BadArchive(f"it is not a whole tar file: {error}") from error
    directories: set[str] = set()
    for path in entries:
        above = posixpath.dirname(path)
        while above and above not in directories:
            if above in entries:
                raise BadArchive(f"{path} is below {above}, which is no directory")
            directories.add(above)
            above = posixpath.dirname(above)
    return entries


def unpack(archive: bytes, directory: Path) -> None:
    """Into a directory that is empty. Raises BadArchive, and OSError when there is no room; then some of it is there.

    Nothing is written through a link: links come last, and nothing is below one.
    """
    entries = read_archive(archive)
    links = {path: entry.link for path, entry in entries.items() if entry.link is not None}
    for path in sorted(entries, key=links.__contains__):
        target = directory / path
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path in links:
                target.symlink_to(links[path])
            else:
                mode = 0o755 if entries[path].executable else 0o644
                with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                    file.write(entries[path].data)
        except FileExistsError as error:  # on a file system that takes README and Readme, or two forms of é, for one
            raise BadArchive(f"{path} and another name are the same on this file system") from error
    for path, link in links.items():
        if leads_out(directory, path, link):
            raise BadArchive(f"the link {path} leads out of the project, to {link}")


def leads_out(directory: Path, path: str, link: str) -> bool:
    """Whether a link that is there leads out: as it is written, or by way of others."""
    written = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    real = Path(os.path.realpath(directory / path))
    return link.startswith("/") or written.split("/")[0] == ".." or not real.is_relative_to(directory.resolve())


def _check(member: tarfile.TarInfo, before: Mapping[str, Entry], size_bytes: int) -> None:
    raw = os.fsencode(member.name)
    if len(raw) > _MAX_PATH_BYTES or max(map(len, raw.split(b"/"))) > _MAX_NAME_BYTES:
        raise BadArchive(f"{member.name[:100]!r}… is longer than a path can be")
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or str(path) != member.name or not path.parts or "\0" in member.name:
        raise BadArchive(f"{member.name!r} is no path within a project")
    if member.name in before:
        raise BadArchive(f"{member.name} is there twice")
    # A sparse file may claim any size.
    if member.type not in (tarfile.REGTYPE, tarfile.SYMTYPE) or member.issparse() or not 0 <= member.size <= size_bytes:
        raise BadArchive(f"{member.name} is neither a file nor a link")
    target = os.fsencode(member.linkname)
    if member.issym() and (not 0 < len(target) <= _MAX_PATH_BYTES or b"\0" in target):
        raise BadArchive(f"the link {member.name} leads to what is no path")
