"""One hold: an attempt of an operation from its acceptance until the API has its finish."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal

from ops_contract.agents import HoldRef, StartTraining, WorkerRegistered
from ops_contract.lifecycle import Kind, Outcome
from ops_contract.pipe import FromTrainer, Mark, ProgressNow, Rank, RunJob, Stop
from ops_contract.reports import (
    PEER_LOST,
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
from ops_worker.delivery import Delivery
from ops_worker.energy.booking import Booking
from ops_worker.job_secrets import MissingSecret, Secrets
from ops_worker.outbox import Outbox
from ops_worker.output import pass_on
from ops_worker.processes import Hearing, JobProcess
from ops_worker.ranks import run_together
from ops_worker.settings import Settings
from ops_worker.slots import Slot, hello
from ops_worker.trainers import Trainer, before_imports
from ops_worker.waiting import first_of
from ops_worker.workspace import NoWorkspace, Workspaces

log = logging.getLogger(__name__)

# Within it a member that says nothing any more has lost the attempt for all, and a heartbeat has told the others.
LEASES_FOR_THE_CAUSE = 2


class Hold:
    """The agent's calls (`confirm`, `cancel`, `preempt`, `fence`, `kill`) return at once; `run` acts on them.

    Of a gang it is this worker's part: one rank in each of its slots. `runner` is the command line of
    `ops_worker.command`; `environment` is what the agent knows of it, for people, beside the trainer's.
    """

    def __init__(
        self,
        order: StartTraining,
        slots: Sequence[Slot],
        outbox: Outbox,
        delivery: Delivery,
        booking: Booking,
        workspaces: Workspaces,
        secrets: Secrets,
        settings: Settings,
        terms: WorkerRegistered,
        runner: Sequence[str],
        environment: Mapping[str, Any],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ref = HoldRef(operation_id=order.operation_id, attempt=order.attempt)
        self.slots = slots
        self.released = False
        self._order = order
        self._deadline = loop.time() + order.deadline_s
        self._outbox = outbox
        self._delivery = delivery
        self._booking = booking
        self._workspaces = workspaces
        self._secrets = secrets
        self._settings = settings
        self._terms = terms
        self._runner = runner
        self._environment = environment
        self._confirmed = asyncio.Event()
        self._halted = asyncio.Event()
        self._fenced = asyncio.Event()
        self._impatient = asyncio.Event()
        self._trainers: list[Trainer] = []
        self._processes: list[JobProcess] = []
        self._stop: Stop | None = None
        self._outcome_if_killed: Literal[Outcome.PREEMPTED, Outcome.CANCELLED] = Outcome.PREEMPTED
        self._grace: asyncio.TimerHandle | None = None
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
            if finish is not None and self._lost_another_member(finish):
                await self._leave_the_cause_to_others()
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
        if not self._trainers:
            self._halted.set()
        elif self._grace is None:
            self._log.info("preempted")
            self._tell(Stop(why="preempted"))

    def fence(self) -> None:
        """The attempt belongs to nobody any more: kill it and say nothing about it."""
        if not self._fenced.is_set() and not self.released:
            self._log.warning("fenced: this attempt has ended for the API; its trainers are killed")
        self._fenced.set()
        self.kill()

    def kill(self) -> None:
        """End it now; it is then reported preempted, or cancelled if that was wanted."""
        self._halted.set()
        self._impatient.set()
        for process in self._processes:
            process.kill()
        for trainer in self._trainers:
            trainer.kill()

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
        self._log.warning("killed: it did not stop within %.0f s", self._terms.cancel_grace_s)
        self.kill()

    def _tell(self, stop: Stop) -> None:
        self._grace = asyncio.get_running_loop().call_later(self._terms.cancel_grace_s, self._out_of_patience)
        self._stop = stop
        for process in self._processes:
            process.tell(stop)

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
            environ = self._order.job.env | self._secrets.values(self._order.job.secrets)
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
        jobs = [self._job(local_rank, directory, environ) for local_rank in range(len(self.slots))]
        if self._order.job.kind is Kind.COMMAND:
            return await self._in_children([slot.runner(self._runner) for slot in self.slots], {}, jobs)
        if at_start := before_imports(environ):
            return await self._in_children([slot.trainer(at_start) for slot in self.slots], at_start, jobs)
        return await self._in_the_warm_ones(jobs)

    async def _in_the_warm_ones(self, jobs: Sequence[RunJob]) -> Finish:
        # A trainer may take its time to get warm, but not fail for ever.
        while not self._halted.is_set() and (cold := [slot for slot in self.slots if not slot.ready.is_set()]):
            failing = next((slot for slot in cold if slot.failing.is_set()), None)
            if failing is not None:
                fault = Fault(code="trainer_not_ready", message=f"Handed back by the worker: {failing.trouble}")
                return Finish(outcome=Outcome.PREEMPTED, error=fault)
            # One that is ready may get cold again while another is waited for.
            await first_of(cold[0].ready.wait(), *(slot.failing.wait() for slot in cold), self._halted.wait())
        if self._halted.is_set():
            return self._not_started()
        with contextlib.ExitStack() as stack:
            self._trainers = [stack.enter_context(slot.lend()) for slot in self.slots]
            return await self._supervise(jobs)

    async def _in_children(
        self,
        children: Sequence[AbstractAsyncContextManager[Trainer]],
        at_start: Mapping[str, str],
        jobs: Sequence[RunJob],
    ) -> Finish:
        """For what the warm trainers cannot become: a command's runner, or trainers with variables of the job's."""
        if self._halted.is_set():
            return self._not_started()
        try:
            async with contextlib.AsyncExitStack() as stack:
                for child in children:
                    self._trainers.append(await stack.enter_async_context(child))
                problem = await self._greeted()
                if problem is None and not self._halted.is_set():
                    return await self._supervise(jobs)
        except OSError as error:
            problem = f"cannot be started: {error}"
        if self._halted.is_set():
            return self._not_started()
        advice = f"The job sets {', '.join(sorted(at_start))}: are they right? " if at_start else ""
        message = f"{advice}The process for this job {problem}"
        return Finish(outcome=Outcome.FAILED, error=Fault(code="child_not_ready", message=message))

    async def _greeted(self) -> str | None:
        """What is wrong with the first child that is not ready, or None."""
        problems: list[str] = []

        async def one(trainer: Trainer) -> None:
            if (problem := await hello(trainer)) is not None:
                problems.append(f"{problem}; its output ends:\n{trainer.log_tail()}")
                for each in self._trainers:
                    each.kill()

        await asyncio.gather(*(one(trainer) for trainer in self._trainers))
        return problems[0] if problems else None

    def _not_started(self) -> Finish:
        fault = Fault(code="not_started", message="It was stopped before it began.")
        return Finish(outcome=self._outcome_if_killed, error=fault)

    async def _supervise(self, jobs: Sequence[RunJob]) -> Finish:
        self._processes = [
            JobProcess(trainer, job, self._hearing(local_rank))
            for local_rank, (trainer, job) in enumerate(zip(self._trainers, jobs, strict=True))
        ]
        first = self._processes[0]
        self._booking.begin()
        for process in self._processes:
            process.begin()
            if self._stop is not None:
                process.tell(self._stop)
        async with asyncio.TaskGroup() as group:
            if self._leads:
                group.create_task(pass_on(first.log_path, first.gone, self._store, lambda: self._delivery.sent_seq))
            finish = await run_together(self._processes)
            gone_at_s = max(process.gone_at_s for process in self._processes)
            self._booking.over(gone_at_s, in_order=first.said_its_end)
        return finish or self._killed()

    def _job(self, local_rank: int, directory: Path, environ: dict[str, str]) -> RunJob:
        slot, gang = self.slots[local_rank], self._order.gang
        rank = gang and Rank(
            rank=gang.first_rank + local_rank,
            local_rank=local_rank,
            world_size=gang.world_size,
            host=gang.host,
            port=gang.port,
        )
        return RunJob(
            start=self._order,
            storage_root=str(self._settings.storage_root.absolute()),
            directory=str(directory),
            # Its device is the slot's, whatever the job says.
            environ={**environ, **slot.environ},
            device=slot.offer.device,
            cores=slot.offer.cores,
            rank=rank,
            device_uuid=slot.offer.device_uuid,
            cpu_power_w=self._settings.cpu_power_w,
            baselines=str(self._settings.worker_state_dir.absolute() / "baselines"),
        )

    @property
    def _leads(self) -> bool:
        """Whether rank 0 is here, which reports for all."""
        return self._order.gang is None or self._order.gang.first_rank == 0

    def _hearing(self, local_rank: int) -> Hearing:
        """Steps count once for all ranks, joules once for those of this worker."""
        by_role = self._hear_reports if self._leads else self._hear_marks
        return Hearing(by_role if local_rank == 0 else _hear_nothing, lambda: self._storing > 0)

    async def _hear_reports(self, messages: Sequence[FromTrainer]) -> None:
        """Into the outbox. The finish waits for the process."""
        kinds = Started | Metrics | CheckpointSaved | ArtifactSaved | Result | Note
        reports: list[Report] = [self._completed(m) for m in messages if isinstance(m, kinds)]
        await self._hear_marks(messages)
        for message in messages:
            if isinstance(message, ProgressNow):
                self._delivery.progress = message.progress
                if message.progress.measurement is not None and self._delivery.sent_seq == self._stored_seq:
                    reports.append(Standing())  # where the API is away, one is enough
        await self._store(reports)

    async def _hear_marks(self, messages: Sequence[FromTrainer]) -> None:
        for message in messages:
            if isinstance(message, Mark):
                self._booking.mark(message)

    def _completed(self, report: Report) -> Report:
        if not isinstance(report, Started):
            return report
        return report.model_copy(update={"environment": {**self._environment, **report.environment}})

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

    def _killed(self) -> Finish:
        """Before it had stopped by itself."""
        message = "The worker killed the trainer before it had stopped; a resume goes on from the last checkpoint."
        fault = Fault(code="killed", message=message, details={"log_tail": self._trainers[0].log_tail()})
        return Finish(outcome=self._outcome_if_killed, error=fault)

    def _lost_another_member(self, finish: Finish) -> bool:
        gang = self._order.gang
        lost = finish.error is not None and finish.error.code == PEER_LOST
        return lost and gang is not None and gang.world_size > len(self.slots)

    async def _leave_the_cause_to_others(self) -> None:
        """Until the attempt has ended for all, or it is not to be waited for; the lease bounds it."""
        self._impatient.clear()
        wait_s = LEASES_FOR_THE_CAUSE * self._terms.lease_s
        await first_of(self._fenced.wait(), self._impatient.wait(), asyncio.sleep(wait_s))


async def _hear_nothing(messages: Sequence[FromTrainer]) -> None:
    """What rank 0 says is said for all."""
