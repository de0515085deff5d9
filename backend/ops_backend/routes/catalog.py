"""Who works here, and what can be run."""

from fastapi import APIRouter

from ops_backend.dependencies import CallerDep, SessionDep, SettingsDep
from ops_backend.routes.errors import refusals
from ops_backend.store import queries
from ops_contract.operations import Workers, Workloads

router = APIRouter(tags=["workers"], responses=refusals(401))


@router.get("/workers")
async def list_workers(session: SessionDep, _: CallerDep, settings: SettingsDep) -> Workers:
    return await queries.workers(session, settings.lease_s)


@router.get("/workloads")
async def list_workloads(session: SessionDep, _: CallerDep) -> Workloads:
    return await queries.workloads(session)
