"""The command `ops`."""

import importlib.util
import os
import sys
from typing import Annotated, NoReturn

import typer

from ops_cli import (
    backup,
    checkpoints,
    cleanup,
    code,
    dashboard,
    demo,
    doctor,
    down,
    export,
    files,
    logs,
    operate,
    plot,
    read,
    replay,
    service,
    up,
    watch,
    webhooks,
    workers,
    workloads,
)
from ops_cli.exits import exit_code

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def main() -> NoReturn:
    try:
        app()
    except Exception as error:
        from ops_contract.errors import OpsError
        from relight.settings import SettingsError

        if isinstance(error, OpsError):
            _leave(error.message, exit_code(error.http_status))
        if isinstance(error, SettingsError):
            _leave(str(error), exit_code(422))
        raise
    raise AssertionError("typer leaves by SystemExit")


def _leave(message: str, code: int) -> NoReturn:
    print(f"ops: {message}", file=sys.stderr)
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
    """A worker as a process, set up by OPS_* variables."""
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
    if importlib.util.find_spec({"backend": "sqlalchemy", "worker": "uvicorn"}[needs]) is None:
        _leave(f"this needs more packages: pip install 'relight[{needs}]'", 1)
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
    workers,
    workloads,
    watch,
    logs,
    webhooks,
    doctor,
):
    part.register(app)
for passed_on in (server, worker, db):
    app.command(context_settings=PASSED_ON, add_help_option=False)(passed_on)
