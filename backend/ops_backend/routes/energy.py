"""What operations cost in joules."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Response

from ops_backend.dependencies import PageCursor, ReaderDep, SessionDep, SettingsDep
from ops_backend.routes.errors import refusals
from ops_backend.store import energy
from ops_backend.store.ledger_views import Rates
from ops_backend.tags import UNCHANGED, IfNoneMatch, Tagged
from ops_contract.ledger import EnergyLedger, EnergyWindows

router = APIRouter(prefix="/operations", tags=["operations"], responses=refusals(401))


@router.get("/{id}/energy", response_model=EnergyLedger, responses=UNCHANGED | refusals(404))
async def get_energy(
    id: UUID,
    session: SessionDep,
    _: ReaderDep,
    settings: SettingsDep,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The ledger: useful, lost, overhead; by attempt, epoch and device; carbon and cost. Unknown is null, and why."""
    rates = Rates(settings.carbon_g_per_kwh, settings.price_per_kwh, settings.currency)
    return Tagged(await energy.ledger(session, id, rates)).answer(if_none_match)


@router.get("/{id}/energy/windows", responses=refusals(404))
async def get_windows(
    id: UUID,
    session: SessionDep,
    _: ReaderDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="how many at most")] = 1000,
    cursor: PageCursor = None,
) -> EnergyWindows:
    """What the ledger adds up, in pages: a time series of each device of each attempt."""
    return await energy.windows(session, id, limit, cursor)
