"""Between the API and its Postgres: cuts, freezes, and loses the answer to a commit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from sqlalchemy import make_url

_SOCKET = ".s.PGSQL.5432"


class PostgresProxy:
    """All goes through while `running` is set. With `lose_commit` n the nth commit is done and not answered."""

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._connections: set[asyncio.Task[None]] = set()
        self.running = asyncio.Event()
        self.running.set()
        self.lose_commit = 0
        self.lost_commits = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_unix_connection(str(self._upstream))
        cut = asyncio.Event()
        pumps = [
            asyncio.create_task(self._requests(reader, upstream[1], cut)),
            asyncio.create_task(self._answers(upstream[0], writer, cut)),
        ]
        self._connections |= set(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
            self._connections.discard(pump)
        for end in (writer, upstream[1]):
            end.close()

    def cut_all(self) -> None:
        """Every connection that there is; new ones go through."""
        for pump in self._connections:
            pump.cancel()

    async def _requests(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, cut: asyncio.Event) -> None:
        while data := await source.read(65536):
            await self.running.wait()
            if self.lose_commit and b"COMMIT" in data:
                self.lose_commit -= 1
                if not self.lose_commit:
                    cut.set()
            sink.write(data)

    async def _answers(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, cut: asyncio.Event) -> None:
        while data := await source.read(65536):
            await self.running.wait()
            if cut.is_set():
                # It has answered, so it has committed; nobody else will know.
                self.lost_commits += 1
                return
            sink.write(data)


@asynccontextmanager
async def postgres_proxy(url: str, directory: Path) -> AsyncIterator[tuple[PostgresProxy, str]]:
    """The proxy, and the URL of the same database through it. `directory` has to be short: it gets a socket."""
    parts = make_url(url)
    proxy = PostgresProxy(Path(str(parts.query["host"])) / _SOCKET)
    server = await asyncio.start_unix_server(proxy.serve, directory / _SOCKET)
    try:
        yield proxy, parts.set(query={"host": str(directory)}).render_as_string(hide_password=False)
    finally:
        proxy.cut_all()
        server.close()
        with suppress(OSError):
            (directory / _SOCKET).unlink()
