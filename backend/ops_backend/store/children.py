"""A study's children, as its newest plan has them: in its order, with what is known of each so far."""

from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store import ledger
from ops_backend.store.energy import OUTCOMES, entries
from ops_backend.store.lineage import starts_of
from ops_backend.store.paging import not_a_cursor
from ops_backend.store.sql import statement
from ops_contract.history import Results, ResultView
from ops_contract.lifecycle import Status
from ops_contract.operations import Children
from ops_contract.plans import ChildResult
from ops_contract.studies import MAX_CHILDREN
from ops_contract.study_results import GridResult, SweepResult

# What the newest plan of a study wants.
_NEWEST_PLAN = """
    p.parent_id = {study} AND p.attempt = (SELECT max(x.attempt) FROM planned x WHERE x.parent_id = {study})"""

# Of each name the last row that counts, and of that the last point: the values of no other are unpacked.
_FINAL = """
    SELECT array_agg(last.name) AS names, array_agg(last.values[width_bucket(last.until, last.steps)]) AS values
      FROM (SELECT DISTINCT ON (m.name) m.name, m.steps, m.values, cut.until
              FROM (SELECT number AS attempt, coalesce(min(start_step) OVER (
                               ORDER BY number ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING) - 1,
                               9223372036854775807) AS until
                      FROM attempts WHERE operation_id = o.id) cut
              JOIN metrics m ON m.operation_id = o.id AND m.attempt = cut.attempt AND m.first_step <= cut.until
             ORDER BY m.name, m.attempt DESC, m.first_step DESC) last"""

# Of a measurement's result the values that are known; all the rest of it stays where it is.
_FIGURES = """
    SELECT json_object_agg(figure.key, figure.value->'value')
      FROM json_each(x.content->'figures') figure WHERE figure.value->>'value' IS NOT NULL"""

# What is read of each child, as operation `o`, is read of those of the page alone.
CHILDREN = statement(f"""
    WITH wanted AS MATERIALIZED (
        SELECT p.child_key AS key, p.position, p.about, c.id
          FROM planned p JOIN operations c ON c.parent_id = p.parent_id AND c.child_key = p.child_key
         WHERE {_NEWEST_PLAN.format(study=":id")} AND p.position > :after
         ORDER BY p.position LIMIT :limit
    )
    SELECT wanted.key, wanted.position, wanted.about, o.id AS operation_id, o.name, o.status, o.error,
           o.ended_at, o.cancel_reason, final.names, final.values, ran.running_s,
           CASE o.kind WHEN 'training' THEN x.content END AS training,
           CASE WHEN o.kind = 'measurement' AND x.attempt = o.attempt THEN ({_FIGURES}) END AS figures,
           {OUTCOMES} AS outcomes, {entries("attempt", "quality", "use")} AS energy
      FROM wanted JOIN operations o USING (id)
      LEFT JOIN results x ON x.operation_id = o.id
      LEFT JOIN LATERAL ({_FINAL}) final ON true
     CROSS JOIN LATERAL (
        SELECT sum(extract(epoch FROM coalesce(a.ended_at, now()) - a.started_at))::float8 AS running_s
          FROM attempts a WHERE a.operation_id = o.id) ran
     ORDER BY wanted.position
""")

# How many there are of each status, as a column of the study `o`; null for what is no study.
COUNTS = f"""
    CASE WHEN o.kind = 'study' THEN (
        SELECT jsonb_object_agg(status, n) FROM (
            SELECT c.status, count(*) AS n
              FROM planned p JOIN operations c ON c.parent_id = p.parent_id AND c.child_key = p.child_key
             WHERE {_NEWEST_PLAN.format(study="o.id")} GROUP BY c.status) counted) END"""

RESULT = statement("SELECT attempt, created_at, content FROM results WHERE operation_id = :id")


async def results(session: AsyncSession, id: UUID) -> Results:
    """Raises 404."""
    await starts_of(session, id)
    found = await _result(session, id)
    return Results(items=[found] if found else [])


async def planned(session: AsyncSession, id: UUID) -> SweepResult | GridResult | None:
    """What the study said last: what it skipped and warned of when it planned."""
    found = await _result(session, id)
    return found.content if found and isinstance(found.content, SweepResult | GridResult) else None


async def _result(session: AsyncSession, id: UUID) -> ResultView | None:
    row = (await session.execute(RESULT, {"id": id})).mappings().one_or_none()
    return ResultView.model_validate(dict(row)) if row else None


async def page(session: AsyncSession, id: UUID, limit: int, cursor: str | None) -> Children:
    """Raises 404, and 422 for a cursor that is not one of ours."""
    await starts_of(session, id)
    try:
        after = -1 if cursor is None else int(cursor)
        found = await children(session, id, after, limit + 1)
    except ValueError:
        raise not_a_cursor() from None
    items = found[:limit]
    return Children(items=items, next_cursor=str(items[-1].position) if len(found) > limit else None)


async def children(session: AsyncSession, id: UUID, after: int = -1, limit: int = MAX_CHILDREN) -> list[ChildResult]:
    """Those at later positions than `after`."""
    rows = await session.execute(CHILDREN, {"id": id, "after": after, "limit": limit})
    return [_child(row) for row in rows]


def _child(row: Row[Any]) -> ChildResult:
    joules = ledger.view(row.energy or [], row.outcomes or [], row.status)
    return ChildResult(
        key=row.key,
        position=row.position,
        operation_id=row.operation_id,
        name=row.name,
        status=row.status,
        about=row.about,
        final=dict(zip(row.names or [], row.values or [], strict=True)) | (row.figures or {}),
        training=row.training,
        running_s=row.running_s,
        energy_j=joules.total_j,
        energy_reason=joules.reason,
        error=_why(row),
        ended_at=row.ended_at,
    )


def _why(row: Row[Any]) -> str | None:
    """Why it has no result."""
    if row.error:
        message: str = row.error["message"]
        return message
    reason: str | None = row.cancel_reason
    return reason if row.status == Status.CANCELLED else None
