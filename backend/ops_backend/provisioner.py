"""Asks a scheduler for workers where operations wait and no slot is there for them, and looks after what it was asked.

What is intended is written first, then the scheduler is asked, then its answer is written: a crash between is found by
the name of the job. Nothing is asked for inside a transaction.
"""

import logging
from collections.abc import Mapping, Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.database import Sessions
from ops_backend.engines import Engine, EngineAway, EngineJob, EngineRefused, EngineRequest, Stage
from ops_backend.engines.requests import request_for
from ops_backend.settings import Settings
from ops_backend.store import engine_jobs
from ops_backend.store.engine_jobs import OpenJob, Seen, Wanting
from ops_backend.ticking import forever

log = logging.getLogger(__name__)

# A scheduler is asked by commands; their users are told to keep them rare.
TICK_S = 2.0
# Longer than a submission may take: what the scheduler does not know by then it was never asked for.
ADOPT_S = 60.0
AWAY = "UNKNOWN"
REFUSED = "REFUSED"
_STAGES = {Stage.PENDING: "submitted", Stage.RUNNING: "running", Stage.ENDED: "ended"}


class Provisioner:
    """One a backend; the statements guard themselves, so several do no harm."""

    def __init__(self, sessions: Sessions, engine: Engine, settings: Settings, *, adopt_s: float = ADOPT_S) -> None:
        self._sessions = sessions
        self._engine = engine
        self._settings = settings
        self._adopt_s = adopt_s

    async def run(self) -> None:
        """Until cancelled; at once where no job may be asked for."""
        if self._settings.slurm_max_jobs > 0:
            await forever(self.look, TICK_S, log)

    async def look(self) -> None:
        while await self._settle():
            pass
        jobs = await self._open()
        try:
            known = await self._engine.poll([job.name for job in jobs])
        except (EngineAway, EngineRefused) as problem:
            # Those that would ask now wait for it too, and are told; they ask when it is back.
            for job in [*jobs, *await self._intend()]:
                await self._observe(job, away(job, self._engine.title, str(problem)))
            return
        for job in jobs:
            await self._observe(job, self._found(job, known))
        await self._give_up([job for job in await self._open() if not (job.awaited or job.came)])
        await self._ask(await self._intend())

    async def _settle(self) -> bool:
        async with self._sessions.begin() as session:
            return await engine_jobs.settle(session, self._engine.name)

    async def _open(self) -> Sequence[OpenJob]:
        async with self._sessions.begin() as session:
            return await engine_jobs.open_jobs(session, self._engine.name)

    async def _observe(self, job: OpenJob, seen: Seen | None) -> bool:
        if seen is None:
            return True
        async with self._sessions.begin() as session:
            wrote = await engine_jobs.observe(session, job, seen)
        if wrote and seen.message:
            log.info("%s", seen.message, extra={"operation_id": job.operation_id})
        return wrote

    def _found(self, job: OpenJob, known: Mapping[str, EngineJob]) -> Seen | None:
        """What a poll says of it; None: nothing new."""
        found, title = known.get(job.name), self._engine.title
        if found is not None:
            return observed(job, found, title, self._settings.slurm_pending_warn_s)
        if job.external_id is None and job.age_s < self._adopt_s:
            return None  # it may be under way to the scheduler
        if job.external_id is None:
            message = f"{title} was never asked for a worker: it does not know {job.name}"
            return Seen("ended", "NEVER", "it was never submitted", message=message, failures=1)
        message = f"{title} job {job.external_id} is not known to {title} any more"
        return Seen("ended", "GONE", None, message=message, failures=_failures(job))

    async def _give_up(self, idle: Sequence[OpenJob]) -> None:
        """Of jobs whose operation needs them no more, before a worker came: handed over, or killed."""
        if not idle:
            return
        async with self._sessions.begin() as session:
            waiting = [(w.id, request_for(w.job, self._settings)) for w in await self._wanting(session)]
        for job in idle:
            same = next((one for one in waiting if one[1] == job.request), None)
            if same is not None:
                waiting.remove(same)
            if same is not None and await self._handed_over(job, same[0]):
                continue
            if job.external_id is not None:
                try:
                    await self._engine.kill(job.external_id)
                except (EngineAway, EngineRefused) as problem:
                    log.warning("%s is not cancelled yet: %s", job.name, problem)

    async def _handed_over(self, job: OpenJob, operation_id: UUID) -> bool:
        async with self._sessions.begin() as session:
            return await engine_jobs.hand_over(session, job, operation_id)

    async def _intend(self) -> list[OpenJob]:
        """Those that this backend is to ask for, in the order of the queue."""
        settings, engine = self._settings, self._engine.name
        intended: list[UUID | None] = []
        async with self._sessions.begin() as session:
            room = await engine_jobs.room(session, settings.slurm_max_jobs)
            waiting = await self._wanting(session) if room else []
            askable = [(w, request) for w in waiting if (request := request_for(w.job, settings)) is not None]
            for one, request in askable[:room]:
                intended.append(await engine_jobs.intend(session, one.id, engine, request, one.failures))
        jobs = {job.id: job for job in await self._open()} if intended else {}
        return [jobs[id] for id in intended if id in jobs]

    async def _wanting(self, session: AsyncSession) -> list[Wanting]:
        return await engine_jobs.wanting(session, self._settings.lease_s, self._settings.slurm_after_s)

    async def _ask(self, jobs: Sequence[OpenJob]) -> None:
        for job in jobs:
            try:
                external_id = await self._engine.submit(job.name, job.request)
            except EngineAway as problem:
                await self._observe(job, away(job, self._engine.title, str(problem)))
            except EngineRefused as refusal:
                await self._observe(job, refused(job, self._engine.title, str(refusal)))
            else:
                message = f"{self._engine.title} was asked for a worker: job {external_id}, {asked(job.request)}"
                seen = Seen("submitted", "PENDING", None, external_id, message)
                if not await self._observe(job, seen) and not await self._is_known(job):
                    # Another backend has given the row up meanwhile, and nobody would look after this job.
                    await self._engine.kill(external_id)

    async def _is_known(self, job: OpenJob) -> bool:
        return any(other.id == job.id for other in await self._open())


def observed(job: OpenJob, found: EngineJob, title: str, warn_s: float) -> Seen | None:
    """What the scheduler's word makes of the row; None: nothing."""
    state = _STAGES[found.stage]
    warned = job.warned or (found.stage is Stage.PENDING and job.age_s > warn_s)
    now, was = (state, found.state, found.reason, warned), (job.state, job.engine_state, job.reason, job.warned)
    if now == was and job.external_id is not None:
        return None
    message = None
    if found.stage is Stage.ENDED:
        served = "" if job.came else ", before a worker came"
        message = f"{title} job {found.external_id} has ended: {_words(found)}{served}"
    elif job.engine_state == AWAY:
        message = f"{title} answers again: job {found.external_id} is {_words(found)}"
    elif job.external_id is None:
        message = f"{title} was asked for a worker: job {found.external_id}, {asked(job.request)}"
    elif warned and not job.warned:
        message = (
            f"{title} job {found.external_id} has been pending for {job.age_s:.0f} s: {found.reason or 'no reason'}"
        )
    elif state == "running" and job.state != "running":
        message = f"{title} job {found.external_id} has begun"
    elif state == "submitted" and job.state == "running":
        message = f"{title} job {found.external_id} is pending again: {_words(found)}"
    failures = _failures(job) if found.stage is Stage.ENDED else 0
    return Seen(state, found.state, found.reason, found.external_id, message, failures, warned)


def away(job: OpenJob, title: str, problem: str) -> Seen | None:
    """Whatever has become of the job stays as it was known."""
    if job.engine_state == AWAY:
        return None
    message = f"{title} does not answer, and is asked again: {problem}"
    return Seen(job.state, AWAY, problem, message=message, warned=job.warned)


def refused(job: OpenJob, title: str, words: str) -> Seen:
    wait_s = min(engine_jobs.MAX_BACKOFF_S, engine_jobs.BACKOFF_S * 2 ** min(job.failures, 16))
    message = f"{title} refused a worker, and is asked again in {wait_s} s: {words}"
    return Seen("ended", REFUSED, words, message=message, failures=1)


def asked(request: EngineRequest) -> str:
    gpus = f" and {request.gpus} GPUs" if request.gpus else ""
    return f"{request.nodes} nodes of {request.cores} cores{gpus}".replace("1 nodes", "1 node", 1)


def _failures(job: OpenJob) -> int:
    """What its end adds to the jobs in a row that were of no use: one, or it takes them all back."""
    return 1 if job.unserved else -job.failures


def _words(found: EngineJob) -> str:
    return f"{found.state} ({found.reason})" if found.reason else found.state
