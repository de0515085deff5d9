"""`ops up -d`: `ops up` in a session of its own, and the wait until it has come up."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from ops_cli.child import last_lines, rotate
from ops_cli.exits import ExitCode
from ops_cli.holder import Holder, describe, find_holder, unusable
from ops_cli.stopping import StopRequested, StopRequests
from relight.private import make_private, opener

LAST_LINES = 15


def start(data_dir: Path, arguments: Sequence[str], port: int | None) -> Holder:
    """Who is up there then; one that was there before is as good. Leaves with its exit code when nobody is."""
    log, process = data_dir / "logs" / "up.log", None
    with StopRequests() as stops:
        try:
            found = find_holder(data_dir)
            if found is None:
                process = _spawn(log, arguments)
            elif found.doing != "ops up":
                typer.echo(f"ops up: {describe(found, data_dir)}", err=True)
                raise typer.Exit(ExitCode.CONFLICT)
            found = _await_ready(data_dir, process, stops)
        except OSError as error:
            if process is not None:
                raise
            typer.echo(f"ops up: {unusable(data_dir, error)}", err=True)
            raise typer.Exit(ExitCode.FAILED) from error
        except StopRequested:
            if process is not None:
                _take_back(process, stops)
            raise typer.Exit(ExitCode.DETACHED) from None
    if found is None:
        end = "\n    ".join([f"ops up: it did not come up. The end of {log}:", *last_lines(log, LAST_LINES)])
        typer.echo(end, err=True)
        raise typer.Exit(ExitCode.FAILED)
    if port not in (None, found.port):
        typer.echo(f"ops up: it is up at {found.url}, not on port {port}; `ops down` first to move it", err=True)
        raise typer.Exit(ExitCode.CONFLICT)
    return found


def _spawn(log: Path, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    make_private(log.parent)
    rotate(log)
    with open(log, "ab", opener=opener) as out:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "ops_cli", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def _await_ready(data_dir: Path, process: "subprocess.Popen[bytes] | None", stops: StopRequests) -> Holder | None:
    """`process` or another one that was first; None when none is left."""
    while True:
        over = process is None or process.poll() is not None  # before looking: whom we find then is another
        found = find_holder(data_dir)
        if found is not None and found.ready:
            return found
        if over and (found is None or found.doing != "ops up"):
            return None
        stops.pause()


def _take_back(process: "subprocess.Popen[bytes]", stops: StopRequests) -> None:
    """What we began, and nobody else's."""
    typer.echo("Stopping what was started.", err=True)
    process.terminate()
    hurried = False
    while process.poll() is None:
        stops.pause()
        if stops.hurried and not hurried:
            hurried = True
            process.terminate()
