"""One hold: an attempt of an operation from its acceptance until the API has its finish."""

import asyncio
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ops_contract.agents import HoldRef, StartTraining
from ops_contract.lifecycle import Kind, Outcome
from ops_contract.pipe import Alive, FromTrainer, Hello, Mark, ProgressNow, RunJob, Stop
from ops_contract.reports import (
    ArtifactSaved,
    CheckpointSaved,
    Fault,
    Finish,
    Metrics,
    Note,
    Report,
    Result,
    Standing,
    Started,
)
from ops_worker.cgroups import oom_kills
from ops_worker.delivery import Delivery
from ops_worker.energy.booking import Booking
from ops_worker.job_secrets import MissingSecret, Secrets
from ops_worker.outbox import Outbox
from ops_worker.output import pass_on
from ops_worker.slots import Slot, hello
from ops_worker.stalls import StallClock
from ops_worker.trainers import PipeGarbage, Trainer, before_imports
from ops_worker.waiting import first_of
from ops_worker.workspace import NoWorkspace, Workspaces

log = logging.getLogger(__name__)

# How long a trainer may take to exit after its last message.
LINGER_S = 5.0
# For a hung trainer to write its stacks. It is not known when it has; one that cannot is killed without.
STACKS_S = 1.0
_IN_ORDER = (Outcome.COMPLETED, Outcome.CANCELLED, Outcome.PREEMPTED)

_SILENT = {Kind.COMMAND: "it reported nothing", Kind.MEASUREMENT: "no batch, and no reading of the idle device"}

_HINTS = {
    signal.SIGKILL: " (out of memory? `dmesg` tells; a smaller batch_size needs less)",
    signal.SIGBUS: " (shared memory full? enlarge /dev/shm, or set num_workers to 0)",
    signal.SIGSEGV: " (a crash in native code; details.log_tail has the Python line that called it)",
    signal.SIGABRT: " (native code gave up; details.log_tail has its last words)",
}


class Hold:
    """The agent's calls (`confirm`, `cancel`, `preempt`, `fence`, `kill`) return at once; `run` acts on them.

    `runner` is the command line of `ops_worker.command`.
    """

    def __init__(
        self,
        order: StartTraining,
        slot: Slot,
        outbox: Outbox,
        delivery: Delivery,
        booking: Booking,
        workspaces: Workspaces,
        secrets: Secrets,
        runner: Sequence[str],
        storage_root: Path,
        cancel_grace_s: float,
        cpu_power_w: float | None,
        baselines: Path,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ref = HoldRef(operation_id=order.operation_id, attempt=order.attempt)
        self.slot = slot
        self.released = False
        self.environment: dict[str, Any] = {}  # what the agent adds to the trainer's
        self._order = order
        self._deadline = loop.time() + order.deadline_s
        self._outbox = outbox
        self._delivery = delivery
        self._booking = booking
        self._workspaces = workspaces
        self._secrets = secrets
        self._runner = runner
        self._storage_root = storage_root
        self._stall_timeout_s = order.job.execution.stall_timeout_s
        # What a study's job says is of its children.
        self._timeout_s = None if order.job.study else order.job.execution.timeout_s
        self._cancel_grace_s = cancel_grace_s
        self._cpu_power_w = cpu_power_w
        self._baselines = baselines
        self._confirmed = asyncio.Event()
        self._halted = asyncio.Event()
        self._fenced = asyncio.Event()
        self._trainer: Trainer | None = None
        self._stop: Stop | None = None
        self._outcome_if_killed: Literal[Outcome.PREEMPTED, Outcome.CANCELLED] = Outcome.PREEMPTED
        self._grace: asyncio.TimerHandle | None = None
        self._finish: Finish | None = None
        self._misbehaviour: str | None = None
        self._overdue: Fault | None = None
        self._storing = 0
        self._stored_seq = 0
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
            await self._booking.done()
            self._delivery.close()
            await first_of(sending, self._fenced.wait())
        finally:
            sending.cancel()
            self._booking.stop()
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
            self._tell(Stop(why="cancelled"))

    def preempt(self) -> None:
        """Checkpoint and hand back, within the grace; what has not begun is handed back as it is. May be repeated."""
        if self.released or self._halted.is_set():
            return
        if self._trainer is None:
            self._halted.set()
        elif self._grace is None:
            self._log.info("preempted")
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
        if self.released:  # what lasts is the way of its finish to the API
            return
        self._log.warning("killed: it did not stop within %.0f s", self._cancel_grace_s)
        self.kill()

    def _tell(self, stop: Stop) -> None:
        self._grace = asyncio.get_running_loop().call_later(self._cancel_grace_s, self._out_of_patience)
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
        try:
            # Its device is the slot's, whatever the job says.
            environ = {
                **self._order.job.env,
                **self._secrets.values(self._order.job.secrets),
                **self.slot.environ,
            }
        except MissingSecret as missing:
            fault = Fault(code="missing_secret", message=f"Not started: {missing}.")
            return Finish(outcome=Outcome.FAILED, permanent=True, error=fault)
        # The beats renew its lease from here on: its code may take its time to come.
        fetching = asyncio.create_task(self._workspaces.code(self._order))
        await first_of(fetching, self._halted.wait())
        if self._halted.is_set():
            return self._not_started()
        try:
            async with self._workspaces.open(self._order, fetching.result()) as directory:
                return await self._run_in(directory, environ)
        except NoWorkspace as problem:
            return Finish(outcome=Outcome.FAILED, permanent=problem.permanent, error=problem.fault)

    async def _run_in(self, directory: Path, environ: dict[str, str]) -> Finish:
        job = self._job(directory, environ)
        if self._order.job.kind is Kind.COMMAND:
            return await self._in_a_child(self._runner, {}, job)
        if at_start := before_imports(environ):
            return await self._in_a_child(self.slot.command, at_start, job)
        return await self._in_the_warm_one(job)

    async def _in_the_warm_one(self, job: RunJob) -> Finish:
        # A trainer may take its time to get warm, but not fail for ever.
        await first_of(self.slot.ready.wait(), self.slot.failing.wait(), self._halted.wait())
        if self._halted.is_set():
            return self._not_started()
        if not self.slot.ready.is_set():
            fault = Fault(code="trainer_not_ready", message=f"Handed back by the worker: {self.slot.trouble}")
            return Finish(outcome=Outcome.PREEMPTED, error=fault)
        with self.slot.lend() as self._trainer:
            return await self._supervise(self._trainer, job)

    async def _in_a_child(self, command: Sequence[str], at_start: Mapping[str, str], job: RunJob) -> Finish:
        """For what the warm trainer cannot become: a command's runner, or a trainer with variables of the job's."""
        if self._halted.is_set():
            return self._not_started()
        try:
            async with self.slot.child(command, at_start) as self._trainer:
                problem = await hello(self._trainer)
                if problem is None:
                    return await self._supervise(self._trainer, job)
                problem += f"; its output ends:\n{self._trainer.log_tail()}"
        except OSError as error:
            problem = f"cannot be started: {error}"
        if self._halted.is_set():
            return self._not_started()
        advice = f"The job sets {', '.join(sorted(at_start))}: are they right? " if at_start else ""
        message = f"{advice}The process for this job {problem}"
        return Finish(outcome=Outcome.FAILED, error=Fault(code="child_not_ready", message=message))

    def _not_started(self) -> Finish:
        fault = Fault(code="not_started", message="It was stopped before it began.")
        return Finish(outcome=self._outcome_if_killed, error=fault)

    async def _supervise(self, trainer: Trainer, job: RunJob) -> Finish:
        self._log.info("trainer %d, output in %s", trainer.pid, trainer.log_path)
        oom_kills_before = oom_kills()
        self._booking.begin()
        trainer.send(job)
        if self._stop is not None:
            trainer.send(self._stop)
        stalls, ended = StallClock(self._stall_timeout_s), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch(trainer, stalls))
            group.create_task(pass_on(trainer.log_path, ended, self._store, lambda: self._delivery.sent_seq))
            relaying = group.create_task(self._relay(trainer, stalls))
            ending = group.create_task(trainer.ended())
            await asyncio.wait({relaying, ending}, return_when=asyncio.FIRST_COMPLETED)
            if relaying.done():
                await asyncio.wait({ending}, timeout=LINGER_S)
                if not ending.done() and self._misbehaviour is None:
                    self._misbehaviour = "the end of the pipe, but the process went on"
                trainer.kill()
            await ending
            gone_at_s = time.monotonic()
            watching.cancel()
            ended.set()
        self._booking.over(gone_at_s, in_order=self._finish is not None and self._finish.outcome in _IN_ORDER)
        await asyncio.to_thread(trainer.trim_log)
        finish = self._finish or self._died(ending.result(), oom_kills_before)
        if finish.error is None:
            return finish
        details = {"log_tail": trainer.log_tail()} | finish.error.details
        return finish.model_copy(update={"error": finish.error.model_copy(update={"details": details})})

    async def _watch(self, trainer: Trainer, stalls: StallClock) -> None:
        """Keeps its output bounded, and kills it when it hangs or has had its time.

        One that was told to stop has its grace instead.
        """
        taken = StallClock(self._timeout_s)
        while (overdue := self._fault_of_time(stalls.tick(), taken.tick())) is None or self._stop is not None:
            if self._storing:  # on a full disk the trainer waits for us
                stalls.sign_of_life()
            await asyncio.to_thread(trainer.trim_log)
            await asyncio.sleep(min(stalls.tick_s, taken.tick_s))
        self._overdue = overdue
        self._log.warning("killed: %s", overdue.code)
        trainer.dump_stacks()
        await asyncio.sleep(STACKS_S)
        trainer.kill()

    def _job(self, directory: Path, environ: dict[str, str]) -> RunJob:
        offer = self.slot.offer
        return RunJob(
            start=self._order,
            storage_root=str(self._storage_root),
            directory=str(directory),
            environ=environ,
            device=offer.device,
            cores=offer.cores,
            device_uuid=offer.device_uuid,
            cpu_power_w=self._cpu_power_w,
            baselines=str(self._baselines),
        )

    async def _relay(self, trainer: Trainer, stalls: StallClock) -> None:
        """Reports go to the outbox, until the finish or the end of the pipe. The finish waits for the process."""
        try:
            # What one says that was taken for hung does not count: the signal for its stacks may have woken it.
            while self._finish is None and (messages := await trainer.receive()) and self._overdue is None:
                kinds = Started | Metrics | CheckpointSaved | ArtifactSaved | Result | Note
                reports: list[Report] = [self._completed(m) for m in messages if isinstance(m, kinds)]
                for message in messages:
                    if _gets_on(message):
                        stalls.sign_of_life()
                    if isinstance(message, Mark):
                        self._booking.mark(message)
                    elif isinstance(message, ProgressNow):
                        self._delivery.progress = message.progress
                        if message.progress.measurement is not None and self._delivery.sent_seq == self._stored_seq:
                            reports.append(Standing())  # where the API is away, one is enough
                    elif isinstance(message, Finish):
                        self._finish = message
                    elif isinstance(message, Hello):
                        raise PipeGarbage("a second greeting")
                await self._store(reports)
        except PipeGarbage as garbage:
            self._misbehaviour = str(garbage)
            trainer.kill()

    def _completed(self, report: Report) -> Report:
        if not isinstance(report, Started):
            return report
        return report.model_copy(update={"environment": self.environment | report.environment})

    async def _store(self, reports: Sequence[Report]) -> int:
        """The number of the last one; 0 when nothing was stored."""
        if not reports or self._fenced.is_set():
            return 0
        self._storing += 1
        try:
            self._stored_seq = await self._outbox.add(self.ref, reports)
        finally:
            self._storing -= 1
        self._delivery.news.set()
        return self._stored_seq

    def _died(self, status: int, oom_kills_before: int | None) -> Finish:
        """Why a trainer ended that said nothing about it."""
        if self._halted.is_set():
            message = "The worker killed the trainer before it had stopped; a resume goes on from the last checkpoint."
            return Finish(outcome=self._outcome_if_killed, error=Fault(code="killed", message=message))
        return Finish(outcome=Outcome.FAILED, error=self._fault(status, oom_kills_before))

    def _fault_of_time(self, stalled: bool, timed_out: bool) -> Fault | None:
        if timed_out:
            return Fault(
                code="timed_out",
                message=f"The trainer was killed: the attempt took longer than its {self._timeout_s:g} s. Its stacks "
                "are in details.log_tail; raise execution.timeout_s if it may take longer.",
            )
        if stalled:
            silent = _SILENT.get(self._order.job.kind, "no step or validation batch")
            return Fault(
                code="stalled",
                message=f"The trainer was killed: {silent} for {self._stall_timeout_s:g} s. Its "
                "stacks are in details.log_tail; raise execution.stall_timeout_s if a step may take that long.",
            )
        return None

    def _fault(self, status: int, oom_kills_before: int | None) -> Fault:
        if self._overdue is not None:
            return self._overdue
        last_words = "Its last output is in details.log_tail."
        if self._misbehaviour is not None:
            message = f"The trainer broke the protocol of its pipe and was killed: {self._misbehaviour}. {last_words}"
            return Fault(code="trainer_protocol", message=message)
        if status == -signal.SIGKILL and oom_kills_before is not None and (oom_kills() or 0) > oom_kills_before:
            advice = "use a smaller batch_size or fewer num_workers, or give the worker's cgroup (container) more"
            return Fault(code="out_of_memory", message=f"The kernel killed the trainer for memory: {advice}.")
        if status < 0:
            return Fault(code="trainer_killed", message=f"The trainer was killed by {_name(-status)}. {last_words}")
        message = f"The trainer exited with code {status} before it was done. {last_words}"
        return Fault(code="trainer_exited", message=message)


def _gets_on(message: FromTrainer) -> bool:
    """Whether it comes from the thread that works.

    Not a checkpoint's report, which comes from the writer's thread, nor a measurement's progress, which is told beside
    it.
    """
    if isinstance(message, ProgressNow):
        return message.progress.measurement is None
    return isinstance(message, Alive | Started)


def _name(number: int) -> str:
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"signal {number}"
    return f"{name.name}{_HINTS.get(name, '')}"
