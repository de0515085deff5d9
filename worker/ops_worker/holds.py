"""One hold: an attempt of an operation from its acceptance until the API has its finish."""

import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ops_contract.agents import HoldRef, StartTraining
from ops_contract.lifecycle import Outcome
from ops_contract.pipe import Hello, ProgressNow, RunJob, Stop
from ops_contract.reports import CheckpointSaved, Fault, Finish, Metrics, Note, Started
from ops_worker.delivery import Delivery
from ops_worker.outbox import Outbox
from ops_worker.slots import Slot
from ops_worker.trainers import PipeGarbage, Trainer
from ops_worker.waiting import first_of

log = logging.getLogger(__name__)

# How long a trainer may take to exit after its last message.
LINGER_S = 5.0

_HINTS = {
    signal.SIGKILL: " (out of memory? `dmesg` tells; a smaller batch_size needs less)",
    signal.SIGBUS: " (shared memory full? enlarge /dev/shm, or set num_workers to 0)",
    signal.SIGSEGV: " (a crash in native code)",
}


class Hold:
    """The agent's calls (`confirm`, `cancel`, `preempt`, `fence`, `kill`) return at once; `run` acts on them."""

    def __init__(
        self,
        order: StartTraining,
        slot: Slot,
        outbox: Outbox,
        delivery: Delivery,
        storage_root: Path,
        cancel_grace_s: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ref = HoldRef(operation_id=order.operation_id, attempt=order.attempt)
        self.slot = slot
        self.released = False
        self._order = order
        self._deadline = loop.time() + order.deadline_s
        self._outbox = outbox
        self._delivery = delivery
        self._storage_root = storage_root
        self._cancel_grace_s = cancel_grace_s
        self._confirmed = asyncio.Event()
        self._halted = asyncio.Event()
        self._fenced = asyncio.Event()
        self._trainer: Trainer | None = None
        self._stop: Stop | None = None
        self._outcome_if_killed: Literal[Outcome.PREEMPTED, Outcome.CANCELLED] = Outcome.PREEMPTED
        self._grace: asyncio.TimerHandle | None = None
        self._finish: Finish | None = None
        self._misbehaviour: str | None = None
        self._log = logging.LoggerAdapter(log, self.ref.model_dump())

    async def run(self) -> None:
        """Until the finish is accepted, or there is none to come: fenced, or never begun."""
        sending = asyncio.create_task(self._delivery.run())
        sending.add_done_callback(self._sending_ended)
        try:
            finish = await self._attempt()
            self.released = True
            if finish is not None and not self._fenced.is_set():
                self._log.info("%s", finish.outcome)
                await self._store([finish])
            self._delivery.close()
            await first_of(sending, self._fenced.wait())
        finally:
            sending.cancel()
            if self._grace is not None:
                self._grace.cancel()

    def confirm(self) -> None:
        """The API counts this hold as live: its trainer may start."""
        self._confirmed.set()

    def cancel(self, reason: str, force: bool) -> None:
        """Checkpoint and stop, within the grace; with `force` be killed at once. Every heartbeat may repeat it."""
        if self.released or self._halted.is_set():
            return
        self._outcome_if_killed = Outcome.CANCELLED
        if force:
            self._log.warning("killed: cancelled with force: %s", reason)
            self.kill()
        elif self._grace is None:
            self._log.info("cancelled: %s", reason)
            self._grace = asyncio.get_running_loop().call_later(self._cancel_grace_s, self._out_of_patience)
            self._tell(Stop(why="cancelled"))

    def preempt(self) -> None:
        """Checkpoint and hand back; what has not begun is handed back as it is."""
        if self._trainer is None:
            self._halted.set()
        else:
            self._tell(Stop(why="preempted"))

    def fence(self) -> None:
        """The attempt belongs to nobody any more: kill it and say nothing about it."""
        if not self._fenced.is_set() and not self.released:
            self._log.warning("fenced: this attempt has ended for the API; its trainer is killed")
        self._fenced.set()
        self.kill()

    def kill(self) -> None:
        """End it now; it is then reported preempted, or cancelled if that was wanted."""
        self._halted.set()
        if self._trainer is not None:
            self._trainer.kill()

    def _sending_ended(self, sending: asyncio.Task[bool]) -> None:
        """Without a sender nothing of this attempt can count: either the API said so, or an error of ours."""
        if sending.cancelled():
            return
        if error := sending.exception():
            self._log.error("sending reports failed", exc_info=error)
        if error or not sending.result():
            self.fence()

    def _out_of_patience(self) -> None:
        self._log.warning("killed: it did not stop within %.0f s", self._cancel_grace_s)
        self.kill()

    def _tell(self, stop: Stop) -> None:
        if self._stop is None:
            self._stop = stop
            if self._trainer is not None:
                self._trainer.send(stop)

    async def _attempt(self) -> Finish | None:
        """From acceptance until no process is left."""
        try:
            async with asyncio.timeout_at(self._deadline):
                # A start may arrive late, when a newer attempt runs elsewhere: only the API knows.
                await first_of(self._confirmed.wait(), self._halted.wait())
        except TimeoutError:
            # Nothing is said: whatever ended or delayed it, the lease decides.
            self._log.warning("dropped: the API did not confirm it in time")
            return None
        # The beats renew its lease from here on: a trainer may take its time to get warm, but not fail for ever.
        await first_of(self.slot.ready.wait(), self.slot.failing.wait(), self._halted.wait())
        if self._halted.is_set():
            fault = Fault(code="not_started", message="It was stopped before it began.")
            return Finish(outcome=self._outcome_if_killed, error=fault)
        if not self.slot.ready.is_set():
            fault = Fault(code="trainer_not_ready", message=f"Handed back by the worker: {self.slot.trouble}")
            return Finish(outcome=Outcome.PREEMPTED, error=fault)
        with self.slot.lend() as self._trainer:
            return await self._supervise(self._trainer)

    async def _supervise(self, trainer: Trainer) -> Finish:
        self._log.info("trainer %d, output in %s", trainer.pid, trainer.log_path)
        trainer.send(self._job())
        if self._stop is not None:
            trainer.send(self._stop)
        async with asyncio.TaskGroup() as group:
            relaying = group.create_task(self._relay(trainer))
            ending = group.create_task(trainer.ended())
            await asyncio.wait({relaying, ending}, return_when=asyncio.FIRST_COMPLETED)
            if relaying.done():
                await asyncio.wait({ending}, timeout=LINGER_S)
                if not ending.done() and self._misbehaviour is None:
                    self._misbehaviour = "the end of the pipe, but the process went on"
                trainer.kill()
        return self._finish or self._died(trainer, ending.result())

    def _job(self) -> RunJob:
        offer = self.slot.offer
        return RunJob(start=self._order, storage_root=str(self._storage_root), device=offer.device, cores=offer.cores)

    async def _relay(self, trainer: Trainer) -> None:
        """Reports go to the outbox, until the finish or the end of the pipe. The finish waits for the process."""
        try:
            while self._finish is None and (messages := await trainer.receive()):
                reports = [m for m in messages if isinstance(m, Started | Metrics | CheckpointSaved | Note)]
                for message in messages:
                    if isinstance(message, ProgressNow):
                        self._delivery.progress = message.progress
                    elif isinstance(message, Finish):
                        self._finish = message
                    elif isinstance(message, Hello):
                        raise PipeGarbage("a second greeting")
                await self._store(reports)
        except PipeGarbage as garbage:
            self._misbehaviour = str(garbage)
            trainer.kill()

    async def _store(self, reports: Sequence[Started | Metrics | CheckpointSaved | Note | Finish]) -> None:
        if reports and not self._fenced.is_set():
            await self._outbox.add(self.ref, reports)
            self._delivery.news.set()

    def _died(self, trainer: Trainer, status: int) -> Finish:
        """Why a trainer ended that said nothing about it."""
        tail = {"log_tail": trainer.log_tail()}
        if self._halted.is_set():
            message = "The worker killed the trainer before it had stopped; a resume goes on from the last checkpoint."
            return Finish(outcome=self._outcome_if_killed, error=Fault(code="killed", message=message, details=tail))
        if self._misbehaviour is not None:
            code, what = "trainer_protocol", f"broke the protocol of its pipe and was killed: {self._misbehaviour}"
        elif status < 0:
            code, what = "trainer_killed", f"was killed by {_name(-status)}"
        else:
            code, what = "trainer_exited", f"exited with code {status} before it was done"
        message = f"The trainer {what}. Its last output is in details.log_tail."
        return Finish(outcome=Outcome.FAILED, error=Fault(code=code, message=message, details=tail))


def _name(number: int) -> str:
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"signal {number}"
    return f"{name.name}{_HINTS.get(name, '')}"
