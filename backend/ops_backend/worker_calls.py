"""One call to a worker, which may be anybody's: it gets no more of our time and memory than an answer takes."""

import asyncio
from dataclasses import dataclass

import httpx

from ops_backend.addresses import authorities
from ops_contract.wire import Wire

# Less than any answer may take: that nobody is there is then told from an answer that does not come.
CONNECT_S = 5.0


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300


def connections() -> httpx.AsyncClient:
    """To any number of workers at a time, which others bound: one that hangs must not keep the others waiting."""
    return httpx.AsyncClient(verify=authorities(), trust_env=False, limits=httpx.Limits(max_connections=None))


async def post(
    http: httpx.AsyncClient, url: str, secret: str, message: Wire, timeout_s: float, max_bytes: int
) -> Answer:
    """Follows no redirect and unpacks nothing. Raises httpx.HTTPError: ReadTimeout when the whole takes longer,
    ReadError for more.
    """
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json", "Accept-Encoding": "identity"}
    limits = httpx.Timeout(timeout_s, connect=CONNECT_S)
    content = message.model_dump_json()
    try:
        # httpx only bounds each wait for a piece of it.
        async with (
            asyncio.timeout(timeout_s),
            http.stream(
                "POST", url, content=content, headers=headers, timeout=limits, follow_redirects=False
            ) as answer,
        ):
            if "Content-Encoding" in answer.headers:
                raise httpx.ReadError("it is packed, and nobody asked for that")
            body = bytearray()
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > max_bytes:
                    raise httpx.ReadError(f"it said more than {max_bytes} bytes")
            return Answer(answer.status_code, bytes(body))
    except TimeoutError as error:
        raise httpx.ReadTimeout(f"no whole answer within {timeout_s:g} s") from error
