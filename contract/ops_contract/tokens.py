"""Who may do what: scopes, and the tokens that carry one."""

import hashlib
import hmac
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import Field

from ops_contract.wire import Name, Wire

MAX_EXPIRES_S = 10 * 366 * 86_400.0
# Who has OPS_API_TOKEN, and the workers of the same service: nobody else is called so.
OPERATOR, WORKERS = "operator", "workers"
PREFIX = "rlt_"


class Scope(StrEnum):
    """What a token is for. Each is a set of calls; `operate` has those of `read`, `admin` all but an agent's own."""

    READ = "read"  # see operations, workers, metrics, logs, artifacts
    OPERATE = "operate"  # submit, cancel, resume, fork, replay, delete
    WORKER = "worker"  # register workers, fetch users' code
    ADMIN = "admin"  # tokens, audit, webhooks, draining, cleanup

    @property
    def allows(self) -> frozenset["Scope"]:
        return _ALLOWED[self]


_ALLOWED = {
    Scope.READ: frozenset({Scope.READ}),
    Scope.OPERATE: frozenset({Scope.READ, Scope.OPERATE}),
    Scope.WORKER: frozenset({Scope.WORKER}),
    Scope.ADMIN: frozenset(Scope),
}


class TokenRequest(Wire):
    """POST /tokens. `name` is who submits with it; no two living tokens share one. Null: it does not expire."""

    name: Name
    scope: Scope
    expires_s: float | None = Field(None, gt=0, le=MAX_EXPIRES_S, allow_inf_nan=False)


class TokenView(Wire):
    """`last_used_at` is at most a minute behind."""

    id: UUID
    name: str
    scope: Scope
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class TokenCreated(TokenView):
    """`token` is in this answer only."""

    token: str


class Tokens(Wire):
    items: list[TokenView]


def token_digest(token: str) -> bytes:
    """By which the database knows one of ours: 256 random bits need no salt and no slow hash."""
    return hashlib.sha256(token.encode()).digest()


def workers_token(api_token: str) -> str:
    """The service's own token of scope `worker`: its agents need no more, and from it nobody learns OPS_API_TOKEN."""
    return PREFIX + hmac.digest(api_token.encode(), b"workers", "sha256").hex()
