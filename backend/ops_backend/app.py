"""The FastAPI app and the loops that run beside it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

from fastapi import FastAPI

from ops_backend.addresses import Names
from ops_backend.announcer import Announcer
from ops_backend.audit import Auditor, Refusals
from ops_backend.database import Drivers, Limits, Sessions
from ops_backend.dispatcher import Dispatcher
from ops_backend.engines.slurm import SlurmEngine
from ops_backend.exporter import Exporter
from ops_backend.family import Family
from ops_backend.identities import Identities
from ops_backend.orphans import OrphanSweeper
from ops_backend.provisioner import Provisioner
from ops_backend.reaper import Reaper
from ops_backend.routes import (
    agents,
    audit,
    catalog,
    cleanup,
    dashboard,
    details,
    errors,
    exports,
    health,
    operations,
    raw_bodies,
    session,
    snapshots,
    status,
    stream,
    submissions,
    tokens,
    webhooks,
)
from ops_backend.settings import Settings
from ops_backend.status_reads import READERS, StatusReads
from ops_backend.streams import Streams
from ops_backend.sweeper import Sweeper
from ops_backend.telemetry import CountRequests, Telemetry
from ops_backend.validator import Validator
from ops_backend.webhooks import WebhookSender
from ops_backend.worker_calls import connections
from ops_contract.http_gate import Gate
from ops_contract.jobs import SNAPSHOT_MAX_BYTES
from ops_contract.wire import API_PREFIX

# Of JSON. An agent sends batches of at most a megabyte, and halves what is refused as too large.
MAX_BODY_BYTES = 8 * 2**20
# For heartbeats and the loops, beside OPS_DB_POOL_SIZE for requests; exporter, exports and Prometheus have theirs.
VITAL_CONNECTIONS = 8
# The metrics of a large operation are read in one transaction, which holds no lock that others want.
EXPORT_S = 600.0
# Within the ten seconds that Prometheus waits unless told otherwise.
SCRAPE_S = 5.0
# At a time: each has its points in memory, 16 bytes each, and shares the interpreter with everybody else.
EXPORTS = 2
# In the order in which people get to know them.
TAGS = {
    "operations": "What runs, ran or waits: submit, watch, cancel, resume, fork, and all that an operation leaves.",
    "workers": "Who works here, and what can be trained.",
    "webhooks": "URLs that are told when operations end.",
    "snapshots": "Users' code, packed as a tar file, by its SHA-256.",
    "tokens": "Who may do what.",
    "audit": "Who did what, and from where.",
    "session": "How a browser logs in: a link that works once becomes a cookie.",
    "health": "For probes and Prometheus.",
    "agents": "What workers say. Users have no need of it.",
}


def create_app(settings: Settings) -> FastAPI:
    """Needs a migrated database. One a process; several processes may share a database."""
    app = status.ShortWay(
        title="Relight",
        version="0.1",
        openapi_tags=[{"name": name, "description": text} for name, text in TAGS.items()],
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        # What Prometheus reads is `Telemetry`'s; to look for exporters of OpenTelemetry takes each request 15 µs.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.telemetry = telemetry = Telemetry(version("relight"))
    app.add_middleware(Gate, max_body_bytes=MAX_BODY_BYTES, raw={f"{API_PREFIX}/snapshots/": SNAPSHOT_MAX_BYTES})
    app.add_middleware(CountRequests, telemetry=telemetry)
    app.state.settings = settings
    app.state.refusals = Refusals()
    app.state.export_turns = asyncio.Semaphore(EXPORTS)
    errors.install(app)
    raw_bodies.install(app)
    of_operations = (submissions, operations, details, stream, exports, cleanup)
    of_others = (snapshots, catalog, webhooks, session, tokens, audit)
    # In this order a request is looked for, and most are polls and agents'.
    for module in (status, agents, health, dashboard, *of_operations, *of_others):
        app.router.routes += module.router.routes
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    telemetry: Telemetry = app.state.telemetry
    url, limits = settings.database_url, settings.db_limits
    app.state.sessions = requests = Sessions(url, settings.db_pool_size, limits)
    app.state.vital_sessions = sessions = Sessions(url, VITAL_CONNECTIONS, limits)
    app.state.identities = Identities(settings, sessions)
    app.state.names = names = Names()
    polls = Drivers(url, READERS, limits)
    app.state.status_reads = reads = StatusReads(polls)
    app.state.scrape_sessions = scrapes = Sessions(url, 1, Limits(SCRAPE_S, SCRAPE_S))
    app.state.patient_sessions = patient = Sessions(url, 1 + EXPORTS, Limits(limits.wait_s, EXPORT_S))
    async with connections() as http:
        app.state.dispatcher = dispatcher = Dispatcher(sessions, http, settings, telemetry)
        app.state.validator = Validator(http)
        app.state.streams = streams = Streams(requests, settings.poll_s, settings.max_streams)
        app.state.webhook_sender = sender = WebhookSender(names)
        reaper = Reaper(sessions, settings.lease_s, settings.tick_s, telemetry, dispatcher.wake)
        family = Family(sessions, settings.tick_s, telemetry, dispatcher.wake, dispatcher.push_cancel)
        sweeper = Sweeper(sessions, settings.storage_root, settings.tick_s)
        orphans = OrphanSweeper(sessions, settings.storage_root, settings.orphan_sweep_s)
        exporter = Exporter(patient, settings.storage_root, settings.tick_s)
        announcer = Announcer(sessions, sender, settings.tick_s)
        auditor = Auditor(sessions, app.state.refusals, settings.audit_days, settings.tick_s)
        provisioner = Provisioner(sessions, SlurmEngine(settings), settings)
        running = (dispatcher, reaper, family, sweeper, orphans, exporter, announcer, auditor, streams, provisioner)
        loops = [asyncio.create_task(loop.run()) for loop in running]
        try:
            yield
        finally:
            for loop in loops:
                loop.cancel()
                with suppress(asyncio.CancelledError):
                    await loop
            await reads.close()
            for pool in (requests, sessions, scrapes, patient, polls):
                await pool.dispose()
