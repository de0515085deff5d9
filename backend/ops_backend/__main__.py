"""`python -m ops_backend server|db`: each one process in the foreground, ready when it says so; other verbs end."""

import argparse
import asyncio
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError

from ops_backend import postgres
from ops_backend.app import create_app
from ops_backend.database import UnfitDatabase, migrate
from ops_backend.http_protocol import BoundedHttp
from ops_backend.postgres_place import PostgresError
from ops_backend.settings import Settings, SettingsError
from ops_contract.backup import RESTORING
from ops_contract.log_lines import LogFormatError, log_formatter


def main() -> int:
    arguments = _parser().parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold every secret of the service
    try:
        _log_to_stderr()
        if arguments.verb == "db":
            return postgres.run(arguments.data_dir, json=arguments.json, exit_on_eof=arguments.exit_on_eof)
        if arguments.verb == "doctor":
            return examine(arguments.data_dir)
        if arguments.verb in ("backup", "restore"):
            return copy(arguments)
        return serve(Settings.from_env(), as_json=arguments.json, exit_on_eof=arguments.exit_on_eof)
    except (SettingsError, PostgresError, LogFormatError) as error:
        print(f"ops {arguments.verb}: {error}", file=sys.stderr)
        return 2


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
        threading.Thread(target=_stop_at_eof, daemon=True).start()
    server.run(sockets=[listener])
    return 0


def examine(data_dir: Path | None) -> int:
    """Print what there is to say of database and storage, as JSON."""
    from ops_backend import doctor

    root, lease_s = os.environ.get("OPS_STORAGE_ROOT"), float(os.environ.get("OPS_LEASE_S") or doctor.LEASE_S)
    findings = doctor.examine(data_dir, os.environ.get("OPS_DATABASE_URL"), Path(root) if root else None, lease_s)
    print(findings.model_dump_json())
    return int(any(finding.state == "fail" for finding in findings.items))


def copy(arguments: argparse.Namespace) -> int:
    """Back up or restore, say on stderr how it goes, and print what was done, as JSON."""
    from ops_backend import backup
    from ops_backend.archive import ArchiveError

    def say(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it clears away what it began
    if arguments.exit_on_eof:
        threading.Thread(target=_stop_at_eof, daemon=True).start()
    service = backup.Service.find(arguments.data_dir, os.environ)
    try:
        if arguments.verb == "backup":
            done = backup.back_up(service, arguments.to, say).model_dump_json()
        else:
            done = backup.restore(service, arguments.file, arguments.replace, say).model_dump_json()
    except (backup.BackupError, ArchiveError, UnfitDatabase, OSError) as error:
        print(f"ops {arguments.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ops {arguments.verb}: stopped before it was done", file=sys.stderr)
        return 130
    print(done)
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


def _stop_at_eof() -> None:
    """The supervisor holds the other end of stdin: its death, however sudden, ends this process in order."""
    # Not sys.stdin: its lock, held by a daemon thread, would abort the interpreter's exit.
    while os.read(0, 4096):
        pass
    signal.raise_signal(signal.SIGTERM)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(log_formatter(os.environ))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ops_backend")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="say ready as one line of JSON on stdout")
    common.add_argument("--exit-on-eof", action="store_true", help="stop when stdin ends")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("server", parents=[common], help="the API, set up by OPS_* variables")
    database = verbs.add_parser("db", parents=[common], help="the embedded Postgres")
    database.add_argument("--data-dir", type=Path, required=True)
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--data-dir", type=Path, help="of an `ops up`, where OPS_* variables do not say")
    place.add_argument("--json", action="store_true", help="the only form there is")
    verbs.add_parser("doctor", parents=[place], help="look at database and storage")
    place.add_argument("--exit-on-eof", action="store_true", help="stop when stdin ends")
    backup = verbs.add_parser("backup", parents=[place], help="the whole service as one file")
    backup.add_argument("--to", type=Path, required=True, help="a file, or a directory to make one in")
    restore = verbs.add_parser("restore", parents=[place], help="a backup, into a place of its own")
    restore.add_argument("file", type=Path)
    restore.add_argument("--replace", action="store_true", help="set aside what is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
