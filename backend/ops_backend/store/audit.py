"""The audit's rows. Those of changes are written in their transactions, and outlive what they tell of."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.paging import cursor_of, read_cursor
from ops_backend.store.sql import statement
from ops_contract.audit import Action, AuditEntry, AuditPage

FORGOTTEN_AT_ONCE = 1000

ADD = statement("""
    INSERT INTO audit (id, who, token_id, action, target, address, user_agent, detail)
    VALUES (gen_random_uuid(), :who, :token_id, :action, :target, :address, :user_agent, :detail)
""")

# One row for all of a minute, whichever backend counted them.
ADD_REFUSED = statement("""
    INSERT INTO audit AS a (id, who, token_id, action, address, user_agent, count, detail)
    VALUES (md5(format('%s|%s|%s|%s', date_trunc('minute', now()), :action, :address, :who))::uuid,
            :who, :token_id, :action, :address, :user_agent, :count, :detail)
    ON CONFLICT (id) DO UPDATE SET count = a.count + EXCLUDED.count
""")

LIST = statement("""
    SELECT a.id, a.at, a.who, a.token_id, a.action, a.target, a.address, a.user_agent, a.count, a.detail
      FROM audit a
     WHERE (:who IS NULL OR a.who = :who) AND (:action IS NULL OR a.action = :action)
       AND (:target IS NULL OR starts_with(a.target, :target))
       AND a.at >= coalesce(CAST(:since AS timestamptz), '-infinity')
       AND (a.at, a.id) < (CAST(:cursor_at AS timestamptz), :cursor_id)
     ORDER BY a.at DESC, a.id DESC
     LIMIT :limit
""")

FORGET = statement(f"""
    DELETE FROM audit WHERE id IN (
        SELECT id FROM audit WHERE at < now() - make_interval(secs => :older_than_s)
         ORDER BY at LIMIT {FORGOTTEN_AT_ONCE} FOR UPDATE SKIP LOCKED)
""")


@dataclass(frozen=True)
class Caller:
    """Who, and from where."""

    who: str | None
    token_id: UUID | None
    address: str
    user_agent: str | None


@dataclass(frozen=True)
class Filter:
    """What the list is narrowed to; `target` is the beginning of one."""

    who: str | None = None
    action: Action | None = None
    target: str | None = None
    since: datetime | None = None


async def add(
    session: AsyncSession, caller: Caller, action: Action, target: str | None, detail: dict[str, Any]
) -> None:
    await session.execute(ADD, asdict(caller) | {"action": action, "target": target, "detail": detail})


async def add_refused(
    session: AsyncSession, caller: Caller, action: Action, count: int, detail: dict[str, Any]
) -> None:
    await session.execute(ADD_REFUSED, asdict(caller) | {"action": action, "count": count, "detail": detail})


async def list_page(session: AsyncSession, wanted: Filter, limit: int, cursor: str | None) -> AuditPage:
    """Newest first. Raises 422 for a cursor that is not one of ours."""
    at, id = read_cursor(cursor)
    since = wanted.since and wanted.since.isoformat()
    values = asdict(wanted) | {"since": since, "cursor_at": at, "cursor_id": id, "limit": limit + 1}
    rows = (await session.execute(LIST, values)).all()
    next_cursor = cursor_of(rows[limit - 1].at, rows[limit - 1].id) if len(rows) > limit else None
    return AuditPage(items=[AuditEntry(**row._mapping) for row in rows[:limit]], next_cursor=next_cursor)


async def forget(session: AsyncSession, older_than_s: float) -> None:
    """A bounded number of those that are too old."""
    await session.execute(FORGET, {"older_than_s": older_than_s})
