"""Every route and every scope: who may call it. A route without its row here fails."""

from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from starlette.routing import BaseRoute

from helpers.databases import Databases
from integration.test_api import TOKEN, refusal, serving
from ops_backend.app import create_app
from ops_backend.settings import Settings
from ops_contract.errors import ErrorCode
from ops_contract.tokens import Scope, workers_token
from ops_contract.wire import API_PREFIX

R, O, W, A = Scope.READ, Scope.OPERATE, Scope.WORKER, Scope.ADMIN  # noqa: E741 # columns of a table
ANYBODY: frozenset[Scope | None] = frozenset({None, *Scope})
KNOWN = frozenset(Scope)
READERS = frozenset({R, O, A})
USERS = frozenset({O, A})
ADMINS = frozenset({A})
AGENTS = frozenset({W, A})
NO_TOKEN: frozenset[Scope] = frozenset()  # a worker's own credential alone

ROUTES: dict[str, Iterable[Scope | None]] = {
    "GET /": ANYBODY,
    "GET /dashboard/{release}/{name}": ANYBODY,
    "GET /docs": ANYBODY,
    "GET /openapi.json": ANYBODY,
    "GET /health/live": ANYBODY,
    "GET /health/ready": ANYBODY,
    "GET /schemas/job": ANYBODY,
    "POST /session": ANYBODY,
    "GET /session": KNOWN,
    "DELETE /session": KNOWN,
    "GET /snapshots/{sha256}": KNOWN,
    "GET /metrics": READERS,
    "POST /session/links": READERS,
    "GET /counts": READERS,
    "GET /operations": READERS,
    "GET /operations/{id}": READERS,
    "GET /operations/{id}/artifacts": READERS,
    "GET /operations/{id}/children": READERS,
    "GET /operations/{id}/results": READERS,
    "GET /operations/{id}/artifacts/{artifact_id}": READERS,
    "GET /operations/{id}/attempts": READERS,
    "GET /operations/{id}/checkpoints": READERS,
    "GET /operations/{id}/energy": READERS,
    "GET /operations/{id}/energy/windows": READERS,
    "GET /operations/{id}/events": READERS,
    "GET /operations/{id}/export": READERS,
    "GET /operations/{id}/logs": READERS,
    "GET /operations/{id}/metrics": READERS,
    "GET /operations/{id}/stream": READERS,
    "GET /workers": READERS,
    "GET /workloads": READERS,
    "POST /operations": USERS,
    "DELETE /operations/{id}": USERS,
    "POST /operations/{id}/cancel": USERS,
    "POST /operations/{id}/fork": USERS,
    "POST /operations/{id}/replay": USERS,
    "POST /operations/{id}/resume": USERS,
    "DELETE /operations/{id}/checkpoints/{checkpoint_id}": USERS,
    "HEAD /snapshots/{sha256}": USERS,
    "PUT /snapshots/{sha256}": USERS,
    "GET /audit": ADMINS,
    "POST /cleanup": ADMINS,
    "POST /tokens": ADMINS,
    "GET /tokens": ADMINS,
    "DELETE /tokens/{id}": ADMINS,
    "POST /webhooks": ADMINS,
    "GET /webhooks": ADMINS,
    "GET /webhooks/{id}/deliveries": ADMINS,
    "POST /webhooks/{id}/test": ADMINS,
    "DELETE /webhooks/{id}": ADMINS,
    "POST /workers/{id}/drain": ADMINS,
    "POST /workers/{id}/undrain": ADMINS,
    "POST /workers": AGENTS,
    "POST /workers/{incarnation}/heartbeat": NO_TOKEN,
    "POST /operations/{id}/attempts/{attempt}/energy": NO_TOKEN,
    "POST /operations/{id}/attempts/{attempt}/reports": NO_TOKEN,
}


def walk(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Method and path; a HEAD beside its GET is the same."""
    for route in routes:
        if (router := getattr(route, "original_router", None)) is not None:
            yield from walk(router.routes, prefix + route.include_context.prefix)  # type: ignore[attr-defined]
        else:
            methods: set[str] = route.methods or set()  # type: ignore[attr-defined]
            yield from ((method, prefix + route.path) for method in methods)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def paths() -> dict[str, str]:
    """`METHOD /path` without the prefix, and the path as it is called."""
    settings = Settings(database_url="postgresql://x/y", api_token=TOKEN, storage_root=Path("/"))
    found = set(walk(create_app(settings).routes))
    heads = {("HEAD", path) for method, path in found if method == "GET"}
    alone = found - (heads - {("HEAD", f"{API_PREFIX}/snapshots/{{sha256}}")})
    return {f"{method} {path.removeprefix(API_PREFIX)}": path for method, path in alone}


@pytest.fixture(scope="module")
async def api(databases: Databases) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(await databases.fresh()) as client:
        yield client


async def tokens(api: httpx.AsyncClient) -> dict[Scope | None, str]:
    made = {}
    for scope in Scope:
        answer = await api.post("/tokens", json={"name": f"{scope}-{uuid4()}", "scope": scope})
        made[scope] = str(answer.json()["token"])
    return {None: "", **made}


def test_every_route_has_its_row(paths: dict[str, str]) -> None:
    assert set(paths) == set(ROUTES)


async def test_every_route_takes_the_scopes_of_its_row_and_no_other(
    paths: dict[str, str], api: httpx.AsyncClient
) -> None:
    secrets = await tokens(api)
    wrong = {}
    for row, allowed in ROUTES.items():
        for scope, secret in secrets.items():
            async with httpx.AsyncClient(transport=api._transport) as stranger:  # no cookie of the call before
                answer = await call(stranger, row.partition(" ")[0], paths[row], secret)
            said = {401: "who?", 403: "no"}.get(answer.status_code, "yes")
            want = "yes" if scope in allowed else "no" if scope else "who?"
            if row == "POST /session":  # it asks for a secret of its own, which `{}` has not
                want = "yes"
            if said != want or answer.status_code >= 500:
                wrong[row, scope] = (answer.status_code, want)
    assert wrong == {}
    assert refusal(await api.get("/tokens", headers=bearer(secrets[R]))) == (403, ErrorCode.FORBIDDEN)


async def call(api: httpx.AsyncClient, method: str, path: str, secret: str) -> httpx.Response:
    """With nothing behind its names, so that an allowed call finds nothing, or nothing to do."""
    names: dict[str, Any] = {"sha256": "0" * 64, "attempt": 1, "release": "r", "name": "n"}
    ids = dict.fromkeys(("id", "artifact_id", "checkpoint_id", "incarnation"), uuid4())
    url = f"http://test{path.format(**names | ids)}"
    body = {"json": {}} if method == "POST" else {}
    return await api.request(method, url, headers=bearer(secret), **body)


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}" if secret else ""}


# ---- what a token is worth, and until when


async def test_the_services_own_token_for_workers_registers_and_does_nothing_else(api: httpx.AsyncClient) -> None:
    own = bearer(workers_token(TOKEN))

    assert (await api.post("/workers", json={}, headers=own)).status_code == 422
    assert (await api.get("/operations", headers=own)).status_code == 403
    assert (await api.post("/tokens", json={"name": "a", "scope": "admin"}, headers=own)).status_code == 403
