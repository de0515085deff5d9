"""Engine, sessions and migrations."""

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

OLDEST_POSTGRES = 15

Sessions = async_sessionmaker[AsyncSession]


def make_engine(url: str, pool_size: int) -> AsyncEngine:
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=5,
        # NaN is not JSON, and Postgres refuses it: better a loud error here than a row that cannot be read.
        json_serializer=partial(json.dumps, allow_nan=False),
        connect_args={
            "timeout": 5,
            "server_settings": {"application_name": "relight", "timezone": "UTC"},
        },
    )
    event.listen(engine.sync_engine, "connect", _decode_json)
    return engine


def make_sessions(engine: AsyncEngine) -> Sessions:
    return async_sessionmaker(engine, expire_on_commit=False)


def alembic_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_migrations()))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


class OldPostgres(Exception):
    """The server is older than our statements."""


async def migrate(url: str) -> None:
    """Bring the schema to this version's. Raises OldPostgres."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        version = str(await connection.scalar(text("SHOW server_version")))
    await engine.dispose()
    if int(version.split(".")[0]) < OLDEST_POSTGRES:
        raise OldPostgres(f"this is Postgres {version}; Relight needs {OLDEST_POSTGRES} or newer")
    # Alembic is synchronous and brings its own event loop.
    await asyncio.to_thread(command.upgrade, alembic_config(url), "head")


def _decode_json(connection: Any, _record: object) -> None:
    """Our statements are text, whose result columns have no types: let the driver itself turn JSON into objects."""
    for name in ("json", "jsonb"):
        connection.run_async(partial(_set_json_codec, name))


async def _set_json_codec(name: str, driver: Any) -> None:
    await driver.set_type_codec(name, encoder=str, decoder=json.loads, schema="pg_catalog", format="text")


def _migrations() -> Path:
    packaged = Path(__file__).parent / "migrations"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "migrations"
