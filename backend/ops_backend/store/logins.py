"""Browsers that are logged in, and codes that log one in. Secrets are known by their digests only.

Whose they are is found in `identities`.
"""

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.identities import Identity
from ops_backend.store.sql import statement

LINK_S = 3600.0
SESSION_S = 30 * 86_400.0

ADD = statement("""
    WITH ended AS (DELETE FROM logins WHERE expires_at <= now())
    INSERT INTO logins (digest, kind, submitter, token_id, expires_at)
    VALUES (:digest, :login_kind, :submitter, :token_id, now() + make_interval(secs => :lasts_s))
    RETURNING expires_at
""")

# Of two that come with the same code, the second waits for the first one's DELETE, and finds nothing.
TRADE = statement("""
    WITH used AS (
        DELETE FROM logins WHERE digest = :code_digest AND kind = 'link' AND expires_at > now()
        RETURNING submitter, token_id
    )
    INSERT INTO logins (digest, kind, submitter, token_id, expires_at)
    SELECT :digest, 'session', submitter, token_id, now() + make_interval(secs => :lasts_s) FROM used
    RETURNING expires_at
""")

END = statement("DELETE FROM logins WHERE digest = :digest AND kind = 'session'")


async def add_link(session: AsyncSession, digest: bytes, user: Identity) -> datetime:
    """Returns until when it is good."""
    return await _add(session, digest, "link", user, LINK_S)


async def add_session(session: AsyncSession, digest: bytes, user: Identity) -> None:
    await _add(session, digest, "session", user, SESSION_S)


async def trade(session: AsyncSession, code_digest: bytes, digest: bytes) -> bool:
    """The code for a session, once. False: it is used, too old, or none of ours."""
    values = {"code_digest": code_digest, "digest": digest, "lasts_s": SESSION_S}
    return await session.scalar(TRADE, values) is not None


async def end(session: AsyncSession, digest: bytes) -> None:
    await session.execute(END, {"digest": digest})


async def _add(session: AsyncSession, digest: bytes, kind: str, user: Identity, lasts_s: float) -> datetime:
    values = {"digest": digest, "login_kind": kind, "submitter": user.name, "token_id": user.token_id}
    expires_at: datetime = await session.scalar(ADD, values | {"lasts_s": lasts_s})
    return expires_at
