"""`python -m ops_backend server|db`: each one process in the foreground, ready when it says so; other verbs end."""

import argparse
import logging
import os
import resource
import signal
import sys
import threading
from pathlib import Path

from ops_backend import postgres
from ops_backend.postgres_place import PostgresError
from ops_contract.log_lines import LogFormatError, log_formatter
from ops_contract.system_words import system_words


def main() -> int:
    arguments = _parser().parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold every secret of the service
    try:
        _log_to_stderr()
        if arguments.verb == "db":
            return postgres.run(arguments.data_dir, json=arguments.json, exit_on_eof=arguments.exit_on_eof)
        return beside_a_database(arguments)
    except (PostgresError, LogFormatError) as error:
        print(f"ops {arguments.verb}: {error}", file=sys.stderr)
        return 2


def beside_a_database(arguments: argparse.Namespace) -> int:
    """The other verbs import what they need themselves: Postgres's own process waits for none of it when it starts."""
    from ops_backend.settings import Settings, SettingsError

    try:
        if arguments.verb == "doctor":
            return examine(arguments.data_dir)
        if arguments.verb in ("backup", "restore"):
            return copy(arguments)
        settings = Settings.from_env()
        from ops_backend.serving import serve

        return serve(settings, as_json=arguments.json, exit_on_eof=arguments.exit_on_eof)
    except SettingsError as error:
        print(f"ops {arguments.verb}: {error}", file=sys.stderr)
        return 2


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
    from ops_backend.database import UnfitDatabase
    from ops_backend.serving import stop_at_eof

    def say(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it clears away what it began
    if arguments.exit_on_eof:
        threading.Thread(target=stop_at_eof, daemon=True).start()
    service = backup.Service.find(arguments.data_dir, os.environ)
    try:
        if arguments.verb == "backup":
            done = backup.back_up(service, arguments.to, say).model_dump_json()
        else:
            done = backup.restore(service, arguments.file, arguments.replace, say).model_dump_json()
    except (backup.BackupError, ArchiveError, UnfitDatabase, OSError) as error:
        print(f"ops {arguments.verb}: {system_words(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ops {arguments.verb}: stopped before it was done", file=sys.stderr)
        return 130
    print(done)
    return 0


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(log_formatter(os.environ))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ops")
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
