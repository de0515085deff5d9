"""What a service logs tells no secret, and no request writes a line of its own, whatever fails."""

import os
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from helpers.service import Service, eventually, running_service
from integration.test_schemathesis import WORKER

FORGED = "2026-01-01 00:00:00,000 INFO ops_backend.auth: all is well"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \S+: |    |(Worker|API) ")


@pytest.mark.slow
def test_no_secret_is_in_any_log_and_no_line_is_forged(database_url: str, tmp_path: Path) -> None:
    with running_service(tmp_path, database_url, workers=1) as service:
        secrets = used(service)
        fail(service)
        logs = {path.name: path.read_text() for path in tmp_path.rglob("*.log")}

    assert {"server.log", "worker-1.log"} <= set(logs)
    for what, secret in secrets.items():
        assert not [name for name, text in logs.items() if secret in text], what
    for text in logs.values():
        lines = text.splitlines()
        assert all(LINE.match(line) and line.isprintable() for line in lines), lines


def used(service: Service) -> dict[str, str]:
    """Every secret that there is, each used in the ways that succeed and fail."""
    with httpx.Client(base_url=f"{service.url}/api/v1", trust_env=False) as plain:
        return _used(service, service.http, plain)


def _used(service: Service, http: httpx.Client, plain: httpx.Client) -> dict[str, str]:
    wrong, code = f"wrong-{uuid4()}", http.post("/session/links").json()["code"]
    plain.post("/session", json={"code": code}).raise_for_status()
    cookie = next(iter(plain.cookies.values()))
    plain.get("/operations", headers={"Sec-Fetch-Site": "same-origin"}).raise_for_status()
    for ask in ({"Authorization": f"Bearer {wrong}"}, {"Authorization": f"Basic {wrong}"}, {"X-Api-Key": wrong}):
        assert plain.get("/operations", headers=ask | {"Cookie": ""}).status_code == 401
    plain.post("/session", json={"token": wrong})
    plain.post("/session", json={"code": wrong, "surplus": wrong})
    token = http.post("/tokens", json={"name": "a", "scope": "operate"}).json()["token"]
    plain.get("/operations", headers={"Authorization": f"Bearer {token}", "Cookie": ""}).raise_for_status()
    path = f"/hook-{uuid4()}"
    hook = http.post("/webhooks", json={"url": f"http://127.0.0.1:9{path}"}).json()
    http.post(f"/webhooks/{hook['id']}/test")
    worker = WORKER | {"secret": f"worker-{uuid4()}-{uuid4()}"}
    http.post("/workers", json=worker).raise_for_status()
    return {
        "the token": service.token,
        "a wrong token": wrong,
        "a made token": token,
        "a login's code": code,
        "a cookie": cookie,
        "a webhook's secret": hook["secret"],
        "a webhook's address": path,
        "a worker's secret": str(worker["secret"]),
        "a worker's credential": str(worker["credential"]),
    }


def fail(service: Service) -> None:
    """What is logged with the words of others: a worker that cannot be reached, a webhook, an ended operation."""
    job = {"workload": "toy", "execution": {"accelerator": "cuda"}}
    id = service.http.post("/operations", json=job).raise_for_status().json()["id"]
    eventually(lambda: "refused" in service.server.log.read_text() or None, "the dispatch fails", service.logs)
    service.http.post(f"/operations/{id}/cancel", json={"reason": f"\x1b[2K\n{FORGED}"}).raise_for_status()
    service.http.get(f"/operations/{id}%0A{FORGED}")
    service.http.get("/nowhere", headers={"User-Agent": f"\x9b{FORGED}".encode("latin-1")})


@pytest.mark.parametrize("address", ["127.0.0.1:1/x", "127.0.0.1:port/x", "/x@h/x"])
def test_a_database_that_is_not_there_is_told_without_its_password(tmp_path: Path, address: str) -> None:
    password = "pa55-of-the-database"
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OPS_")}
    environ |= {"OPS_DATABASE_URL": f"postgresql://relight:{password}@{address}", "OPS_API_TOKEN": "x" * 16}
    environ |= {"OPS_STORAGE_ROOT": str(tmp_path)}
    command = [sys.executable, "-m", "ops_backend", "server"]
    result = subprocess.run(command, env=environ, capture_output=True, text=True)

    assert result.returncode in (1, 2)
    assert "OPS_DATABASE_URL" in result.stderr
    assert password not in result.stdout + result.stderr
