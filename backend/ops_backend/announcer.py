"""Tells webhooks of ends. What is to be told and what was is in the database, never only here."""

import asyncio
import logging
import random
from collections import Counter
from uuid import UUID

from ops_backend.bodies import ended_body
from ops_backend.database import Sessions
from ops_backend.store import webhooks
from ops_backend.store.webhooks import Due
from ops_backend.ticking import forever
from ops_backend.webhooks import SEND_S, WebhookSender
from ops_contract.webhooks import DeliveryState

log = logging.getLogger(__name__)

RETRIES_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 3 * 3600.0, 12 * 3600.0)
RETRY_AFTER_LIMIT_S = 3600.0
SENDS = 32
SENDS_A_WEBHOOK = 2  # one that hangs leaves the others their sends
# Well past the end of a send: who finds it still due after that finds a backend that is dead.
CLAIM_S = 3 * SEND_S


class Announcer:
    """One a backend, several share the work. A loop of its own: nobody must wait for a slow receiver."""

    def __init__(self, sessions: Sessions, sender: WebhookSender, tick_s: float) -> None:
        self._sessions = sessions
        self._sender = sender
        self._tick_s = tick_s
        self._sending: Counter[UUID] = Counter()
        # However many send at once, the loops that keep leases alive find a connection.
        self._one_at_a_time = asyncio.Lock()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as sends:

            async def tick() -> None:
                await self.announce()
                await self.start_due(sends)

            await forever(tick, self._tick_s, log)

    async def announce(self) -> None:
        more = True
        while more:
            async with self._one_at_a_time, self._sessions.begin() as session:
                more = await webhooks.announce(session)

    async def start_due(self, sends: asyncio.TaskGroup) -> None:
        """As many as there is room for; returns before they are sent."""
        while self._sending.total() < SENDS:
            busy = [id for id, number in self._sending.items() if number >= SENDS_A_WEBHOOK]
            until_s = asyncio.get_running_loop().time() + CLAIM_S - SEND_S
            async with self._one_at_a_time, self._sessions.begin() as session:
                due = await webhooks.claim_due(session, CLAIM_S, busy)
            if due is None:
                return
            self._sending[due.hook.id] += 1
            sends.create_task(self._deliver(due, until_s))

    async def _deliver(self, due: Due, until_s: float) -> None:
        """Begun before `until_s` of the loop's clock, or left: after a pause somebody else may be sending it."""
        try:
            if asyncio.get_running_loop().time() < until_s:
                await self._send(due)
        except Exception:
            log.exception("webhook %s: not sent or not recorded; trying again", due.hook.id, extra=_about(due))
        finally:
            self._sending[due.hook.id] -= 1

    async def _send(self, due: Due) -> None:
        async with self._one_at_a_time, self._sessions.begin() as session:
            operation, event = await webhooks.ended(session, due)
        body = ended_body(due.hook.format, operation, event)
        answer, leave_alone_s = await self._sender.send(due.hook, due.id, due.at, body)
        retry_in_s = _retry_in_s(due.tries, leave_alone_s)
        async with self._one_at_a_time, self._sessions.begin() as session:
            state = await webhooks.record(session, due, answer, retry_in_s)
        if state in (DeliveryState.DUE, DeliveryState.GIVEN_UP):
            then = f"again in {retry_in_s:.0f} s" if state is DeliveryState.DUE else "given up"
            # Not what was answered, which may name a URL that is a secret: that is in `ops webhooks deliveries`.
            said = answer.http_status or answer.answer
            log.warning("webhook %s: try %d: %s; %s", due.hook.id, due.tries, said, then, extra=_about(due))


def _retry_in_s(tries: int, leave_alone_s: float) -> float | None:
    """None after the last one."""
    if tries > len(RETRIES_S):
        return None
    return max(RETRIES_S[tries - 1] * random.uniform(0.8, 1.2), min(leave_alone_s, RETRY_AFTER_LIMIT_S))


def _about(due: Due) -> dict[str, object]:
    return {"operation_id": due.operation_id}
