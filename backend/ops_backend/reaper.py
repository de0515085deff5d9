"""Ends attempts whose lease ran out, unless nobody could renew."""

import logging
from collections.abc import Awaitable, Callable

from ops_backend.database import Sessions
from ops_backend.store.leases import expired, tick
from ops_backend.store.transitions import lose_if_expired
from ops_backend.telemetry import Telemetry
from ops_backend.ticking import forever

log = logging.getLogger(__name__)


class Reaper:
    """One a backend; the statements guard themselves, so several do no harm."""

    def __init__(
        self,
        sessions: Sessions,
        lease_s: float,
        tick_s: float,
        telemetry: Telemetry,
        wake: Callable[[], Awaitable[None]],
    ) -> None:
        self._sessions = sessions
        self._lease_s = lease_s
        self._tick_s = tick_s
        self._telemetry = telemetry
        self._wake = wake

    async def run(self) -> None:
        """Until cancelled."""
        await forever(self.reap, self._tick_s, log)

    async def reap(self) -> None:
        async with self._sessions.begin() as session:
            grace = await tick(session, self._lease_s)
            overdue = [] if grace else await expired(session)
        for operation_id, attempt in overdue:
            async with self._sessions.begin() as session:
                status = await lose_if_expired(session, operation_id, attempt)
            if status is not None:
                extra = {"operation_id": operation_id, "attempt": attempt}
                log.warning("lease ran out: operation is %s", status, extra=extra)
                self._telemetry.lost(status)
                await self._wake()
