"""What agents say to the API and hear from it, over HTTP as cheap as it gets: for benchmarks in their place."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

from ops_contract.agents import CREDENTIAL_PREFIX, WorkloadOffer
from ops_contract.reports import Exactness, Finish, Metrics, Series, Started
from ops_contract.wire import API_PREFIX

RETRY_CAP_S = 2.0
IDLE_CLOSE_S = 4.5  # a little less than the API keeps a connection

STARTED = Started(
    trainer_pid=1,
    start_step=0,
    exactness=Exactness(promise="promised"),
    environment={"torch": "2.13.0", "python": "3.11"},
).model_dump_json()
COMPLETED = Finish.model_validate({"outcome": "completed"}).model_dump_json()
FAILED = Finish.model_validate(
    {"outcome": "failed", "permanent": True, "error": {"code": "exception", "message": "it raised"}}
).model_dump_json()
_VALUES = Series.of("loss", [(step, random.random()) for step in range(10)]).values


class Connection:
    """One, kept while it is used; one request at a time."""

    asked = 0  # of all connections of this process

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._token = token
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used_s = 0.0
        self._turn = asyncio.Lock()

    async def request(
        self, method: str, path: str, body: str = "", tag: str = "", timeout_s: float = 30.0
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. Raises OSError, and TimeoutError."""
        async with self._turn:
            Connection.asked += 1
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._request(method, path, body, tag)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
        self._streams = None

    async def _request(self, method: str, path: str, body: str, tag: str) -> tuple[int, dict[str, str], bytes]:
        if self._streams and time.monotonic() - self._used_s > IDLE_CLOSE_S:
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        has = f"If-None-Match: {tag}\r\n" if tag else ""
        content = body.encode()
        head = f"{method} {API_PREFIX}{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self._token}\r\n{has}"
        if content:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        writer.write(f"{head}\r\n".encode() + content)
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            answer = await reader.readexactly(int(headers.get("content-length", 0)))
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("it was closed") from error
        self._used_s = time.monotonic()
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), headers, answer


def is_for_later(status: int) -> bool:
    """Says nothing of the request: an agent tries again."""
    return status in (408, 429) or status >= 500


async def pause(failures: int, headers: dict[str, str]) -> None:
    """As `ops_worker.waiting.Backoff`: longer after each failure in a row, and not before `Retry-After`, seconds."""
    said = headers.get("retry-after", "")
    backoff_s = min(RETRY_CAP_S, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)
    await asyncio.sleep(max(backoff_s, float(said) if said.isdecimal() else 0.0))


def answers(take: Callable[[dict[str, Any]], int]) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    """A server of what the API calls, which is starts: `take` gives the status of each."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
                status = take(json.loads(await reader.readexactly(length) or b"{}"))
                writer.write(b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\n" % status)
                writer.write(b"Content-Length: 2\r\n\r\n{}")
        writer.close()

    return serve


def registration(incarnation: UUID, port: int, cores: int = 1) -> dict[str, Any]:
    offer = WorkloadOffer(name="toy", config_schema={"type": "object"}, reports={"loss": "min"})
    return {
        "incarnation": str(incarnation),
        "credential": credential_of(incarnation),
        "secret": "s" * 43,
        "name": f"w-{incarnation.hex[:8]}",
        "host": f"h-{incarnation.hex[:8]}",
        "url": f"http://127.0.0.1:{port}",
        "slots": [{"index": 0, "device": "cpu", "cores": cores}],
        "workloads": [offer.model_dump()],
    }


def credential_of(incarnation: UUID) -> str:
    return CREDENTIAL_PREFIX + incarnation.hex + 11 * "0"


def metrics_at(step: int) -> str:
    steps = list(range(step - 9, step + 1))
    series = [Series(name=name, steps=steps, values=_VALUES) for name in ("epoch", "learning_rate", "loss")]
    return Metrics(series=series).model_dump_json()


def checkpoint_at(id: str, attempt: int, step: int) -> str:
    about = {
        "kind": "checkpoint",
        "checkpoint_id": str(uuid4()),
        "checkpoint_type": "periodic",
        "step": step,
        "epoch": 0,
    }
    about |= {"phase": "update", "path": f"{id}/{attempt}-{step}", "size_bytes": 1, "manifest_sha256": "0" * 64}
    return json.dumps(about)
