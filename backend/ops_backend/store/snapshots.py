"""Snapshots of users' code: kept as long as an operation refers to them, or for a day after they were asked for."""

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import statement

# Whoever asks is about to submit it: the answer holds for a day. No key changes, so no reader waits.
TOUCH = statement("UPDATE snapshots SET created_at = now() WHERE sha256 = :sha256 RETURNING sha256")

KEEP = statement("""
    INSERT INTO snapshots (sha256, archive) VALUES (:sha256, :archive)
        ON CONFLICT (sha256) DO UPDATE SET created_at = now()
""")

ARCHIVE = statement("SELECT archive FROM snapshots WHERE sha256 = :sha256")

_UNUSED = """s.created_at < now() - interval '1 day'
             AND NOT EXISTS (SELECT FROM operations o WHERE o.code_sha256 = s.sha256)"""

# A submit holds the row from finding it to referring to it: it is passed over. One that comes later waits, and finds
# it gone. A statement of its own: the next one's snapshot shows what was submitted before the lock.
LOCK_UNUSED = statement(f"""
    SELECT s.sha256 FROM snapshots s WHERE {_UNUSED} ORDER BY s.sha256 LIMIT 100 FOR UPDATE SKIP LOCKED
""")
DELETE_UNUSED = statement(f"DELETE FROM snapshots s WHERE s.sha256 = ANY (:names) AND {_UNUSED}")


async def has(session: AsyncSession, sha256: str) -> bool:
    """Whether it is here, and will be for a day."""
    return await session.scalar(TOUCH, {"sha256": sha256}) is not None


async def keep(session: AsyncSession, sha256: str, archive: bytes) -> bool:
    """Whether it is new."""
    if await has(session, sha256):
        return False
    await session.execute(KEEP, {"sha256": sha256, "archive": archive})
    return True


async def archive(session: AsyncSession, sha256: str) -> bytes | None:
    found: bytes | None = await session.scalar(ARCHIVE, {"sha256": sha256})
    return found


async def delete_unused(session: AsyncSession) -> None:
    names = list(await session.scalars(LOCK_UNUSED))
    await session.execute(DELETE_UNUSED, {"names": names})
