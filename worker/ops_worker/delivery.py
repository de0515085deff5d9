"""Sends the reports of one hold from the outbox to the API: in order, each counted once, blocked by nothing."""

import asyncio
import json
import logging
from typing import Any, Protocol
from uuid import UUID

from ops_contract.agents import HoldRef
from ops_contract.errors import ErrorCode
from ops_contract.reports import Fault, Finish, Note, Progress
from ops_worker.api_client import ApiRefused, ApiUnavailable
from ops_worker.outbox import Batch, Outbox
from ops_worker.waiting import Backoff, Trouble

log = logging.getLogger(__name__)

BATCH_REPORTS = 200
RETRY_CAP_S = 2.0


class ReportSender(Protocol):
    async def send_reports(self, ref: HoldRef, body: str) -> int: ...


class Delivery:
    """One hold's sender. `progress` goes with every batch; `news` is set when the outbox has more.

    The API has the reports up to `sent_seq`.

    An answer may be lost at any moment: the API counts a sequence number once, so sending again is harmless.
    """

    def __init__(
        self, api: ReportSender, outbox: Outbox, incarnation: UUID, ref: HoldRef, backoff: Backoff | None = None
    ) -> None:
        self._api = api
        self._outbox = outbox
        self._incarnation = incarnation
        self._ref = ref
        self._backoff = backoff or Backoff(RETRY_CAP_S)
        self._max_reports = BATCH_REPORTS
        self._set_aside_seq = 0
        self._closed = False
        self._log = logging.LoggerAdapter(log, ref.model_dump())
        self._trouble = Trouble("sending reports", self._log)
        self.progress: Progress | None = None
        self.sent_seq = 0
        self.news = asyncio.Event()

    async def run(self) -> bool:
        """Until closed and all is sent; False as soon as the API wants nothing more of this hold."""
        while True:
            closed = self._closed
            while batch := await self._outbox.batch(self._ref, self._max_reports):
                if not await self._send(batch):
                    return False
            if closed:
                return True
            await self.news.wait()
            self.news.clear()

    def close(self) -> None:
        """No more reports will be added."""
        self._closed = True
        self.news.set()

    async def _send(self, batch: Batch) -> bool:
        try:
            last_seq = await self._api.send_reports(self._ref, self._body(batch))
        except ApiUnavailable as problem:
            self._trouble.now(problem)
            await self._backoff.pause(problem.retry_after_s)
            return True
        except ApiRefused as refusal:
            return await self._obey(refusal, batch)
        await self._drop(last_seq)
        self._trouble.over()
        self._backoff.reset()
        self._max_reports = min(BATCH_REPORTS, self._max_reports * 2)
        return True

    def _body(self, batch: Batch) -> str:
        """A ReportBatch. Reports go as they were stored: an outbox written by another version flushes too."""
        progress = self.progress.model_dump_json() if self.progress else "null"
        return (
            f'{{"incarnation":"{self._incarnation}","first_seq":{batch.first_seq},'
            f'"progress":{progress},"reports":[{",".join(batch.reports)}]}}'
        )

    async def _obey(self, refusal: ApiRefused, batch: Batch) -> bool:
        """Whether to go on after a definite refusal."""
        if refusal.code in (ErrorCode.FENCED, ErrorCode.NOT_FOUND):
            self._log.warning("the API wants no more reports: %s", refusal)
            return False
        if refusal.code is ErrorCode.OUT_OF_ORDER:
            return await self._go_on_from(refusal, batch)
        if len(batch.reports) > 1:
            self._max_reports = len(batch.reports) // 2
            return True
        return await self._set_aside(batch, refusal)

    async def _go_on_from(self, refusal: ApiRefused, batch: Batch) -> bool:
        last_seq = refusal.error.details.get("last_seq") if refusal.error else None
        if not isinstance(last_seq, int) or last_seq < batch.first_seq:
            # It has lost reports that it had confirmed, as after a restored backup: nobody has them any more.
            self._log.error("giving this attempt up: report %d comes next, but %s", batch.first_seq, refusal)
            return False
        await self._drop(last_seq)
        return True

    async def _drop(self, last_seq: int) -> None:
        await self._outbox.drop(self._ref, last_seq)
        self.sent_seq = last_seq

    async def _set_aside(self, batch: Batch, refusal: ApiRefused) -> bool:
        """Put a note under the number of a report that the API does not take, so that the next ones are not blocked."""
        seq, report = batch.first_seq, batch.reports[0]
        if seq == self._set_aside_seq:
            self._log.error("giving this attempt up: not even a note in place of report %d: %s", seq, refusal)
            return False
        self._log.error("report %d set aside: %s; it began %.500s", seq, refusal, report)
        await self._outbox.replace(self._ref, seq, _substitute(report, refusal))
        self._set_aside_seq = seq
        return True


def _substitute(report: str, refusal: ApiRefused) -> Note | Finish:
    """Says what was refused and why; a finish stays a finish, or the attempt would never end."""
    content: dict[str, Any] = json.loads(report)
    kind = content.get("kind")
    reason = f"The API refused a report of kind {kind}: {str(refusal)[:2000]}. It was set aside by the worker."
    if kind != "finish":
        return Note(message=reason)
    fault = Fault(code="report_refused", message=reason) if content["error"] else None
    return Finish(outcome=content["outcome"], permanent=content["permanent"], error=fault)
