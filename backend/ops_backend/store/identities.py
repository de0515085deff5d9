"""Who shows a secret: the holder of a token, a registered worker, or a browser that is logged in."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import TextClause
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store import tokens
from ops_backend.store.sql import statement
from ops_contract.tokens import Scope

FIND_TOKEN = statement(f"""
    SELECT t.name, t.scope, t.id AS token_id, t.expires_at, NULL AS incarnation
      FROM tokens t
     WHERE t.digest = :digest AND {tokens.LIVE}
""")

FIND_WORKER = statement(f"""
    SELECT w.name, 'worker' AS scope, t.id AS token_id, t.expires_at, w.incarnation
      FROM workers w LEFT JOIN tokens t ON t.id = w.token_id
     WHERE w.credential = :digest AND (w.token_id IS NULL OR {tokens.LIVE})
""")

# What a token made ends with it.
FIND_LOGIN = statement(f"""
    SELECT l.submitter AS name, coalesce(t.scope, 'admin') AS scope, t.id AS token_id,
           least(l.expires_at, t.expires_at) AS expires_at, NULL AS incarnation
      FROM logins l LEFT JOIN tokens t ON t.id = l.token_id
     WHERE l.digest = :digest AND l.kind = 'session' AND l.expires_at > now() AND (l.token_id IS NULL OR {tokens.LIVE})
""")


@dataclass(frozen=True)
class Identity:
    """Who calls. `token_id` is null for the service's own tokens; `incarnation` for whoever is no registered worker."""

    name: str
    scope: Scope
    token_id: UUID | None = None
    expires_at: datetime | None = None
    incarnation: UUID | None = None


async def of_secret(session: AsyncSession, find: TextClause, digest: bytes) -> Identity | None:
    """`find` is the statement for what kind of secret it is. That its token is used is noted."""
    row = (await session.execute(find, {"digest": digest})).one_or_none()
    if row is None:
        return None
    if row.token_id is not None:
        await session.execute(tokens.USED, {"id": row.token_id})
    return Identity(row.name, Scope(row.scope), row.token_id, row.expires_at, row.incarnation)
