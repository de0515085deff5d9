"""The rows of a backup: all of them in one snapshot, and back into a database that has none.

Plain COPY in text, by the columns' names: any Postgres reads it, older or newer.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO, Any

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from ops_backend.store.sql import statement
from ops_backend.tables import metadata

# Any number that no other user of the database takes; it spells "backup" in base 36.
BACKUP_LOCK = 682_510_993

# Who may log a browser in is nobody's to bring back: a link that was used would be good once more.
LEFT_OUT = ("logins",)
WRITTEN_AT_START = ("service", "workers", "slots", "workloads", "audit", *LEFT_OUT)

TRY_SWEEP = statement(f"SELECT pg_try_advisory_xact_lock_shared({BACKUP_LOCK})")

# What text means must not depend on the settings of a role or a server, nor how long a copy may take.
_SESSION = {
    "application_name": "relight backup",
    "bytea_output": "hex",
    "datestyle": "ISO",
    "extra_float_digits": "1",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "statement_timeout": "0",
    "idle_session_timeout": "0",
    "lock_timeout": "10s",
}

_CHECKPOINTS = "SELECT path, size_bytes FROM checkpoints WHERE status <> 'deleting' ORDER BY path"
_ARTIFACTS = "SELECT path, size_bytes FROM artifacts ORDER BY path"
_OPERATIONS = "SELECT id::text FROM operations ORDER BY id"

_FOREIGN_KEYS = """
    SELECT conrelid::regclass::text AS of, quote_ident(conname) AS name, pg_get_constraintdef(oid) AS definition
      FROM pg_constraint WHERE contype = 'f' AND connamespace = current_schema()::regnamespace
"""

# A copy must not speak to the workers of what it is a copy of, which may still run. They have no secret here until
# they register, which the answer to their next heartbeat makes them do.
_FORGET_WORKERS = "UPDATE workers SET secret = '', last_seen_at = 'epoch'"
# The files in logs/ are not in a backup: they are written again from the rows.
_WRITE_LOGS_AGAIN = "UPDATE operations SET logged_event_seq = NULL WHERE logged_event_seq IS NOT NULL"


class TableRows(BaseModel):
    """Whose rows these are, and which columns, in their order."""

    name: str
    columns: list[str]


@dataclass(frozen=True)
class Files:
    """What the rows name below the storage root. `checkpoints` are directories, by their sizes in bytes."""

    checkpoints: dict[str, int]
    artifacts: dict[str, int]
    operations: list[str]

    @property
    def size_bytes(self) -> int:
        return sum(self.checkpoints.values()) + sum(self.artifacts.values())


async def may_sweep(session: AsyncSession) -> bool:
    """False while a backup copies files. For the transaction that finds out which are to go.

    What it finds was given up before any backup that begins after it, and is in none.
    """
    return bool(await session.scalar(TRY_SWEEP))


class Snapshot:
    """All rows as they were at one moment."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    async def revision(self) -> str | None:
        """Of the schema; None for a database without one."""
        if not await _present(self._driver, ["alembic_version"]):
            return None
        found: str | None = await self._driver.fetchval("SELECT version_num FROM alembic_version")
        return found

    async def version(self) -> str:
        """Of Postgres."""
        return str(await self._driver.fetchval("SHOW server_version"))

    async def files(self) -> Files:
        return Files(
            {row["path"]: row["size_bytes"] for row in await self._driver.fetch(_CHECKPOINTS)},
            {row["path"]: row["size_bytes"] for row in await self._driver.fetch(_ARTIFACTS)},
            [row["id"] for row in await self._driver.fetch(_OPERATIONS)],
        )

    async def copy(self, rows: TableRows, out: IO[bytes]) -> None:
        await self._driver.copy_from_table(rows.name, columns=rows.columns, output=out)


class Holding:
    """Keeps the sweepers from deleting files, for as long as the connection lives."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    async def check(self) -> None:
        """Raises a driver's error or OSError when the connection was lost: files may have gone since."""
        await self._driver.execute("SELECT 1")

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        async with self._driver.transaction(isolation="repeatable_read", readonly=True):
            yield Snapshot(self._driver)


@asynccontextmanager
async def holding_files(url: str) -> AsyncIterator[Holding]:
    """Raises OSError, or the driver's own errors: LockNotAvailableError while another one holds them."""
    async with _driver(url) as driver:
        # A sweeper has it for the moment in which it finds out what is to go.
        await driver.execute(f"SELECT pg_advisory_lock({BACKUP_LOCK})")
        yield Holding(driver)


def tables() -> list[TableRows]:
    """Those of a backup, as this version has them."""
    kept = [table for table in metadata.sorted_tables if table.name not in LEFT_OUT]
    return [TableRows(name=table.name, columns=[column.name for column in table.columns]) for table in kept]


async def holds_anything(url: str) -> bool:
    """Rows that somebody would miss: not those which a service writes again when it starts."""
    async with _driver(url) as driver:
        for name in await _present(driver, [table for table in metadata.tables if table not in WRITTEN_AT_START]):
            if await driver.fetchval(f"SELECT EXISTS (SELECT FROM {name})"):
                return True
    return False


async def counts(url: str) -> tuple[int, int]:
    """Operations, and deliveries to webhooks that are due."""
    async with _driver(url) as driver:
        operations = await driver.fetchval("SELECT count(*) FROM operations")
        if not await _present(driver, ["deliveries"]):
            return operations, 0
        return operations, await driver.fetchval("SELECT count(*) FROM deliveries WHERE state = 'due'")


async def ping(url: str) -> None:
    """Raises OSError or the driver's errors when it does not answer."""
    async with _driver(url):
        pass


async def is_served(url: str) -> bool:
    """Whether an API runs on it."""
    async with _driver(url) as driver:
        if not await _present(driver, ["service"]):
            return False
        return bool(await driver.fetchval("SELECT max(last_tick_at) > now() - interval '10 s' FROM service"))


async def clear(url: str) -> None:
    """Drop our tables, of whichever version. For a database that holds nothing."""
    async with _driver(url) as driver:
        if found := await _present(driver, [*metadata.tables, "alembic_version"]):
            await driver.execute(f"DROP TABLE {', '.join(found)} CASCADE")


async def fill(url: str, copies: Sequence[tuple[TableRows, IO[bytes]]]) -> None:
    """All rows into an empty schema of their version, in one transaction, with every foreign key checked."""
    async with _driver(url) as driver:
        async with driver.transaction():
            keys = await driver.fetch(_FOREIGN_KEYS)
            # They go round in circles, so no order of the tables would do.
            for key in keys:
                await driver.execute(f"ALTER TABLE {key['of']} DROP CONSTRAINT {key['name']}")
            for rows, source in copies:
                await driver.copy_to_table(rows.name, columns=rows.columns, source=source)
            await driver.execute(_FORGET_WORKERS)
            await driver.execute(_WRITE_LOGS_AGAIN)
            for key in keys:
                await driver.execute(f"ALTER TABLE {key['of']} ADD CONSTRAINT {key['name']} {key['definition']}")
        await driver.execute("ANALYZE")


async def _present(driver: Any, names: Sequence[str]) -> list[str]:
    """Those of the tables that there are."""
    sql = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
    return [row["relname"] for row in await driver.fetch(f"{sql} AND relname = ANY ($1)", names)]


@asynccontextmanager
async def _driver(url: str) -> AsyncIterator[Any]:
    """A connection of the driver itself, which knows COPY."""
    engine = create_async_engine(url, poolclass=NullPool, connect_args={"server_settings": _SESSION})
    async with engine.connect() as connection:
        yield (await connection.get_raw_connection()).driver_connection
    await engine.dispose()
