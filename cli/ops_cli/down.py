"""`ops down`: ends the `ops up` of a data directory, wherever it was started, and nobody else."""

import os
import select
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from ops_cli.exits import ExitCode
from ops_cli.holder import describe, find_holder, holds

ASK_AGAIN_S = 1.0
KILL_AFTER_S = 30.0


def register(app: typer.Typer) -> None:
    app.command()(down)


def down(
    data_dir: Annotated[Path | None, typer.Option(help="Else that of the last `ops up`.")] = None,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for checkpoints; in the end by SIGKILL.")] = False,
) -> None:
    """End `ops up`; running trainings save a checkpoint first.

    They go on at the next start. Ctrl-C stops waiting, not the end itself.
    """
    from ops_cli.up import last_data_dir

    data_dir = (data_dir or last_data_dir()).expanduser().resolve()
    found = find_holder(data_dir)
    if found is None:
        print(f"Nothing runs on {data_dir}.")
        return
    if found.doing != "ops up":
        typer.echo(f"ops down: {describe(found, data_dir)}", err=True)
        raise typer.Exit(ExitCode.CONFLICT)
    process = _process(found.pid, data_dir)
    try:
        how = "without waiting for checkpoints" if now else "running trainings save a checkpoint first"
        print(f"Stopping Relight in {data_dir} (pid {found.pid}); {how}.", flush=True)
        _end(process, now)
    except KeyboardInterrupt:
        print("It is still stopping.")
        raise typer.Exit(ExitCode.DETACHED) from None
    finally:
        os.close(process)
    print("Stopped." + (" systemd starts it again at the next boot (`ops service`)." if found.by_systemd else ""))


def _process(pid: int, data_dir: Path) -> int:
    """A pidfd: what it names stays the same process, whoever gets the number next."""
    try:
        process = os.pidfd_open(pid)
        if holds(pid, data_dir):
            return process
        os.close(process)
        problem = "does not hold its lock"
    except OSError as error:
        problem = f"cannot be reached ({error.strerror})"
    typer.echo(
        f"ops down: pid {pid}, which {data_dir / 'lock'} names, {problem}; nothing was done, try again", err=True
    )
    raise typer.Exit(ExitCode.FAILED)


def _end(process: int, now: bool) -> None:
    """With `now` it is asked a second time, which is what a second ctrl-C says."""
    began_s = time.monotonic()
    signal.pidfd_send_signal(process, signal.SIGTERM)
    while not select.select([process], [], [], ASK_AGAIN_S)[0]:
        if now:
            late = time.monotonic() - began_s > KILL_AFTER_S
            try:
                signal.pidfd_send_signal(process, signal.SIGKILL if late else signal.SIGTERM)
            except ProcessLookupError:
                return
