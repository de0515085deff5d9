"""The agents' calls."""

from typing import Annotated
from uuid import UUID

from fastapi import Path, Request

from ops_backend.addresses import Refused, address_of, allowed, worker_url
from ops_backend.dependencies import (
    AgentDep,
    AuditDep,
    DispatcherDep,
    IdentitiesDep,
    NamesDep,
    RegistrarDep,
    SessionsDep,
    SettingsDep,
    TelemetryDep,
    VitalSessionDep,
)
from ops_backend.routes.errors import refusals
from ops_backend.routes.routers import api_router
from ops_backend.store import energy, workers
from ops_backend.store.reports import accept
from ops_backend.store.submit import invalid
from ops_contract.agents import (
    Heartbeat,
    HeartbeatAnswer,
    ReportBatch,
    ReportsAccepted,
    WorkerRegistered,
    WorkerRegistration,
)
from ops_contract.audit import Action
from ops_contract.energy import EnergyBatch, EnergyBooked
from ops_contract.reports import Finish

router = api_router("agents")


@router.post("/workers", status_code=201, responses=refusals(409))
async def register(
    worker: WorkerRegistration,
    request: Request,
    session: VitalSessionDep,
    user: RegistrarDep,
    settings: SettingsDep,
    audit: AuditDep,
    names: NamesDep,
    identities: IdentitiesDep,
) -> WorkerRegistered:
    """A worker process begins, and says by which secrets it and the API will know each other.

    409 where a live worker has one of its devices, or where its incarnation has registered with another credential,
    name, host or slots. 422 where its URL is not at the address that it calls from, nor `OPS_WORKER_ALLOW` names it.
    """
    try:
        url = await worker_url(names, worker.url, address_of(request), allowed(settings.worker_allow))
    except Refused as error:
        raise invalid([("url", str(error))]) from error
    await workers.register(session, worker, settings.lease_s, url, user.token_id)
    identities.forget()
    await audit.note(session, Action.REGISTER, worker.incarnation, name=worker.name, host=worker.host)
    return WorkerRegistered(
        lease_s=settings.lease_s, heartbeat_s=settings.heartbeat_s, cancel_grace_s=settings.cancel_grace_s
    )


@router.post("/workers/{incarnation}/heartbeat", responses=refusals(404))
async def heartbeat(
    incarnation: UUID, beat: Heartbeat, session: VitalSessionDep, agent: AgentDep, settings: SettingsDep
) -> HeartbeatAnswer:
    """Renew the leases of the holds that are named; the answer says which of them have ended or are to stop."""
    agent.speaks_for(incarnation)
    return await workers.heartbeat(session, incarnation, beat, settings.lease_s)


@router.post("/operations/{id}/attempts/{attempt}/reports", responses=refusals(404, 409))
async def report(
    id: UUID,
    attempt: Annotated[int, Path(ge=1, lt=2**31)],
    batch: ReportBatch,
    sessions: SessionsDep,
    agent: AgentDep,
    dispatcher: DispatcherDep,
    telemetry: TelemetryDep,
    settings: SettingsDep,
) -> ReportsAccepted:
    """What an attempt has to say, numbered without gaps: a number that came before is accepted and changes nothing.

    409 `fenced`: the attempt has ended for the API, so stop. 409 `out_of_order`: one is missing before this.
    """
    agent.speaks_for(batch.incarnation)
    async with sessions.begin() as session:
        accepted = await accept(session, id, attempt, batch, settings.retry_backoff_s)
    telemetry.accepted(accepted.new)
    telemetry.moved(accepted.status)
    if isinstance(batch.reports[-1], Finish):
        await dispatcher.wake()
    return ReportsAccepted(last_seq=accepted.last_seq)


@router.post("/operations/{id}/attempts/{attempt}/energy", responses=refusals(404))
async def book_energy(
    id: UUID,
    attempt: Annotated[int, Path(ge=1, lt=2**31)],
    batch: EnergyBatch,
    sessions: SessionsDep,
    agent: AgentDep,
    telemetry: TelemetryDep,
) -> EnergyBooked:
    """Windows of a hold, whether it has ended or not, however often: each counts once."""
    agent.speaks_for(batch.incarnation)
    async with sessions.begin() as session:
        booked = await energy.book(session, id, attempt, batch)
    telemetry.booked(booked)
    return EnergyBooked()
