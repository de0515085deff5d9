"""Which checkpoints go: committed → deleting, and then the row. `pinned_at` is what holds one back.

Live operations are retired where they commit, under the hold of the reporting attempt: so nothing is retired while
a finish or a claim looks for the checkpoint to go on from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.storage import Found
from ops_backend.store.sql import NEWEST_FIRST, continues, in_lineage, statement
from ops_backend.store.transitions import not_found
from ops_backend.tables import quoted
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import TERMINAL, CheckpointStatus

# Kept: the best of the lineage, of equals the earlier; its newest, which a resume would take; whatever is pinned, by a
# claim, a resume or a fork. Of a replay that is done nothing is kept. A null limit keeps all of the best. NaN is
# nobody's best. Corrupt ones are kept until the operation is completed: what marked them may have been a storage that
# was not mounted.
RETIRE = statement(f"""
    WITH rule AS MATERIALIZED (
        SELECT id, job->'execution'->>'checkpoint_mode' AS mode,
               (job->'execution'->>'checkpoint_save_top_k')::int AS top_k,
               status = 'completed' AS is_completed,
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
     WHERE c.operation_id = rule.id AND c.pinned_at IS NULL AND rule.top_k >= 0
       AND (c.status = 'committed' OR c.status = 'corrupt' AND rule.is_completed)
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

# Every use pins the row first, so a use and a deletion at once meet at this row, and its guard is read again. What a
# live operation goes on from next is pinned by nobody yet, and the newest may turn out corrupt while it is restored:
# not so once the current attempt has committed it. The lock keeps the attempt from changing meanwhile.
DELETE = statement(f"""
    WITH target AS MATERIALIZED (
        SELECT id, status, attempt, forked_from_checkpoint_id FROM operations WHERE id = :id FOR NO KEY UPDATE
    ), newest AS MATERIALIZED (
        SELECT c.id, c.operation_id = t.id AND c.attempt = t.attempt AS is_own
          FROM checkpoints c JOIN target t ON {continues("t")} ORDER BY {NEWEST_FIRST} LIMIT 1
    )
    UPDATE checkpoints d SET status = 'deleting'
      FROM target t
     WHERE d.id = :checkpoint_id AND d.operation_id = t.id AND d.status IN ('committed', 'corrupt')
       AND d.pinned_at IS NULL
       AND (t.status IN ({quoted(sorted(TERMINAL))})
            OR d.status = 'corrupt' OR NOT ({in_lineage("d")})
            OR EXISTS (SELECT FROM newest WHERE is_own AND newest.id <> d.id))
    RETURNING d.id
""")

EXPLAIN = statement("""
    SELECT c.status, c.pinned_at IS NOT NULL AS is_pinned,
           (SELECT array_agg(f.id) FROM operations f WHERE f.forked_from_checkpoint_id = c.id) AS forks,
           o.resume_checkpoint_id = c.id AS is_chosen
      FROM operations o LEFT JOIN checkpoints c ON c.operation_id = o.id AND c.id = :checkpoint_id
     WHERE o.id = :id
""")

DELETING = statement("SELECT id, path FROM checkpoints WHERE status = 'deleting' ORDER BY id LIMIT 100")

FORGET = statement("DELETE FROM checkpoints WHERE id = :checkpoint_id AND status = 'deleting'")


# Read in one snapshot: an attempt whose end it shows has all its rows in it. A row of any status keeps its files.
# A deleted operation has none: a zombie may have published there after its directory was deleted.
WITHOUT_ROW = statement("""
    SELECT f.path
      FROM unnest(:ids, :attempts, :paths) AS f(operation_id, attempt, path)
     WHERE (EXISTS (SELECT FROM attempts a
                     WHERE a.operation_id = f.operation_id AND a.number = f.attempt AND a.ended_at IS NOT NULL)
            OR EXISTS (SELECT FROM deletions d WHERE d.operation_id = f.operation_id))
       AND NOT EXISTS (SELECT FROM holds h WHERE h.operation_id = f.operation_id AND h.attempt = f.attempt
                                             AND h.ended_at IS NULL)
       AND NOT EXISTS (SELECT FROM checkpoints c WHERE c.path = f.path)
       AND NOT EXISTS (SELECT FROM artifacts x
                        WHERE x.operation_id = f.operation_id AND starts_with(x.path, f.path || '/'))
""")


@dataclass(frozen=True)
class Retired:
    """A checkpoint whose files are to go, and its row after them."""

    id: UUID
    path: str


async def retire(session: AsyncSession, id: UUID) -> None:
    """Move the operation's checkpoints that its job does not keep, committed → deleting."""
    await session.execute(RETIRE, {"id": id})


async def delete_if_unused(session: AsyncSession, id: UUID, checkpoint_id: UUID) -> bool:
    """Move a checkpoint that nobody uses committed, corrupt → deleting."""
    deleted = await session.scalar(DELETE, {"id": id, "checkpoint_id": checkpoint_id})
    return deleted is not None


async def explain_delete(session: AsyncSession, id: UUID, checkpoint_id: UUID) -> OpsError:
    """Why `delete_if_unused` moved nothing."""
    row = (await session.execute(EXPLAIN, {"id": id, "checkpoint_id": checkpoint_id})).one_or_none()
    if row is None:
        return not_found(id)
    if row.status is None:
        return OpsError(ErrorCode.NO_CHECKPOINT, "this operation has no such checkpoint; see `ops checkpoints list`")
    if row.status == CheckpointStatus.DELETING:
        return OpsError(ErrorCode.NO_CHECKPOINT, "this checkpoint is being deleted already")
    if row.forks:
        why = f"forks begin at it, which need it as long as they exist: {', '.join(map(str, row.forks))}"
    elif row.is_chosen:
        why = "a resume chose it; it is needed until the operation has saved another one"
    elif row.is_pinned:
        why = "an attempt started from it; try again when that attempt has ended"
    else:
        why = "the live operation may go on from it; wait until its attempt has saved a newer one, or cancel it"
    return OpsError(ErrorCode.CHECKPOINT_IN_USE, f"this checkpoint is in use: {why}")


async def release(session: AsyncSession) -> None:
    """Unpin what no operation refers to any more, and retire it where no commit will."""
    for id in list(await session.scalars(UNPIN)):
        await retire(session, id)


async def deleting(session: AsyncSession) -> list[Retired]:
    return [Retired(row.id, row.path) for row in await session.execute(DELETING)]


async def forget(session: AsyncSession, retired: Retired) -> None:
    """Its files are gone."""
    await session.execute(FORGET, {"checkpoint_id": retired.id})


async def without_row(session: AsyncSession, found: Sequence[Found]) -> list[str]:
    """The paths of those that no row refers to, nor ever will."""
    columns = {
        "ids": [f.operation_id for f in found],
        "attempts": [f.attempt for f in found],
        "paths": [f.path for f in found],
    }
    return list(await session.scalars(WITHOUT_ROW, columns))
