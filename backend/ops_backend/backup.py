"""`python -m ops_backend backup|restore`: the whole service as one file, taken while it runs.

Rows first, in one snapshot, then the files that they name, while the sweepers hold back: whatever a row of the backup
names is in it.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Self

from asyncpg import InterfaceError, LockNotAvailableError
from asyncpg import PostgresError as PostgresRefusal
from sqlalchemy.exc import DBAPIError

from ops_backend.archive import TOKEN, ArchiveReader, ArchiveWriter, Manifest, digest, new_archive
from ops_backend.database import is_known, migrate, newest_revision
from ops_backend.postgres import EmbeddedPostgres, url_of
from ops_backend.postgres_place import existing_home
from ops_backend.settings import SettingsError, with_our_driver
from ops_backend.storage import files_in, mark_restoring, open_file, operations_in, remove_operation, sync_directory
from ops_backend.store import backup as store
from ops_contract.backup import RESTORING, Restored, Taken

SPARE_BYTES = 64 << 20
SET_ASIDE = ("postgres", "workers", "token", "storage")  # the database first: see _set_aside

Say = Callable[[str], None]


class BackupError(Exception):
    """It cannot be done; the message says why, and what to do."""


@dataclass(frozen=True)
class Service:
    """Where one keeps what it has. Without `database_url` its database is the embedded one of `data_dir`."""

    data_dir: Path | None
    database_url: str | None
    storage_root: Path

    @classmethod
    def find(cls, data_dir: Path | None, environ: Mapping[str, str]) -> Self:
        """That of `ops up` on `data_dir`, or of an `ops server` with these variables. Raises SettingsError."""
        url, root = environ.get("OPS_DATABASE_URL"), environ.get("OPS_STORAGE_ROOT")
        if data_dir is None and not (url and root):
            raise SettingsError("OPS_DATABASE_URL and OPS_STORAGE_ROOT say where the service is, or --data-dir")
        try:
            url = with_our_driver(url) if url else None
        except ValueError as error:
            raise SettingsError(f"OPS_DATABASE_URL: {error}") from None
        return cls(data_dir, url, data_dir / "storage" if data_dir else Path(str(root)))


def back_up(service: Service, to: Path, say: Say) -> Taken:
    """Raises BackupError, PostgresError, OSError; then there is no file."""
    if _begun(service.storage_root) is not None:
        raise BackupError(f"a restore into {service.storage_root} did not finish: do it again")
    if to.is_dir():
        to /= f"relight-{datetime.now(UTC):%Y%m%d-%H%M%S}.tar"
    with _database(service) as url, _explained(), new_archive(to) as writer:
        operations, missing = asyncio.run(_write(url, service, writer, to.parent, say))
    size_bytes = to.stat().st_size
    return Taken(
        path=str(to), size_bytes=size_bytes, operations=operations, missing=missing, changed=sorted(writer.changed)
    )


async def _write(url: str, service: Service, writer: ArchiveWriter, scratch: Path, say: Say) -> tuple[int, list[str]]:
    """How many operations there are, and what rows name that is not there."""
    with ExitStack() as stack:
        async with store.holding_files(url) as holding:
            async with holding.snapshot() as snapshot:
                revision = await snapshot.revision()
                if revision != newest_revision():
                    raise BackupError(
                        f"the schema is at {revision or 'nothing'}, this Relight's at {newest_revision()}: take the "
                        "backup with the version that runs there, or start this one on it once"
                    )
                manifest = Manifest(
                    relight=version("relight"),
                    postgres=await snapshot.version(),
                    revision=revision,
                    taken_at=datetime.now(UTC),
                    tables=store.tables(),
                )
                files = await snapshot.files()
                _check_room(scratch, files.size_bytes)
                copies: dict[str, IO[bytes]] = {}
                for rows in manifest.tables:
                    copies[rows.name] = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
                    await snapshot.copy(rows, copies[rows.name])
            say(f"database: {len(files.operations)} operations")
            missing = await asyncio.to_thread(_add_files, writer, manifest, service, files)
            say(f"files: {files.size_bytes / 1e6:,.1f} MB of checkpoints and artifacts")
            await holding.check()
        for name, copy in copies.items():
            copy.seek(0)
            writer.add_file(f"database/{name}", copy)
    return len(files.operations), missing


def _add_files(writer: ArchiveWriter, manifest: Manifest, service: Service, files: store.Files) -> list[str]:
    writer.add_manifest(manifest)
    root, missing = service.storage_root, []
    for path in files.checkpoints:
        # All of them are asked, so not any().
        if not [name for name in files_in(root, path) if _add(writer, root, name)]:
            missing.append(path)
    missing += [path for path in files.artifacts if not _add(writer, root, path)]
    for operation in files.operations:
        for name in files_in(root, f"{operation}/output"):
            _add(writer, root, name)
    if service.data_dir and (service.data_dir / TOKEN).exists():
        writer.add_bytes(TOKEN, (service.data_dir / TOKEN).read_bytes())
    return missing


def _add(writer: ArchiveWriter, root: Path, path: str) -> bool:
    try:
        file = open_file(root, path)
    except FileNotFoundError:
        return False
    with os.fdopen(file, "rb") as opened:
        writer.add_file(f"storage/{path}", opened)
    return True


def _check_room(directory: Path, wanted_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < wanted_bytes + SPARE_BYTES:
        raise BackupError(
            f"{wanted_bytes / 1e9:.1f} GB are wanted and {free_bytes / 1e9:.1f} GB are free in {directory}: make room "
            "there (`ops cleanup --older-than 30d` makes backups smaller), or choose another place"
        )


def restore(service: Service, file: Path, replace: bool, say: Say) -> Restored:
    """Nothing else may run on `service`. Raises BackupError, ArchiveError, PostgresError, OSError.

    A restore that was killed has left RESTORING in the storage root: nothing starts there, and this begins anew.
    """
    found = digest(file)
    say("verified: every byte is as it was written")
    with ArchiveReader(file) as archive, ExitStack() as stack, _explained():
        if not is_known(archive.manifest.revision):
            raise BackupError(f"it was made by a newer Relight ({archive.manifest.relight}): restore it with that one")
        root, set_aside = service.storage_root, None
        begun = _begun(root)
        if begun is None:
            set_aside = _make_way(service, replace)
        _check_room(_existing(root), archive.size_bytes)
        if service.database_url is None:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if begun is None:
                mark_restoring(root, found)
        url = stack.enter_context(_database(service, begin=True))
        if asyncio.run(store.holds_anything(url)):
            # The rows come last, in one transaction.
            if begun != found:
                raise BackupError("its database holds operations already: choose an empty one, or another --data-dir")
        else:
            mark_restoring(root, found)
            _fill(service, archive, url, say)
        operations, deliveries = asyncio.run(store.counts(url))
        (root / RESTORING).unlink()
        sync_directory(root)
    return Restored(
        taken_at=archive.manifest.taken_at,
        relight=archive.manifest.relight,
        operations=operations,
        deliveries=deliveries,
        set_aside=str(set_aside) if set_aside else None,
    )


def _begun(root: Path) -> str | None:
    """Which backup an unfinished restore was of."""
    try:
        return (root / RESTORING).read_text()
    except FileNotFoundError:
        return None


def _make_way(service: Service, replace: bool) -> Path | None:
    """Refuse where something is, or set it aside. Raises BackupError."""
    if service.database_url and asyncio.run(store.is_served(service.database_url)):
        raise BackupError("an API runs on its database: stop it first")
    home = existing_home(service.data_dir / "postgres") if service.data_dir and not service.database_url else None
    if home is None and not operations_in(service.storage_root):
        return None
    place = service.data_dir or service.storage_root
    if not replace:
        raise BackupError(f"{place} is not empty: choose another place, or set aside what is there with --replace")
    if service.data_dir is None or service.database_url or home not in (None, service.data_dir / "postgres"):
        raise BackupError(f"what is in {place} cannot be set aside from here: choose another place")
    return _set_aside(service.data_dir)


def _set_aside(data_dir: Path) -> Path:
    """Killed in between, it goes on the next time; nothing is deleted."""
    aside = data_dir / f"replaced-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    aside.mkdir(mode=0o700)
    for name in SET_ASIDE:
        if (data_dir / name).exists():
            (data_dir / name).rename(aside / name)
    sync_directory(data_dir)
    return aside


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _fill(service: Service, archive: ArchiveReader, url: str, say: Say) -> None:
    root = service.storage_root
    for operation in operations_in(root):  # of a restore that was killed
        remove_operation(root, operation)
    count = archive.extract_storage(root)
    if service.data_dir and (token := archive.token()):
        _write_token(service.data_dir / TOKEN, token)
    os.sync()  # what the rows name is there before they are
    say(f"files: {count}, {archive.size_bytes / 1e6:,.1f} MB with the database")
    asyncio.run(_fill_database(url, archive))
    say("database: all rows are there")


async def _fill_database(url: str, archive: ArchiveReader) -> None:
    await store.clear(url)
    await migrate(url, archive.manifest.revision)
    await store.fill(url, list(archive.rows()))


def _write_token(path: Path, token: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)


@contextmanager
def _database(service: Service, begin: bool = False) -> Iterator[str]:
    """Its URL. One that is embedded and not running is started for as long as this takes; with `begin` it is made."""
    if service.database_url:
        yield service.database_url
        return
    assert service.data_dir is not None
    home = existing_home(service.data_dir / "postgres")
    if home is None and not begin:
        raise BackupError(f"there is no database in {service.data_dir}: `ops backup --data-dir DIR` says where it is")
    if home is not None and (url := _answering(home)):
        yield url
        return
    with EmbeddedPostgres(service.data_dir / "postgres") as postgres:
        yield postgres.start()


def _answering(home: Path) -> str | None:
    """The URL of a database that runs already."""
    try:
        url = url_of(home)
        asyncio.run(store.ping(url))
    except (OSError, PostgresRefusal, DBAPIError):
        return None
    return url


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except LockNotAvailableError as error:
        raise BackupError("another backup of it is being taken: wait until that is done") from error
    except (PostgresRefusal, InterfaceError, DBAPIError, ConnectionError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackupError(f"the database did not go along, try again when it is well: {cause}") from error
