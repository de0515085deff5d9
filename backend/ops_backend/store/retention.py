"""Which checkpoints go: committed → deleting, and then the row. `pinned_at` is what holds one back.

Live operations are retired where they commit, under the hold of the reporting attempt: so nothing is retired while
a finish or a claim looks for the checkpoint to go on from.
"""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import NEWEST_FIRST, in_lineage, statement

# Kept: the best of the lineage, of equals the earlier; its newest, which a resume would take; whatever is pinned, by a
# claim, a resume or a fork. Of a replay that is done nothing is kept. A null limit keeps all of the best.
# NaN is nobody's best.
RETIRE = statement(f"""
    WITH rule AS MATERIALIZED (
        SELECT id, job->'execution'->>'checkpoint_mode' AS mode,
               (job->'execution'->>'checkpoint_save_top_k')::int AS top_k,
               status <> 'completed' OR (job->'execution'->>'checkpoint_save_last')::bool AND replay_of IS NULL
                   AS keeps_last
          FROM operations WHERE id = :id
    ), lineage AS MATERIALIZED (
        SELECT c.* FROM checkpoints c WHERE c.operation_id = :id AND c.status = 'committed' AND {in_lineage("c")}
    ), best AS (
        SELECT c.id
          FROM lineage c CROSS JOIN rule
         WHERE c.monitored <> 'NaN'
         ORDER BY CASE rule.mode WHEN 'max' THEN -c.monitored ELSE c.monitored END, c.step, c.attempt
         LIMIT (SELECT top_k FROM rule WHERE top_k >= 0)
    ), last AS (
        SELECT c.id FROM lineage c ORDER BY {NEWEST_FIRST} LIMIT 1
    )
    UPDATE checkpoints c SET status = 'deleting'
      FROM rule
     WHERE c.operation_id = rule.id AND c.status = 'committed' AND c.pinned_at IS NULL AND rule.top_k >= 0
       AND c.id NOT IN (SELECT id FROM best)
       AND NOT (rule.keeps_last AND c.id = (SELECT id FROM last))
""")

# Guarded by the value read: who pins it again meanwhile keeps it. An operation that ended keeps the choice of its last
# resume, since the next one begins there again. Completed operations are given back: no commit of theirs will follow.
UNPIN = statement("""
    WITH idle AS MATERIALIZED (
        SELECT c.id, c.pinned_at FROM checkpoints c
         WHERE c.pinned_at IS NOT NULL
           AND NOT EXISTS (SELECT FROM operations o WHERE o.resume_checkpoint_id = c.id)
           AND NOT EXISTS (SELECT FROM operations o WHERE o.forked_from_checkpoint_id = c.id)
           AND NOT EXISTS (SELECT FROM attempts a JOIN operations o ON o.id = a.operation_id AND o.attempt = a.number
                            WHERE a.checkpoint_id = c.id AND o.status IN ('running', 'cancelling'))
    ), unpinned AS (
        UPDATE checkpoints c SET pinned_at = NULL
          FROM idle WHERE c.id = idle.id AND c.pinned_at = idle.pinned_at
        RETURNING c.operation_id
    )
    SELECT DISTINCT o.id FROM unpinned JOIN operations o ON o.id = unpinned.operation_id WHERE o.status = 'completed'
""")

DELETING = statement("SELECT id, path FROM checkpoints WHERE status = 'deleting' ORDER BY id LIMIT 100")

FORGET = statement("DELETE FROM checkpoints WHERE id = :checkpoint_id AND status = 'deleting'")


@dataclass(frozen=True)
class Retired:
    """A checkpoint whose files are to go, and its row after them."""

    id: UUID
    path: str


async def retire(session: AsyncSession, id: UUID) -> None:
    """Move the operation's checkpoints that its job does not keep, committed → deleting."""
    await session.execute(RETIRE, {"id": id})


async def release(session: AsyncSession) -> None:
    """Unpin what no operation refers to any more, and retire it where no commit will."""
    for id in list(await session.scalars(UNPIN)):
        await retire(session, id)


async def deleting(session: AsyncSession) -> list[Retired]:
    return [Retired(row.id, row.path) for row in await session.execute(DELETING)]


async def forget(session: AsyncSession, retired: Retired) -> None:
    """Its files are gone."""
    await session.execute(FORGET, {"checkpoint_id": retired.id})
