"""One real Postgres for the whole run, and a fresh migrated database for whoever asks."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import asyncpg
from sqlalchemy import make_url

from helpers.history import KEEP_WRITERS
from ops_backend.database import migrate

_numbers = count(1)


@contextmanager
def embedded_postgres(directory: Path) -> Iterator[str]:
    """The URL of an embedded Postgres run by its own process, as `ops up` runs it; it remembers commits for the checker
    of histories."""
    with _embedded_postgres(directory) as url:
        asyncio.run(_remember_commits(url))
    with _embedded_postgres(directory) as url:
        yield url


async def _remember_commits(url: str) -> None:
    """From the next start on."""
    connection = await connect(url)
    await connection.execute("ALTER SYSTEM SET track_commit_timestamp = on")
    await connection.close()


@contextmanager
def _embedded_postgres(directory: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "ops_backend", "db", "--data-dir", str(directory), "--json", "--exit-on-eof"]
    with (
        (directory / "db.log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (directory / "db.log").read_text()
        yield json.loads(line)["url"]
        assert process.stdin is not None
        process.stdin.close()


class Databases:
    """Migrates a template once; each database after that is a copy of its files."""

    def __init__(self, server_url: str) -> None:
        self._url = make_url(server_url)
        self._template: str | None = None

    async def fresh(self) -> str:
        """The URL of a new database with our schema and no rows, which the checker of histories can read."""
        if self._template is None:
            template = await self._create("")
            await migrate(self._of(template))
            connection = await connect(self._of(template))
            await connection.execute(KEEP_WRITERS)
            await connection.close()
            self._template = template
        return self._of(await self._create(f"TEMPLATE {self._template}"))

    async def empty(self) -> str:
        """The URL of a new database without a schema."""
        return self._of(await self._create(""))

    async def _create(self, how: str) -> str:
        name = f"test_{next(_numbers)}"
        connection = await connect(self._url.render_as_string(hide_password=False))
        try:
            await connection.execute(f"CREATE DATABASE {name} {how}")
        finally:
            await connection.close()
        return name

    def _of(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)


async def connect(url: str) -> asyncpg.Connection:
    """A plain driver connection, for checks behind the service's back."""
    parts = make_url(url)
    return await asyncpg.connect(
        user=parts.username,
        password=parts.password,
        database=parts.database,
        host=parts.query.get("host") or parts.host,
        port=int(str(parts.query.get("port") or parts.port or 5432)),
    )
