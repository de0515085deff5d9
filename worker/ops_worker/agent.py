"""The agent: registers, takes starts, heartbeats, hands back. It runs no user code and imports no torch."""

import asyncio
import hmac
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from uuid import UUID, uuid4

from ops_contract.agents import (
    CREDENTIAL_PREFIX,
    CancelTraining,
    HoldRef,
    ProbeStorage,
    SlotOffer,
    StartTraining,
    StorageProbed,
    Validate,
    Validated,
    WorkerHealth,
    WorkerRegistration,
)
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.jobs import Job, runs_user_code
from ops_contract.lifecycle import Kind
from ops_contract.pipe import RunJob
from ops_contract.problems import Problem
from ops_worker.api_client import ApiClient
from ops_worker.delivery import Delivery
from ops_worker.describe import describe, validate
from ops_worker.energy.booking import Booking
from ops_worker.energy.delivery import EnergyDelivery
from ops_worker.energy.devices import Devices
from ops_worker.heartbeats import Heartbeats
from ops_worker.holds import Hold
from ops_worker.job_secrets import MissingSecret, Secrets
from ops_worker.leftovers import send
from ops_worker.outbox import Outbox, Sender
from ops_worker.settings import Settings
from ops_worker.slots import Slot
from ops_worker.storage_probe import probe
from ops_worker.waiting import first_of
from ops_worker.workspace import NoWorkspace, Workspaces
from relight.manifest import CheckpointCorrupt, CheckpointMissing, check_manifest

log = logging.getLogger(__name__)

# Waiting for its turn and unpacking the job's code included. The API waits a little longer.
VALIDATE_S = 15.0
# After the grace: for the kernel to end what was killed, and one try to send their finishes.
LAST_WORDS_S = 2.0


class Agent:
    """One incarnation. `url` is where its HTTP server is reached; `trainer_command` starts a trainer or describes.

    `gang_sockets` are those of the slots, where their trainers listen for other ranks.
    """

    def __init__(
        self,
        settings: Settings,
        devices: Devices,
        gang_sockets: Sequence[socket.socket],
        incarnation: UUID,
        url: str,
        trainer_command: Sequence[str],
    ) -> None:
        self.incarnation = incarnation
        self.url = url
        self._settings = settings
        self._devices = devices
        self._trainer_command = trainer_command
        self._credential = CREDENTIAL_PREFIX + secrets.token_urlsafe(32)
        self._secret = secrets.token_urlsafe(32)
        self._slots = [
            self._slot(offer, gang_socket) for offer, gang_socket in zip(devices.offers(), gang_sockets, strict=True)
        ]
        self._workspaces = Workspaces(settings.worker_state_dir, incarnation, self._api)
        self._secrets = Secrets(os.environ, settings.secrets_dir)
        self._draining = asyncio.Event()
        self._hurry = asyncio.Event()
        self._holds: dict[HoldRef, Hold] = {}
        self._beats = Heartbeats(settings, incarnation, self._holds, devices.sampler.now, self._draining)
        self._newest_attempt: dict[UUID, int] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._checking = 0  # starts that may become holds
        self._idle_since_s = math.inf
        # Each takes the memory and the time of importing torch.
        self._validating = asyncio.Semaphore(2)

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Until `stop`; `on_ready` is called once registered. Raises DescribeError when there is nothing to offer."""
        outboxes = self._settings.worker_state_dir / "outbox"
        orphans = Outbox.orphans(outboxes)
        sender = Sender(self.incarnation, self._settings.api_url, self._credential)
        async with (
            aclosing(Outbox.create(outboxes, sender)) as self._outbox,
            self._api() as self._reports_api,
            # Its own connections: no backlog of reports can keep a beat waiting.
            self._api() as self._beats_api,
            self._workspaces.held(),
            asyncio.TaskGroup() as group,
        ):
            self._energy = EnergyDelivery(self._reports_api, self._outbox, self.incarnation)
            tasks = [group.create_task(slot.keep_warm()) for slot in self._slots]
            tasks.append(group.create_task(self._energy.run()))
            # Beside the new work, not before it: an API that takes nothing from the dead must not stop the living.
            measured = {meter.device for meter in self._devices.meters(*range(len(self._slots)))}
            tasks += [group.create_task(send(orphan, self._devices.sampler, measured)) for orphan in orphans]
            tasks += [group.create_task(self._workspaces.clear()), group.create_task(self._work(on_ready))]
            if self._settings.worker_idle_exit_s is not None:
                tasks.append(group.create_task(self._leave_when_idle(self._settings.worker_idle_exit_s)))
            await self._draining.wait()
            await self._hand_back()
            for task in tasks:
                task.cancel()

    def stop(self) -> None:
        """Take no more work, hand back what there is, end. A second time: kill the trainers at once."""
        if self._draining.is_set():
            self._hurry.set()
        self._draining.set()

    def is_the_api(self, secret: str) -> bool:
        """Whether it is what this worker has told the API, and nobody else."""
        return hmac.compare_digest(secret.encode(), self._secret.encode())

    async def start(self, order: StartTraining) -> bool:
        """Take a job for all of its slots, or for none; False when this attempt was taken before.

        Raises 409 `stale`, `busy`, `no_user_code` or `device_not_ready`, 404 `no_checkpoint`, 422
        `checkpoint_corrupt` or `invalid`.
        """
        if self._taken(order):
            return False
        with self._checked():
            await self._check_checkpoint(order)
            warnings = await self._devices.check(order.slots, order.checkpoint)
        # Another start may have come while files were read; from here on nothing is awaited.
        if self._taken(order):
            return False
        self._take(order, warnings)
        return True

    def cancel(self, operation_id: UUID, order: CancelTraining) -> None:
        """Raises 409 `stale` for another incarnation, 404 for an attempt that is not here (any more)."""
        self._check_incarnation(order.incarnation)
        hold = self._holds.get(HoldRef(operation_id=operation_id, attempt=order.attempt))
        if hold is None:
            raise OpsError(ErrorCode.NOT_FOUND, f"attempt {order.attempt} of {operation_id} does not run here")
        hold.cancel(order.reason, order.force)

    async def validate(self, question: Validate) -> Validated:
        """What a trainer would make of the job. Raises 409 `stale`, `no_user_code`, 503 when none says it in time."""
        self._check_incarnation(question.incarnation)
        job = question.job
        self._check_user_code(job)
        # As an attempt of an operation that does not exist yet.
        order = StartTraining(
            incarnation=self.incarnation, operation_id=uuid4(), attempt=1, slots=[0], deadline_s=1, job=job
        )
        try:
            environ = job.env | self._secrets.values(job.secrets)
            async with asyncio.timeout(VALIDATE_S), self._validating:
                archive = await self._workspaces.code(order)
                async with self._workspaces.open(order, archive) as directory:
                    run_job = RunJob(
                        start=order,
                        storage_root=str(self._settings.storage_root.absolute()),
                        directory=str(directory),
                        environ=environ,
                        device="cpu",
                        cores=1,
                    )
                    told = await validate(self._trainer_command, run_job)
        except NoWorkspace as problem:
            if problem.permanent:
                return Validated(problems=[Problem(field="code", problem=str(problem))])
            told = None
        except (TimeoutError, MissingSecret):  # another worker may have the secret
            told = None
        if told is None:
            raise OpsError(ErrorCode.UNAVAILABLE, "the job could not be validated; its start will tell")
        return told

    async def probe_storage(self, wish: ProbeStorage) -> StorageProbed:
        """What this host sees of the storage root. Raises 409 `stale`."""
        self._check_incarnation(wish.incarnation)
        return await asyncio.to_thread(probe, self._settings.storage_root.absolute(), wish)

    def health(self) -> WorkerHealth:
        return WorkerHealth(
            incarnation=self.incarnation,
            name=self._settings.worker_name,
            draining=self._draining.is_set(),
            slots=[slot.offer for slot in self._slots],
            holds=list(self._holds),
        )

    def _slot(self, offer: SlotOffer, gang_socket: socket.socket) -> Slot:
        offer = offer.model_copy(update={"port": gang_socket.getsockname()[1]})
        logs, prefix = self._settings.worker_state_dir / "logs", str(self.incarnation)
        environ = self._devices.environ(offer.index)
        return Slot(offer, self._trainer_command, logs, prefix, environ, gang_socket.fileno())

    def _api(self) -> ApiClient:
        return ApiClient(self._settings.api_url, self._credential)

    # ---- starts

    def _taken(self, order: StartTraining) -> bool:
        self._check_incarnation(order.incarnation)
        if HoldRef(operation_id=order.operation_id, attempt=order.attempt) in self._holds:
            return True
        newest = self._newest_attempt.get(order.operation_id, 0)
        if order.attempt <= newest:
            raise OpsError(ErrorCode.STALE, f"attempt {newest} of this operation was here already", newest=newest)
        if self._draining.is_set():
            raise OpsError(ErrorCode.STALE, "this worker takes no more work")
        self._check_user_code(order.job)
        if self._beats.terms is None:  # it overtook the answer to the registration
            raise OpsError(ErrorCode.BUSY, "this worker waits for the API's terms")
        self._check_ranks(order)
        for index in order.slots:
            self._check_slot(index)
        return False

    @contextmanager
    def _checked(self) -> Iterator[None]:
        self._checking += 1
        try:
            yield
        finally:
            self._checking -= 1
            self._idle_since_s = time.monotonic()

    def _check_incarnation(self, incarnation: UUID) -> None:
        if incarnation != self.incarnation:
            raise OpsError(ErrorCode.STALE, f"that worker is gone; this is {self.incarnation}")

    def _check_user_code(self, job: Job) -> None:
        if runs_user_code(job) and not self._settings.user_code:
            what = "code of its users, variables of their jobs included"
            raise OpsError(ErrorCode.NO_USER_CODE, f"this worker runs no {what}: OPS_USER_CODE=1 allows it")

    def _check_ranks(self, order: StartTraining) -> None:
        gang, count = order.gang, len(order.slots)
        if len(set(order.slots)) < count:
            raise OpsError(ErrorCode.INVALID, "slots: one of them is given twice")
        if gang is None and count > 1:
            raise OpsError(ErrorCode.INVALID, f"slots: {count} of them, but no gang to say which rank each has")
        if gang is not None and gang.first_rank + count > gang.world_size:
            last_rank = gang.first_rank + count - 1
            raise OpsError(ErrorCode.INVALID, f"gang: there is no rank {last_rank} among {gang.world_size}")
        if gang is not None and order.job.kind is not Kind.TRAINING:
            raise OpsError(ErrorCode.INVALID, f"gang: a {order.job.kind} runs in one process")

    def _check_slot(self, index: int) -> None:
        if index >= len(self._slots):
            raise OpsError(ErrorCode.INVALID, f"slot: there is no slot {index}, only {len(self._slots)}")
        if (trouble := self._slots[index].trouble) is not None:
            raise OpsError(ErrorCode.BUSY, trouble)
        for hold in self._holds.values():
            if self._slots[index] in hold.slots and not hold.released:
                # It may be busy with what has ended for the API: the next beat tells.
                self._beats.now.set()
                raise OpsError(ErrorCode.BUSY, f"slot {index} runs {hold.ref.operation_id}")

    async def _check_checkpoint(self, order: StartTraining) -> None:
        if order.checkpoint is None:
            return
        try:
            await asyncio.to_thread(check_manifest, self._settings.storage_root, order.checkpoint)
        except CheckpointMissing as error:
            raise OpsError(ErrorCode.NO_CHECKPOINT, str(error)) from error
        except CheckpointCorrupt as error:
            raise OpsError(ErrorCode.CHECKPOINT_CORRUPT, str(error)) from error

    def _take(self, order: StartTraining, warnings: Sequence[str]) -> None:
        terms = self._beats.terms
        assert terms is not None
        for older in self._holds.values():
            if older.ref.operation_id == order.operation_id:
                older.fence()  # a newer attempt exists, so this one has ended
        ref = HoldRef(operation_id=order.operation_id, attempt=order.attempt)
        delivery = Delivery(self._reports_api, self._outbox, self.incarnation, ref)
        step = order.checkpoint.step if order.checkpoint else 0
        meters = self._devices.meters(*order.slots)
        booking = Booking(ref, meters, self._devices.sampler, self._outbox, self._energy.news, step)
        hold = Hold(
            order,
            [self._slots[index] for index in order.slots],
            self._outbox,
            delivery,
            booking,
            self._workspaces,
            self._secrets,
            self._settings,
            terms,
            runner=(self._trainer_command[0], "-P", "-m", "ops_worker.command"),
            environment=self._devices.environment(*order.slots) | _code(order) | {"preflight": list(warnings)},
        )
        self._holds[ref] = hold
        self._newest_attempt[order.operation_id] = order.attempt
        task = asyncio.create_task(self._serve(hold, [meter.device for meter in meters]))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        self._beats.now.set()

    async def _serve(self, hold: Hold, devices: Sequence[str]) -> None:
        """It stays in the heartbeats until its finish has been accepted. `devices` are those that it is booked on."""
        sampler = self._devices.sampler
        for device in devices:
            sampler.note_busy(device)
        try:
            await hold.run()
            await self._outbox.forget(hold.ref)
        except Exception:
            # One hold's trouble is not the others': its lease runs out, and its slot is free.
            log.exception("a hold was lost", extra=hold.ref.model_dump())
        finally:
            for device in devices:
                sampler.note_idle(device)
            del self._holds[hold.ref]
            self._idle_since_s = time.monotonic()

    async def _work(self, on_ready: Callable[[], None]) -> None:
        description = await describe(self._trainer_command)
        # Made once: the API takes no other of the same incarnation, and a laptop's host name changes.
        worker = WorkerRegistration(
            incarnation=self.incarnation,
            credential=self._credential,
            secret=self._secret,
            name=self._settings.worker_name,
            host=socket.gethostname(),
            url=self.url,
            slots=[slot.offer for slot in self._slots],
            workloads=description.workloads,
            user_code=self._settings.user_code,
            versions=description.versions,
        )

        def ready() -> None:
            self._idle_since_s = time.monotonic()
            on_ready()

        await self._beats.run(worker, self._beats_api, ready)

    # ---- the end

    async def _leave_when_idle(self, idle_s: float) -> None:
        """A start that comes just then is refused, as after any SIGTERM."""
        while True:
            left_s = self._idle_left_s(idle_s)
            if left_s <= 0:
                break
            await asyncio.sleep(min(left_s, idle_s))
        log.info("nothing to do for %g s (OPS_WORKER_IDLE_EXIT_S): this worker ends", idle_s)
        self._draining.set()

    def _idle_left_s(self, idle_s: float) -> float:
        busy = bool(self._holds) or self._checking > 0
        return idle_s if busy else self._idle_since_s + idle_s - time.monotonic()

    async def _hand_back(self) -> None:
        """Every hold preempted and its finish accepted; what takes longer than the grace is killed."""
        log.info("handing back %d holds", len(self._holds))
        self._beats.now.set()
        for hold in list(self._holds.values()):
            hold.preempt()
        grace_s = self._beats.terms.cancel_grace_s if self._beats.terms else 0.0
        await first_of(self._all_served(), self._hurry.wait(), asyncio.sleep(grace_s))
        for hold in list(self._holds.values()):
            hold.kill()
        await first_of(self._all_said(), asyncio.sleep(LAST_WORDS_S))
        # What could not be sent is in the outbox, for the successor.
        for task in self._serving:
            task.cancel()
        await self._all_served()
        await self._beats.say_goodbye(self._beats_api)

    async def _all_served(self) -> None:
        while self._serving:
            await asyncio.wait(self._serving)

    async def _all_said(self) -> None:
        await self._all_served()
        await self._energy.drain()


def _code(order: StartTraining) -> dict[str, object]:
    code = order.job.code
    return {"git_commit": code.commit, "git_dirty": code.dirty} if code and code.commit else {}
