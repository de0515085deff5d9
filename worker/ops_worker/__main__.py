"""`python -m ops_worker`: one agent in the foreground, ready when it says so."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from uuid import UUID, uuid4

import uvicorn

from ops_contract.log_lines import LogFormatError, log_formatter
from ops_worker.agent import Agent
from ops_worker.confinement import clean_environment, confine_agent
from ops_worker.describe import DescribeError
from ops_worker.energy.devices import open_devices
from ops_worker.rendezvous import listen, listeners
from ops_worker.routes import create_app, server_config
from ops_worker.settings import Settings, SettingsError
from relight.interpreter import InterpreterError, checked_interpreter
from relight.private import make_private

# -P: what lies in the agent's working directory is none of the trainer's business.
TRAINER = ("-P", "-m", "ops_worker.trainer")


def main(trainer_command: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args()
    confine_agent()
    try:
        settings = Settings.from_env(os.environ | ({"OPS_WORKER_PYTHON": arguments.python} if arguments.python else {}))
        if trainer_command is None:
            python = os.path.expanduser(settings.worker_python or sys.executable)
            trainer_command = (checked_interpreter(python, clean_environment(os.environ)), *TRAINER)
        _log_to_stderr(settings.worker_name)
    except (SettingsError, InterpreterError, LogFormatError) as error:
        print(f"ops worker: {error}", file=sys.stderr)
        return 2
    code = 0
    try:
        asyncio.run(serve(settings, trainer_command, arguments.json, arguments.exit_on_eof))
    except* (DescribeError, OSError, SettingsError) as errors:
        for problem in errors.exceptions:
            print(f"ops worker: {problem}", file=sys.stderr)
        code = 2 if errors.subgroup(SettingsError) else 1
    return code


async def serve(settings: Settings, trainer_command: Sequence[str], as_json: bool, exit_on_eof: bool) -> None:
    """Until SIGTERM, ctrl-C or (with `exit_on_eof`) the end of stdin; a second signal makes it hurry."""
    make_private(settings.worker_state_dir)
    address, port = settings.worker_bind, settings.worker_port
    with (
        open_devices(settings, os.environ) as devices,
        listen(address, port, 128, f"{address}:{port}") as listener,
        listeners(address, len(devices.offers())) as sockets,
    ):
        incarnation = uuid4()
        agent = Agent(settings, devices, sockets, incarnation, _url(settings, listener), trainer_command)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.stop)
        if exit_on_eof:
            threading.Thread(target=_stop_at_eof, daemon=True).start()
        server = _Server(server_config(create_app(agent)))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            await agent.run(lambda: _announce(agent.url, incarnation, as_json))
        finally:
            server.should_exit = True
            await serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the agent's: its routes answer until everything is handed back."""
        yield


def _url(settings: Settings, listener: socket.socket) -> str:
    host = f"[{settings.worker_bind}]" if ":" in settings.worker_bind else settings.worker_bind
    return settings.worker_url or f"http://{host}:{listener.getsockname()[1]}"


def _announce(url: str, incarnation: UUID, as_json: bool) -> None:
    ready = {"event": "ready", "url": url, "incarnation": str(incarnation)}
    print(json.dumps(ready) if as_json else f"Worker {incarnation} ready at {url}", flush=True)


def _stop_at_eof() -> None:
    """The supervisor holds the other end of stdin: its death, however sudden, ends this process in order."""
    # Not sys.stdin: its lock, held by a daemon thread, would abort the interpreter's exit.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _log_to_stderr(worker: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(log_formatter(os.environ, worker=worker))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ops worker", description="One worker; OPS_* variables set it up.")
    parser.add_argument("--json", action="store_true", help="say ready as one line of JSON on stdout")
    parser.add_argument("--python", metavar="PATH", help="the Python in which trainers run; else OPS_WORKER_PYTHON")
    parser.add_argument("--exit-on-eof", action="store_true", help="stop when stdin ends")
    return parser


if __name__ == "__main__":
    sys.exit(main())
