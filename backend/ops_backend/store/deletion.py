"""delete: an operation that has ended goes with all its rows; `deletions` tells the sweepers of its files.

A fork and a resume hold or want the row of the operation: whoever has it first wins, and the other finds it gone or
no longer deletable.
"""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import statement
from ops_backend.store.transitions import not_found
from ops_backend.tables import quoted
from ops_contract.cleanup import CleanupItem, CleanupRequest
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import TERMINAL

CANDIDATES = 10_000
FORKS_NAMED = 5

# A statement of its own: the next one's snapshot shows the forks that were inserted while this one waited.
# A study's children go with it.
LOCK = statement("SELECT id FROM operations WHERE id = :id OR parent_id = :id ORDER BY id FOR UPDATE")

_TERMINAL = quoted(sorted(TERMINAL))

# Live or not: a fork that has ended can be resumed from its fork point, and a replay compares with its parent's values.
_DEPENDENTS = """
    SELECT f.id FROM operations f JOIN checkpoints c ON c.id = f.forked_from_checkpoint_id WHERE c.operation_id = o.id
     UNION SELECT f.id FROM operations f WHERE f.replay_of = o.id"""

# Foreign keys are checked at the end of the statement, so the order within it does not count.
DELETE = statement(f"""
    WITH target AS MATERIALIZED (
        SELECT x.id FROM operations x WHERE (x.id = :id OR x.parent_id = :id) AND NOT EXISTS (
            SELECT FROM operations o WHERE (o.id = :id OR o.parent_id = :id)
               AND (o.status NOT IN ({_TERMINAL}) OR EXISTS ({_DEPENDENTS})))
    ), entombed AS (
        INSERT INTO deletions (operation_id) SELECT id FROM target RETURNING operation_id
    ), wanted AS (DELETE FROM planned x USING target t WHERE x.parent_id = t.id
    ), given AS (DELETE FROM results x USING target t WHERE x.operation_id = t.id
    ), told AS (DELETE FROM events x USING target t WHERE x.operation_id = t.id
    ), measured AS (DELETE FROM metrics x USING target t WHERE x.operation_id = t.id
    ), used AS (DELETE FROM energy_windows x USING target t WHERE x.operation_id = t.id
    ), summed AS (DELETE FROM energy_sums x USING target t WHERE x.operation_id = t.id
    ), printed AS (DELETE FROM logs x USING target t WHERE x.operation_id = t.id
    ), left_over AS (DELETE FROM artifacts x USING target t WHERE x.operation_id = t.id
    ), saved AS (DELETE FROM checkpoints x USING target t WHERE x.operation_id = t.id
    ), held AS (DELETE FROM holds x USING target t WHERE x.operation_id = t.id
    ), attempted AS (DELETE FROM attempts x USING target t WHERE x.operation_id = t.id
    ), gone AS (DELETE FROM operations x USING target t WHERE x.id = t.id
    )
    SELECT operation_id FROM entombed
""")

EXPLAIN = statement(f"""
    SELECT o.id, o.status, ARRAY({_DEPENDENTS}) AS dependents FROM operations o
     WHERE o.id = :id OR o.parent_id = :id ORDER BY o.id <> :id, o.status IN ({_TERMINAL})
""")

# Pinned ones are a fork's.
GIVE_UP_CHECKPOINTS = statement(f"""
    UPDATE checkpoints c SET status = 'deleting'
      FROM operations o
     WHERE o.id = :id AND o.status IN ({_TERMINAL}) AND c.operation_id = o.id
       AND c.status IN ('committed', 'corrupt') AND c.pinned_at IS NULL
""")

# Newest first: forks before what they begin at.
ENDED = statement(f"""
    SELECT o.id, o.name, o.status, o.ended_at, ARRAY({_DEPENDENTS}) AS dependents,
           saved.size_bytes AS checkpoint_bytes, coalesce(saved.free_bytes, 0) AS free_bytes,
           saved.free_bytes IS NOT NULL AS has_free, model.size_bytes AS model_bytes
      FROM operations o
     CROSS JOIN LATERAL (
        SELECT coalesce(sum(c.size_bytes), 0)::bigint AS size_bytes,
               sum(c.size_bytes) FILTER (WHERE c.pinned_at IS NULL AND c.status <> 'deleting')::bigint AS free_bytes
          FROM checkpoints c WHERE c.operation_id = o.id) saved
     CROSS JOIN LATERAL (SELECT sum(x.size_bytes)::bigint AS size_bytes FROM artifacts x
                          WHERE x.operation_id = o.id AND x.attempt = o.attempt AND o.status = 'completed') model
     WHERE o.status = ANY (:names) AND o.ended_at < now() - make_interval(secs => :older_than_s)
       AND (CAST(:label_key AS text) IS NULL OR
            CASE WHEN CAST(:label_value AS text) IS NULL THEN o.labels ? :label_key
                 ELSE o.labels->>:label_key = :label_value END)
     ORDER BY o.created_at DESC, o.id DESC
     LIMIT {CANDIDATES}
""")

UNSWEPT = statement("SELECT operation_id FROM deletions WHERE swept_at IS NULL ORDER BY operation_id LIMIT 100")

MARK_SWEPT = statement("UPDATE deletions SET swept_at = now() WHERE operation_id = :id")


async def delete_if_ended(session: AsyncSession, id: UUID) -> bool:
    """Delete an operation that has ended, and that no fork and no replay needs."""
    await session.execute(LOCK, {"id": id})
    return await session.scalar(DELETE, {"id": id}) is not None


async def give_up_checkpoints(session: AsyncSession, id: UUID) -> None:
    """Of an operation that has ended; but for those that forks begin at."""
    await session.execute(LOCK, {"id": id})
    await session.execute(GIVE_UP_CHECKPOINTS, {"id": id})


async def explain_delete(session: AsyncSession, id: UUID) -> OpsError:
    """Why `delete_if_ended` deleted nothing."""
    rows = (await session.execute(EXPLAIN, {"id": id})).all()
    if not rows or rows[0].id != id:
        return not_found(id)
    row = next((row for row in rows if row.status not in TERMINAL), rows[0])
    if row.status not in TERMINAL:
        which = "operation" if row.id == id else f"its child {row.id}"
        message = f"{which} is {row.status}: cancel it first (`ops cancel`), and delete it once it has ended"
        return OpsError(ErrorCode.NOT_DELETABLE, message, status=row.status)
    needed = sorted({str(dependent) for row in rows for dependent in row.dependents})
    if not needed:
        return OpsError(ErrorCode.UNAVAILABLE, "a fork or replay of it has just gone; try again")
    return OpsError(ErrorCode.NOT_DELETABLE, _needed(needed), status=row.status, needed_by=needed)


async def cleanup_plan(session: AsyncSession, wanted: CleanupRequest) -> tuple[list[CleanupItem], bool]:
    """What goes and what stays, in an order in which it can go; and whether there are more than were looked at."""
    key, _, value = (wanted.label or "").partition("=")
    values = {"names": sorted(wanted.status), "older_than_s": wanted.older_than_s}
    rows = (await session.execute(ENDED, values | {"label_key": key or None, "label_value": value or None})).all()
    items: list[CleanupItem] = []
    going: set[UUID] = set()
    for row in rows:
        facts = {"id": row.id, "name": row.name, "status": row.status, "ended_at": row.ended_at}
        needed = sorted(str(id) for id in row.dependents if id not in going)
        if wanted.keep_model and row.model_bytes is not None:
            if row.has_free:
                reason = "its model and history are kept"
                items.append(CleanupItem(**facts, goes="checkpoints", size_bytes=row.free_bytes, reason=reason))
        elif needed:
            items.append(CleanupItem(**facts, goes="nothing", size_bytes=0, reason=_needed(needed)))
        else:
            going.add(row.id)
            size_bytes = row.checkpoint_bytes + (row.model_bytes or 0)
            items.append(CleanupItem(**facts, goes="all", size_bytes=size_bytes))
    return items, len(rows) == CANDIDATES


async def unswept(session: AsyncSession) -> Sequence[UUID]:
    """Deleted operations whose files may still be there."""
    return list(await session.scalars(UNSWEPT))


async def mark_swept(session: AsyncSession, id: UUID) -> None:
    await session.execute(MARK_SWEPT, {"id": id})


def _needed(by: Sequence[str]) -> str:
    named = ", ".join(by[:FORKS_NAMED]) + (", …" if len(by) > FORKS_NAMED else "")
    return f"forks or replays need it as long as they exist; delete them first: {named}"
