"""`python -m ops_backend doctor`: looks at the database and the storage as this host sees them, and changes nothing."""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

from asyncpg import PostgresError as PostgresRefusal
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from ops_backend.database import OLDEST_POSTGRES, newest_revision
from ops_backend.engines import EngineAway, EngineRefused
from ops_backend.engines.slurm import partitions
from ops_backend.postgres import socket_dir_of, url_of
from ops_backend.postgres_place import PostgresError, existing_home
from ops_backend.settings import Settings, with_our_driver
from ops_backend.shared_storage import FREE_BYTES, LiveWorker, compare, remove_stale
from ops_backend.storage import sync_directory
from ops_contract.agents import PROBE_PREFIX
from ops_contract.doctor import Finding, Findings, clock, fail, ok, warn

QUIET_S = 60.0
TIMEOUT_S = 5.0
LEASE_S: float = Settings.model_fields["lease_s"].default
RENAMES = 50

# One that has said goodbye may be gone already; one without a secret never spoke to a backend of this database.
LIVE_WORKERS = text("""
    SELECT incarnation, name, url, secret FROM workers
     WHERE secret <> '' AND NOT draining AND last_seen_at > now() - make_interval(secs => :lease_s)
     ORDER BY name, incarnation
""")


def examine(
    data_dir: Path | None, database_url: str | None, storage_root: Path | None, lease_s: float = LEASE_S
) -> Findings:
    """Of a service by its settings, or of the `ops up` on `data_dir`."""
    items = list(_embedded(data_dir)) if data_dir and not database_url else []
    workers: list[LiveWorker] = []
    if url := database_url or _embedded_url(data_dir):
        found, workers = asyncio.run(_database(url, lease_s))
        items += found
    elif data_dir is None and storage_root is None:
        items.append(fail("database", "no database is known", "set OPS_DATABASE_URL, or start `ops up`"))
    root = storage_root or (data_dir / "storage" if data_dir else None)
    items += _storage(root)
    if root and root.is_dir():
        items += asyncio.run(compare(root, workers))
    return Findings(items=[*items, *_slurm()])


def _embedded(data_dir: Path) -> Iterator[Finding]:
    try:
        home = existing_home(data_dir / "postgres")
    except PostgresError as error:
        yield fail("embedded postgres", str(error), "install what it names, or set OPS_DATABASE_URL")
        return
    if home is None:
        yield fail("embedded postgres", f"there is no database under {data_dir}", "start `ops up` on it once")
    elif socket_dir_of(home) == home:
        yield ok("embedded postgres", f"data and socket in {home}")
    else:
        yield ok("embedded postgres", f"{home} is unfit for a socket, which is in {socket_dir_of(home)}")


def _embedded_url(data_dir: Path | None) -> str | None:
    try:
        home = existing_home(data_dir / "postgres") if data_dir else None
        return url_of(home) if home else None
    except (OSError, PostgresError):
        return None


async def _database(url: str, lease_s: float) -> tuple[list[Finding], list[LiveWorker]]:
    """What is to be said of it, and the workers that live by it."""
    try:
        engine = create_async_engine(with_our_driver(url), poolclass=NullPool, connect_args={"timeout": TIMEOUT_S})
        async with asyncio.timeout(2 * TIMEOUT_S), engine.connect() as connection:
            found = [finding async for finding in _look_at(connection)]
            if found[-1].check != "reaper":  # the schema is another version's
                return found, []
            rows = await connection.execute(LIVE_WORKERS, {"lease_s": lease_s})
            return found, [LiveWorker(**row) for row in rows.mappings()]
    except ValueError as error:
        problem = fail("database", f"OPS_DATABASE_URL: {error}", "write it like postgresql://user:password@host/name")
    except (OSError, DBAPIError, PostgresRefusal) as error:
        cause = str(error).splitlines()[0] if str(error) else "it does not answer in time"
        problem = fail("database", f"cannot be reached: {cause}", "is it running, and may this host connect to it?")
    return [problem], []


async def _look_at(connection: AsyncConnection) -> AsyncIterator[Finding]:
    version = str(await connection.scalar(text("SHOW server_version")))
    if int(version.split(".")[0]) < OLDEST_POSTGRES:
        yield fail("database", f"Postgres {version}", f"Relight needs {OLDEST_POSTGRES} or newer: upgrade it")
    else:
        yield ok("database", f"Postgres {version} answers")
    sent_s = time.time()
    now_s = float(str(await connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))))
    yield clock("clock of the database", now_s - (sent_s + time.time()) / 2)
    head = newest_revision()
    has_schema = await connection.scalar(text("SELECT to_regclass('alembic_version')"))
    at = await connection.scalar(text("SELECT version_num FROM alembic_version")) if has_schema else None
    if at != head:
        found = f"the schema is at {at or 'nothing'}, this version's at {head}"
        yield fail("migrations", found, "restart `ops server` of this version: it migrates; if newer, update this one")
        return
    yield ok("migrations", f"at {head}, this version's")
    quiet_s = await connection.scalar(text("SELECT extract(epoch FROM now() - max(last_tick_at)) FROM service"))
    if quiet_s is None or quiet_s > QUIET_S:
        yield warn("reaper", "no API has looked after the operations of late", "is `ops server` running?")
    else:
        yield ok("reaper", f"looked {max(0.0, float(quiet_s)):.0f} s ago")


def _slurm() -> Iterator[Finding]:
    """Where the settings in this environment have jobs of it."""
    if os.environ.get("OPS_SLURM_MAX_JOBS", "0") in ("", "0"):
        return
    try:
        yield ok("Slurm", asyncio.run(partitions()))
    except (EngineAway, EngineRefused) as problem:
        yield fail("Slurm", str(problem), "is slurmctld running, and do `sinfo` and `sbatch` work on this host?")


def _storage(root: Path | None) -> Iterator[Finding]:
    if root is None:
        yield fail("storage", "no storage root is known", "set OPS_STORAGE_ROOT, or start `ops up`")
        return
    if not root.is_dir():
        yield fail("storage", f"{root} is not there", "mount it, or correct OPS_STORAGE_ROOT")
        return
    try:
        _write_as_trainers_do(root)
    except OSError as error:
        advice = "it must be writable for this user, on a file system with rename and fsync, and not full"
        yield fail("storage", f"cannot be written to: {error}", advice)
        return
    yield ok("storage", f"{root} can be written, synced and renamed in")
    free_bytes = shutil.disk_usage(root).free
    found = f"{free_bytes / 1e9:.1f} GB free"
    advice = "make room: `ops cleanup --older-than 30d`, or a smaller checkpoint_save_top_k"
    yield ok("free space", found) if free_bytes > FREE_BYTES else warn("free space", found, advice)


def _write_as_trainers_do(root: Path) -> None:
    """In a directory that is gone again afterwards. Raises OSError."""
    directory = root / f"{PROBE_PREFIX}{uuid4().hex}"
    directory.mkdir(mode=0o700)
    try:
        now_s = directory.stat().st_mtime
        remove_stale(root, now_s)
        _write_new(directory / "new")
        _refuses_what_is_there(directory / "new")
        _replaces_whole(directory)
        sync_directory(directory)
        directory.rename(renamed := directory.with_suffix(".renamed"))
        directory = renamed
        sync_directory(root)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_new(path: Path, content: bytes = b"ops doctor\n") -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _refuses_what_is_there(path: Path) -> None:
    try:
        _write_new(path)
    except FileExistsError:
        return
    raise OSError("a file that is there is made a second time: O_EXCL does not hold")


def _replaces_whole(directory: Path) -> None:
    """Who reads a name while it is replaced finds the old or the new, never neither."""
    name, contents = directory / "name", (b"a" * 4096, b"b" * 4096)
    _write_new(name, contents[0])
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [name.read_bytes() for _ in range(RENAMES)])
        for number in range(RENAMES):
            _write_new(scratch := directory / "scratch", content := contents[number % 2])
            scratch.replace(name)
            if name.read_bytes() != content:
                raise OSError("a rename over a name does not show at once")
        if not {*reading.result()} <= {*contents}:
            raise OSError("a rename over a name is not atomic")
