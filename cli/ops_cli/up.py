"""`ops up`: the whole service in the foreground, or with -d behind it; one per data directory."""

import errno
import os
import random
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli.exits import ExitCode
from ops_cli.holder import Lock, Taken, only_one, unusable
from ops_cli.stopping import StopRequested, StopRequests
from relight.settings import UpState, data_home, forget_up_state, read_up_state, write_up_state

if TYPE_CHECKING:
    from ops_cli.stack import StackSettings

DEFAULT_PORT = 8470
PREDECESSOR_ENDS_S = 15.0
HAND_BACK_S = 10.0


class UpError(Exception):
    """`ops up` cannot start; the message says what to do."""


def register(app: typer.Typer) -> None:
    app.command()(up)


def up(
    data_dir: Annotated[Path | None, typer.Option(help="Else $XDG_DATA_HOME/relight.")] = None,
    host: Annotated[str, typer.Option(envvar="OPS_HOST", help="Where the API listens.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(envvar="OPS_PORT", min=1, max=65535, help=f"Else {DEFAULT_PORT}, or a free one.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="They divide the cores.")] = 1,
    python: Annotated[
        str | None,
        typer.Option(
            envvar="OPS_WORKER_PYTHON",
            metavar="PATH",
            help="Where trainings run: a Python with torch and relight.",
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="In the background; `ops down` ends it.")] = False,
) -> None:
    """Start database, API and workers.

    Ctrl-C or `ops down` ends them; running trainings save a checkpoint first, and go on at the next start.
    """
    from ops_cli.stack import StackError
    from relight.interpreter import InterpreterError, checked_interpreter

    data_dir = (data_dir or data_home()).expanduser().resolve()
    if os.environ.get("OPS_TLS_CERT"):
        print("ops up: OPS_TLS_CERT is for `ops server`; put a proxy with TLS in front of `ops up`", file=sys.stderr)
        raise typer.Exit(ExitCode.USAGE)
    if detach:
        _detach(data_dir, host, port, arguments(data_dir, host, port, workers, python))
        return
    try:
        with StopRequests() as stops, only_one(data_dir, "ops up") as lock:
            if python:
                os.environ["OPS_WORKER_PYTHON"] = checked_interpreter(os.path.expanduser(python), os.environ)
            _serve(_settings(data_dir, host, port, workers, lock, stops), lock, stops)
    except StopRequested:
        pass  # before anything ran
    except Taken as error:
        print(f"ops up: {error}", file=sys.stderr)
        raise typer.Exit(ExitCode.CONFLICT) from error
    except (UpError, StackError, InterpreterError, OSError) as error:
        print(f"ops up: {unusable(data_dir, error) if isinstance(error, OSError) else error}", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED) from error


def arguments(data_dir: Path, host: str, port: int | None, workers: int, python: str | None) -> list[str]:
    """For another process that is to start the same."""
    given = {"--data-dir": data_dir, "--host": host, "--port": port, "--workers": workers, "--python": python}
    return [text for name, value in given.items() if value is not None for text in (name, str(value))]


def last_data_dir() -> Path:
    """That of the last `ops up`, which may run or not; else the one that it takes unless told otherwise."""
    state = read_up_state()
    return Path(state.data_dir) if state else data_home()


def _detach(data_dir: Path, host: str, port: int | None, given: list[str]) -> None:
    from ops_cli.background import start

    found = start(data_dir, given, port)
    token = os.environ.get("OPS_API_TOKEN") or kept_token(data_dir)
    _say(_welcome(str(found.url), token, host, data_dir, link=True))
    _say(f"`ops down` stops it (pid {found.pid}); its log is {data_dir / 'logs' / 'up.log'}")


def _settings(
    data_dir: Path, host: str, port: int | None, workers: int, lock: "Lock", stops: StopRequests
) -> "StackSettings":
    from ops_cli.stack import StackSettings

    return StackSettings(
        data_dir=data_dir,
        token=os.environ.get("OPS_API_TOKEN") or kept_token(data_dir),
        host=host,
        port=choose_port(host, port, lock.previous_port, stops.pause),
        workers=workers,
        cores=max(1, _cores() // workers),
        worker_grace_s=cancel_grace_s() + HAND_BACK_S,
        database_url=os.environ.get("OPS_DATABASE_URL"),
    )


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cancel_grace_s() -> float:
    given = os.environ.get("OPS_CANCEL_GRACE_S") or "30"
    try:
        return float(given)
    except ValueError:
        raise UpError(f"OPS_CANCEL_GRACE_S is {given!r}; give a number of seconds") from None


def _serve(settings: "StackSettings", lock: "Lock", stops: StopRequests) -> None:
    from ops_cli.stack import Stack, stop_limit_s
    from ops_contract.backup import RESTORING

    if (settings.data_dir / "storage" / RESTORING).exists():
        raise UpError(f"a restore into {settings.data_dir} did not finish: do it again (`ops restore`)")
    stack = Stack(settings, stops.pause, _say, _complain)
    _say(f"Starting Relight, data in {settings.data_dir}")
    try:
        facts = {"url": settings.url, "port": settings.port, "by_systemd": "NOTIFY_SOCKET" in os.environ}
        lock.note(**facts)
        stack.start()
        write_up_state(UpState(settings.url, settings.token, str(settings.data_dir), os.getpid()))
        lock.note(**facts, ready=True)
        tell_systemd("READY=1")
        # Who reads a log or a journal, maybe somebody else, gets no link that logs in.
        link = sys.stdout.isatty()
        _say(_welcome(settings.url, settings.token, settings.host, settings.data_dir, link))
        _say("Ctrl-C stops it.")
        while True:
            stops.pause()
            stack.turn()
    except StopRequested:
        _say("Stopping; running trainings save a checkpoint first and go on next time.\nCtrl-C again is faster.")
    finally:
        limit_us = round(stop_limit_s(settings.worker_grace_s) * 1e6)
        tell_systemd(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={limit_us}")
        forget_up_state(os.getpid())
        stack.stop(lambda: stops.hurried)
        lock.forget()
    _say("Stopped.")


def _welcome(url: str, token: str, host: str, data_dir: Path, link: bool) -> str:
    lines = [f"Relight is up: {url}"]
    if host not in ("127.0.0.1", "localhost"):
        lines.append(f"Other machines reach it too, with the token in {data_dir / 'token'}")
    if link:
        lines.append("In a browser, once and within an hour (`ops dashboard` makes another link):")
        lines.append(f"  {_dashboard_link(url, token)}")
    lines += ["In another terminal:", "  ops train digits --watch", "  ops list"]
    return "\n".join(lines)


def _dashboard_link(url: str, token: str) -> str:
    from ops_contract.errors import OpsError
    from relight.client import Client

    try:
        with Client(url, token) as client:
            return client.dashboard_link()
    except OpsError as error:  # it may be on its way back
        return f"none now: {error.message}"


def kept_token(data_dir: Path) -> str:
    """Made once for a data directory, readable by its owner only."""
    path = data_dir / "token"
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    token, new = secrets.token_urlsafe(32), path.with_name(".token.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    new.replace(path)  # complete or absent, should we be killed here
    return token


def choose_port(host: str, wanted: int | None, previous: int | None, pause: Callable[[float], None]) -> int:
    """The wanted or the default one. The default, when busy, gives way to a free one. Raises UpError.

    `previous` is that of a predecessor that was killed: its server notices and ends within moments.
    """
    port = wanted or DEFAULT_PORT
    until_s = time.monotonic() + (PREDECESSOR_ENDS_S if port == previous else 0.0)
    while not _free(host, port):
        if time.monotonic() < until_s:
            pause(0.1)
            continue
        if wanted:
            raise UpError(f"port {port} on {host} is busy; choose another --port, or leave it out for a free one")
        port = free_port(host)
        _say(f"Port {DEFAULT_PORT} is busy; taking {port}")
    return port


def free_port(host: str = "127.0.0.1") -> int:
    """Below those that the kernel gives to any connection: a server that is restarted finds it free again."""
    ports = random.SystemRandom().sample(range(10_000, 30_000), 1000)
    return next(port for port in ports if _free(host, port))


def _free(host: str, port: int) -> bool:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise UpError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
    return True


def tell_systemd(state: str) -> None:
    """`sd_notify`, where a unit of `Type=notify` runs us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def _say(line: str) -> None:
    with suppress(OSError):  # a terminal that was closed must not keep us from stopping in order
        print(line, flush=True)


def _complain(line: str) -> None:
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
