"""One process of a hold, from its job until it is gone: what it says, whether it gets on, and how it ended."""

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ops_contract.lifecycle import Kind, Outcome
from ops_contract.pipe import Alive, FromTrainer, Hello, ProgressNow, RunJob, Stop
from ops_contract.reports import Fault, Finish, Started
from ops_worker.deaths import killed_for_memory, oom_kills, signal_name
from ops_worker.stalls import StallClock
from ops_worker.trainers import PipeGarbage, Trainer

log = logging.getLogger(__name__)

# How long a trainer may take to exit after its last message.
LINGER_S = 5.0
# For a hung trainer to write its stacks. It is not known when it has; one that cannot is killed without.
STACKS_S = 1.0
_IN_ORDER = (Outcome.COMPLETED, Outcome.CANCELLED, Outcome.PREEMPTED)

_SILENT = {Kind.COMMAND: "it reported nothing", Kind.MEASUREMENT: "no batch, and no reading of the idle device"}

_HINTS: dict[int, str] = {
    signal.SIGKILL: " (out of memory? `dmesg` tells; a smaller batch_size needs less)",
    signal.SIGBUS: " (shared memory full? enlarge /dev/shm, or set num_workers to 0)",
    signal.SIGSEGV: " (a crash in native code; details.log_tail has the Python line that called it)",
    signal.SIGABRT: " (native code gave up; details.log_tail has its last words)",
}


@dataclass(frozen=True)
class Hearing:
    """What its hold makes of what a process says; `held_up`: the agent itself keeps processes waiting."""

    hear: Callable[[Sequence[FromTrainer]], Awaitable[None]]
    held_up: Callable[[], bool]


class JobProcess:
    """`trainer` has greeted. `begin`, `tell` and `kill` return at once; `run` acts on them."""

    def __init__(self, trainer: Trainer, job: RunJob, hearing: Hearing) -> None:
        execution = job.start.job.execution
        self.rank = job.rank.rank if job.rank else None
        self.gone = asyncio.Event()
        self.gone_at_s = 0.0
        self._trainer = trainer
        self._job = job
        self._hearing = hearing
        self._stall_timeout_s = execution.stall_timeout_s
        # What a study's job says is of its children.
        self._timeout_s = None if job.start.job.study else execution.timeout_s
        self._stalls = StallClock(self._stall_timeout_s)
        self._stopping = False
        self._killed = False
        self._finish: Finish | None = None
        self._misbehaviour: str | None = None
        self._overdue: Fault | None = None
        ref = {"operation_id": job.start.operation_id, "attempt": job.start.attempt}
        self._log = logging.LoggerAdapter(log, ref)

    @property
    def log_path(self) -> Path:
        return self._trainer.log_path

    @property
    def said_its_end(self) -> bool:
        return self._finish is not None and self._finish.outcome in _IN_ORDER

    @property
    def silent(self) -> bool:
        """Whether it is taken for hung, or is about to be."""
        return self._stalls.nearly

    def begin(self) -> None:
        self._log.info("%s %d, output in %s", self._what, self._trainer.pid, self.log_path)
        self._oom_kills_before = oom_kills()
        self._trainer.send(self._job)

    def tell(self, stop: Stop) -> None:
        """It has its hold's grace from now on: it may be silent, and take longer."""
        self._stopping = True
        self._trainer.send(stop)

    def kill(self) -> None:
        self._killed = True
        self._trainer.kill()

    async def run(self) -> Finish | None:
        """How it ended, once it is gone; None when `kill` came before it had said anything."""
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            relaying = group.create_task(self._relay())
            ending = group.create_task(self._trainer.ended())
            await asyncio.wait({relaying, ending}, return_when=asyncio.FIRST_COMPLETED)
            if relaying.done():
                await asyncio.wait({ending}, timeout=LINGER_S)
                if not ending.done() and self._misbehaviour is None:
                    self._misbehaviour = "the end of the pipe, but the process went on"
                self._trainer.kill()
            await ending
            self.gone_at_s = time.monotonic()
            watching.cancel()
            self.gone.set()
        await asyncio.to_thread(self._trainer.trim_log)
        finish = self._finish or self._death(ending.result())
        if finish is None or finish.error is None:
            return finish
        return finish.model_copy(update={"error": self._with_details(finish.error)})

    async def _watch(self) -> None:
        """Keeps its output bounded, and kills it when it hangs or has had its time.

        One that was told to stop has its grace instead.
        """
        stalls, taken = self._stalls, StallClock(self._timeout_s)
        while (overdue := self._fault_of_time(stalls.tick(), taken.tick())) is None or self._stopping:
            if self._hearing.held_up():  # on a full disk all wait for us
                stalls.sign_of_life()
            await asyncio.to_thread(self._trainer.trim_log)
            await asyncio.sleep(min(stalls.tick_s, taken.tick_s))
        self._overdue = overdue
        self._log.warning("killed: the %s %s", self._what, overdue.code)
        self._trainer.dump_stacks()
        await asyncio.sleep(STACKS_S)
        self._trainer.kill()

    async def _relay(self) -> None:
        """Until the finish or the end of the pipe. The finish waits for the process."""
        try:
            # What one says that was taken for hung does not count: the signal for its stacks may have woken it.
            while self._finish is None and (messages := await self._trainer.receive()) and self._overdue is None:
                for message in messages:
                    if gets_on(message):
                        self._stalls.sign_of_life()
                    if isinstance(message, Finish):
                        self._finish = message
                    elif isinstance(message, Hello):
                        raise PipeGarbage("a second greeting")
                await self._hearing.hear(messages)
        except PipeGarbage as garbage:
            self._misbehaviour = str(garbage)
            self._trainer.kill()

    @property
    def _what(self) -> str:
        return "trainer" if self.rank is None else f"trainer of rank {self.rank}"

    def _with_details(self, fault: Fault) -> Fault:
        details = {"log_tail": self._trainer.log_tail()} | fault.details
        if self.rank is not None:
            details["rank"] = self.rank
        return fault.model_copy(update={"details": details})

    def _death(self, status: int) -> Finish | None:
        """Why it ended, when it said nothing about it."""
        return None if self._killed else Finish(outcome=Outcome.FAILED, error=self._fault(status))

    def _fault_of_time(self, stalled: bool, timed_out: bool) -> Fault | None:
        if timed_out:
            return Fault(
                code="timed_out",
                message=f"The {self._what} was killed: the attempt took longer than its {self._timeout_s:g} s. Its "
                "stacks are in details.log_tail; raise execution.timeout_s if it may take longer.",
            )
        if stalled:
            silent = _SILENT.get(self._job.start.job.kind, "no step or validation batch")
            return Fault(
                code="stalled",
                message=f"The {self._what} was killed: {silent} for {self._stall_timeout_s:g} s. Its "
                "stacks are in details.log_tail; raise execution.stall_timeout_s if a step may take that long.",
            )
        return None

    def _fault(self, status: int) -> Fault:
        if self._overdue is not None:
            return self._overdue
        what, last_words = self._what, "`ops logs` has its output, details.log_tail the end of it."
        if self._misbehaviour is not None:
            message = f"The {what} broke the protocol of its pipe and was killed: {self._misbehaviour}. {last_words}"
            return Fault(code="trainer_protocol", message=message)
        if killed_for_memory(status, self._oom_kills_before):
            advice = "use a smaller batch_size or fewer num_workers, or give the worker's cgroup (container) more"
            return Fault(code="out_of_memory", message=f"The kernel killed the {what} for memory: {advice}.")
        if status < 0:
            by = signal_name(-status) + _HINTS.get(-status, "")
            return Fault(code="trainer_killed", message=f"The {what} was killed by {by}. {last_words}")
        message = f"The {what} exited with code {status} before it was done. {last_words}"
        return Fault(code="trainer_exited", message=message)


def gets_on(message: FromTrainer) -> bool:
    """Whether it comes from the thread that works.

    Not a checkpoint's report, which comes from the writer's thread, nor a measurement's progress, which is told beside
    it.
    """
    if isinstance(message, ProgressNow):
        return message.progress.measurement is None
    return isinstance(message, Alive | Started)
