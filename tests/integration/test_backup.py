"""A backup holds all rows of one moment and every file that they name, and comes back into a place of its own."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.exc import DBAPIError

from helpers.databases import Databases, connect
from helpers.store import Held, Store, losses, saved, started
from integration.test_upgrade import old_database
from ops_backend import backup as backup_module
from ops_backend.archive import ArchiveError
from ops_backend.backup import BackupError, Service, back_up, restore
from ops_backend.database import Sessions, migrate
from ops_backend.orphans import OrphanSweeper
from ops_backend.store.backup import TableRows, holding_files, tables
from ops_backend.sweeper import Sweeper
from ops_contract.backup import RESTORING, Restored, Taken
from ops_contract.errors import OpsError
from ops_contract.lifecycle import Outcome
from ops_contract.reports import ArtifactSaved


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    root = tmp_path / "storage"
    root.mkdir()
    return root


@pytest.fixture
def service(database_url: str, storage: Path) -> Service:
    return Service(None, database_url, storage)


@pytest.fixture
async def other(databases: Databases, tmp_path: Path) -> Service:
    """Where to restore: an empty database, an empty storage root."""
    (tmp_path / "other").mkdir()
    return Service(None, await databases.empty(), tmp_path / "other")


@pytest.fixture
async def copy(other: Service) -> AsyncIterator[Store]:
    """Of what was restored there."""
    sessions = Sessions(other.database_url or "", 2)
    yield Store(sessions)
    await sessions.dispose()


async def take(service: Service, to: Path) -> Taken:
    return await asyncio.to_thread(back_up, service, to, lambda _: None)


async def bring_back(service: Service, file: Path) -> Restored:
    return await asyncio.to_thread(restore, service, file, False, lambda _: None)


def write(storage: Path, path: str, text: str = "x") -> None:
    (storage / path).parent.mkdir(parents=True, exist_ok=True)
    (storage / path).write_text(text)


async def a_life(store: Store, storage: Path) -> Held:
    """One that runs and one that has completed, with every kind of file; what runs is returned."""
    await store.worker(slots=4)
    done = await store.running(labels={"a": "ü \\N \\t"})
    path = f"{done.operation_id}/1-2-files/model.bin"
    made = ArtifactSaved(artifact_id=uuid4(), name="files/model.bin", step=2, path=path, size_bytes=4, sha256="0" * 64)
    write(storage, path, "made")
    write(storage, f"{done.operation_id}/output/sub/out.txt", "printed")
    write(storage, os.fsdecode(f"{done.operation_id}/output/".encode() + b"not utf-8 \xff"), "strange")
    write(storage, f"{done.operation_id}/logs/metrics.csv", "derived")
    points = losses((0, 0.1), (1, float("nan")), (2, -0.0), (3, 5e-324))
    await store.finish(await store.report(done, started(), points, made), Outcome.COMPLETED)
    run = await store.running()
    first, second = saved(run, 0), saved(run, 4)
    for checkpoint in (first, second):
        write(storage, f"{checkpoint.path}/manifest.json", checkpoint.path)
    run = await store.report(run, started(), losses((0, 1.5)), first, second)
    write(storage, f"{run.operation_id}/1-9.tmp/half", "nobody's")
    return run


def read(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


async def everything(url: str) -> dict[str, list[Any]]:
    connection = await connect(url)
    try:
        names = [rows.name for rows in tables()]
        return {name: sorted(await connection.fetch(f"SELECT t::text FROM {name} t")) for name in names}
    finally:
        await connection.close()


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


async def test_all_rows_and_the_files_that_they_name_come_back(
    store: Store, service: Service, other: Service, copy: Store, tmp_path: Path
) -> None:
    run = await a_life(store, service.storage_root)
    before, files = await everything(service.database_url or ""), contents(service.storage_root)

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "backups").symlink_to("elsewhere")

    taken = await take(service, tmp_path / "backups")
    done = await bring_back(other, Path(taken.path))

    assert (taken.operations, done.operations, taken.missing, taken.changed) == (2, 2, [], [])
    assert os.stat(taken.path).st_mode & 0o777 == 0o600
    assert contents(other.storage_root) == {
        path: text for path, text in files.items() if "/logs/" not in path and ".tmp" not in path
    }
    after = await everything(other.database_url or "")
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"workers", "operations"}
    [log_free] = await copy.fetch("SELECT count(*) FROM operations WHERE logged_event_seq IS NOT NULL")
    assert log_free[0] == 0
    # It is a database like any other: its guards are there, and what ran is there to go on.
    await copy.report(run, losses((1, 2.5)))
    with pytest.raises(DBAPIError, match="fk_"):
        await copy.execute("INSERT INTO events SELECT gen_random_uuid(), 1, now(), 1, 'note', NULL, 'running', '{}'")


async def test_what_is_written_while_it_is_taken_is_wholly_in_it_or_not_at_all(
    store: Store, service: Service, other: Service, copy: Store, tmp_path: Path
) -> None:
    """Checkpoints come and are retired all the time."""
    await store.worker(slots=1)
    run = await store.running(execution={"checkpoint_save_top_k": 0})
    stop = threading.Event()

    async def train() -> None:
        nonlocal run
        step = 0
        sweeper = Sweeper(store.sessions, service.storage_root, 1.0)
        run = await store.report(run, started())
        while not stop.is_set():
            checkpoint = saved(run, step)
            write(service.storage_root, f"{checkpoint.path}/manifest.json", checkpoint.path)
            run = await store.report(run, losses((step, float(step))), checkpoint)
            await sweeper.sweep()
            step += 1

    training = asyncio.create_task(train())
    try:
        taken = [await take(service, tmp_path / f"{number}.tar") for number in range(5)]
    finally:
        stop.set()
        await training

    assert [backup.missing for backup in taken] == [[]] * 5
    await bring_back(other, Path(taken[-1].path))
    rows = await copy.fetch("SELECT path FROM checkpoints WHERE status = 'committed'")
    assert rows
    assert all((other.storage_root / row.path / "manifest.json").read_text() == row.path for row in rows)


async def test_the_sweepers_delete_nothing_while_a_backup_copies_and_go_on_after_it(
    store: Store, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.worker()
    run = await store.running()
    gone = saved(run, 0)
    run = await store.report(run, started(), gone)
    write(service.storage_root, f"{gone.path}/manifest.json")
    await store.execute("UPDATE checkpoints SET status = 'deleting'")
    await store.finish(run, Outcome.COMPLETED)
    write(service.storage_root, f"{run.operation_id}/1-7/orphan")
    sweepers = (
        Sweeper(store.sessions, service.storage_root, 1.0),
        OrphanSweeper(store.sessions, service.storage_root, 1.0),
    )

    async with holding_files(service.database_url or ""):
        with monkeypatch.context() as patient:
            patient.setitem(backup_module.store._SESSION, "lock_timeout", "10ms")
            with pytest.raises(BackupError, match="another backup"):
                await take(service, tmp_path)
        for sweeper in sweepers:
            await sweeper.sweep()
        assert len(contents(service.storage_root)) == 2
    for sweeper in sweepers:
        await sweeper.sweep()

    assert contents(service.storage_root) == {}


async def test_a_copy_does_not_speak_to_the_workers_of_its_original_until_they_register(
    store: Store, service: Service, other: Service, copy: Store, tmp_path: Path
) -> None:
    worker = await store.worker()
    run = await store.running()
    await bring_back(other, Path((await take(service, tmp_path)).path))

    cancelled = await copy.cancel(run.operation_id)
    assert cancelled is not None
    assert [push.secret for push in cancelled.pushes] == [""]
    await copy.submit()
    assert await copy.claim() is None
    with pytest.raises(OpsError, match="register again"):
        await copy.heartbeat(worker, run)


async def test_any_changed_byte_is_noticed_and_nothing_is_written(
    store: Store, service: Service, other: Service, tmp_path: Path
) -> None:
    await a_life(store, service.storage_root)
    path = Path((await take(service, tmp_path)).path)
    whole = read(path)
    places = [0, len(whole) - 1, *random.Random(7).sample(range(len(whole)), 20)]

    for place in places:
        put(path, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArchiveError, match="damaged, cut short or no backup"):
            await bring_back(other, path)
    for length in (0, 100, len(whole) - 1):
        put(path, whole[:length])
        with pytest.raises(ArchiveError, match="damaged, cut short or no backup"):
            await bring_back(other, path)

    assert contents(other.storage_root) == {}
    put(path, whole)
    await bring_back(other, path)


async def test_a_place_that_is_not_empty_is_refused_and_stays_as_it_is(
    store: Store, service: Service, other: Service, tmp_path: Path
) -> None:
    await a_life(store, service.storage_root)
    path = Path((await take(service, tmp_path)).path)
    before = await everything(service.database_url or ""), contents(service.storage_root)

    for place in (service, Service(None, service.database_url, other.storage_root)):
        with pytest.raises(BackupError, match="empty"):
            await bring_back(place, path)
    with pytest.raises(BackupError, match="not empty"):
        await bring_back(Service(None, other.database_url, service.storage_root), path)

    assert (await everything(service.database_url or ""), contents(service.storage_root)) == before
    assert contents(other.storage_root) == {}
    await store.execute("TRUNCATE operations, deletions CASCADE")
    await store.tick()
    with pytest.raises(BackupError, match="an API runs"):
        await bring_back(Service(None, service.database_url, other.storage_root), path)


async def test_what_rows_name_and_is_not_there_is_said_and_the_rest_comes_back(
    store: Store, service: Service, other: Service, tmp_path: Path
) -> None:
    run = await a_life(store, service.storage_root)
    shutil.rmtree(service.storage_root / f"{run.operation_id}/1-4")

    taken = await take(service, tmp_path)

    assert taken.missing == [f"{run.operation_id}/1-4"]
    assert (await bring_back(other, Path(taken.path))).operations == 2


async def test_links_in_the_output_of_a_command_lead_nowhere(
    store: Store, service: Service, other: Service, tmp_path: Path
) -> None:
    run = await a_life(store, service.storage_root)
    output = service.storage_root / str(run.operation_id) / "output"
    output.mkdir()
    (output / "passwd").symlink_to("/etc/passwd")
    (output / "etc").symlink_to("/etc")

    await bring_back(other, Path((await take(service, tmp_path)).path))

    assert not (other.storage_root / str(run.operation_id) / "output").exists()


async def test_a_restore_marks_its_place_through_no_link_that_others_have_put_there(
    store: Store, service: Service, other: Service, tmp_path: Path
) -> None:
    await a_life(store, service.storage_root)
    path = Path((await take(service, tmp_path)).path)
    write(tmp_path, "precious", "stays")
    (other.storage_root / RESTORING).symlink_to(tmp_path / "precious")

    with pytest.raises(OSError, match="symbolic links"):
        await bring_back(other, path)

    assert read(tmp_path / "precious") == b"stays"


async def test_one_of_an_older_schema_comes_back_and_is_migrated_and_one_of_a_newer_is_refused(
    databases: Databases, storage: Path, other: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await old_database(databases, "0013")
    old = Service(None, url, storage)
    with pytest.raises(BackupError, match="the version that runs there"):
        await take(old, tmp_path)
    known = await columns(url)
    with monkeypatch.context() as older:  # the tables as that version had them
        older.setattr(backup_module, "newest_revision", lambda: "0013")
        older.setattr(backup_module.store, "tables", lambda: known)
        path = Path((await take(old, tmp_path)).path)

    await bring_back(other, path)
    await migrate(other.database_url or "")

    assert len((await everything(other.database_url or ""))["operations"]) == 2
    monkeypatch.setattr(backup_module, "is_known", lambda _: False)
    with pytest.raises(BackupError, match="newer Relight"):
        await bring_back(other, path)


async def columns(url: str) -> list[TableRows]:
    """Of our tables, those that are there."""
    database = await connect(url)
    rows = await database.fetch("SELECT table_name, column_name FROM information_schema.columns")
    await database.close()
    there = {(row["table_name"], row["column_name"]) for row in rows}
    known = [TableRows(name=t.name, columns=[c for c in t.columns if (t.name, c) in there]) for t in tables()]
    return [table for table in known if table.columns]


async def test_a_backup_that_fails_leaves_no_file(store: Store, service: Service, tmp_path: Path) -> None:
    await a_life(store, service.storage_root)
    to = tmp_path / "to"
    to.mkdir()
    (to / "there.tar").touch()
    with pytest.raises(FileExistsError, match=r"there\.tar is there already"):
        await take(service, to / "there.tar")
    with pytest.raises(FileNotFoundError):
        await take(service, to / "none" / "x.tar")
    with pytest.raises(BackupError, match="the database"):
        await take(Service(None, "postgresql+asyncpg://u:p@127.0.0.1:9/none", service.storage_root), to)
    (service.storage_root / RESTORING).touch()
    with pytest.raises(BackupError, match="did not finish"):
        await take(service, to)

    assert [path.name for path in to.iterdir()] == ["there.tar"]


# Stops where it is told to, as a machine that loses its power there.
DYING = """
import os, signal, sys
from pathlib import Path
from ops_backend import archive, backup
from ops_backend.backup import Service, back_up, restore

verb, where, place, file = sys.argv[1:]
url, root = place.split(" ")
service = Service(None, url, Path(root))

def dying(owner, name):
    real = getattr(owner, name)
    async def later(*arguments):
        await real(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    def now(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, later if name == "fill" else now)

dying({"store": backup.store, "backup": backup, "archive": archive}[where.split(".")[0]], where.split(".")[1])
if verb == "backup":
    back_up(service, Path(file), print)
else:
    restore(service, Path(file), False, print)
"""


def die(verb: str, where: str, service: Service, file: Path) -> None:
    place = f"{service.database_url} {service.storage_root}"
    done = subprocess.run([sys.executable, "-c", DYING, verb, where, place, str(file)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
async def test_a_backup_that_is_killed_leaves_nothing_that_passes_for_one_and_the_next_clears_it_away(
    store: Store, service: Service, other: Service, tmp_path: Path
) -> None:
    await a_life(store, service.storage_root)
    to = tmp_path / "to"
    to.mkdir()
    await asyncio.to_thread(die, "backup", "archive.sync_directory", service, tmp_path)  # after it is whole
    [whole] = [name for name in os.listdir(tmp_path) if name.endswith(".tar")]
    await bring_back(other, tmp_path / whole)

    await asyncio.to_thread(die, "backup", "backup._add", service, to)
    await asyncio.to_thread(die, "backup", "backup._add", service, to / "named.tar")
    assert [path.suffix for path in to.iterdir()] == [".partial"]
    await take(service, to / "named.tar")
    os.unlink(to / "named.tar")

    taken = await take(service, to)
    assert [str(path) for path in to.iterdir()] == [taken.path]


@pytest.mark.parametrize(
    "where",
    [
        "store.fill",
        *(
            pytest.param(where, marks=pytest.mark.slow)
            for where in ("backup.mark_restoring", "backup.migrate", "backup.sync_directory")
        ),
    ],
)
async def test_a_restore_that_is_killed_is_no_service_and_is_done_again(
    where: str, store: Store, service: Service, other: Service, tmp_path: Path
) -> None:
    await a_life(store, service.storage_root)
    path = Path((await take(service, tmp_path)).path)
    expected = contents(service.storage_root)

    await asyncio.to_thread(die, "restore", where, other, path)
    if where not in ("backup.mark_restoring", "backup.sync_directory"):
        refused = await asyncio.to_thread(serve, other)
        assert refused.returncode == 1
        assert "did not finish" in refused.stderr
    done = await (bring_back(other, path) if where != "backup.sync_directory" else asyncio.sleep(0))

    assert done is None or done.operations == 2
    kept = contents(other.storage_root)
    assert kept == {name: text for name, text in expected.items() if "/logs/" not in name and ".tmp" not in name}
    assert len((await everything(other.database_url or ""))["operations"]) == 2


def serve(service: Service) -> subprocess.CompletedProcess[str]:
    environ = {
        **os.environ,
        "OPS_DATABASE_URL": service.database_url or "",
        "OPS_API_TOKEN": "x" * 16,
        "OPS_STORAGE_ROOT": str(service.storage_root),
        "OPS_PORT": "0",
    }
    command = [sys.executable, "-m", "ops_backend", "server"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
