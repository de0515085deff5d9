"""What benchmarks over HTTP measure, as processes: our API as `ops server` runs it, and MLflow's tracking server.

Both have the same embedded Postgres, which is one too, each a database of its own.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import peers
from filling import connect
from sqlalchemy import make_url

MLFLOW = ("mlflow==3.17.2", "psycopg2-binary==2.9.13")
READY_S = 120.0  # four processes that import MLflow, on a busy machine
# Its group ends with our end of its stdin, however we end.
GUARDED = ("sh", "-c", '"$@" & read -r _; kill 0', "sh")


@dataclass(frozen=True)
class Api:
    port: int
    token: str
    pid: int


@contextmanager
def postgres(directory: Path) -> Iterator[tuple[str, int]]:
    """As `ops up` runs it."""
    command = [sys.executable, "-m", "ops_backend", "db", "--data-dir", str(directory), "--json", "--exit-on-eof"]
    with (
        (directory / "db.log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        yield said["url"], said["pid"]
        process.communicate()


@contextmanager
def ours(url: str, directory: Path, **settings: str) -> Iterator[Api]:
    """Our API, once it answers."""
    storage, token = directory / "files", secrets.token_hex(16)
    storage.mkdir(exist_ok=True)
    environ = os.environ | {"OPS_DATABASE_URL": url, "OPS_API_TOKEN": token, "OPS_PORT": "0"}
    environ |= {"OPS_STORAGE_ROOT": str(storage)} | settings
    command = [sys.executable, "-m", "ops_backend", "server", "--json", "--exit-on-eof"]
    with process(command, directory / "server.log", environ) as server:
        yield Api(int(said(server)["url"].rpartition(":")[2]), token, server.pid)


@contextmanager
def mlflow(url: str, directory: Path) -> Iterator[str]:
    """The address of MLflow's tracking server with its defaults, once it answers."""
    python, port = peers.python_of("mlflow", *MLFLOW), free_port()
    store = make_url(url).set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)
    environ = os.environ | {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [*GUARDED, str(python), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    address, until_s = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
    with process(command, directory / "mlflow.log", environ, directory):
        while not answers(f"{address}/health"):
            if time.monotonic() > until_s:
                raise RuntimeError((directory / "mlflow.log").read_text()[-3000:])
            time.sleep(0.2)
        yield address


async def mlflow_runs(address: str, number: int) -> list[str]:
    """The ids of so many new runs, each with a metric."""
    ids = []
    async with httpx.AsyncClient(base_url=f"{address}/api/2.0/mlflow", timeout=60, trust_env=False) as http:
        for _ in range(number):
            run = await mlflow_post(http, "/runs/create", {"experiment_id": "0"})
            ids.append(run["run"]["info"]["run_id"])
            metric = {"run_id": ids[-1], "key": "loss", "value": 0.5, "step": 1, "timestamp": 1}
            await mlflow_post(http, "/runs/log-metric", metric)
    return ids


async def mlflow_post(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Again where it hung up: uvicorn ends processes that a busy machine keeps from answering for five seconds."""
    while True:
        try:
            answer: dict[str, Any] = (await http.post(path, json=body)).raise_for_status().json()
        except httpx.RemoteProtocolError:
            continue
        return answer


@contextmanager
def process(
    command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Ended at the end of its stdin, or with its whole group."""
    with log.open("ab") as file:
        running = subprocess.Popen(
            command,
            env=environ,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    try:
        yield running
    finally:
        try:
            running.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()


def said(running: subprocess.Popen[str]) -> dict[str, Any]:
    """Its next line."""
    assert running.stdout is not None
    line = running.stdout.readline()
    if not line:
        raise RuntimeError(f"{running.args} has ended before it said anything")
    answer: dict[str, Any] = json.loads(line)
    return answer


def end_in_order() -> None:
    """A SIGTERM ends what we have started too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


async def database(url: str, name: str) -> str:
    """The URL of a new database on the same Postgres."""
    connection = await connect(url)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def answers(address: str) -> bool:
    try:
        return httpx.get(address, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
