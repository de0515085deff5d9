"""The API's own process: migrate, bind, serve."""

import asyncio
import json
import os
import signal
import socket
import sys
import threading

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError

from ops_backend.app import create_app
from ops_backend.database import UnfitDatabase, migrate
from ops_backend.http_protocol import BoundedHttp
from ops_backend.settings import Settings
from ops_contract.backup import RESTORING


def serve(settings: Settings, *, as_json: bool, exit_on_eof: bool) -> int:
    """Migrate, bind, say so, serve until SIGTERM, ctrl-C or (with `exit_on_eof`) the end of stdin."""
    if (settings.storage_root / RESTORING).exists():
        print(f"ops server: a restore into {settings.storage_root} did not finish: do it again", file=sys.stderr)
        return 1
    try:
        asyncio.run(migrate(settings.database_url))
    except (OSError, DBAPIError, UnfitDatabase) as error:
        print(f"ops server: cannot use the database of OPS_DATABASE_URL: {error}", file=sys.stderr)
        return 1
    try:
        listener = socket.create_server((settings.host, settings.port), backlog=2048)
    except OSError as error:
        print(f"ops server: cannot listen on {settings.host}:{settings.port}: {error}", file=sys.stderr)
        return 1
    try:
        server = Server(create_app(settings), settings, listener.getsockname()[1], as_json)
    except OSError as error:
        print(f"ops server: cannot use OPS_TLS_CERT and OPS_TLS_KEY: {error}", file=sys.stderr)
        return 1
    if exit_on_eof:
        threading.Thread(target=stop_at_eof, daemon=True).start()
    server.run(sockets=[listener])
    return 0


class Server(uvicorn.Server):
    """Says that it is ready when requests are answered, not before, and waits for no stream when it ends."""

    def __init__(self, app: FastAPI, settings: Settings, port: int, as_json: bool) -> None:
        """Raises OSError for a certificate or a key that is none."""
        super().__init__(
            uvicorn.Config(
                app,
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
                http=BoundedHttp,
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        self.config.load()
        url = f"{'https' if settings.tls_cert else 'http'}://{settings.host}:{port}"
        self._state = app.state
        self._line = json.dumps({"event": "ready", "url": url}) if as_json else f"API ready at {url}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._line, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Uvicorn waits for open responses before it tells the app that it ends.
        self._state.streams.close()
        await super().shutdown(sockets)


def stop_at_eof() -> None:
    """The supervisor holds the other end of stdin: its death, however sudden, ends this process in order."""
    # Not sys.stdin: its lock, held by a daemon thread, would abort the interpreter's exit.
    while os.read(0, 4096):
        pass
    signal.raise_signal(signal.SIGTERM)
