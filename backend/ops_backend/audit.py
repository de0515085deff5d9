"""The audit: what requests note of themselves, what was refused, and the loop that writes and forgets."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import Request

from ops_backend.addresses import address_of
from ops_backend.browsers import SAFE, cookie_name
from ops_backend.database import Sessions
from ops_backend.store import audit
from ops_backend.store.audit import Caller
from ops_backend.store.identities import Identity
from ops_backend.ticking import forever
from ops_contract.audit import Action

log = logging.getLogger(__name__)

TEXT_CHARS = 300
TOLD_APART = 20
OTHERS = "others"
DAY_S = 86_400.0

_Key = tuple[Action, str, str | None]


class Audit:
    """Of one request. A note is in the transaction of its change, so that there is either both or neither."""

    def __init__(self, request: Request) -> None:
        self._request = request

    async def note(
        self,
        session: AsyncSession,
        action: Action,
        target: UUID | str | None = None,
        by: Identity | None = None,
        **detail: Any,
    ) -> None:
        """`by`: where it is not who was asked for a token. `detail` has no secrets."""
        caller = _caller(self._request, by or self._request.state.identity)
        short = {name: _line(value) for name, value in detail.items() if value is not None}
        await audit.add(session, caller, action, str(target) if target else None, short)


@dataclass
class Refused:
    """Of one caller, since they were last written; the first of them is described."""

    caller: Caller
    action: Action
    call: str
    count: int = 1


class Refusals:
    """Those of this process that are not written yet. A flood costs few rows: so many callers a minute have one."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic, told_apart: int = TOLD_APART) -> None:
        self._clock_s = clock_s
        self._told_apart = told_apart
        self._minute_ends_s = 0.0
        self._known: set[_Key] = set()
        self._waiting: dict[_Key, Refused] = {}

    def refused(self, request: Request, action: Action) -> None:
        call = f"{request.method} {getattr(request.scope.get('route'), 'path', '')}"
        self.add(Refused(_caller(request, getattr(request.state, "identity", None)), action, call))

    def add(self, refused: Refused) -> None:
        if self._clock_s() >= self._minute_ends_s:
            self._minute_ends_s = self._clock_s() + 60.0
            self._known = set(self._waiting)
        key = (refused.action, refused.caller.address, refused.caller.who)
        if key not in self._known and len(self._known) >= self._told_apart:
            key = (refused.action, OTHERS, None)
            refused = replace(refused, caller=Caller(None, None, OTHERS, None))
        self._known.add(key)
        self._waiting.setdefault(key, replace(refused, count=0)).count += refused.count

    def take(self) -> list[Refused]:
        taken, self._waiting = list(self._waiting.values()), {}
        return taken


def note_refusal(request: Request, http_status: int) -> None:
    """Of an answer with an error. A browser that asks who it is before it logs in has shown nothing that was wrong."""
    action = {401: Action.UNAUTHENTICATED, 403: Action.FORBIDDEN}.get(http_status)
    cookie = cookie_name(request.app.state.settings)
    if action and ("authorization" in request.headers or cookie in request.cookies or request.method not in SAFE):
        request.app.state.refusals.refused(request, action)


class Auditor:
    """Writes what was refused, and forgets what is too old. One a backend; several do no harm."""

    def __init__(self, sessions: Sessions, refusals: Refusals, keep_days: float, tick_s: float) -> None:
        self._sessions = sessions
        self._refusals = refusals
        self._keep_s = keep_days * DAY_S
        self._tick_s = tick_s

    async def run(self) -> None:
        """Until cancelled."""
        await forever(self.tick, self._tick_s, log)

    async def tick(self) -> None:
        taken = self._refusals.take()
        try:
            async with self._sessions.begin() as session:
                for each in taken:
                    await audit.add_refused(session, each.caller, each.action, each.count, {"call": each.call})
                await audit.forget(session, self._keep_s)
        except Exception:
            for each in taken:
                self._refusals.add(each)
            raise


def _caller(request: Request, identity: Identity | None) -> Caller:
    who, token_id = (identity.name, identity.token_id) if identity else (None, None)
    return Caller(who, token_id, address_of(request) or "unknown", _line(request.headers.get("user-agent")))


def _line(value: Any) -> Any:
    """Text as one line of a terminal, whoever wrote it."""
    if not isinstance(value, str):
        return value
    return "".join(each if each.isprintable() else "\ufffd" for each in value[:TEXT_CHARS])
