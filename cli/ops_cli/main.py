"""The command `ops`."""

import errno
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ops_cli import (
    audit,
    backup,
    checkpoints,
    cleanup,
    code,
    compare,
    dashboard,
    demo,
    doctor,
    down,
    energy,
    export,
    files,
    logs,
    measure,
    operate,
    plot,
    ptycho,
    read,
    replay,
    service,
    show,
    sweep,
    tokens,
    top,
    up,
    watch,
    webhooks,
    workers,
    workloads,
)
from ops_cli.exits import exit_code, require

# What `ops --help` shows, and in which order.
SECTIONS = {
    "Service": "up down service demo dashboard doctor backup restore server worker db",
    "Submit": "train run submit init workloads pack schema",
    "Watch": "list status top watch logs events attempts",
    "Act": "cancel resume fork replay",
    "Results": "metrics plot compare energy artifacts download export code",
    "Study": "sweep measure ptycho",
    "Keep in order": "checkpoints delete cleanup workers webhooks tokens audit",
}


class Sections(TyperGroup):
    """Typer's own panels are drawn by rich, which takes longer to import than all of this."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        named = {name for names in SECTIONS.values() for name in names.split()}
        others = [name for name in self.commands if name not in named]
        limit = formatter.width - 6 - max(map(len, self.commands))
        for section, names in [*SECTIONS.items(), ("More", " ".join(others))]:
            if there := [(name, self.commands[name]) for name in names.split() if name in self.commands]:
                with formatter.section(section):
                    formatter.write_dl([(name, command.get_short_help_str(limit)) for name, command in there])


app = typer.Typer(cls=Sections, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def main() -> NoReturn:
    # As where it is not installed: httpx's own command line is most of what importing httpx takes.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    try:
        try:
            app()
        finally:
            _flush()
    except Exception as error:
        from ops_contract.errors import OpsError
        from ops_contract.system_words import system_words
        from relight.settings import SettingsError

        if isinstance(error, OpsError):
            _leave(error.message, exit_code(error.http_status))
        if isinstance(error, SettingsError):
            _leave(str(error), exit_code(422))
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _leave(f"this cannot be written: {system_words(error)}", 1)
        raise
    raise AssertionError("typer leaves by SystemExit")


def _flush() -> None:
    """Python would do it after us, and complain where nobody reads any more: `ops list --json | head -1`."""
    try:
        if sys.stdout is not None:  # >&-
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def _leave(message: str, code: int) -> NoReturn:
    print(f"ops: {show.harmless(message)}", file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("relight"))
        raise typer.Exit()


@app.callback()
def ops(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Run training as operations: submit, watch, cancel, resume. Begin with `ops up`."""


def server(context: typer.Context) -> None:
    """The API as a process, set up by OPS_* variables."""
    _become("ops_backend", "server", *context.args, needs="backend")


def worker(context: typer.Context) -> None:
    """A worker as a process, set up by OPS_* variables. With OPS_WORKER_IDLE_EXIT_S it ends when it has no work."""
    _become("ops_worker", *context.args, needs="worker")


def db(context: typer.Context) -> None:
    """The embedded Postgres as a process.

    On the data of `ops up` unless --data-dir says otherwise.
    """
    from relight.settings import data_home

    elsewhere = any(argument.startswith("--data-dir") or argument in ("-h", "--help") for argument in context.args)
    _become(
        "ops_backend", "db", *context.args, *([] if elsewhere else ["--data-dir", str(data_home())]), needs="backend"
    )


def _become(module: str, *arguments: str, needs: str) -> NoReturn:
    require({"backend": "sqlalchemy", "worker": "uvicorn"}[needs], needs, "ops: this")
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


for part in (
    up,
    down,
    service,
    backup,
    demo,
    operate,
    code,
    dashboard,
    replay,
    checkpoints,
    files,
    export,
    cleanup,
    read,
    plot,
    energy,
    compare,
    sweep,
    measure,
    ptycho,
    workers,
    workloads,
    watch,
    top,
    logs,
    tokens,
    audit,
    webhooks,
    doctor,
):
    part.register(app)
for passed_on in (server, worker, db):
    app.command(context_settings=PASSED_ON, add_help_option=False)(passed_on)
