"""The reaper's statements: its own tick, and whose lease ran out."""

from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import statement

# A gap since anybody's last tick means that nobody could renew (database away, laptop asleep, clock stepped, all
# backends restarted): everybody gets a whole lease before anybody is reaped. The first tick ever counts as a gap.
# A tick a little in the future is that of another backend, which began later and was first.
TICK = statement("""
    INSERT INTO service AS s (id, last_tick_at, grace_until)
    VALUES (1, now(), now() + make_interval(secs => :lease_s))
    ON CONFLICT (id) DO UPDATE
       SET last_tick_at = now(),
           grace_until = CASE
               WHEN abs(extract(epoch FROM now() - s.last_tick_at)) > :lease_s / 2
               THEN now() + make_interval(secs => :lease_s) ELSE s.grace_until END
    RETURNING grace_until > now() AS grace,
              (SELECT last_tick_at - now() > make_interval(secs => :lease_s / 2) FROM service) AS stepped_back
""")

EXPIRED = statement("""
    SELECT DISTINCT operation_id, attempt FROM holds
     WHERE ended_at IS NULL AND lease_expires_at < now()
     LIMIT 1000
""")

# What was written before the clock went back lies too far in the future: a dead worker's lease would last for hours.
MEND = statement("""
    WITH leases AS (
        UPDATE holds SET lease_expires_at = now() + make_interval(secs => :lease_s)
         WHERE ended_at IS NULL AND lease_expires_at > now() + make_interval(secs => :lease_s)
    ), rests AS (
        UPDATE slots SET rests_until = NULL WHERE rests_until > now()
    )
    UPDATE operations SET not_before = NULL WHERE status = 'pending' AND not_before > now()
""")

PING = statement("SELECT last_tick_at FROM service")


async def tick(session: AsyncSession, lease_s: float) -> bool:
    """Say that a reaper is alive; True while nobody may be reaped."""
    row = (await session.execute(TICK, {"lease_s": lease_s})).one()
    if row.stepped_back:
        await session.execute(MEND, {"lease_s": lease_s})
    return bool(row.grace)


async def expired(session: AsyncSession) -> list[tuple[UUID, int]]:
    """Attempts with a hold whose lease ran out. A hint only: the transition guards itself."""
    return [(row.operation_id, row.attempt) for row in await session.execute(EXPIRED)]


async def ping(session: AsyncSession) -> None:
    """Raises when the database is away or not migrated."""
    await session.execute(PING)
