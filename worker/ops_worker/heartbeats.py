"""A worker's standing with the API: registered, and its leases renewed by heartbeats for as long as it lives."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from uuid import UUID

from ops_contract.agents import Heartbeat, HoldRef, WorkerRegistered, WorkerRegistration
from ops_contract.energy import DeviceNow
from ops_contract.errors import ErrorCode
from ops_contract.lifecycle import Drain
from ops_worker.api_client import ApiClient, ApiRefused, ApiUnavailable, ApiUnknown
from ops_worker.holds import Hold
from ops_worker.settings import Settings
from ops_worker.waiting import Backoff, Trouble, first_of

log = logging.getLogger(__name__)

REGISTER_CAP_S = 5.0
# The longest pause after a beat that failed, in leases. An API that was away for less than half a lease gives no grace,
# so the last beat before (a third of a lease ago), that half and this pause have to fit into one.
BEAT_RETRY_LEASES = 1 / 12


class Heartbeats:
    """Those of one incarnation: they list its `holds`, and the answers are passed on to these.

    `terms` are the API's, None until it has registered. Set `now` for a beat at once.
    """

    def __init__(
        self,
        settings: Settings,
        incarnation: UUID,
        holds: Mapping[HoldRef, Hold],
        devices: Callable[[], list[DeviceNow]],
        draining: asyncio.Event,
    ) -> None:
        self.terms: WorkerRegistered | None = None
        self.now = asyncio.Event()
        self._settings = settings
        self._incarnation = incarnation
        self._holds = holds
        self._devices = devices
        self._draining = draining
        self._drain: Drain | None = None

    async def run(self, worker: WorkerRegistration, api: ApiClient, on_ready: Callable[[], None]) -> None:
        """Register, then beat until cancelled. Not being heard never stops a training."""
        terms = await self._register(worker)
        on_ready()
        trouble, backoff = Trouble("heartbeat", log), Backoff(terms.lease_s * BEAT_RETRY_LEASES)
        while True:
            self.now.clear()
            pause_s = terms.heartbeat_s
            try:
                await self._beat(api, terms.lease_s)
                trouble.over()
                backoff.reset()
            except ApiUnknown as problem:  # its database was replaced, or the token has ended
                trouble.now(problem)
                terms = await self._register(worker)
            except ApiUnavailable as problem:
                trouble.now(problem)
                pause_s = backoff.next_s()
            except ApiRefused as refusal:
                trouble.now(refusal)
                if refusal.code is ErrorCode.NOT_FOUND:  # it was restored from a backup
                    terms = await self._register(worker)
            await first_of(self.now.wait(), asyncio.sleep(pause_s))

    async def say_goodbye(self, api: ApiClient) -> None:
        """So that an idle worker gets no start that it will not answer. Only a courtesy."""
        if self.terms is not None:
            with suppress(ApiUnavailable, ApiRefused):
                await api.heartbeat(self._incarnation, Heartbeat(draining=True), timeout_s=1.0)

    async def _register(self, worker: WorkerRegistration) -> WorkerRegistered:
        trouble, backoff = Trouble(f"registering at {self._settings.api_url}", log), Backoff(REGISTER_CAP_S)
        token = self._settings.api_token.get_secret_value()
        async with ApiClient(self._settings.api_url, token) as api:
            while True:
                try:
                    self.terms = await api.register(worker)
                    return self.terms
                except (ApiUnavailable, ApiRefused) as problem:
                    trouble.now(problem)
                    await backoff.pause()

    async def _beat(self, api: ApiClient, lease_s: float) -> None:
        listed = list(self._holds.values())
        beat = Heartbeat(holds=[hold.ref for hold in listed], devices=self._devices(), draining=self._draining.is_set())
        # One that hangs must leave time for another within the lease.
        answer = await api.heartbeat(self._incarnation, beat, timeout_s=lease_s / 3)
        ended = set(answer.ended)
        for hold in listed:
            if hold.ref in ended:
                hold.fence()
            else:
                hold.confirm()
        for order in answer.cancelling:
            ref = HoldRef(operation_id=order.operation_id, attempt=order.attempt)
            if (cancelled := self._holds.get(ref)) is not None:
                cancelled.cancel(order.reason, order.force)
        self._drain_told(answer.drain)

    def _drain_told(self, drain: Drain | None) -> None:
        """That no more work comes is the API's to see to: a start that was claimed before is taken."""
        if drain != self._drain:
            log.info("an operator's wish: %s", f"drain, and {drain} what runs" if drain else "drain no longer")
        self._drain = drain
        if drain == "preempt":
            for hold in self._holds.values():
                hold.preempt()
