"""Who shows a secret, known for a moment: polls cost no query, and who is shut out is so within that moment."""

import hmac
import time
from collections.abc import Callable

from sqlalchemy import TextClause
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.browsers import digest
from ops_backend.database import Sessions
from ops_backend.failed_logins import FailedLogins
from ops_backend.settings import Settings
from ops_backend.store import logins
from ops_backend.store.identities import FIND_LOGIN, FIND_TOKEN, FIND_WORKER, Identity, of_secret
from ops_contract.agents import CREDENTIAL_PREFIX
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.tokens import OPERATOR, WORKERS, Scope, token_digest, workers_token

KNOWN_S = 2.0
MOST = 10_000
_OPERATOR, _WORKERS = Identity(OPERATOR, Scope.ADMIN), Identity(WORKERS, Scope.WORKER)


class Identities:
    """One an app. `sessions` are the vital ones: a heartbeat asks too.

    Every method takes the `address` of who asks and raises 429 when it has shown too many wrong secrets. A secret that
    was looked up before is neither refused for that nor counted again: one client that is set up wrongly must not shut
    out its neighbours behind the same proxy.
    """

    def __init__(self, settings: Settings, sessions: Sessions, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._sessions = sessions
        self._clock_s = clock_s
        self._operator = settings.api_token.encode()
        self._workers = workers_token(settings.api_token).encode()
        self._failed = FailedLogins(clock_s=clock_s)
        # Until when the answer counts; after that only that there was one. Nobody's secrets too.
        self._answers: dict[bytes, tuple[float, Identity | None]] = {}

    def known(self, token: str) -> Identity | None:
        """Whose it is, where that takes no query."""
        if hmac.compare_digest(token.encode(), self._operator):
            return _OPERATOR
        if hmac.compare_digest(token.encode(), self._workers):
            return _WORKERS
        until_s, identity = self._answers.get(token_digest(token), (0.0, None))
        return identity if self._clock_s() < until_s else None

    async def of_token(self, token: str, address: str) -> Identity | None:
        if identity := self.known(token):
            return identity
        find = FIND_WORKER if token.startswith(CREDENTIAL_PREFIX) else FIND_TOKEN
        return await self._known_or(token_digest(token), find, address)

    async def of_cookie(self, secret: str, address: str) -> Identity | None:
        return await self._known_or(digest(self._settings, secret), FIND_LOGIN, address)

    async def trade(self, session: AsyncSession, code: str, secret: str, address: str) -> None:
        """Make the code of a link a session with this secret, where it is good."""
        self._admit(address)
        if not await logins.trade(session, digest(self._settings, code), digest(self._settings, secret)):
            self._failed.failed(address)

    def forget(self) -> None:
        """Something was revoked, or has begun to count: here, at least, at once."""
        for known, (_, identity) in self._answers.items():
            self._answers[known] = (0.0, identity)

    async def _known_or(self, digest: bytes, find: TextClause, address: str) -> Identity | None:
        now_s = self._clock_s()
        known = self._answers.get(digest)
        if known and now_s < known[0]:
            return known[1]
        if not known:
            self._admit(address)
        async with self._sessions.reading() as session:
            found = await of_secret(session, find, digest)
        if found is None and not known:
            self._failed.failed(address)
        self._answers.pop(digest, None)
        if len(self._answers) >= MOST:
            del self._answers[next(iter(self._answers))]  # asked for longest ago
        self._answers[digest] = (now_s + KNOWN_S, found)
        return found

    def _admit(self, address: str) -> None:
        if (wait_s := self._failed.allowed(address)) > 0:
            message = "too many wrong tokens or codes came from your address; wait, and give a valid one"
            raise OpsError(ErrorCode.RATE_LIMITED, message, retry_after_s=wait_s)
