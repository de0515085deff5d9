"""Moves what studies and their children make of each other: wakes, cascades, and the end of a cancelled study."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from uuid import UUID

from ops_backend.database import Sessions
from ops_backend.store import studies
from ops_backend.store.transitions import CancelPush
from ops_backend.telemetry import Telemetry
from ops_backend.ticking import forever
from ops_contract.lifecycle import Status

log = logging.getLogger(__name__)

PushCancel = Callable[[UUID, CancelPush, str, bool], Awaitable[None]]


class Family:
    """One a backend; the statements guard themselves, so several do no harm."""

    def __init__(
        self,
        sessions: Sessions,
        tick_s: float,
        telemetry: Telemetry,
        wake: Callable[[], Awaitable[None]],
        push_cancel: PushCancel,
    ) -> None:
        self._sessions = sessions
        self._tick_s = tick_s
        self._telemetry = telemetry
        self._wake = wake
        self._push_cancel = push_cancel

    async def run(self) -> None:
        """Until cancelled."""
        await forever(self.look, self._tick_s, log)

    async def look(self) -> None:
        """Each statement in a transaction of its own: none locks what another one waits for."""
        async with self._sessions.begin() as session:
            if not await studies.stirs(session):
                return
        # Before another one is claimed.
        async with self._sessions.begin() as session:
            not_run = await studies.stop_after_failures(session)
        for child in not_run:
            self._telemetry.moved(child.status)
            log.info("not run: too many children of its study have failed", extra={"operation_id": child.id})
        queued = False
        for level in (studies.replan, studies.reduce):
            async with self._sessions.begin() as session:
                moved = await level(session)
            for id in moved:
                queued = True
                log.info("%s: it is in the queue", level.__name__, extra={"operation_id": id})
        if queued:
            await self._wake()
        async with self._sessions.begin() as session:
            cancelled = await studies.cancel_children(session)
        for child in cancelled:
            self._telemetry.moved(child.status)
        # Beside each other: a worker that does not answer keeps nobody else's waiting.
        told = ((child.id, child.push, studies.CANCELLED_STUDY, child.force) for child in cancelled if child.push)
        await asyncio.gather(*(self._push_cancel(*each) for each in told))
        async with self._sessions.begin() as session:
            stopped = await studies.stop(session)
        for id in stopped:
            self._telemetry.moved(Status.CANCELLED)
            log.info("cancelled: nothing of this study runs any more", extra={"operation_id": id})
