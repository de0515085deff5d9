"""For probes and Prometheus: whether this process lives, whether it can serve, and what it counts."""

import logging
from importlib.metadata import version
from typing import Annotated, Any, cast

from fastapi import APIRouter, Header, Request, Response
from sqlalchemy.exc import SQLAlchemyError

from ops_backend.database import Sessions
from ops_backend.dependencies import ReaderDep, SessionDep, SettingsDep, TelemetryDep
from ops_backend.routes.errors import refusals
from ops_backend.routes.routers import ANYWHERE
from ops_backend.store import gauges
from ops_backend.store.leases import ping
from ops_contract.doctor import Health

log = logging.getLogger(__name__)

router = APIRouter(tags=["health"], responses=ANYWHERE)


@router.get("/health/live")
async def live() -> Health:
    """The process answers. It asks nothing of the database: restart it where this fails."""
    return Health(status="ok", version=version("relight"))


@router.get("/health/ready")
async def ready(session: SessionDep) -> Health:
    """The database answers and has our tables: send requests here only while it does."""
    await ping(session)
    return Health(status="ok", version=version("relight"))


_TEXT: dict[str, Any] = {"schema": {"type": "string"}}
_SCRAPE = {
    "description": "in the one or the other text format of Prometheus",
    "content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT},
}


@router.get("/metrics", response_class=Response, responses={200: _SCRAPE, **refusals(401)})
async def metrics(
    request: Request,
    _: ReaderDep,
    telemetry: TelemetryDep,
    settings: SettingsDep,
    accept: Annotated[str, Header(description="which of the two formats, as Prometheus sends it")] = "",
) -> Response:
    """In the text format, or OpenMetrics where `Accept` prefers it. With the database away, what this process knows."""
    body, content_type = telemetry.render(accept, await _gauges(request, settings.lease_s))
    return Response(body, media_type=content_type)


async def _gauges(request: Request, lease_s: float) -> gauges.Gauges | None:
    """None where the database does not answer in time: a scrape must not hang, and an alert needs the rest of it."""
    try:
        async with cast(Sessions, request.app.state.scrape_sessions).begin() as session:
            return await gauges.read(session, lease_s)
    except (SQLAlchemyError, OSError) as error:
        log.warning("a scrape without the database: %r", error)
        return None
