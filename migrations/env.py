"""Alembic's environment: one asyncpg connection, one migrator at a time."""

import asyncio

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from ops_backend.tables import metadata

# Any number that no other user of the database takes; it spells "relight" in base 36.
MIGRATION_LOCK = 59_614_283_477


def _migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        compare_server_default=True,
        # Postgres prints such an expression in its own way, which Alembic takes for another one.
        include_name=lambda name, kind, _: name != "ix_operations_wish",
        include_object=lambda _, name, *__: name != "ix_operations_wish",
    )
    with context.begin_transaction():
        # Two servers that start together: the second waits, then finds nothing to do.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        context.run_migrations()


async def _run() -> None:
    url = context.config.get_main_option("sqlalchemy.url") or ""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(_migrate)
    await engine.dispose()


asyncio.run(_run())
