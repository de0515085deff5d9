"""Drives the store as the API and its loops do: a transaction a call."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal
from uuid import UUID, uuid4

from sqlalchemy import text

from ops_backend.database import Sessions
from ops_backend.store import (
    children,
    claims,
    energy,
    fork,
    leases,
    queries,
    reports,
    studies,
    submit,
    transitions,
    workers,
)
from ops_backend.store.ledger_views import Rates
from ops_backend.store.submit import Elastic, Fleet, Submission
from ops_contract.agents import (
    CREDENTIAL_PREFIX,
    Heartbeat,
    HeartbeatAnswer,
    HoldRef,
    ReportBatch,
    SlotOffer,
    WorkerRegistration,
    WorkloadOffer,
)
from ops_contract.energy import DeviceNow, EnergyBatch, EnergyWindow, Quality, Source, Use
from ops_contract.history import AttemptView
from ops_contract.jobs import Execution, JobSpec
from ops_contract.ledger import EnergyLedger
from ops_contract.lifecycle import CheckpointType, Drain, Outcome, Phase, Status
from ops_contract.measurements import MEASUREMENT
from ops_contract.operations import ForkRequest, Operation, ReplayRequest, ResumeAccepted
from ops_contract.plans import ChildPlan, ChildResult, GridAbout, Plan
from ops_contract.reports import CheckpointSaved, Exactness, Fault, Finish, Metrics, Progress, Report, Series, Started

LEASE_S = 60.0
TOY = WorkloadOffer(name="toy", config_schema={"type": "object", "properties": {}, "additionalProperties": False})


def credential_of(incarnation: UUID) -> str:
    """What the workers of these tests show, so that a test knows it too."""
    return CREDENTIAL_PREFIX + incarnation.hex + 11 * "0"


def registration(incarnation: UUID, **changes: Any) -> dict[str, Any]:
    """The body of POST /workers, of a worker with one CPU slot."""
    return {
        "incarnation": str(incarnation),
        "credential": credential_of(incarnation),
        "secret": "s" * 43,
        "name": "w",
        "host": "h",
        "url": "http://127.0.0.1:1",
        "slots": [{"index": 0, "device": "cpu", "cores": 1}],
        **changes,
    }


def shown_by(incarnation: UUID) -> dict[str, str]:
    """How such a worker speaks to the API."""
    return {"Authorization": f"Bearer {credential_of(incarnation)}", "Content-Type": "application/json"}


@dataclass(frozen=True)
class Held:
    """An attempt as its worker knows it, with the number of its next report."""

    operation_id: UUID
    attempt: int
    incarnation: UUID
    seq: int = 1


class Store:
    """Every method is one transaction; those that end in `_in` report for an attempt."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    async def worker(
        self,
        name: str = "w",
        *,
        device: str = "cpu",
        slots: int = 1,
        cores: int = 1,
        workloads: Any = (TOY,),
        **kw: Any,
    ) -> UUID:
        incarnation = uuid4()
        offer = WorkerRegistration(
            incarnation=incarnation,
            name=name,
            host=kw.get("host", "h"),
            credential=credential_of(incarnation),
            secret="s" * 43,
            url="http://127.0.0.1:1",
            slots=[
                SlotOffer.model_validate({"index": i, "device": device, "cores": cores} | kw.get("slot", {}))
                for i in range(slots)
            ],
            workloads=list(workloads),
            user_code=kw.get("user_code", False),
        )
        async with self.sessions.begin() as session:
            await workers.register(session, offer, LEASE_S, offer.url)
        return incarnation

    async def submit(self, key: str | None = None, elastic: Elastic | None = None, **spec: Any) -> UUID:
        submission = Submission("me", key, b'{"workload": "toy"}')
        if "command" not in spec and spec.get("workload") != MEASUREMENT:
            # A period of its own, so that all its checkpoints are kept.
            execution = {"checkpoint_every": {"epochs": 1}} | spec.get("execution", {})
            spec = {"workload": "toy"} | spec | {"execution": execution}
        async with self.sessions.begin() as session:
            found = await submit.replay(session, submission)
            made = found or await submit.submit_if_new(
                session, JobSpec.model_validate(spec), submission, Fleet(LEASE_S, elastic)
            )
            made = made or await submit.replay(session, submission)
        assert made is not None
        return made

    async def claim(self) -> claims.Claim | None:
        async with self.sessions.begin() as session:
            return await claims.claim_next(session, LEASE_S)

    async def running(self, **spec: Any) -> Held:
        """An operation that a worker has just been given."""
        await self.submit(**spec)
        claim = await self.claim()
        assert claim is not None
        return held(claim)

    async def refuse(self, claim: claims.Claim, rest_s: float = 0.0, member: int = 0) -> str | None:
        fault = Fault(code="busy", message="busy")
        async with self.sessions.begin() as session:
            return await claims.refuse_if_held(session, claim, claim.members[member], error=fault, rest_s=rest_s)

    async def report(
        self, held: Held, *batch: Report, seq: int | None = None, progress: Progress | None = None
    ) -> Held:
        """Raises OpsError as the API would answer."""
        first = seq or held.seq
        message = ReportBatch(incarnation=held.incarnation, first_seq=first, reports=list(batch), progress=progress)
        async with self.sessions.begin() as session:
            accepted = await reports.accept(session, held.operation_id, held.attempt, message, backoff_s=0.0)
        return Held(held.operation_id, held.attempt, held.incarnation, accepted.last_seq + 1)

    async def finish(self, held: Held, outcome: Outcome, **kw: Any) -> Held:
        return await self.report(held, Finish.model_validate({"outcome": outcome} | kw))

    async def lose(self, held: Held) -> Status | None:
        async with self.sessions.begin() as session:
            return await transitions.lose_if_expired(session, held.operation_id, held.attempt)

    async def expire(self, held: Held) -> None:
        """As if a lease had passed without a heartbeat."""
        sql = "UPDATE holds SET lease_expires_at = now() - interval '1 s' WHERE operation_id = :id AND attempt = :n"
        await self.execute(sql, id=held.operation_id, n=held.attempt)

    async def cancel(self, id: UUID, *, force: bool = False) -> transitions.Cancelled | None:
        async with self.sessions.begin() as session:
            return await transitions.cancel_if_live(session, id, "", force)

    async def resume(
        self, id: UUID, from_checkpoint: UUID | None = None, accept_changes: bool = False
    ) -> ResumeAccepted | None:
        async with self.sessions.begin() as session:
            return await transitions.resume_if_ended(session, id, from_checkpoint, accept_changes)

    async def fork(self, id: UUID, key: str | None = None, elastic: Elastic | None = None, **wish: Any) -> UUID | None:
        request = ForkRequest.model_validate(wish)
        submission = Submission("me", key, request.model_dump_json().encode())
        async with self.sessions.begin() as session:
            return await fork.fork_if_there(session, id, request, submission, Fleet(LEASE_S, elastic))

    async def replay(self, id: UUID, key: str | None = None, **wish: Any) -> UUID | None:
        request = ReplayRequest.model_validate(wish)
        submission = Submission("me", key, request.model_dump_json().encode())
        async with self.sessions.begin() as session:
            return await fork.replay_if_there(session, id, request, submission)

    async def heartbeat(
        self, incarnation: UUID, *holds: Held, draining: bool = False, devices: Sequence[DeviceNow] = ()
    ) -> HeartbeatAnswer:
        listed = [HoldRef(operation_id=h.operation_id, attempt=h.attempt) for h in holds]
        async with self.sessions.begin() as session:
            beat = Heartbeat(holds=listed, draining=draining, devices=list(devices))
            return await workers.heartbeat(session, incarnation, beat, LEASE_S)

    async def drain(self, incarnation: UUID, wish: Drain | None) -> None:
        async with self.sessions.begin() as session:
            await workers.drain(session, incarnation, wish)

    async def look(self) -> None:
        """What studies and children make of each other, until nothing moves any more."""
        levels = (studies.stop_after_failures, studies.replan, studies.reduce, studies.cancel_children, studies.stop)
        moved = True
        while moved:
            moved = False
            for level in levels:
                async with self.sessions.begin() as session:
                    moved = bool(await level(session)) or moved

    async def children(self, id: UUID) -> list[ChildResult]:
        async with self.sessions.begin() as session:
            return await children.children(session, id)

    async def tick(self, lease_s: float = LEASE_S) -> bool:
        async with self.sessions.begin() as session:
            return await leases.tick(session, lease_s)

    async def get(self, id: UUID) -> Operation:
        async with self.sessions.begin() as session:
            return await queries.get(session, id)

    async def attempts(self, id: UUID) -> Sequence[AttemptView]:
        async with self.sessions.begin() as session:
            return (await queries.attempts(session, id)).items

    async def artifact_names(self, id: UUID) -> list[str]:
        async with self.sessions.begin() as session:
            return [artifact.name for artifact in (await queries.artifacts(session, id)).items]

    async def book(self, held: Held, *windows: EnergyWindow) -> list[energy.Booked]:
        batch = EnergyBatch(incarnation=held.incarnation, windows=list(windows))
        async with self.sessions.begin() as session:
            return await energy.book(session, held.operation_id, held.attempt, batch)

    async def energy(self, id: UUID, rates: Rates = Rates()) -> EnergyLedger:  # noqa: B008 # frozen
        async with self.sessions.begin() as session:
            return await energy.ledger(session, id, rates)

    async def fetch(self, sql: str, **values: Any) -> list[Any]:
        async with self.sessions.begin() as session:
            return list((await session.execute(text(sql), values)).all())

    async def execute(self, sql: str, **values: Any) -> None:
        async with self.sessions.begin() as session:
            await session.execute(text(sql), values)


def held(claim: claims.Claim) -> Held:
    return holds_of(claim)[0]


def holds_of(claim: claims.Claim) -> list[Held]:
    """One for each member, the leader's first."""
    return [Held(claim.operation_id, claim.attempt, member.incarnation) for member in claim.members]


def started(step: int = 0, promise: Literal["promised", "best_effort"] = "promised", **environment: Any) -> Started:
    exactness = Exactness(promise=promise)
    return Started(trainer_pid=1, start_step=step, exactness=exactness, environment=environment)


def plan(*names: str, **changes: Any) -> Plan:
    """Children of toy, whose keys follow from their names."""
    return Plan(
        children=[
            ChildPlan.model_validate(
                {
                    "key": sha256(name.encode()).hexdigest(),
                    "name": name,
                    "about": GridAbout(point={"config.name": name}, cycle=0),
                    "execution": Execution(),
                }
                | changes
            )
            for name in names
        ]
    )


def losses(*points: tuple[int, float], name: str = "loss") -> Metrics:
    return Metrics(series=[Series.of(name, list(points))])


def saved(
    held: Held, step: int, *, phase: Phase = Phase.UPDATE, epoch: int = 0, monitored: float | None = None
) -> CheckpointSaved:
    suffix = "-evaluate" if phase is Phase.EVALUATE else ""
    return CheckpointSaved(
        checkpoint_id=uuid4(),
        checkpoint_type=CheckpointType.PERIODIC,
        step=step,
        epoch=epoch,
        phase=phase,
        path=f"{held.operation_id}/{held.attempt}-{step}{suffix}",
        size_bytes=1,
        manifest_sha256="0" * 64,
        monitored=monitored,
    )


async def at_once(*calls: Any) -> list[Any]:
    """All calls side by side; what one raises is its answer."""
    return list(await asyncio.gather(*calls, return_exceptions=True))


def window(index: int, use: Use = Use.TRAIN, steps: tuple[int, int] = (0, 0), **changes: Any) -> EnergyWindow:
    """100 J in a second, `steps` from and until, of one GPU's counter."""
    plain = {
        "index": index,
        "device": "GPU-1",
        "source": Source.NVML_COUNTER,
        "quality": Quality.MEASURED,
        "use": use,
        "first_step": steps[0],
        "until_step": steps[1],
        "duration_s": 1.0,
        "energy_j": 100.0,
        "error_j": 1.0,
    }
    return EnergyWindow.model_validate(plain | changes)


def threads(number: int) -> dict[str, Any]:
    return {"execution": Execution(threads=number).model_dump()}


async def no_wake() -> None:
    """For a reaper without a dispatcher."""
