"""One request to a receiver: signed after Standard Webhooks (standardwebhooks.com), to an address that is checked."""

import asyncio
import base64
import hmac
import secrets
from contextlib import suppress
from datetime import datetime
from ipaddress import ip_address
from urllib.request import getproxies, proxy_bypass
from uuid import UUID

import httpx

from ops_backend.addresses import LOOK_UP_S, Names, Refused, authorities
from ops_backend.store.webhooks import Hook
from ops_contract.webhooks import WebhookAnswer

SEND_S = 10.0
CONNECT_S = 3.0  # to each of its addresses
READ_S = 2.0
ANSWER_BYTES = 500
SECRET_PREFIX = "whsec_"


def new_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def signature(secret: str, id: str, timestamp_s: int, body: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signed = hmac.digest(key, f"{id}.{timestamp_s}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(signed).decode()}"


class WebhookSender:
    """A connection a request: one to the same address may be another receiver's."""

    def __init__(self, names: Names) -> None:
        self._names = names

    async def check(self, url: str) -> None:
        """Raises Refused. A name that is not known yet passes: it is looked up again whenever something is sent."""
        try:
            async with asyncio.timeout(LOOK_UP_S):
                await self._addresses(httpx.URL(url))
        except (httpx.InvalidURL, UnicodeError) as error:
            raise Refused(f"nothing can be sent to it: {error}") from error
        except OSError:
            return

    async def send(self, hook: Hook, id: UUID, at: datetime, body: bytes) -> tuple[WebhookAnswer, float]:
        """What it answered, and for how many seconds it wants to be left alone. Raises nothing."""
        try:
            async with asyncio.timeout(SEND_S):
                return await self._send(httpx.URL(hook.url), _headers(hook, id, at, body), body)
        except TimeoutError:
            said = f"no answer within {SEND_S:g} s"
        # The last two: the proxy of the environment is none, or a SOCKS one, which needs another package.
        except (Refused, httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:
            said = str(error) or type(error).__name__
        return WebhookAnswer(delivered=False, http_status=None, answer=said[:ANSWER_BYTES]), 0.0

    async def _send(self, url: httpx.URL, headers: dict[str, str], body: bytes) -> tuple[WebhookAnswer, float]:
        """To the first of its addresses that takes a connection: looked up once, so that it is the one looked at."""
        proxy = _proxy(url)
        targets = [url] if proxy else [url.copy_with(host=address) for address in await self._addresses(url)]
        async with httpx.AsyncClient(
            verify=authorities(), trust_env=False, proxy=proxy, timeout=httpx.Timeout(SEND_S, connect=CONNECT_S)
        ) as http:
            for target in targets[:-1]:
                with suppress(httpx.ConnectError, httpx.ConnectTimeout):
                    return await _request(http, target, url, headers, body)
            return await _request(http, targets[-1], url, headers, body)

    async def _addresses(self, url: httpx.URL) -> list[str]:
        return await self._names.addresses(url.raw_host.decode())


async def _request(
    http: httpx.AsyncClient, target: httpx.URL, url: httpx.URL, headers: dict[str, str], body: bytes
) -> tuple[WebhookAnswer, float]:
    name = {"sni_hostname": url.raw_host.decode()}
    headers = {"Host": url.netloc.decode(), **headers}
    async with http.stream("POST", target, content=body, headers=headers, extensions=name) as response:
        said = await _beginning(response)
    if response.is_redirect:
        said = f"redirects are not followed; add the address that it leads to: {response.headers.get('Location', '')}"
    answer = WebhookAnswer(delivered=response.is_success, http_status=response.status_code, answer=said[:ANSWER_BYTES])
    return answer, _retry_after_s(response)


async def _beginning(response: httpx.Response) -> str:
    """Of its body, as far as it comes: the status alone counts."""
    read = b""
    with suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(READ_S):
            async for chunk in response.aiter_raw():
                read += chunk[:ANSWER_BYTES]
                if len(read) >= ANSWER_BYTES:
                    break
    text = read.decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _headers(hook: Hook, id: UUID, at: datetime, body: bytes) -> dict[str, str]:
    timestamp_s = int(at.timestamp())
    return {
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
        "User-Agent": "Relight",
        "webhook-id": str(id),
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": signature(hook.secret, str(id), timestamp_s, body),
    }


def _proxy(url: httpx.URL) -> str | None:
    """The environment's, for names: it looks them up itself. It knows nothing of this machine and of bare addresses."""
    with suppress(ValueError):
        ip_address(url.host)
        return None
    if url.host == "localhost" or proxy_bypass(url.netloc.decode()):
        return None
    proxies = getproxies()
    return proxies.get(url.scheme) or proxies.get("all")


def _retry_after_s(response: httpx.Response) -> float:
    """0.0 where it says nothing, or a date."""
    said = response.headers.get("Retry-After", "")
    return float(said) if said.isascii() and said.isdigit() and len(said) < 10 else 0.0
