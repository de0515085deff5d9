"""Engine, sessions and migrations."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, text
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:  # what it imports takes as long as a quarter of the API, and most starts have nothing to migrate
    from alembic.config import Config

OLDEST_POSTGRES = 15


@dataclass(frozen=True)
class Limits:
    """How long a transaction waits for a connection or a lock, and how long it takes at most."""

    wait_s: float
    transaction_s: float


UNHURRIED = Limits(wait_s=30.0, transaction_s=60.0)


class Sessions:
    """Transactions on one pool of connections, each ended by its limit whatever the database does."""

    def __init__(self, url: str, pool_size: int, limits: Limits = UNHURRIED) -> None:
        self._engine = _engine(url, pool_size, limits)
        self._make = async_sessionmaker(self._engine, expire_on_commit=False)
        self._transaction_s = limits.transaction_s

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """Committed at the end. Raises TimeoutError: then it is not known whether it was."""
        # A database that is frozen, or beyond a dead network, keeps no limit of its own.
        async with asyncio.timeout(self._transaction_s), self._make.begin() as session:
            yield session

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """For statements that stand each by itself: it sees what is committed when it is sent, and is so at once."""
        async with asyncio.timeout(self._transaction_s), self._make() as session:
            await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            yield session

    async def dispose(self) -> None:
        await self._engine.dispose()


class Drivers:
    """Connections of the driver itself, for a statement that is sent a thousand times a second; JSON is text there."""

    def __init__(self, url: str, pool_size: int, limits: Limits = UNHURRIED) -> None:
        # To plan such a statement takes longer than to carry it out, and its plan is always the same.
        self._engine = _engine(url, pool_size, limits, read_json=str, plan_cache_mode="force_generic_plan")
        self._transaction_s = limits.transaction_s

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """Each statement by itself, as in `Sessions.reading`."""
        async with asyncio.timeout(self._transaction_s), self._engine.connect() as connection:
            yield (await connection.get_raw_connection()).driver_connection

    async def dispose(self) -> None:
        await self._engine.dispose()


def _engine(
    url: str, pool_size: int, limits: Limits, read_json: Callable[[str], Any] = json.loads, **settings: str
) -> AsyncEngine:
    # In ms. Without a client (frozen, or its network is gone) the database itself ends what holds locks.
    transaction, wait = str(round(limits.transaction_s * 1000)), str(round(limits.wait_s * 1000))
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=limits.wait_s,
        hide_parameters=True,  # an error that is logged would tell secrets
        # NaN is not JSON, and Postgres refuses it: better a loud error here than a row that cannot be read.
        json_serializer=partial(json.dumps, allow_nan=False),
        json_deserializer=read_json,
        connect_args={
            "timeout": limits.wait_s,
            "server_settings": {
                "application_name": "relight",
                "timezone": "UTC",
                "lock_timeout": wait,
                "statement_timeout": transaction,
                "idle_in_transaction_session_timeout": transaction,
                **settings,
            },
        },
    )
    event.listen(engine.sync_engine, "checkout", _try_it)
    return engine


def alembic_config(url: str) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_migrations()))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


class UnfitDatabase(Exception):
    """The server, or what is in its database, is not for this version; the message says what to do."""


async def migrate(url: str, revision: str = "head") -> None:
    """Bring the schema to this version's, or to an older one of an empty database. Raises UnfitDatabase."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        version = str(await connection.scalar(text("SHOW server_version")))
        has_schema = await connection.scalar(text("SELECT to_regclass('alembic_version')"))
        found = await connection.scalar(text("SELECT version_num FROM alembic_version")) if has_schema else None
    await engine.dispose()
    if int(version.split(".")[0]) < OLDEST_POSTGRES:
        raise UnfitDatabase(f"this is Postgres {version}; Relight needs {OLDEST_POSTGRES} or newer")
    if found is not None and not is_known(found):
        raise UnfitDatabase(
            f"its schema {found} was made by a newer Relight than this one, which knows up to {newest_revision()}; "
            "nothing was changed. Use that version again, or restore a backup that this one has made"
        )
    if revision == "head" and found == newest_revision():
        return
    from alembic import command

    # Alembic is synchronous and brings its own event loop.
    await asyncio.to_thread(command.upgrade, alembic_config(url), revision)


def newest_revision() -> str:
    """Of the schema, as this version has it."""
    return max(_revisions())


def is_known(revision: str) -> bool:
    return revision in _revisions()


def _revisions() -> set[str]:
    """By their files: a line of numbers, each of which follows the one before."""
    return {path.name.partition("_")[0] for path in (_migrations() / "versions").glob("[0-9]*_*.py")}


def _try_it(connection: Any, _record: object, _proxy: object) -> None:
    """Before it is used: `pool_pre_ping` in one round trip. Its own takes three, more than most requests do."""
    try:
        connection.run_async(lambda driver: driver.execute("SELECT"))
    except Exception as error:
        raise InvalidatePoolError() from error


def _migrations() -> Path:
    packaged = Path(__file__).parent / "migrations"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "migrations"
