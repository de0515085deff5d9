"""Who shows a secret, known for a moment: polls cost no query, and who is shut out is so within that moment."""

import hmac
import time
from collections.abc import Awaitable, Callable

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.browsers import digest
from ops_backend.database import Sessions
from ops_backend.settings import Settings
from ops_backend.store import identities
from ops_backend.store.identities import Identity
from ops_contract.agents import CREDENTIAL_PREFIX
from ops_contract.tokens import OPERATOR, WORKERS, Scope, token_digest, workers_token

KNOWN_S = 2.0
MOST = 1000


class Identities:
    """One an app. `sessions` are the vital ones: a heartbeat asks too."""

    def __init__(self, settings: Settings, sessions: Sessions, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._sessions = sessions
        self._clock_s = clock_s
        self._operator = settings.api_token.encode()
        self._workers = workers_token(settings.api_token).encode()
        self._known: dict[bytes, tuple[float, Identity]] = {}

    async def of_token(self, token: str) -> Identity | None:
        if hmac.compare_digest(token.encode(), self._operator):
            return Identity(OPERATOR, Scope.ADMIN)
        if hmac.compare_digest(token.encode(), self._workers):
            return Identity(WORKERS, Scope.WORKER)
        find = identities.of_worker if token.startswith(CREDENTIAL_PREFIX) else identities.of_token
        return await self._known_or(token_digest(token), find)

    async def of_cookie(self, secret: str) -> Identity | None:
        return await self._known_or(digest(self._settings, secret), identities.of_login)

    def forget(self) -> None:
        """Something was revoked: here, at least, it counts at once."""
        self._known.clear()

    async def _known_or(
        self, digest: bytes, find: Callable[[AsyncSession, bytes], Awaitable[Identity | None]]
    ) -> Identity | None:
        now_s = self._clock_s()
        if (known := self._known.get(digest)) and now_s < known[0]:
            return known[1]
        async with self._sessions.begin() as session:
            found = await find(session, digest)
        self._known.pop(digest, None)
        if found is not None:
            if len(self._known) >= MOST:
                del self._known[next(iter(self._known))]  # the oldest
            self._known[digest] = (now_s + KNOWN_S, found)
        return found
