"""`ops service`: a systemd unit of this user, so that `ops up` is there after a reboot, and what ran goes on."""

import getpass
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ops_cli.exits import ExitCode
from relight.private import make_private, opener
from relight.settings import config_path, data_home

NAME = "relight.service"
SPARE_S = 10.0
# What `ops up` would find in the shell that installs it, and systemd would not give it.
PASSED_ON = ("PATH", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")

commands = typer.Typer(no_args_is_help=True, help="Start at boot: a systemd unit of this user.")


def register(app: typer.Typer) -> None:
    commands.command()(install)
    commands.command()(uninstall)
    commands.command()(status)
    app.add_typer(commands, name="service")


def install(
    data_dir: Annotated[Path | None, typer.Option(help="Else $XDG_DATA_HOME/relight.")] = None,
    host: Annotated[str, typer.Option(envvar="OPS_HOST", help="Where the API listens.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(envvar="OPS_PORT", min=1, max=65535, help="Else as `ops up`.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="They divide the cores.")] = 1,
    python: Annotated[
        str | None, typer.Option(envvar="OPS_WORKER_PYTHON", metavar="PATH", help="Where trainings run.")
    ] = None,
) -> None:
    """Write the unit, start it, and have it started at boot.

    PATH and the OPS_* variables of this shell are kept in a file beside config.toml, which is yours to change.
    """
    from ops_cli.stack import stop_limit_s
    from ops_cli.up import HAND_BACK_S, UpError, arguments, cancel_grace_s

    data_dir = (data_dir or data_home()).expanduser().resolve()
    try:
        stop_s = stop_limit_s(cancel_grace_s() + HAND_BACK_S) + SPARE_S
    except UpError as error:
        typer.echo(f"ops service: {error}", err=True)
        raise typer.Exit(ExitCode.USAGE) from error
    # The unit has another working directory; a link of a virtual environment is not followed.
    python = os.path.abspath(os.path.expanduser(python)) if python else None
    environment = config_path().with_name("environment")
    command = [sys.executable, "-P", "-m", "ops_cli", "up", *arguments(data_dir, host, port, workers, python)]
    text = unit(command, environment, stop_s)
    make_private(unit_path().parent)
    # Whoever may write it may run what they like.
    with open(unit_path(), "w", opener=opener) as file:
        file.write(text)
    print(f"{unit_path()} is written.")
    if environment.exists():
        print(f"{environment} has its variables; it was there and stays as it is.")
    else:
        make_private(environment.parent)
        with open(environment, "x", opener=opener) as file:
            file.write(environment_file(os.environ))
        print(f"{environment} has its variables: PATH and OPS_* of this shell.")
    _start(data_dir)


def uninstall() -> None:
    """Stop it and remove the unit. Data and settings stay."""
    if not unit_path().exists():
        print("There is no unit.")
        return
    if systemd_runs():
        _systemctl("disable", "--now", NAME)
    unit_path().unlink()
    if systemd_runs():
        _systemctl("daemon-reload")
    print(f"{unit_path()} is gone; the data are where they were.")


def status() -> None:
    """Say whether it is installed, runs, and starts at boot. Exits with 1 unless it runs."""
    if not unit_path().exists():
        print("It is not installed: `ops service install`.")
        raise typer.Exit(ExitCode.FAILED)
    print(f"unit      {unit_path()}")
    if not systemd_runs():
        print("systemd   does not run for this user here")
        raise typer.Exit(ExitCode.FAILED)
    state = _ask("is-active", NAME)
    print(f"state     {state}, {_ask('is-enabled', NAME)}")
    print(f"at boot   {'yes' if lingers() else f'only when you log in: {_linger()}'}")
    print(f"log       journalctl --user -u {NAME}")
    if state != "active":
        raise typer.Exit(ExitCode.FAILED)


def _start(data_dir: Path) -> None:
    from ops_cli.holder import find_holder

    if not systemd_runs():
        print("systemd does not run for this user here. Where it does:")
        print(f"  systemctl --user daemon-reload && systemctl --user enable --now {NAME}")
        print(f"  {_linger()}        # so that it starts at boot, before anybody logs in")
        return
    _systemctl("daemon-reload")
    _systemctl("enable", NAME)
    if find_holder(data_dir) is not None and _ask("is-active", NAME) != "active":
        print(f"Another `ops up` runs on {data_dir}. Now: ops down && systemctl --user start {NAME}")
    else:
        # It waits until the service is ready.
        _systemctl("restart", NAME)
        print(f"It runs. Its log: journalctl --user -u {NAME}")
    if not lingers():
        print(f"To have it started at boot, before you log in: {_linger()}")


def unit_path(environ: Mapping[str, str] = os.environ) -> Path:
    return config_path(environ).parents[1] / "systemd" / "user" / NAME


def unit(command: Sequence[str], environment: Path, stop_s: float) -> str:
    return f"""\
[Unit]
Description=Relight: training that survives
Documentation=man:systemd.service(5)
After=network.target

[Service]
# `ops up` says when it is ready, however long the database takes to recover.
Type=notify
TimeoutStartSec=infinity
ExecStart={exec_line(command)}
EnvironmentFile=-{_escaped(str(environment))}
# `ops down` and `systemctl stop` end it for good, a crash does not.
Restart=on-failure
RestartSec=10
# SIGTERM for `ops up` alone: it ends its parts in order, and trainings save a checkpoint first.
KillMode=mixed
TimeoutStopSec={stop_s:.0f}

[Install]
WantedBy=default.target
"""


def exec_line(command: Sequence[str]) -> str:
    """As systemd splits it: quoted, without its specifiers and variables. The program's own path takes no variables."""
    program, *arguments = command
    if set(program) & set("\"'\\"):
        raise typer.BadParameter(f"systemd runs no program with quotes in its path, and {program} is one")
    return " ".join([_quoted(program), *(_quoted(argument).replace("$", "$$") for argument in arguments)])


def environment_file(environ: Mapping[str, str]) -> str:
    """Of what a service would not have by itself. It may hold a token, and secrets of jobs."""
    kept = {name: value for name, value in environ.items() if name in PASSED_ON or name.startswith("OPS_")}
    lines = [f"{name}={_shell_quoted(value)}" for name, value in sorted(kept.items()) if "\n" not in value]
    return "\n".join(
        ["# Read by the unit of `ops service`; systemctl --user restart relight takes changes up.", *lines, ""]
    )


def _quoted(argument: str) -> str:
    if any(ord(character) < 32 for character in argument):
        raise typer.BadParameter(f"{argument!r} has characters that a systemd unit cannot hold")
    return '"' + _escaped(argument).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _shell_quoted(value: str) -> str:
    for character in '\\"`$':
        value = value.replace(character, f"\\{character}")
    return f'"{value}"'


def systemd_runs() -> bool:
    """For this user; not so in most containers, and in a shell of `su`."""
    return shutil.which("systemctl") is not None and _ask("is-system-running") in ("running", "degraded", "starting")


def lingers() -> bool:
    if shutil.which("loginctl") is None:
        return False
    asked = ["loginctl", "show-user", getpass.getuser(), "--property=Linger", "--value"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() == "yes"


def _linger() -> str:
    return f"loginctl enable-linger {shlex.quote(getpass.getuser())}"


def _ask(*arguments: str) -> str:
    asked = subprocess.run(["systemctl", "--user", *arguments], capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def _systemctl(*arguments: str) -> None:
    done = subprocess.run(["systemctl", "--user", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        typer.echo(f"ops service: systemctl --user {' '.join(arguments)}: {done.stderr.strip()}", err=True)
        typer.echo(f"  journalctl --user -u {NAME} may say more", err=True)
        raise typer.Exit(ExitCode.FAILED)
