"""Who works here, and what can be run."""

from typing import Any
from uuid import UUID

from fastapi import BackgroundTasks, Response
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.dependencies import AdminDep, AuditDep, DispatcherDep, ReaderDep, SessionDep, SettingsDep
from ops_backend.routes.errors import refusals
from ops_backend.routes.routers import api_router
from ops_backend.store import catalog, gauges
from ops_backend.store.workers import drain
from ops_backend.tags import UNCHANGED, IfNoneMatch, Tagged
from ops_contract.audit import Action
from ops_contract.jobs import JobSpec
from ops_contract.operations import LiveCounts
from ops_contract.workers import DrainRequest, Workers, WorkerView, Workloads

router = api_router("workers")


@router.get("/workers")
async def list_workers(session: SessionDep, _: ReaderDep, settings: SettingsDep) -> Workers:
    """Those that were seen within a day, their slots, and what runs there."""
    return await catalog.workers(session, settings.lease_s)


@router.post("/workers/{id}/drain", responses=refusals(404))
async def drain_worker(
    id: UUID, session: SessionDep, _: AdminDep, settings: SettingsDep, audit: AuditDep, wish: DrainRequest | None = None
) -> WorkerView:
    """No more work goes to this worker until it is undrained or restarted. What runs there finishes, or is preempted.

    Again: the newer wish counts.
    """
    preempt = wish is not None and wish.preempt
    await drain(session, id, "preempt" if preempt else "finish")
    await audit.note(session, Action.DRAIN, id, preempt=preempt or None)
    return await _view(session, id, settings.lease_s)


@router.post("/workers/{id}/undrain", responses=refusals(404))
async def undrain_worker(
    id: UUID,
    session: SessionDep,
    _: AdminDep,
    settings: SettingsDep,
    dispatcher: DispatcherDep,
    audit: AuditDep,
    after: BackgroundTasks,
) -> WorkerView:
    """Work goes to it again. What was handed back stays handed back."""
    await drain(session, id, None)
    await audit.note(session, Action.UNDRAIN, id)
    after.add_task(dispatcher.wake)
    return await _view(session, id, settings.lease_s)


@router.get("/workloads")
async def list_workloads(session: SessionDep, _: ReaderDep) -> Workloads:
    """What can be trained: each with the JSON Schema of its config and the metrics that it reports."""
    return await catalog.workloads(session)


@router.get("/counts", tags=["operations"], response_model=LiveCounts, responses=UNCHANGED)
async def count_live(session: SessionDep, _: ReaderDep, if_none_match: IfNoneMatch = None) -> Response:
    """How many operations wait, run, and are being cancelled."""
    return Tagged(await gauges.counts(session)).answer(if_none_match)


@router.get("/schemas/job", tags=["operations"])
async def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file. Editors fetch it, so it asks for no token."""
    return JobSpec.model_json_schema()


async def _view(session: AsyncSession, id: UUID, lease_s: float) -> WorkerView:
    [worker] = (await catalog.workers(session, lease_s, id)).items
    return worker
