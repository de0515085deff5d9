"""Gives due operations to free slots: claim in a transaction, deliver outside of it, then say how it went.

A delivery that may have arrived is left to the lease; only a definite refusal takes the claim back.
"""

import asyncio
import json
import logging
import time
from contextlib import suppress
from uuid import UUID

import httpx

from ops_backend.database import Sessions
from ops_backend.settings import Settings
from ops_backend.store.claims import Claim, Member, claim_next, refuse_if_held
from ops_backend.store.transitions import CancelPush, finish_if_held
from ops_backend.telemetry import Telemetry
from ops_backend.worker_calls import Answer, post
from ops_contract.agents import CancelTraining, Gang, StartTraining
from ops_contract.errors import ErrorCode
from ops_contract.lifecycle import Outcome
from ops_contract.reports import Fault, Finish
from ops_contract.wire import Wire

log = logging.getLogger(__name__)

# No request was sent, or the worker said no: nothing runs there.
_UNDELIVERED = (httpx.ConnectError, httpx.ConnectTimeout)
UNREACHABLE = "unreachable"
# Long enough for a worker that checks a manifest on a slow disk; a worker that takes longer is left to the lease.
ANSWER_S = 10.0
ANSWER_BYTES = 65_536
# As a trainer says it that finds the same later.
_BAD_CHECKPOINT: dict[str, str] = {
    ErrorCode.NO_CHECKPOINT: "checkpoint_missing",
    ErrorCode.CHECKPOINT_CORRUPT: "checkpoint_corrupt",
}


class Dispatcher:
    """One a backend; several backends share the work through the claim's lock."""

    def __init__(self, sessions: Sessions, http: httpx.AsyncClient, settings: Settings, telemetry: Telemetry) -> None:
        self._sessions = sessions
        self._http = http
        self._settings = settings
        self._telemetry = telemetry
        self._due = asyncio.Event()
        self._deliveries: set[asyncio.Task[None]] = set()

    async def wake(self) -> None:
        """Something may be due. Only a hint: the poll finds it anyway.

        A coroutine, so that a background task of a route runs it in the loop: from a thread nobody would hear it.
        """
        self._due.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._claim_all()
            except Exception:
                log.exception("dispatcher: cannot claim; trying again")
            # Not `wait_for`: in Python 3.11 that one swallows a cancellation which comes together with a wake.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_s):
                    await self._due.wait()
            self._due.clear()

    async def push_cancel(self, operation_id: UUID, push: CancelPush, reason: str, force: bool) -> None:
        """Tell the worker now what its next heartbeat would tell it."""
        order = CancelTraining(incarnation=push.incarnation, attempt=push.attempt, reason=reason, force=force)
        try:
            await self._post(push.url, f"/operations/{operation_id}/cancel", push.secret, order)
        except httpx.HTTPError as error:
            log.info("cancel not pushed, the heartbeat will tell: %s", error, extra={"operation_id": operation_id})

    async def _claim_all(self) -> None:
        while True:
            async with self._sessions.begin() as session:
                claim = await claim_next(session, self._settings.lease_s)
            if claim is None:
                return
            delivery = asyncio.create_task(self._deliver(claim))
            self._deliveries.add(delivery)
            delivery.add_done_callback(self._deliveries.discard)

    async def _deliver(self, claim: Claim) -> None:
        """To all members at once. What the others were told when one refuses, their next heartbeat takes back."""
        began_s = time.monotonic()
        outcomes = await asyncio.gather(*(self._deliver_to(member, claim) for member in claim.members))
        worst = max(outcomes, key=("accepted", "unanswered", "refused").index)
        self._telemetry.dispatched(worst, claim.due_s + time.monotonic() - began_s)

    async def _deliver_to(self, member: Member, claim: Claim) -> str:
        """How it went: accepted, refused, unanswered."""
        extra = {"operation_id": claim.operation_id, "attempt": claim.attempt}
        outcome = "unanswered"
        try:
            refusal = await self._offer(member, claim)
            outcome = "accepted" if refusal is None else "refused"
            if refusal is not None:
                log.info("worker %s refused: %s", member.url, refusal.message, extra=extra)
                await self._take_back(claim, member, refusal)
        except httpx.HTTPError as error:
            log.warning("dispatch to %s is ambiguous, left to the lease: %r", member.url, error, extra=extra)
        except Exception:
            log.exception("dispatch to %s failed, left to the lease", member.url, extra=extra)
        return outcome

    async def _offer(self, member: Member, claim: Claim) -> Fault | None:
        """None when taken; why not, when definitely not. Raises httpx.HTTPError when nobody can know."""
        start = StartTraining(
            incarnation=member.incarnation,
            operation_id=claim.operation_id,
            attempt=claim.attempt,
            slots=member.slots,
            gang=_gang(member, claim),
            deadline_s=self._settings.lease_s,
            job=claim.job,
            checkpoint=claim.checkpoint,
            parent_job=claim.parent_job,
            children=claim.children,
            planned=claim.planned,
            accept_changes=claim.accept_changes,
            record=claim.record,
        )
        verb = "resume" if claim.checkpoint else "start"
        try:
            answer = await self._post(member.url, f"/{claim.job.kind}/{verb}", member.secret, start)
        except _UNDELIVERED as error:
            return Fault(code=UNREACHABLE, message=f"the worker at {member.url} does not answer: {error}")
        if answer.is_success:
            return None
        if answer.status >= 500:
            raise httpx.ReadError(f"it answered {answer.status}")
        return _fault(answer)

    async def _take_back(self, claim: Claim, member: Member, refusal: Fault) -> None:
        async with self._sessions.begin() as session:
            if refusal.code in _BAD_CHECKPOINT:
                told = refusal.model_copy(update={"code": _BAD_CHECKPOINT[refusal.code]})
                finish = Finish(outcome=Outcome.CHECKPOINT_CORRUPT, error=told)
                backoff_s = self._settings.retry_backoff_s
                status = await finish_if_held(
                    session, claim.operation_id, claim.attempt, member.incarnation, 1, finish, backoff_s
                )
            else:
                # A worker that is not there is left alone until its silence shows; a busy one is asked again soon.
                rest_s = self._settings.lease_s if refusal.code == UNREACHABLE else self._settings.slot_rest_s
                status = await refuse_if_held(session, claim, member, error=refusal, rest_s=rest_s)
        self._telemetry.moved(status)
        await self.wake()

    async def _post(self, url: str, path: str, secret: str, message: Wire) -> Answer:
        return await post(self._http, f"{url}{path}", secret, message, ANSWER_S, ANSWER_BYTES)


def _gang(member: Member, claim: Claim) -> Gang | None:
    if claim.host is None or claim.port is None or claim.world_size == 1:
        return None
    return Gang(world_size=claim.world_size, first_rank=member.first_rank, host=claim.host, port=claim.port)


def _fault(answer: Answer) -> Fault:
    try:
        error = json.loads(answer.body)["error"]
        return Fault(code=error["code"], message=error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return Fault(code="refused", message=f"the worker answered {answer.status}")
