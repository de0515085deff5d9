"""The connection to a server: retries, and what an answer or its absence means."""

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from ops_contract.errors import ErrorBody, ErrorCode, OpsError
from ops_contract.wire import API_PREFIX, Wire
from relight.settings import Server, find_server

W = TypeVar("W", bound=Wire)

TRIES = 4
BACKOFF_S = 0.2
RETRY_AFTER_LIMIT_S = 5.0
PAGE = 100


class Unreachable(OpsError):
    """No Relight server answered, or it cannot reach its database; the message says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, message)


class Transport:
    """The connection to one server, and how calls are made over it: see `relight.Client`."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout_s: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Without arguments: the server of OPS_API_URL, of the config file, or of the last `ops up`."""
        server = find_server(url, token)
        if server is None:
            raise Unreachable("No server is known. Start one with `ops up`, or name one by --url or OPS_API_URL.")
        self.server: Server = server
        self._sleep = sleep
        local = is_loopback(server.url)
        # Of http on this machine there is nothing to verify, and reading all authorities takes longer than most calls.
        plain = local and server.url.startswith("http://")
        self._http = httpx.Client(
            base_url=server.url,
            headers={"Authorization": f"Bearer {server.token}"} if server.token else {},
            timeout=timeout_s,
            transport=transport,
            verify=False if plain else httpx.create_ssl_context(),  # heeds SSL_CERT_FILE
            trust_env=not local,  # a proxy for the Internet knows nothing of this machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _get(self, path: str, model: type[W], query: Mapping[str, Any] | None = None) -> W:
        given = {key: value for key, value in (query or {}).items() if value is not None}
        return self._parse(self._call("GET", path, params=given, repeatable=True), model)

    def _items(
        self, path: str, model: type[Wire], query: Mapping[str, Any] = {}, most: int | None = None
    ) -> Iterator[Any]:
        """Those of every page, or the first `most`. `model` has `items` and `next_cursor`."""
        wanted, left = dict(query), most
        while left is None or left > 0:
            wanted["limit"] = left and min(PAGE, left)
            page: Any = self._get(path, model, wanted)
            yield from page.items
            left = None if left is None else left - len(page.items)
            if page.next_cursor is None:
                return
            wanted["cursor"] = page.next_cursor

    def _post(
        self, path: str, body: Wire, headers: Mapping[str, str] | None = None, repeatable: bool = False
    ) -> httpx.Response:
        # Only what was given: the server's defaults count, not this client's.
        content = body.model_dump_json(exclude_unset=True)
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self._call("POST", path, content=content, headers=headers, repeatable=repeatable)

    def _call(
        self, method: str, path: str, *, repeatable: bool = False, checked: bool = True, **request: Any
    ) -> httpx.Response:
        for retry_in_s in retries():
            try:
                response = self._http.request(method, API_PREFIX + path, **request)
            except httpx.TransportError as error:
                unsent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
                if retry_in_s is None or not (unsent or repeatable):
                    raise self._unreachable(error, unsent or method == "GET") from error
            else:
                if response.status_code != 503 or retry_in_s is None:
                    return self._checked(response) if checked else response
                retry_in_s = _retry_after_s(response) or retry_in_s
            self._sleep(retry_in_s * random.uniform(0.8, 1.2))
        raise AssertionError("the last try returns or raises")

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_success or response.status_code == 304:
            return response
        try:
            error = ErrorBody.model_validate_json(response.content).error
        except ValidationError:
            raise self._not_relight(response) from None
        if error.code is ErrorCode.UNAVAILABLE:
            raise Unreachable(error.message)
        raise OpsError(error.code, error.message, **error.details)

    def _parse(self, response: httpx.Response, model: type[W]) -> W:
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise self._not_relight(response) from error

    def _unreachable(self, error: httpx.TransportError, harmless: bool) -> Unreachable:
        problem = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
        where = f"No server answers at {self.server.url} ({self.server.origin}): {problem}."
        if harmless:
            return Unreachable(f"{where} Start it with `ops up`, or name another by --url or OPS_API_URL.")
        return Unreachable(f"{where} The request may have been carried out: look with `ops list` before repeating it.")

    def _not_relight(self, response: httpx.Response) -> Unreachable:
        return Unreachable(
            f"{self.server.url} ({self.server.origin}) answered HTTP {response.status_code} in a way this client does"
            " not understand: it is no Relight server, or one of another version. Check --url and `ops --version`."
        )


def retries() -> Iterator[float | None]:
    """The pause after each try, in seconds; None after the last."""
    yield from (BACKOFF_S * 2**n for n in range(TRIES - 1))
    yield None


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        return min(max(float(response.headers["Retry-After"]), 0.0), RETRY_AFTER_LIMIT_S)
    except (KeyError, ValueError):
        return None


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
