"""The gate of both HTTP servers: what comes in is bounded and clean, what goes out says how to treat it."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from ops_contract import strict_json
from ops_contract.errors import ErrorCode, OpsError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Of request line and headers together; a cookie and a token are a few hundred bytes.
MAX_HEAD_BYTES = 32 * 1024
# For answers without their own. The API's are no pages, hold no script, and may hold secrets.
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
# A client that is still sending reads the answer only if the connection outlives what it sends.
LINGER_S = 1.0
LINGER_BYTES = 64 * 2**20


def with_headers(given: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Of an answer, with those of `HEADERS` that it has not itself."""
    names = {name for name, _ in given}
    return [*given, *(each for each in HEADERS if each[0] not in names)]


class Gate:
    """Plain ASGI, before everything: a body reaches its route whole, within its bound, as JSON that is strict.

    `raw`: the bounds of bodies that are bytes, by the beginning of their path.
    """

    def __init__(self, app: App, *, max_body_bytes: int, raw: Mapping[str, int] | None = None) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._raw = raw or {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": with_headers(message["headers"])}
            await send(message)

        try:
            if "\0" in scope["path"] or b"%00" in scope["query_string"]:
                raise OpsError(ErrorCode.INVALID, "the address has a NUL (%00), which nothing here is called by")
            if (body := await self._body(scope, receive)) is not None:
                receive = _with(body, receive)
        except OpsError as error:
            return await _refuse(error, receive, secured)
        await self._app(scope, receive, secured)

    async def _body(self, scope: Message, receive: Receive) -> bytes | None:
        """None where there is none to read. Raises OpsError as soon as it is known to be refused."""
        has_body, headers = False, {}
        for name, value in scope["headers"]:
            if name in _OF_BODIES:
                headers[name] = value
                has_body = has_body or name in (b"content-length", b"transfer-encoding")
        if not has_body:
            return None
        is_raw = next((prefix for prefix in self._raw if scope["path"].startswith(prefix)), None)
        bound = self._raw[is_raw] if is_raw else self._max_body_bytes
        body = await _bounded(headers, receive, bound)
        if body and not is_raw:
            _check(headers, body)
        return body


_JSON = re.compile(rb"application/([\w.-]+\+)?json")
_OF_BODIES = frozenset({b"content-length", b"transfer-encoding", b"content-type", b"content-encoding"})


async def _bounded(headers: Mapping[bytes, bytes], receive: Receive, bound: int) -> bytes:
    length = headers.get(b"content-length", b"0")
    if len(length) > 18 or (length.isdigit() and int(length) > bound):
        raise _too_large(bound)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise OpsError(ErrorCode.INVALID, "the body ends before its end")  # nobody reads this
        body += message.get("body", b"")
        if len(body) > bound:
            raise _too_large(bound)
        if not message.get("more_body"):
            return bytes(body)


def _check(headers: Mapping[bytes, bytes], body: bytes) -> None:
    if (encoding := headers.get(b"content-encoding", b"identity").strip().lower()) != b"identity":
        raise _invalid(f"it is packed ({encoding.decode('latin-1')[:50]}); send it without Content-Encoding")
    media_type, *parameters = (part.strip() for part in headers.get(b"content-type", b"").lower().split(b";"))
    if not _JSON.fullmatch(media_type):
        raise _invalid("send JSON, and say so: `Content-Type: application/json`")
    charsets = {part.partition(b"=")[2].strip(b'"') for part in parameters if part.startswith(b"charset")}
    if not charsets <= {b"utf-8", b"utf8"}:
        raise _invalid("JSON is UTF-8; send it so")
    try:
        strict_json.check(body)
    except strict_json.NotStrict as error:
        raise _invalid(str(error)) from None


def _invalid(problem: str) -> OpsError:
    return OpsError(ErrorCode.INVALID, f"body: {problem}", errors=[{"field": "body", "problem": problem}])


def _too_large(bound: int) -> OpsError:
    return OpsError(ErrorCode.TOO_LARGE, f"this call takes a body of at most {bound} B", max_bytes=bound)


def _with(body: bytes, receive: Receive) -> Receive:
    """The body as one message; then what else comes, which is the end of the connection."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def _refuse(error: OpsError, receive: Receive, send: Send) -> None:
    """Answer at once, read what is still on its way for a moment, and close."""
    body = error.body().model_dump_json().encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    is_unread = error.code is ErrorCode.TOO_LARGE
    headers += [(b"connection", b"close")] if is_unread else []
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": is_unread})
    if is_unread:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await _drain(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    """Of what is thrown away only a part is in memory."""
    left_bytes = LINGER_BYTES
    while left_bytes > 0:
        message = await receive()
        left_bytes -= len(message.get("body", b""))
        if not message.get("more_body"):
            return
