"""Between the parts of the service: balances over the API's replicas, fails over, and is where the network fails.

`/from/NAME/…` goes to an API, whoever NAME is (an agent, a user); `/to/NAME/…` goes to the agent of that name.
"""

import asyncio
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from ops_cli.up import free_port

Scope = dict[str, Any]
# What the network does not forward: they are the next connection's own.
_HOP_BY_HOP = {b"host", b"connection", b"content-length", b"transfer-encoding", b"content-encoding"}
_BROKEN = httpx.Response(599)


@dataclass
class Weather:
    """What the network does at the moment. `share` of the requests that `calls` names meet it."""

    lose_answers: bool = False
    lose_requests: bool = False
    duplicate: bool = False
    delay: bool = False
    repeat_late: bool = False
    cut_off: set[str] = field(default_factory=set)
    mute: Callable[[str, str], bool] = lambda name, path: False


class Proxy:
    """Runs in a thread of its own. `failures`: every answer of an API that nobody may ever get."""

    def __init__(self, apis: dict[str, int], agents: dict[str, int], seed: int) -> None:
        self.port = free_port()
        self.weather = Weather()
        self.failures: list[str] = []
        self.hits: dict[str, int] = {}
        self._apis, self._agents = apis, agents
        self._chance = random.Random(seed)
        self._turn = 0
        self._late: set[asyncio.Task[Any]] = set()
        config = uvicorn.Config(self._app, port=self.port, interface="asgi3", lifespan="off", log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="proxy", daemon=True)

    def start(self) -> None:
        # Idle connections are not kept: one to an API that was killed would count as a fault of the network's own.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(20, connect=2), trust_env=False)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    def url_for(self, name: str) -> str:
        """Of the API, for this client."""
        return f"http://127.0.0.1:{self.port}/from/{name}"

    def url_of(self, agent: str) -> str:
        return f"http://127.0.0.1:{self.port}/to/{agent}"

    async def _app(self, scope: Scope, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message.get("body", b"")
        _, direction, name, path = scope["path"].split("/", 3)
        if query := scope["query_string"].decode():
            path = f"{path}?{query}"
        headers = [(key, value) for key, value in scope["headers"] if key not in _HOP_BY_HOP]
        await _answer(send, await self._pass(direction, name, scope["method"], f"/{path}", headers, body))

    async def _pass(self, direction: str, name: str, *request: Any) -> httpx.Response:
        """What comes back, through whatever the weather is."""
        weather, (method, path, _, _) = self.weather, request
        if name in weather.cut_off or weather.mute(name, path):
            return self._hit("cut_off", _BROKEN)
        if method != "POST":
            return await self._forward(direction, name, *request)
        meets = self._chance.random() < 0.5
        if meets and weather.lose_requests:
            return self._hit("lose_requests", _BROKEN)
        if meets and weather.delay:
            self._hit("delay")
            await asyncio.sleep(self._chance.uniform(0.2, 2.5))  # of a beat, past its sender's patience
        if meets and weather.duplicate:
            self._hit("duplicate")
            return (await asyncio.gather(*[self._forward(direction, name, *request) for _ in "12"]))[0]
        answer = await self._forward(direction, name, *request)
        if meets and weather.repeat_late:
            self._hit("repeat_late")
            again = asyncio.create_task(self._again(direction, name, *request))
            self._late.add(again)
            again.add_done_callback(self._late.discard)
        return self._hit("lose_answers", _BROKEN) if meets and weather.lose_answers else answer

    async def _again(self, direction: str, name: str, *request: Any) -> None:
        await asyncio.sleep(self._chance.uniform(0.5, 4))
        await self._forward(direction, name, *request)

    async def _forward(self, direction: str, name: str, method: str, path: str, headers: Any, body: bytes) -> Any:
        for port in self._ports(direction, name):
            try:
                url = f"http://127.0.0.1:{port}{path}"
                answer = await self._http.request(method, url, headers=headers, content=body)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
            except httpx.HTTPError:
                return _BROKEN  # it may have arrived: that is for the sender to sort out
            if direction == "from":
                self._judge(method, path, answer)
            return answer
        return _BROKEN

    def _ports(self, direction: str, name: str) -> list[int]:
        if direction == "to":
            return [self._agents[name]]
        self._turn += 1
        ports = list(self._apis.values())
        first = self._turn % len(ports)
        return ports[first:] + ports[:first]

    def _judge(self, method: str, path: str, answer: httpx.Response) -> None:
        if answer.status_code >= 500 and answer.status_code != 503:
            self.failures.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        if answer.status_code == 503:
            self._hit("answered 503")
            if "retry-after" not in answer.headers:
                self.failures.append(f"{method} {path}: 503 without Retry-After: {answer.text[:300]}")

    def _hit(self, what: str, answer: Any = None) -> Any:
        self.hits[what] = self.hits.get(what, 0) + 1
        return answer


async def _answer(send: Any, answer: httpx.Response) -> None:
    if answer is _BROKEN:
        # Half an answer: the server closes the connection on whoever waits for the rest.
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        return
    headers = [(key.lower(), value) for key, value in answer.headers.raw if key.lower() not in _HOP_BY_HOP]
    headers.append((b"content-length", str(len(answer.content)).encode()))
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": answer.content})
