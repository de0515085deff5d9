"""Reports on disk until the API has them: one file per incarnation, locked while its agent lives."""

import asyncio
import functools
import logging
import os
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from uuid import UUID

from ops_contract.agents import HoldRef
from ops_contract.energy import EnergyWindow, Quality, Source
from ops_contract.wire import Wire
from ops_worker import locks
from relight.publish import sync

log = logging.getLogger(__name__)

DISK_RETRY_S = 1.0
BATCH_BYTES = 1_000_000

_SCHEMA = """
    CREATE TABLE sender (incarnation TEXT NOT NULL, api_url TEXT NOT NULL, credential TEXT NOT NULL);
    CREATE TABLE reports (
        operation_id TEXT NOT NULL, attempt INTEGER NOT NULL, seq INTEGER NOT NULL, report TEXT NOT NULL,
        PRIMARY KEY (operation_id, attempt, seq)
    ) WITHOUT ROWID;
"""
# `measured`: until where the joules of a hold that has not ended are booked. Its own table, beside that of the windows
# which wait to be sent: files of an earlier version have neither.
_ENERGY_SCHEMA = """
    CREATE TABLE IF NOT EXISTS energy (
        id INTEGER PRIMARY KEY, operation_id TEXT NOT NULL, attempt INTEGER NOT NULL,
        device TEXT NOT NULL, nr INTEGER NOT NULL, window TEXT NOT NULL,
        UNIQUE (operation_id, attempt, device, nr)
    );
    CREATE TABLE IF NOT EXISTS measured (
        operation_id TEXT NOT NULL, attempt INTEGER NOT NULL, device TEXT NOT NULL, source TEXT, quality TEXT,
        boot_id TEXT NOT NULL, at_s REAL NOT NULL, step INTEGER NOT NULL, nr INTEGER NOT NULL, counter_j REAL,
        PRIMARY KEY (operation_id, attempt, device)
    ) WITHOUT ROWID;
"""
_HOLD = "operation_id = :operation_id AND attempt = :attempt"

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Consecutive reports as JSON, the first numbered `first_seq`."""

    first_seq: int
    reports: list[str]


@dataclass(frozen=True)
class Booked:
    """Until where the joules of a hold and device are booked: for who comes after an agent that was killed.

    `index` is the last window's. `counter_j`: where the hardware's own counter stood at `at_s` (CLOCK_MONOTONIC of
    that boot), in joules; None where there is none, or where it is not known yet.
    """

    device: str
    source: Source | None
    quality: Quality | None
    boot_id: str
    at_s: float
    step: int = 0
    index: int = 0
    counter_j: float | None = None


@dataclass(frozen=True)
class EnergyRows:
    """Windows of one hold as JSON, by the ids of their rows."""

    ref: HoldRef
    windows: dict[int, str]


@dataclass(frozen=True)
class Sender:
    """Under which incarnation, where and with which credential a file is to be sent."""

    incarnation: UUID
    api_url: str
    credential: str = field(repr=False)


def _on_its_thread(
    method: Callable[Concatenate["Outbox", P], T],
) -> Callable[Concatenate["Outbox", P], Coroutine[Any, Any, T]]:
    """Run a method on the outbox's one thread: an fsync that takes a second delays no heartbeat.

    A full disk is waited out: the trainer's pipe fills and training pauses, but no report is lost.
    """

    @functools.wraps(method)
    async def call(self: "Outbox", /, *args: P.args, **kwargs: P.kwargs) -> T:
        work = functools.partial(method, self, *args, **kwargs)
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, work)
            except sqlite3.OperationalError as error:
                log.error("outbox %s: %s; free some space there, trying again", self._path, error)
                await asyncio.sleep(DISK_RETRY_S)

    return call


class Outbox:
    """Numbers the reports of each hold from 1 and keeps them until they are dropped.

    A commit survives SIGKILL and power loss. Methods run one after the other, in the order of their calls.
    """

    def __init__(self, path: Path, lock: int, database: sqlite3.Connection, sender: Sender) -> None:
        self._path = path
        self._lock = lock
        self._database = database
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._last_seq: dict[HoldRef, int] = {}
        self.sender = sender

    @classmethod
    def create(cls, directory: Path, sender: Sender) -> Self:
        """The outbox of a new incarnation, locked. Raises OSError, also for a full disk."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / f"{sender.incarnation}.db"
        lock = locks.lock(path)  # beside it: closing a descriptor of the database itself would drop SQLite's own
        if lock is None:
            raise FileExistsError(f"{path} belongs to a living agent")
        # SQLite gives its -wal file the same mode: it holds the credential too.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        try:
            database = _open(path)
            with database:
                database.executescript(f"BEGIN; {_SCHEMA} {_ENERGY_SCHEMA}")
                row = (str(sender.incarnation), sender.api_url, sender.credential)
                database.execute("INSERT INTO sender VALUES (?, ?, ?)", row)
        except sqlite3.Error as error:
            _delete(path, lock)
            raise OSError(
                f"outbox {path} cannot be made: {error}; make room there, or set OPS_WORKER_STATE_DIR"
            ) from error
        sync(directory)
        return cls(path, lock, database, sender)

    @classmethod
    def orphans(cls, directory: Path) -> list[Self]:
        """The outboxes of dead agents, locked now; those with nothing to send are deleted instead."""
        claimed = (cls._claim(path) for path in sorted(directory.glob("*.db")))
        return [outbox for outbox in claimed if outbox is not None]

    @classmethod
    def _claim(cls, path: Path) -> Self | None:
        lock = locks.lock(path)
        if lock is None:
            return None
        if not path.exists():  # another agent flushed it while we waited for nothing
            _delete(path, lock)
            return None
        try:
            database = _open(path)
            sender = _sender_with_content(database)
        except sqlite3.DatabaseError as error:
            log.error("outbox %s cannot be read: %s; delete it when nobody misses its reports", path, error)
            os.close(lock)
            return None
        if sender is not None:
            return cls(path, lock, database, sender)
        database.close()
        _delete(path, lock)
        return None

    @_on_its_thread
    def add(self, ref: HoldRef, reports: Sequence[Wire]) -> int:
        """Number and keep them, in one transaction; the last number."""
        first_seq = self._last_seq.get(ref, 0) + 1
        rows = [
            _key(ref) | {"seq": seq, "report": report.model_dump_json()}
            for seq, report in enumerate(reports, first_seq)
        ]
        with self._database:
            # REPLACE: a commit that failed halfway may be found to have happened when it is tried again.
            self._database.executemany(
                "INSERT OR REPLACE INTO reports VALUES (:operation_id, :attempt, :seq, :report)", rows
            )
        last_seq = self._last_seq[ref] = first_seq + len(rows) - 1
        return last_seq

    @_on_its_thread
    def batch(self, ref: HoldRef, max_reports: int) -> Batch | None:
        """The oldest reports of a hold: at least one, and then not more than BATCH_BYTES. None where there is none."""
        query = f"SELECT seq, report FROM reports WHERE {_HOLD} ORDER BY seq LIMIT :n"
        rows = self._database.execute(query, _key(ref) | {"n": max_reports}).fetchall()
        reports: list[str] = []
        size_bytes = 0
        for _, report in rows:
            size_bytes += len(report)
            if reports and size_bytes > BATCH_BYTES:
                break
            reports.append(report)
        return Batch(rows[0][0], reports) if rows else None

    @_on_its_thread
    def drop(self, ref: HoldRef, last_seq: int) -> None:
        """Forget reports up to a number: the API has them."""
        with self._database:
            self._database.execute(f"DELETE FROM reports WHERE {_HOLD} AND seq <= :seq", _key(ref) | {"seq": last_seq})

    @_on_its_thread
    def replace(self, ref: HoldRef, seq: int, report: Wire) -> None:
        """Another report under the same number."""
        values = _key(ref) | {"seq": seq, "report": report.model_dump_json()}
        with self._database:
            self._database.execute(f"UPDATE reports SET report = :report WHERE {_HOLD} AND seq = :seq", values)

    @_on_its_thread
    def forget(self, ref: HoldRef) -> None:
        """Drop all reports of a hold. Its joules stay: they count whether it was fenced or not."""
        with self._database:
            self._database.execute(f"DELETE FROM reports WHERE {_HOLD}", _key(ref))
        self._last_seq.pop(ref, None)

    @_on_its_thread
    def holds(self) -> list[HoldRef]:
        """Those with reports."""
        rows = self._database.execute("SELECT DISTINCT operation_id, attempt FROM reports ORDER BY 1, 2")
        return [HoldRef(operation_id=UUID(operation_id), attempt=attempt) for operation_id, attempt in rows]

    @_on_its_thread
    def book(self, ref: HoldRef, windows: Sequence[EnergyWindow], booked: Sequence[Booked]) -> None:
        """Keep windows, and until where the hold is booked now: with nothing, it has ended. In one transaction."""
        rows = [_key(ref) | {"device": w.device, "nr": w.index, "window": w.model_dump_json()} for w in windows]
        with self._database:
            # REPLACE: as for reports.
            self._database.executemany(
                "INSERT OR REPLACE INTO energy (operation_id, attempt, device, nr, window)"
                " VALUES (:operation_id, :attempt, :device, :nr, :window)",
                rows,
            )
            self._database.execute(f"DELETE FROM measured WHERE {_HOLD}", _key(ref))
            self._database.executemany(
                "INSERT INTO measured VALUES (:operation_id, :attempt, :device, :source, :quality, :boot_id, :at_s,"
                " :step, :index, :counter_j)",
                [_key(ref) | asdict(each) for each in booked],
            )

    @_on_its_thread
    def unended(self) -> list[tuple[HoldRef, list[Booked]]]:
        """The holds that were never booked to their end."""
        found: dict[HoldRef, list[Booked]] = {}
        for operation_id, attempt, device, source, quality, *rest in self._database.execute("SELECT * FROM measured"):
            booked = Booked(device, source and Source(source), quality and Quality(quality), *rest)
            found.setdefault(HoldRef(operation_id=UUID(operation_id), attempt=attempt), []).append(booked)
        return list(found.items())

    @_on_its_thread
    def energy(self, max_windows: int) -> EnergyRows | None:
        """The oldest windows, of one hold; None where there is none."""
        first = self._database.execute("SELECT operation_id, attempt FROM energy ORDER BY id LIMIT 1").fetchone()
        if first is None:
            return None
        ref = HoldRef(operation_id=UUID(first[0]), attempt=first[1])
        query = f"SELECT id, window FROM energy WHERE {_HOLD} ORDER BY id LIMIT :n"
        return EnergyRows(ref, dict(self._database.execute(query, _key(ref) | {"n": max_windows}).fetchall()))

    @_on_its_thread
    def drop_energy(self, ids: Sequence[int]) -> None:
        """The API has them, or does not want them."""
        with self._database:
            self._database.executemany("DELETE FROM energy WHERE id = ?", [(id,) for id in ids])

    async def aclose(self) -> None:
        """Unlock it for a successor; with nothing to send it is deleted."""
        await self._close()
        self._thread.shutdown()

    @_on_its_thread
    def _close(self) -> None:
        empty = not _has_content(self._database)
        self._database.close()
        if empty:
            _delete(self._path, self._lock)
        else:
            os.close(self._lock)


def _sender_with_content(database: sqlite3.Connection) -> Sender | None:
    """None when there is nothing to send; also when its agent was killed before it had written anything."""
    if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
        return None
    database.executescript(_ENERGY_SCHEMA)
    if not _has_content(database):
        return None
    incarnation, api_url, credential = database.execute("SELECT * FROM sender").fetchone()
    return Sender(UUID(incarnation), api_url, credential)


def _has_content(database: sqlite3.Connection) -> bool:
    return any(database.execute(f"SELECT 1 FROM {table}").fetchone() for table in ("reports", "energy", "measured"))


def _key(ref: HoldRef) -> dict[str, Any]:
    return {"operation_id": str(ref.operation_id), "attempt": ref.attempt}


def _open(path: Path) -> sqlite3.Connection:
    # Only one method runs at a time, but the first and the later ones on different threads.
    database = sqlite3.connect(path, check_same_thread=False)
    # Exclusive: no shared memory beside it, which home directories on NFS cannot have.
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    return database


def _delete(path: Path, lock: int) -> None:
    """The lock last: whoever gets it later finds no database, and nobody makes one under an old name."""
    path.unlink(missing_ok=True)
    locks.lock_path(path).unlink(missing_ok=True)
    os.close(lock)
