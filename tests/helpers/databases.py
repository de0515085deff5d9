"""One real Postgres for the whole run, and a fresh migrated database for whoever asks."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import asyncpg
from sqlalchemy import make_url

from helpers.history import KEEP_WRITERS
from ops_backend.database import migrate

POSTGRES_15 = Path("/usr/lib/postgresql/15/bin")

# What a process leaves when it is killed is the kernel's already; none of these tests cuts the power.
UNSYNCED = """
import sys
from ops_backend import postgres
from ops_backend.__main__ import main
postgres.SETTINGS["fsync"] = "off"
sys.exit(main())
"""

# Of any table, whatever refers to its rows; sequences begin anew.
EMPTY = """
    DO $$ DECLARE own regclass; BEGIN
        SET LOCAL session_replication_role = replica;
        FOR own IN
            SELECT oid FROM pg_class
             WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, 'history'::regnamespace)
               AND relname <> 'alembic_version'
        LOOP
            EXECUTE format('DELETE FROM %s', own);
        END LOOP;
        PERFORM setval(seqrelid, seqstart, false) FROM pg_sequence;
    END $$
"""
# How many rows the catalogs have, and which transaction wrote the last of them: another one after any DDL.
SCHEMA = """
    SELECT string_agg(format('%s %s', n, last), ',') FROM (
        SELECT count(*) AS n, max(xmin::text::bigint) AS last FROM pg_class
        UNION ALL SELECT count(*), max(xmin::text::bigint) FROM pg_attribute
        UNION ALL SELECT count(*), max(xmin::text::bigint) FROM pg_constraint
        UNION ALL SELECT count(*), max(xmin::text::bigint) FROM pg_trigger
        UNION ALL SELECT count(*), max(xmin::text::bigint) FROM pg_proc
    ) catalogs
"""
OTHERS = """
    SELECT count(*) FROM pg_stat_activity
     WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""

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
    command = [sys.executable, "-c", UNSYNCED, "db", "--data-dir", str(directory), "--json", "--exit-on-eof"]
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


@dataclass(frozen=True)
class Server:
    """`home` has the socket, and the data in `data`."""

    home: Path
    port: int


@contextmanager
def debian_postgres(port: int = 5432, password: str | None = None, home: Path | None = None) -> Iterator[Server]:
    """Postgres 15 of the system, on a socket; with a password on the loopback too. Its superuser is `relight`.

    Postgres refuses to be root, so root lends it to the package's user.
    """
    user = "postgres" if os.geteuid() == 0 else None
    made = home or Path(tempfile.mkdtemp(prefix="pg15-"))
    try:
        if user:
            shutil.chown(made, user)
        access = ["-A", "trust"]
        if password:
            (made / "password").write_text(password)
            (made / "password").chmod(0o644)
            access = ["-A", "scram-sha-256", "--pwfile", str(made / "password")]
        initdb = [POSTGRES_15 / "initdb", "-D", made / "data", "-U", "relight", "-E", "UTF8", "--no-sync", *access]
        if not (made / "data").exists():
            subprocess.run(initdb, user=user, check=True, capture_output=True, cwd=made)
        address = "127.0.0.1" if password else ""
        flags = ["-D", made / "data", "-k", made, "-p", str(port), "-c", f"listen_addresses={address}"]
        with subprocess.Popen(
            [POSTGRES_15 / "postgres", *flags, "-c", "fsync=off"],
            user=user,
            cwd=made,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as server:
            assert server.stdout is not None
            assert any("ready to accept connections" in line for line in server.stdout)
            yield Server(made, port)
            server.terminate()
            server.communicate()
    finally:
        if home is None:
            shutil.rmtree(made)


class Databases:
    """Migrates a template once; each database after that is a copy of its files, or was given back."""

    def __init__(self, server_url: str, template: str | None = None) -> None:
        self._url = make_url(server_url)
        self._template = template
        self._made: list[str] = []
        self._schema: str | None = None
        self._free: list[str] = []

    async def fresh(self) -> str:
        """The URL of a database with our schema and no rows, which the checker of histories can read."""
        if self._free:
            return self._free.pop()
        url = self._of(await self._create(f"TEMPLATE {await self.template()}"))
        if self._schema is None:
            connection = await connect(url)
            self._schema = await connection.fetchval(SCHEMA)
            await connection.close()
        return url

    async def give_back(self, url: str) -> None:
        """Emptied, in a tenth of the time of another copy; unless somebody has changed it, or is still there."""
        connection = await connect(url)
        if await connection.fetchval(SCHEMA) == self._schema and await connection.fetchval(OTHERS) == 0:
            await connection.execute(EMPTY)
            self._free.append(url)
        await connection.close()

    async def template(self) -> str:
        if self._template is None:
            template = await self._create("")
            await migrate(self._of(template))
            connection = await connect(self._of(template))
            await connection.execute(KEEP_WRITERS)
            await connection.close()
            self._template = template
        return self._template

    async def empty(self) -> str:
        """The URL of a new database without a schema."""
        return self._of(await self._create(""))

    async def drop(self) -> None:
        """All of them, of a server that outlives us."""
        connection = await connect(self._url.render_as_string(hide_password=False))
        for name in self._made:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await connection.close()

    async def _create(self, how: str) -> str:
        name = f"test_{os.getpid()}_{next(_numbers)}"
        connection = await connect(self._url.render_as_string(hide_password=False))
        try:
            await connection.execute(f"CREATE DATABASE {name} {how}")
        finally:
            await connection.close()
        self._made.append(name)
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
