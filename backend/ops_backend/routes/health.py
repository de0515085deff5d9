"""Whether this process lives, and whether it can serve."""

from importlib.metadata import version

from fastapi import APIRouter

from ops_backend.dependencies import SessionDep
from ops_backend.store.leases import ping
from ops_contract.operations import Health

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live() -> Health:
    """The process answers. It asks nothing of the database: restart it where this fails."""
    return Health(status="ok", version=version("relight"))


@router.get("/ready")
async def ready(session: SessionDep) -> Health:
    """The database answers and has our tables: send requests here only while it does."""
    await ping(session)
    return Health(status="ok", version=version("relight"))
