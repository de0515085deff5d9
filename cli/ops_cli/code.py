"""The user's code: packed with a submit, shown, and fetched again."""

import posixpath
import re
import sys
from collections.abc import Collection
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json, OperationId, with_client
from ops_cli.exits import invalid, not_found

if TYPE_CHECKING:
    from uuid import UUID

    from ops_contract.jobs import Code, JobSpec
    from relight.archive import Entry
    from relight.client import Client
    from relight.packing import Packed

CodeDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where your code is; else the current directory. See `ops pack`.")
]
NoCode = Annotated[bool, typer.Option("--no-code", help="Your code is installed on the workers; pack nothing.")]


def register(app: typer.Typer) -> None:
    app.command()(pack)
    app.command()(code)


def pack(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Your project.")] = Path("."), json: Json = False
) -> None:
    """Show what a submit would pack of a directory.

    Nothing is sent. Within a git work tree what git tracks and what it would, else all but hidden files, caches and
    venvs. Name in .relightignore what does not belong to it, in the words of .gitignore.
    """
    from relight import packing

    packed = packing.pack(directory)
    if json:
        print(dumps({"sha256": packed.sha256, "files": dict(packed.files), "left_out": packed.left_out}))
        return
    for path, size_bytes in packed.files:
        print(f"{show.size(size_bytes):>9}  {path}")
    print(_said(packed, directory))


@with_client
def code(
    client: "Client",
    operation_id: OperationId,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Unpack it there: a new or empty directory.")] = None,
    json: Json = False,
) -> None:
    """Show or unpack the code of an operation, as it was at submit."""
    found = client.resolve(operation_id)
    ran = client.get(found).job.code
    if ran is None:
        raise not_found(f"{str(found)[:8]} has no code of its own: it was submitted without")
    packed = client.snapshot(ran.sha256)
    files = {path: len(entry.data) for path, entry in _entries(packed).items()}
    if to is not None:
        _unpack(packed, to)
    if json:
        print(dumps({**ran.model_dump(), "files": files}))
    elif to is None:
        for path, size_bytes in files.items():
            print(f"{show.size(size_bytes):>9}  {path}")
    if not json:
        print(f"{_amount(files.values())}{_state(ran)}" + (f", unpacked in {to}" if to else ""))


def with_code(client: "Client", job: "JobSpec", directory: Path | None, no_code: bool) -> "JobSpec":
    """The job with a snapshot of the directory as it is now, when it runs the user's own code and has none.

    What was packed is said on stderr. Raises OpsError `invalid`.
    """
    from ops_contract.jobs import is_users_own
    from relight.packing import pack

    own = is_users_own(job.workload or "command")
    if directory and (no_code or job.code or not own):
        reason = "--no-code" if no_code else "the code that the file names" if job.code else "an installed workload"
        raise invalid(f"--code {directory} contradicts {reason}; leave one of them out")
    if no_code or job.code or not own:
        return job
    directory = directory or Path(".")
    packed = pack(directory)
    print(_said(packed, directory), file=sys.stderr)
    if absent := _absent(job, [path for path, _ in packed.files]):
        raise invalid(
            f"{absent} is not in what was packed: is it there, and does .gitignore or .relightignore name it? "
            "`ops pack` shows what is packed; --no-code packs nothing"
        )
    return job.model_copy(update={"code": client.upload(packed)})


def _absent(job: "JobSpec", paths: Collection[str]) -> str | None:
    """The working directory, or the script that the command names, if an attempt would not find it."""
    if job.workdir != "." and not any(path.startswith(f"{job.workdir}/") for path in paths):
        return f"the directory {job.workdir}"
    program, *arguments = job.command or ["true"]
    interprets = re.fullmatch(r"python[\d.]*|bash|sh", program) and arguments and not arguments[0].startswith("-")
    script = arguments[0] if interprets else program if "/" in program else "/"
    place = posixpath.normpath(posixpath.join(job.workdir, script))
    return None if place.startswith(("/", "..")) or place in paths else script


def changed_code(client: "Client", parent: "UUID", directory: Path) -> "Code":
    """The directory as it is now, for a fork, and which files are not those of the operation."""
    from relight.packing import pack

    packed = pack(directory)
    ran = client.get(parent).job.code
    print(_said(packed, directory), file=sys.stderr)
    if ran is not None:
        before, now = _entries(client.snapshot(ran.sha256)), _entries(packed.archive)
        print(_difference(before, now), file=sys.stderr)
    return client.upload(packed)


def _entries(packed: bytes) -> "dict[str, Entry]":
    from relight.archive import BadArchive, read_archive

    try:
        return read_archive(packed)
    except BadArchive as error:
        raise invalid(f"this snapshot was not packed by Relight: {error}") from error


def _difference(before: "dict[str, Entry]", now: "dict[str, Entry]") -> str:
    words = {
        "changed": [path for path in now if path in before and before[path] != now[path]],
        "new": [path for path in now if path not in before],
        "gone": [path for path in before if path not in now],
    }
    told = [f"{word}: {', '.join(paths)}" for word, paths in words.items() if paths]
    return "; ".join(told).capitalize() if told else "The code is the same."


def _unpack(packed: bytes, to: Path) -> None:
    from relight import archive

    try:
        to.mkdir(parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise invalid(f"{to} is not empty; name a new directory, so that nothing of it is lost")
        archive.unpack(packed, to)
    except (OSError, archive.BadArchive) as error:
        raise invalid(f"the code cannot be unpacked in {to}: {error}") from error


def _said(packed: "Packed", directory: Path) -> str:
    amount = _amount([size_bytes for _, size_bytes in packed.files])
    without = f"; left out, for they look secret: {', '.join(packed.left_out)}" if packed.left_out else ""
    return f"Packed {amount} of {directory.resolve()}{_state(packed.code)}{without}"


def _amount(sizes: Collection[int]) -> str:
    return f"{len(sizes):,} file{'s' if len(sizes) != 1 else ''}, {show.size(sum(sizes))}"


def _state(code: "Code") -> str:
    if code.commit is None:
        return ", not in git"
    return f", commit {code.commit[:10]}" + (" with changes" if code.dirty else "")
