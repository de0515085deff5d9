"""Lists of operations, in pages that cost what they show."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import TextClause
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.paging import cursor_of, read_cursor
from ops_backend.store.queries import SUMMARY, summary
from ops_backend.store.sql import statement
from ops_backend.tables import quoted
from ops_contract.lifecycle import Status
from ops_contract.operations import OperationPage, OperationSummary


@dataclass(frozen=True)
class Filter:
    """What a list is narrowed to; without statuses it is of any."""

    statuses: frozenset[Status] = frozenset()
    kind: str | None = None
    workload: str | None = None
    label: str | None = None
    q: str | None = None
    submitted_by: str | None = None
    parent_id: UUID | Literal["none"] | None = None


# Only what is asked for is in the statement: a condition that is there but says nothing hides the indexes from the
# planner, and a status has to be written out to be found in a partial one.
_CONDITIONS = {
    "kind": "o.kind = :kind",
    "workload": "o.workload = :workload",
    "label_key": "o.labels ? :label_key",
    "label_value": "o.labels @> jsonb_build_object(CAST(:label_key AS text), CAST(:label_value AS text))",
    "submitted_by": "o.submitted_by = :submitted_by",
    "parent_id": "o.parent_id = :parent_id",
    "no_children": "o.parent_id IS NULL",
    "q": "(strpos(lower(o.name), lower(:q)) > 0 OR starts_with(o.id::text, lower(:q)))",
    "end_at": "(o.created_at, o.id) >= (CAST(:end_at AS timestamptz), :end_id)",
}
_NEWEST_FIRST = "ORDER BY o.created_at DESC, o.id DESC"
# What a page of a search by `q` looks at, at most: no index finds a part of a name.
SEARCHED = 100_000


@lru_cache(maxsize=500)
def list_of(statuses: frozenset[Status], conditions: frozenset[str]) -> TextClause:
    """A page, newest first, of what is in `statuses` (empty: in any)."""
    return statement(f"{SUMMARY} WHERE {_where(statuses, conditions)} {_NEWEST_FIRST} LIMIT :limit")


@lru_cache(maxsize=500)
def _end_of_search(statuses: frozenset[Status], conditions: frozenset[str]) -> TextClause:
    """The last operation that a page of this search looks at; no row: all that there are."""
    where = _where(statuses, conditions - {"q"})
    return statement(
        f"SELECT o.created_at, o.id FROM operations o WHERE {where} {_NEWEST_FIRST} OFFSET :searched - 1 LIMIT 1"
    )


def _where(statuses: frozenset[Status], conditions: frozenset[str]) -> str:
    wanted = [_CONDITIONS[name] for name in sorted(conditions)]
    if statuses:
        wanted.append(f"o.status IN ({quoted(sorted(statuses))})")
    return " AND ".join([*wanted, "(o.created_at, o.id) < (CAST(:cursor_at AS timestamptz), :cursor_id)"])


async def list_page(session: AsyncSession, wanted: Filter, limit: int, cursor: str | None) -> OperationPage:
    """Newest first. Raises 422 for a cursor that is not one of ours.

    A page by `q` looks at `SEARCHED` operations at most: it may have fewer than `limit`, or none, and still a next one.
    """
    at, id = read_cursor(cursor)
    values = _asked(wanted) | {"cursor_at": at, "cursor_id": id, "limit": limit + 1}
    statuses, conditions = wanted.statuses, frozenset(values.keys() & _CONDITIONS.keys())
    if "label_value" in conditions:
        conditions -= {"label_key"}
    end = None
    if wanted.q:
        found = await session.execute(_end_of_search(statuses, conditions), values | {"searched": SEARCHED})
        if end := found.one_or_none():
            values |= {"end_at": end.created_at.isoformat(), "end_id": end.id}
            conditions |= {"end_at"}
    rows = (await session.execute(list_of(statuses, conditions), values)).all()
    last = rows[limit - 1] if len(rows) > limit else end
    next_cursor = cursor_of(last.created_at, last.id) if last else None
    return OperationPage(items=[OperationSummary(**summary(row)) for row in rows[:limit]], next_cursor=next_cursor)


def _asked(wanted: Filter) -> dict[str, Any]:
    """The values of `_CONDITIONS` that it narrows to, by name."""
    key, _, value = (wanted.label or "").partition("=")
    values = {
        "kind": wanted.kind,
        "workload": wanted.workload,
        "label_key": key or None,
        "label_value": value if key and value else None,
        "q": wanted.q,
        "submitted_by": wanted.submitted_by,
        "parent_id": wanted.parent_id if isinstance(wanted.parent_id, UUID) else None,
        "no_children": wanted.parent_id == "none" or None,
    }
    return {name: value for name, value in values.items() if value is not None}
