"""`ops doctor`: is all in order, and if not, what to do. A part that is down hides no other."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json, Token, Url
from ops_cli.exits import ExitCode

if TYPE_CHECKING:
    import httpx

    from ops_contract.doctor import Finding
    from ops_contract.workers import WorkerView
    from relight.settings import Server

TIMEOUT_S = 5.0
BACKEND_TIMEOUT_S = 90.0  # its start takes seconds on a busy host, and workers may let it wait for half a minute
STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    data_dir: Annotated[Path | None, typer.Option(help="Of `ops up`; else that of the last one.")] = None,
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Is all in order, and if not, what to do.

    Looks at database, storage, API, workers, clocks and drivers. Works with the service down. Exits with 1 when
    something fails.
    """
    findings = list(examine(data_dir, url, token))
    if json:
        print(show.json_array(findings))
    else:
        for finding in findings:
            state = f"[{STYLES[finding.state]}]{finding.state:4}[/]"
            advice = f"\n     → {show.plain(finding.advice)}" if finding.advice else ""
            show.print_rich(f"{state} {finding.check}: {show.plain(finding.message)}{advice}")
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


def examine(data_dir: Path | None, url: str | None, token: str | None) -> "Iterator[Finding]":
    from ops_contract.doctor import fail
    from relight.settings import SettingsError, find_server, read_up_state

    yield from _here()
    server = None
    try:
        server = find_server(url, token)
    except SettingsError as error:
        yield fail("settings", str(error), "correct it")
    state = read_up_state()
    is_ours = state is not None and (server is None or server.url == state.url)
    if data_dir is None and is_ours and state is not None:
        data_dir = Path(state.data_dir)
    yield from _backend(data_dir, os.environ)
    yield from _service(server)


def _here() -> "Iterator[Finding]":
    """What is installed on this host."""
    from importlib.metadata import PackageNotFoundError, version

    from ops_contract.doctor import ok, warn

    yield ok("relight", f"{version('relight')} on Python {platform.python_version()}")
    try:
        yield ok("torch", version("torch"))
    except PackageNotFoundError:
        yield warn("torch", "not installed in this environment", "workers need it: pip install 'relight[worker]'")
    if shutil.which("nvidia-smi") is None:
        yield ok("driver", "no nvidia-smi: workers of this host train on the CPU, or on Apple's GPU")
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_S * 4)
        problem, found = asked.returncode != 0, "; ".join((asked.stdout + asked.stderr).splitlines())
    except (OSError, subprocess.TimeoutExpired) as error:
        problem, found = True, str(error)
    broken = warn("driver", f"nvidia-smi fails: {found}", "reload or reinstall the driver; a reboot often does")
    yield broken if problem else ok("driver", found)


def _backend(data_dir: Path | None, environ: Mapping[str, str]) -> "Iterator[Finding]":
    """Database and storage, where this host has to do with them."""
    from ops_contract.doctor import Findings, fail, ok

    if data_dir is None and not {"OPS_DATABASE_URL", "OPS_STORAGE_ROOT"} & environ.keys():
        what = "not looked at: no `ops up` runs here, and neither OPS_DATABASE_URL nor OPS_STORAGE_ROOT is set"
        yield ok("database and storage", what)
        return
    if importlib.util.find_spec("sqlalchemy") is None:
        yield ok("database and storage", "not looked at: relight[backend] is not installed here")
        return
    place = ["--data-dir", str(data_dir)] if data_dir else []
    command = [sys.executable, "-P", "-m", "ops_backend", "doctor", "--json", *place]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=BACKEND_TIMEOUT_S)
        yield from Findings.model_validate_json(asked.stdout).items
    except subprocess.TimeoutExpired:
        yield fail("database and storage", f"no answer in {BACKEND_TIMEOUT_S:g} s", "a disk or mount hangs: look at it")
    except ValueError:
        yield fail("database and storage", asked.stderr.strip()[-500:], "python -m ops_backend doctor says more")


def _service(server: "Server | None") -> "Iterator[Finding]":
    import httpx

    from ops_contract.doctor import fail, warn
    from ops_contract.errors import OpsError
    from relight.client import Client
    from relight.transport import is_loopback

    if server is None:
        yield warn("API", "no server is known", "start `ops up`, or name one by --url or OPS_API_URL")
        return
    try:
        answer = httpx.get(
            f"{server.url}/health/ready",
            timeout=TIMEOUT_S,
            verify=httpx.create_ssl_context(),  # heeds SSL_CERT_FILE
            trust_env=not is_loopback(server.url),
        )
    except httpx.HTTPError as error:
        yield fail("API", f"{server.url} ({server.origin}) does not answer: {error}", "start it: `ops up`")
        return
    yield from _api(server, answer)
    try:
        with Client(server.url, server.token, timeout_s=TIMEOUT_S) as client:
            workers = [worker for worker in client.workers() if worker.live]
    except OpsError as error:
        yield fail("workers", error.message, "is the token right (--token, OPS_API_TOKEN), and the database up?")
        return
    if not workers:
        yield warn("workers", "none is live: nothing will be trained", "start one: `ops worker`, or `ops up`")
    for worker in workers:
        yield from _worker(worker)


def _api(server: "Server", answer: "httpx.Response") -> "Iterator[Finding]":
    from importlib.metadata import version

    from ops_contract.doctor import fail, ok, warn

    if answer.status_code != 200:
        yield fail("API", f"{server.url} answers {answer.status_code}: {answer.text[:200]}", "see the database above")
        return
    is_json = answer.headers.get("Content-Type", "").startswith("application/json")
    theirs, ours = answer.json().get("version") if is_json else "unknown", version("relight")
    if theirs == ours:
        yield ok("API", f"{server.url} is ready")
    else:
        found = f"{server.url} is ready, with version {theirs}; this is {ours}"
        yield warn("API", found, "install the same version on both sides")
    yield from _clock("clock of the API", answer)


def _worker(worker: "WorkerView") -> "Iterator[Finding]":
    from importlib.metadata import version

    import httpx

    from ops_contract.doctor import ok, warn

    check, theirs = f"worker {worker.name}", worker.versions.get("relight")
    if theirs != version("relight"):
        found = f"version {theirs}; this is {version('relight')}"
        yield warn(check, found, "install the same version there, and restart it: it hands its trainings back")
    else:
        draining = ", draining" if worker.draining else ""
        torch = f"torch {worker.versions.get('torch', 'missing')}"
        counts = Counter(slot.device for slot in worker.slots)
        slots = " and ".join(f"{count} {device}" for device, count in sorted(counts.items(), reverse=True))
        slots += " slot" if len(worker.slots) == 1 else " slots"
        yield ok(check, f"live on {worker.host}, {slots}, {torch}{draining}")
        yield from _gpus(check, worker)
    try:
        answer = httpx.get(f"{worker.url}/health", timeout=TIMEOUT_S, trust_env=False)
    except httpx.HTTPError:
        yield ok(f"clock of {check}", f"not compared: {worker.url} cannot be reached from this host")
        return
    yield from _clock(f"clock of {check}", answer)


def _gpus(check: str, worker: "WorkerView") -> "Iterator[Finding]":
    from ops_contract.doctor import ok, warn

    uuids = [slot.device_uuid or slot.device for slot in worker.slots if slot.device != "cpu"]
    if not uuids:
        return
    if worker.versions.get("torch", "").endswith("+cpu"):
        advice = "install a torch with CUDA in the environment of the trainers, or set OPS_GPUS=none"
        yield warn(f"GPUs of {check}", f"{', '.join(uuids)}, but its torch has no CUDA", advice)
    else:
        yield ok(f"GPUs of {check}", ", ".join(uuids))


def _clock(check: str, answer: "httpx.Response") -> "Iterator[Finding]":
    from email.utils import parsedate_to_datetime

    from ops_contract.doctor import clock

    if "Date" in answer.headers:
        yield clock(check, parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time())
