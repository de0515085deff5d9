"""What routes ask for: a session, the caller, the settings."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Protocol, cast
from uuid import UUID

from fastapi import Depends, Query, Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.addresses import Names, address_of
from ops_backend.audit import Audit
from ops_backend.browsers import cookie_of
from ops_backend.database import Sessions
from ops_backend.engines.requests import elastic
from ops_backend.identities import Identities
from ops_backend.settings import Settings
from ops_backend.status_reads import StatusReads
from ops_backend.store.identities import Identity
from ops_backend.store.submit import Fleet
from ops_backend.store.transitions import CancelPush
from ops_backend.store.validation import Question
from ops_backend.streams import Streams
from ops_backend.telemetry import Telemetry
from ops_backend.webhooks import WebhookSender
from ops_contract.agents import Validated
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.tokens import Scope


class Dispatching(Protocol):
    """What routes want of the dispatcher."""

    async def wake(self) -> None: ...

    async def push_cancel(self, operation_id: UUID, push: CancelPush, reason: str, force: bool) -> None: ...


class Validating(Protocol):
    async def ask(self, question: Question) -> Validated | None: ...


def _of_app(name: str) -> Any:
    """What the app has by this name; awaited, for FastAPI runs plain functions in a thread each, however short."""

    async def found(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(found)


async def session_of(request: Request) -> AsyncIterator[AsyncSession]:
    """One transaction a request, committed before the answer is sent; an error rolls it back."""
    async with cast(Sessions, request.app.state.sessions).begin() as session:
        yield session


async def vital_session_of(request: Request) -> AsyncIterator[AsyncSession]:
    """The same, for what keeps leases alive: no load of requests can keep it waiting for a connection."""
    async with cast(Sessions, request.app.state.vital_sessions).begin() as session:
        yield session


async def fleet_of(request: Request) -> Fleet:
    settings: Settings = request.app.state.settings
    return Fleet(settings.lease_s, elastic(settings))


async def audit_of(request: Request) -> Audit:
    return Audit(request)


class Bearer(SecurityBase):
    """Says in the OpenAPI document which calls want a token; `caller` itself reads what comes."""

    scheme_name = "token"
    model = HTTPBearer(
        description="of `ops tokens create`, or what `ops up` keeps in DIR/token; browsers have a cookie"
    )

    async def __call__(self) -> None:
        pass


async def caller(
    request: Request, wanted: SecurityScopes, _bearer: Annotated[None, Depends(Bearer())] = None
) -> Identity:
    """Who calls, by a bearer token or the browser's cookie. Raises 401, and 403 where it is not for this call."""
    identity = request.state.identity = await identified(request)
    for scope in wanted.scopes:
        if scope not in identity.scope.allows:
            message = f"it takes a token of scope {scope}, not {identity.scope}; an admin makes one"
            raise OpsError(ErrorCode.FORBIDDEN, message, wanted=scope, scope=identity.scope)
    return identity


async def identified(request: Request) -> Identity:
    """Raises 401, and 429."""
    identities = cast(Identities, request.app.state.identities)
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found = await identities.of_token(token, address_of(request))
    elif not scheme and (secret := cookie_of(request, request.app.state.settings)):
        found = await identities.of_cookie(secret, address_of(request))
    else:
        found = None
    if found is None:
        message = "no valid token (OPS_API_TOKEN, --token, Bearer): see DIR/token of `ops up`"
        raise OpsError(ErrorCode.UNAUTHENTICATED, message)
    return found


class Agent:
    """A registered worker, by its own credential."""

    def __init__(self, incarnation: UUID) -> None:
        self._incarnation = incarnation

    def speaks_for(self, incarnation: UUID) -> None:
        """Raises 403 for another."""
        if incarnation != self._incarnation:
            raise OpsError(ErrorCode.FORBIDDEN, f"this is the credential of worker {self._incarnation}, and no other's")


CallerDep = Annotated[Identity, Security(caller)]


async def registrar(identity: CallerDep) -> Identity:
    """Raises 403 for the credential of a worker: it registers no other."""
    if identity.incarnation is not None:
        raise OpsError(ErrorCode.FORBIDDEN, "a worker registers with a token, not with the credential of another")
    return identity


async def agent(identity: CallerDep) -> Agent:
    """Raises 403 for a token, whatever its scope: nobody speaks for a worker but itself."""
    if identity.incarnation is None:
        raise OpsError(ErrorCode.FORBIDDEN, "it takes the credential with which a worker registered, and no token")
    return Agent(identity.incarnation)


PageCursor = Annotated[str | None, Query(description="the `next_cursor` of the page before")]

SessionsDep = Annotated[Sessions, _of_app("sessions")]
# For reads as long as an operation is.
PatientSessionsDep = Annotated[Sessions, _of_app("patient_sessions")]
ExportTurnsDep = Annotated[asyncio.Semaphore, _of_app("export_turns")]
SettingsDep = Annotated[Settings, _of_app("settings")]
DispatcherDep = Annotated[Dispatching, _of_app("dispatcher")]
TelemetryDep = Annotated[Telemetry, _of_app("telemetry")]
ValidatorDep = Annotated[Validating, _of_app("validator")]
StatusReadsDep = Annotated[StatusReads, _of_app("status_reads")]
StreamsDep = Annotated[Streams, _of_app("streams")]
WebhookSenderDep = Annotated[WebhookSender, _of_app("webhook_sender")]
SessionDep = Annotated[AsyncSession, Depends(session_of, scope="function")]
VitalSessionDep = Annotated[AsyncSession, Depends(vital_session_of, scope="function")]
ReaderDep = Annotated[Identity, Security(caller, scopes=[Scope.READ])]
UserDep = Annotated[Identity, Security(caller, scopes=[Scope.OPERATE])]
AdminDep = Annotated[Identity, Security(caller, scopes=[Scope.ADMIN])]
RegistrarDep = Annotated[Identity, Security(registrar, scopes=[Scope.WORKER])]
AgentDep = Annotated[Agent, Security(agent, scopes=[Scope.WORKER])]
NamesDep = Annotated[Names, _of_app("names")]
FleetDep = Annotated[Fleet, Depends(fleet_of)]
AuditDep = Annotated[Audit, Depends(audit_of)]
IdentitiesDep = Annotated[Identities, _of_app("identities")]
