"""Sends windows from an outbox to the API, the oldest first. They have no sequence: each counts once by its key.

So they go beside the reports, and also when their hold has ended, fenced or not.
"""

import asyncio
import logging
from typing import Protocol
from uuid import UUID

from ops_contract.agents import HoldRef
from ops_contract.errors import ErrorCode
from ops_worker.api_client import ApiRefused, ApiUnavailable
from ops_worker.outbox import EnergyRows, Outbox
from ops_worker.waiting import Backoff, Trouble

log = logging.getLogger(__name__)

BATCH_WINDOWS = 500
RETRY_CAP_S = 10.0


class EnergySender(Protocol):
    async def send_energy(self, ref: HoldRef, body: str) -> None: ...


class EnergyDelivery:
    """An outbox's windows; `news` is set when there are more."""

    def __init__(self, api: EnergySender, outbox: Outbox, incarnation: UUID, backoff: Backoff | None = None) -> None:
        self._api = api
        self._outbox = outbox
        self._incarnation = incarnation
        self._backoff = backoff or Backoff(RETRY_CAP_S)
        self._trouble = Trouble("sending energy", log)
        self._max_windows = BATCH_WINDOWS
        self.news = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.news.clear()
            await self.drain()
            await self.news.wait()

    async def drain(self) -> None:
        """Until there is none left."""
        while rows := await self._outbox.energy(self._max_windows):
            await self._send(rows)

    async def _send(self, rows: EnergyRows) -> None:
        body = f'{{"incarnation":"{self._incarnation}","windows":[{",".join(rows.windows.values())}]}}'
        try:
            await self._api.send_energy(rows.ref, body)
        except ApiUnavailable as problem:
            self._trouble.now(problem)
            await self._backoff.pause(problem.retry_after_s)
            return
        except ApiRefused as refusal:
            await self._obey(refusal, rows)
            return
        await self._outbox.drop_energy(list(rows.windows))
        self._trouble.over()
        self._backoff.reset()
        self._max_windows = BATCH_WINDOWS

    async def _obey(self, refusal: ApiRefused, rows: EnergyRows) -> None:
        """It would refuse them for ever, and must not be asked for ever."""
        where = rows.ref.model_dump()
        if refusal.code is ErrorCode.NOT_FOUND:
            log.warning("%d energy windows dropped: %s", len(rows.windows), refusal, extra=where)
        elif len(rows.windows) > 1:
            self._max_windows = len(rows.windows) // 2  # which of them it is
            return
        else:
            log.error("an energy window set aside: %s; it was %s", refusal, *rows.windows.values(), extra=where)
        await self._outbox.drop_energy(list(rows.windows))
