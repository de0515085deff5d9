"""`ops backup` and `ops restore`: the whole service as one file. The work is the backend's, a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json
from ops_cli.exits import ExitCode, require


def register(app: typer.Typer) -> None:
    app.command()(backup)
    app.command()(restore)


def backup(
    to: Annotated[Path, typer.Option(metavar="PATH", help="A file, or a directory to make one in.")] = Path(),
    data_dir: Annotated[Path | None, typer.Option(help="Else by OPS_* variables, or the last `ops up`.")] = None,
    json: Json = False,
) -> None:
    """Write everything into one file, also while the service runs.

    It holds the token and what users submitted: keep it where only you can read it.
    """
    from ops_cli.up import last_data_dir
    from ops_contract.backup import Taken

    place = None if data_dir is None and _by_variables() else (data_dir or last_data_dir()).expanduser().resolve()
    answer = _ask("backup", "--to", str(to.expanduser().absolute()), data_dir=place)
    if json:
        print(answer)
        return
    taken = Taken.model_validate_json(answer)
    print(f"{taken.path}: {taken.operations} operations, {show.size(taken.size_bytes)}")
    for path in taken.missing:
        typer.echo(f"  not there, so not in it: {path}", err=True)
    for path in taken.changed:
        typer.echo(f"  written to while it was read, so maybe torn: {path}", err=True)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="That `ops backup` wrote.")],
    data_dir: Annotated[Path | None, typer.Option(help="Else $XDG_DATA_HOME/relight, or by OPS_* variables.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Set aside what is there; nothing is deleted.")] = False,
    json: Json = False,
) -> None:
    """Bring a backup back into an empty data directory.

    What ran when it was taken goes on at the next `ops up`.
    """
    from ops_cli.holder import Taken, only_one
    from ops_contract.backup import Restored
    from relight.settings import data_home

    arguments = [str(file.expanduser().absolute()), *(["--replace"] if replace else [])]
    if data_dir is None and _by_variables():
        place, answer = None, _ask("restore", *arguments)
    else:
        place = (data_dir or data_home()).expanduser().resolve()
        try:
            with only_one(place, "ops restore") as lock:
                answer = _ask("restore", *arguments, data_dir=place, lock=lock.fileno())
                lock.forget()
        except Taken as error:
            typer.echo(f"ops restore: {error}", err=True)
            raise typer.Exit(ExitCode.CONFLICT) from error
    if json:
        print(answer)
        return
    done = Restored.model_validate_json(answer)
    print(f"{done.operations} operations are back, as of {done.taken_at:%Y-%m-%d %H:%M:%S} UTC")
    if done.set_aside:
        print(f"What was there before is in {done.set_aside}; delete it when nobody needs it")
    if done.deliveries:
        print(f"{done.deliveries} messages to webhooks were on their way then, and are sent, maybe for a second time")
    print(f"Next: ops up --data-dir {place}" if place else "Next: start the service")


def _by_variables() -> bool:
    return {"OPS_DATABASE_URL", "OPS_STORAGE_ROOT"} <= os.environ.keys()


def _ask(verb: str, *arguments: str, data_dir: Path | None = None, lock: int | None = None) -> str:
    """What the backend printed. Leaves with its exit code when it fails, after it has said why on stderr.

    It holds `lock` as long as it lives, and ends when we do.
    """
    require("sqlalchemy", "backend", f"ops {verb}: this")
    command = [sys.executable, "-P", "-m", "ops_backend", verb, "--json", "--exit-on-eof", *arguments]
    if data_dir:
        command += ["--data-dir", str(data_dir)]
    passed = [lock] if lock is not None else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # Its own session: a ctrl-C is ours to pass on, which the end of its stdin does.
    with subprocess.Popen(command, pass_fds=passed, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            answer: str = process.stdout.read().decode()
        except KeyboardInterrupt:
            process.stdin.close()
            process.wait()
            raise typer.Exit(ExitCode.DETACHED) from None
    if process.returncode != 0:
        raise typer.Exit(process.returncode if process.returncode > 0 else ExitCode.FAILED)
    return answer
