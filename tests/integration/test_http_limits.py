"""What is too large, or is no request of ours, is refused in the one shape, and costs no memory."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import httpx
import psutil
import pytest
import uvicorn

from helpers.databases import Databases
from helpers.openapi import openapi_of_this_code
from helpers.service import Service
from helpers.store import shown_by
from integration.test_api import MISSING, refusal, serving
from integration.test_schemathesis import INCARNATION, WORKER
from ops_backend.app import MAX_BODY_BYTES
from ops_contract.errors import ErrorBody
from ops_contract.http_gate import MAX_HEAD_BYTES
from ops_worker import routes as worker_routes

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def service(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The API as a process, on a database of its own."""
    directory = tmp_path_factory.mktemp("service")
    service = Service(directory, asyncio.run(Databases(postgres_url).fresh()))
    service.storage.mkdir()
    try:
        service.start(workers=0)
        yield service
    finally:
        service.stop()


class Wire:
    """A connection, byte by byte."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=60)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def pour(self, size_bytes: int) -> int:
        """How much of it the other side takes."""
        block, sent = b" " * 2**20, 0
        try:
            while sent < size_bytes:
                sent += self._socket.send(block[: size_bytes - sent])
        except OSError:
            pass
        return sent

    def receive(self) -> bytes:
        try:
            return self._socket.recv(65536)
        except ConnectionResetError:
            return b""

    def answer(self) -> tuple[int, str, bool]:
        """Status, code of the error, and whether the connection was closed after it."""
        received = b""
        while True:
            data = self.receive()
            received += data
            head, end, body = received.partition(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            if end and length and len(body) >= int(length[0].partition(b":")[2]):
                code = ErrorBody.model_validate_json(body).error.code
                return int(head[9:12]), code, b"connection: close" in head.lower()
            assert data, received

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def head(service: Service, *lines: str, method: str = "POST", path: str = "/api/v1/operations") -> bytes:
    lines = ("Host: x", f"Authorization: Bearer {service.token}", "Content-Type: application/json", *lines)
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode()


@pytest.mark.parametrize("authorized", [True, False])
@pytest.mark.parametrize("path", ["/api/v1/operations", f"/api/v1/snapshots/{'0' * 64}", "/nowhere"])
def test_a_gigabyte_that_is_announced_is_refused_unread(service: Service, path: str, authorized: bool) -> None:
    method = "PUT" if "snapshots" in path else "POST"
    request = head(service, f"Content-Length: {GIGABYTE}", method=method, path=path)
    with Wire(service.url) as wire:
        wire.send(request if authorized else request.replace(b"Authorization", b"X"))

        assert wire.answer() == (413, "too_large", True)


def test_a_gigabyte_that_is_not_announced_is_refused_while_it_comes(service: Service) -> None:
    process = psutil.Process(service.server.pid)
    before_bytes = process.memory_info().rss
    with Wire(service.url) as wire:
        wire.send(head(service, "Transfer-Encoding: chunked") + b"%x\r\n" % GIGABYTE)
        poured: list[int] = []
        pouring = threading.Thread(target=lambda: poured.append(wire.pour(GIGABYTE)))
        pouring.start()

        assert wire.answer() == (413, "too_large", True)
        pouring.join()

    assert poured[0] < GIGABYTE
    assert process.memory_info().rss - before_bytes < 5 * MAX_BODY_BYTES
    assert service.http.get("/workers").status_code == 200


def test_who_sends_a_little_too_much_reads_why(service: Service) -> None:
    body = b" " * (MAX_BODY_BYTES + 1)

    for content in (body, iter([body])):
        answer = service.http.post("/operations", content=content, headers={"Content-Type": "application/json"})
        assert refusal(answer) == (413, "too_large")
    assert service.http.get("/workers").status_code == 200


@pytest.mark.parametrize(
    "endless",
    [
        b"GET /" + b"a" * 2 * MAX_HEAD_BYTES,
        b"GET / HTTP/1.1\r\nX: " + b"a" * 2 * MAX_HEAD_BYTES,
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * MAX_HEAD_BYTES,
    ],
    ids=["address", "header", "headers"],
)
def test_a_head_without_an_end_is_refused(service: Service, endless: bytes) -> None:
    with Wire(service.url) as wire:
        wire.send(endless)

        assert wire.answer() == (431, "head_too_large", True)


def test_a_head_that_comes_whole_is_refused_too(service: Service) -> None:
    for request in (head(service, "X: " + "a" * MAX_HEAD_BYTES), head(service, path="/" + "a" * MAX_HEAD_BYTES)):
        with Wire(service.url) as wire:
            wire.send(request)

            assert wire.answer() == (431, "head_too_large", True)


def test_trailers_without_an_end_are_refused(service: Service) -> None:
    with Wire(service.url) as wire:
        wire.send(head(service, "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\nX: ")
        wire.pour(2**20)

        assert wire.answer() == (431, "head_too_large", True)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"HELLO\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so(service: Service, request_bytes: bytes) -> None:
    with Wire(service.url) as wire:
        wire.send(request_bytes)

        assert wire.answer() == (400, "invalid", True)


BODIES = {
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a float that is none": b'{"a": 1e400}',
    "an integer of 5,000 digits": b'{"a": 1%s}' % (b"0" * 5000),
    "an integer of 65 bits": b'{"a": 18446744073709551616}',
    "a NUL": b'{"a": "\\u0000"}',
    "a NUL in a name": b'{"\\u0000": 1}',
    "half of a pair": b'{"a": "\\ud800"}',
    "a name twice": b'{"workload": "digits", "workload": "bytelm"}',
    "100 levels": b'{"a":' * 100 + b"1" + b"}" * 100,
    "100,000 levels": b"[" * 100_000 + b"]" * 100_000,
    "Latin-1": b'{"a": "\xe9"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a mark of byte order": b"\xef\xbb\xbf{}",
    "half of it": b'{"a": ',
    "two": b"{} {}",
}


def routes_with_bodies() -> list[tuple[str, str]]:
    """Every one, by the API's own description."""
    paths = openapi_of_this_code().document["paths"].items()
    return [
        (method, path.format(id=MISSING, incarnation=MISSING, attempt=1, checkpoint_id=MISSING).removeprefix("/api/v1"))
        for path, methods in paths
        for method, call in methods.items()
        if "application/json" in call.get("requestBody", {}).get("content", {})
    ]


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url) as client:
        yield client


async def test_no_route_takes_json_that_is_not_strict(api: httpx.AsyncClient) -> None:
    routes = routes_with_bodies()
    assert len(routes) > 10
    for method, path in routes:
        for what, body in BODIES.items():
            answer = await api.request(method, path, content=body, headers={"Content-Type": "application/json"})
            assert refusal(answer) == (422, "invalid"), (method, path, what)
            assert answer.json()["error"]["message"].startswith("body: "), what


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Content-Type": "application/json; charset=latin-1"}, "UTF-8"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "Content-Encoding"),
        ({"Content-Type": "application/json", "Content-Encoding": "br"}, "Content-Encoding"),
        ({"Content-Type": "text/plain"}, "application/json"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, "application/json"),
    ],
)
async def test_a_body_is_plain_json_in_utf8(api: httpx.AsyncClient, headers: dict[str, str], said: str) -> None:
    for method, path in routes_with_bodies():
        answer = await api.request(method, path, content=b'{"a": 1}', headers=headers)
        assert refusal(answer) == (422, "invalid"), path
        assert said in answer.json()["error"]["message"]


async def test_json_may_say_that_it_is_utf8_and_have_any_text(api: httpx.AsyncClient) -> None:
    text = "\u202e\u200b\ufeff\U0001f600 é 中"
    for content_type in ("application/json; charset=UTF-8", 'application/json;charset="utf-8"', "application/ld+json"):
        answer = await api.post(
            f"/operations/{MISSING}/cancel",
            content=json.dumps({"reason": text}, ensure_ascii=False).encode(),
            headers={"Content-Type": content_type, "Content-Encoding": "identity"},
        )
        assert refusal(answer) == (404, "not_found")


@pytest.mark.parametrize(
    "path",
    [
        "/operations?q=a%00b",
        "/operations?cursor=%00",
        f"/operations?cursor={'A' * 20_000}",
        f"/operations?limit={'9' * 5000}",
        f"/operations/{MISSING}/events?after_seq={10**30}",
        f"/operations/{MISSING}/events?after_seq={2**31}",
        f"/operations/{MISSING}/metrics?name=a%00b",
        f"/operations/{MISSING}/metrics?name=a&after_step={10**30}",
        f"/operations/{MISSING}/logs?offset={10**30}",
        f"/operations/{MISSING}/stream?after={'9' * 5000}.1.1",
        "/operations/a%00b",
    ],
)
async def test_no_value_of_an_address_is_an_error_of_ours(api: httpx.AsyncClient, path: str) -> None:
    assert refusal(await api.get(path)) == (422, "invalid")


@pytest.mark.parametrize("q", ["%ED%A0%80", "%FF", "%E2%80%AE", "%F0%9F%98%80", "%", "%zz"])
async def test_a_search_takes_any_text(api: httpx.AsyncClient, q: str) -> None:
    assert (await api.get(f"/operations?q={q}")).status_code == 200


@pytest.mark.parametrize("name", ["Authorization", "If-None-Match", "Idempotency-Key", "Cookie", "Last-Event-ID"])
async def test_no_header_is_an_error_of_ours(api: httpx.AsyncClient, name: str) -> None:
    for value in (b"\xff\xfe", b"Bearer \xe9", b"9" * 10_000, b'"' * 1000):
        answer = await api.get(f"/operations/{MISSING}", headers={name.encode(): value})  # type: ignore[dict-item]
        assert answer.status_code in (401, 404), (name, value)


@pytest.mark.parametrize("attempt", [0, 2**31, 10**30])
async def test_the_number_of_an_attempt_is_one_that_the_database_can_have(api: httpx.AsyncClient, attempt: int) -> None:
    path = f"/operations/{MISSING}/attempts/{attempt}/reports"
    assert refusal(await api.post(path, json=batch(1), headers=await registered(api))) == (422, "invalid")


async def test_a_batch_has_a_bounded_number_of_reports(api: httpx.AsyncClient) -> None:
    path = f"/operations/{MISSING}/attempts/1/reports"
    assert refusal(await api.post(path, json=batch(1001), headers=await registered(api))) == (422, "invalid")


async def registered(api: httpx.AsyncClient) -> dict[str, str]:
    """How a worker shows itself."""
    (await api.post("/workers", json=WORKER)).raise_for_status()
    return shown_by(INCARNATION)


def batch(reports: int) -> dict[str, Any]:
    return {"incarnation": str(INCARNATION), "first_seq": 1, "reports": [{"kind": "note", "message": "x"}] * reports}


@asynccontextmanager
async def worker_serving() -> AsyncIterator[str]:
    """The URL of a worker's server, as the worker runs it, around an agent that has a secret and no more."""
    agent = AsyncMock()
    agent.secret.return_value = "the secret"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(worker_routes.server_config(worker_routes.create_app(agent)))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


def worker_head(*lines: str) -> bytes:
    lines = ("Host: x", "Authorization: Bearer the secret", "Content-Type: application/json", *lines)
    return "\r\n".join(["POST /validate HTTP/1.1", *lines, "", ""]).encode()


async def test_a_worker_takes_no_gigabyte_and_no_head_without_an_end() -> None:
    def asked(request: bytes, rest: int = 0) -> tuple[int, str, bool]:
        with Wire(url) as wire:
            wire.send(request)
            pouring = threading.Thread(target=lambda: wire.pour(rest))
            pouring.start()
            answer = wire.answer()
            pouring.join()
            return answer

    async with worker_serving() as url:
        announced = worker_head(f"Content-Length: {GIGABYTE}")
        assert await asyncio.to_thread(asked, announced) == (413, "too_large", True)
        assert await asyncio.to_thread(asked, announced.replace(b"Bearer", b"No")) == (413, "too_large", True)
        chunked = worker_head("Transfer-Encoding: chunked") + b"%x\r\n" % GIGABYTE
        assert await asyncio.to_thread(asked, chunked, GIGABYTE) == (413, "too_large", True)
        with Wire(url) as wire:
            wire.send(worker_head("X: " + "a" * 2 * MAX_HEAD_BYTES)[:-4])
            assert (await asyncio.to_thread(wire.receive)).startswith(b"HTTP/1.1 400 ")
        async with httpx.AsyncClient(base_url=url) as client:
            for what, body in BODIES.items():
                headers = {"Authorization": "Bearer the secret", "Content-Type": "application/json"}
                answer = await client.post("/validate", content=body, headers=headers)
                assert refusal(answer) == (422, "invalid"), what


ALWAYS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


async def test_every_answer_says_how_to_treat_it(api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    answers = [
        await api.get("/workers"),
        await api.get("/workers", headers={"Authorization": ""}),
        await api.get("/nowhere"),
        await api.post("/operations", content=b"NaN"),
        await api.post("/session/links"),
        await api.post("/tokens", json={"name": str(uuid4()), "scope": "read"}),
        await api.get("http://test/health/live"),
        await api.get("http://test/openapi.json"),
    ]
    monkeypatch.setattr("ops_backend.routes.catalog.catalog.workers", broken)
    async with httpx.AsyncClient(transport=api._transport, base_url=api.base_url, headers=api.headers) as unwatched:
        answers.append(await unwatched.get("/workers"))

    assert answers[-1].status_code == 500
    for answer in answers:
        assert {name: answer.headers.get_list(name) for name in ALWAYS} == {n: [v] for n, v in ALWAYS.items()}, answer


async def test_what_may_be_kept_says_so_itself(api: httpx.AsyncClient) -> None:
    async with httpx.AsyncClient(transport=api._transport) as browser:
        page = await browser.get("http://test/")

    assert page.headers.get_list("content-security-policy") == [page.headers["content-security-policy"]]
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["cache-control"] == "no-cache"
    assert page.headers["x-content-type-options"] == "nosniff"


async def test_no_other_site_is_told_anything(api: httpx.AsyncClient) -> None:
    """CORS is off: no answer allows another origin to read it, or to ask with more than a form can."""
    asks = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for method, path in (("OPTIONS", "/operations"), ("GET", "/operations"), ("POST", "/session")):
        answer = await api.request(method, path, headers=asks)
        assert not [name for name in answer.headers if name.startswith("access-control-")], (method, path)
    assert refusal(await api.request("OPTIONS", "/operations", headers=asks)) == (405, "method_not_allowed")


async def test_the_page_of_the_api_has_every_call_and_nothing_from_elsewhere(api: httpx.AsyncClient) -> None:
    page = await api.get("http://test/docs")

    for path, methods in openapi_of_this_code().document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page.text
    assert "<script" not in page.text
    assert "http://" not in page.text.replace("http://127.0.0.1", "")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert (await api.get("http://test/redoc")).status_code == 404
