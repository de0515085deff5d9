"""Tokens: made, found by what their holder shows, revoked. The secrets themselves are with their holders alone."""

import secrets
from uuid import UUID, uuid4

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import statement
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.tokens import OPERATOR, PREFIX, WORKERS, TokenCreated, TokenRequest, Tokens, TokenView, token_digest

_VIEW = "id, name, scope, created_by, created_at, expires_at, last_used_at, revoked_at"
# Of a token `t`.
LIVE = "t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now())"

# The name of one that has expired is free again.
FREE_NAME = statement("""
    UPDATE tokens SET revoked_at = now() WHERE name = :name AND revoked_at IS NULL AND expires_at <= now()
""")

ADD = statement(f"""
    INSERT INTO tokens (id, name, scope, digest, created_by, expires_at)
    VALUES (:id, :name, :scope, :digest, :created_by, now() + make_interval(secs => :lasts_s))
    ON CONFLICT (name) WHERE revoked_at IS NULL DO NOTHING
    RETURNING {_VIEW}
""")

LIST = statement(f"SELECT {_VIEW} FROM tokens ORDER BY created_at, id")

REVOKE = statement("UPDATE tokens SET revoked_at = now() WHERE id = :id AND revoked_at IS NULL RETURNING name")

# A row a minute at most, however much it is used.
USED = statement("""
    UPDATE tokens SET last_used_at = now()
     WHERE id = :id AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')
""")


async def add(session: AsyncSession, wish: TokenRequest, created_by: str) -> TokenCreated:
    """The token is in the answer only. Raises 409 where a living one has the name, 422 where nobody may have it."""
    if wish.name in (OPERATOR, WORKERS):
        raise OpsError(ErrorCode.INVALID, f"name: {wish.name!r} is the service's own; choose another")
    token = PREFIX + secrets.token_urlsafe(32)
    values = {"id": uuid4(), "name": wish.name, "scope": wish.scope, "digest": token_digest(token)}
    await session.execute(FREE_NAME, {"name": wish.name})
    made = await session.execute(ADD, values | {"created_by": created_by, "lasts_s": wish.expires_s})
    if (row := made.one_or_none()) is None:
        raise OpsError(
            ErrorCode.TOKEN_EXISTS, f"there is a token {wish.name!r}; choose another name, or revoke it first"
        )
    return TokenCreated(**row._mapping, token=token)


async def list_all(session: AsyncSession) -> Tokens:
    return Tokens(items=[TokenView(**row._mapping) for row in await session.execute(LIST)])


async def revoke(session: AsyncSession, id: UUID) -> str:
    """Its name. Logins and workers that it made end with it. Raises 404, also for one that is revoked already."""
    name: str | None = await session.scalar(REVOKE, {"id": id})
    if name is None:
        raise OpsError(ErrorCode.NOT_FOUND, f"no living token {id}; GET /tokens lists them")
    return name
