"""Reads. Bounded in rows and in queries, whatever the operation has lived through."""

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Row, TextClause
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.storage import LOGS
from ops_backend.store import energy, ledger
from ops_backend.store.children import COUNTS
from ops_backend.store.energy import OUTCOMES, entries
from ops_backend.store.engine_jobs import ENGINE
from ops_backend.store.sql import IS_LIVE, continues, statement
from ops_backend.store.story import tell
from ops_backend.store.transitions import not_found
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.jobs import Logger
from ops_contract.lifecycle import TERMINAL, Status
from ops_contract.operations import (
    Artifacts,
    ArtifactView,
    Attempts,
    AttemptView,
    Checkpoints,
    CheckpointView,
    Events,
    EventView,
    ForkedFrom,
    LineageEntry,
    Operation,
    OperationPage,
    OperationSummary,
    ProgressView,
    ResumedFrom,
    SlotView,
    Workers,
    WorkerView,
    Workloads,
    WorkloadView,
)

# Where the first page begins: a bound as any other, so that the index gives it under every plan.
_NEWEST = ("infinity", UUID(int=2**128 - 1))

# The newest hold that told anything; a claimed attempt that has not spoken yet shows where it starts instead.
_PROGRESS = """
    LEFT JOIN attempts a ON a.operation_id = o.id AND a.number = o.attempt
    LEFT JOIN LATERAL (
        SELECT h.attempt, h.progress FROM holds h
         WHERE h.operation_id = o.id AND h.progress IS NOT NULL ORDER BY h.attempt DESC, h.first_rank LIMIT 1
    ) told ON true"""

# An attempt that was seen to differ takes the promise from the whole operation, whatever its successors promise.
OPERATIONS = statement(f"""
    SELECT o.*, a.start_step, told.attempt AS told_attempt, told.progress,
           (SELECT x.exactness FROM attempts x
             WHERE x.operation_id = o.id AND x.exactness IS NOT NULL
             ORDER BY coalesce((x.replay->>'differing')::int > 0, false) DESC, x.number DESC LIMIT 1) AS exactness,
           c.id AS checkpoint_id, c.checkpoint_type, c.created_at AS checkpoint_created_at,
           c.epoch AS checkpoint_epoch, c.step AS checkpoint_step,
           fork.operation_id AS fork_operation_id, fork.step AS fork_step,
           (SELECT array_agg(x.start_step ORDER BY x.number) FROM attempts x WHERE x.operation_id = o.id) AS starts,
           {OUTCOMES} AS outcomes, {entries("o", "attempt", "quality", "use")} AS energy, {COUNTS} AS children,
           {ENGINE} AS engine
      FROM operations o {_PROGRESS}
      LEFT JOIN checkpoints c ON c.id = coalesce(o.resume_checkpoint_id, a.checkpoint_id)
      LEFT JOIN checkpoints fork ON fork.id = o.forked_from_checkpoint_id
     WHERE o.id = ANY (:ids)
""")

_SUMMARY = f"""
    SELECT o.id, o.name, o.status, o.kind, o.workload, o.labels, o.submitted_by, o.priority, o.attempt, o.error,
           o.created_at, o.started_at, o.ended_at, o.parent_id, a.start_step, told.attempt AS told_attempt,
           told.progress, {COUNTS} AS children
      FROM operations o {_PROGRESS}"""

SUMMARIES = statement(f"{_SUMMARY} WHERE o.id = ANY (:ids)")

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
    return statement(f"{_SUMMARY} WHERE {_where(statuses, conditions)} {_NEWEST_FIRST} LIMIT :limit")


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
        wanted.append("o.status IN ({})".format(", ".join(f"'{status}'" for status in sorted(statuses))))
    return " AND ".join([*wanted, "(o.created_at, o.id) < (CAST(:cursor_at AS timestamptz), :cursor_id)"])


STARTS = statement("""
    SELECT (SELECT array_agg(a.start_step ORDER BY a.number) FROM attempts a WHERE a.operation_id = o.id) AS starts
      FROM operations o WHERE o.id = :id
""")

ATTEMPTS = statement("""
    SELECT a.*, w.name AS worker, w.host, h.first_step, h.last_step,
           (SELECT jsonb_agg(jsonb_build_object('worker_id', m.incarnation, 'worker', k.name, 'host', k.host,
                                                'first_rank', m.first_rank, 'ranks', m.ranks) ORDER BY m.first_rank)
              FROM holds m JOIN workers k USING (incarnation)
             WHERE m.operation_id = a.operation_id AND m.attempt = a.number) AS members
      FROM attempts a
      JOIN workers w USING (incarnation)
      LEFT JOIN holds h ON h.operation_id = a.operation_id AND h.attempt = a.number AND h.incarnation = a.incarnation
     WHERE a.operation_id = :id ORDER BY a.number
""")

CHECKPOINTS = statement(f"""
    SELECT c.*, coalesce({continues("o")}, false) AS in_lineage
      FROM operations o JOIN checkpoints c ON c.operation_id = o.id OR c.id = o.forked_from_checkpoint_id
     WHERE o.id = :id ORDER BY c.created_at, c.step
""")

# The model of the attempt that completed it; of the files that its job keeps the newest, however it ended.
ARTIFACTS = statement("""
    SELECT x.* FROM artifacts x JOIN operations o ON o.id = x.operation_id
     WHERE o.id = :id AND (x.name LIKE 'files/%' OR o.status = 'completed' AND o.attempt = x.attempt)
       AND (CAST(:artifact_id AS uuid) IS NULL OR x.id = :artifact_id) ORDER BY x.name, x.attempt
""")

EVENTS = statement("""
    SELECT e.*, o.submitted_by, w.name AS worker, a.start_step, a.checkpoint_id
      FROM events e
      JOIN operations o ON o.id = e.operation_id
      LEFT JOIN attempts a ON a.operation_id = e.operation_id AND a.number = e.attempt
      LEFT JOIN workers w USING (incarnation)
     WHERE e.operation_id = :id AND e.seq > :after ORDER BY e.seq LIMIT 1000
""")

WORKERS = statement(f"""
    SELECT w.incarnation, w.name, w.host, w.url, w.draining OR w.drain IS NOT NULL AS draining, w.drain,
           w.user_code, w.registered_at, w.last_seen_at, w.versions, w.devices,
           {IS_LIVE} AS live,
           s.index, s.device, s.device_uuid, s.cores, h.operation_id, h.attempt
      FROM workers w
      JOIN slots s USING (incarnation)
      LEFT JOIN holds h ON h.operation_id = s.operation_id AND h.attempt = s.attempt
                       AND h.incarnation = s.incarnation AND h.ended_at IS NULL
     WHERE CASE WHEN CAST(:id AS uuid) IS NULL THEN w.last_seen_at > now() - interval '1 day'
                ELSE w.incarnation = :id END
     ORDER BY live DESC, w.name, w.registered_at DESC, s.index
     LIMIT 5000
""")

WORKLOADS = statement("SELECT name, title, config_schema, reports FROM workloads ORDER BY name")


@dataclass(frozen=True)
class Filter:
    """What a list is narrowed to; `status` may be several, joined by commas."""

    status: str | None = None
    kind: str | None = None
    workload: str | None = None
    label: str | None = None
    q: str | None = None
    submitted_by: str | None = None
    parent_id: UUID | Literal["none"] | None = None


async def get(session: AsyncSession, id: UUID) -> Operation:
    """Raises 404."""
    rows = await operation_rows(session, [id])
    if not rows:
        raise not_found(id)
    return operation_of(rows[0])


async def operation_rows(session: AsyncSession, ids: list[UUID]) -> Sequence[Row[Any]]:
    """Those that there are, each for `operation_of`."""
    return (await session.execute(OPERATIONS, {"ids": ids})).all()


def operation_of(row: Any) -> Operation:
    return Operation(
        **summary(row),
        job=row.job,
        max_retries=row.max_retries,
        failures=row.failures,
        cancel_reason=row.cancel_reason,
        exit_unconfirmed=row.exit_unconfirmed,
        not_before=row.not_before,
        exactness=row.exactness,
        energy=ledger.view(row.energy or [], row.outcomes or [], row.status),
        resumed_from=_resumed_from(row),
        forked_from=_forked_from(row),
        replay_of=row.replay_of,
        lineage=lineage(row.starts or []),
        engine=row.engine,
        logs=_logs(row),
    )


async def list_page(session: AsyncSession, wanted: Filter, limit: int, cursor: str | None) -> OperationPage:
    """Newest first. Raises 422 for a cursor that is not one of ours.

    A page by `q` looks at `SEARCHED` operations at most: it may have fewer than `limit`, or none, and still a next one.
    """
    at, id = read_cursor(cursor)
    values = _asked(wanted) | {"cursor_at": at, "cursor_id": id, "limit": limit + 1}
    statuses = frozenset(Status(status) for status in (wanted.status or "").split(",") if status)
    conditions = frozenset(values.keys() & _CONDITIONS.keys())
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


async def summaries(session: AsyncSession, ids: list[UUID]) -> dict[UUID, OperationSummary]:
    """Of those that there are."""
    rows = await session.execute(SUMMARIES, {"ids": ids})
    return {row.id: OperationSummary(**summary(row)) for row in rows}


async def attempts(session: AsyncSession, id: UUID) -> Attempts:
    rows = (await session.execute(ATTEMPTS, {"id": id})).all()
    used = await energy.by_attempt(session, id)  # of as many, or of one that was claimed in between
    return Attempts(
        items=[
            AttemptView(
                number=r.number,
                worker_id=r.incarnation,
                worker=r.worker,
                host=r.host,
                world_size=sum(member["ranks"] for member in r.members or []) or 1,
                members=r.members or [],
                trainer_pid=r.trainer_pid,
                claimed_at=r.claimed_at,
                started_at=r.started_at,
                ended_at=r.ended_at,
                outcome=r.outcome,
                error=r.error,
                start_step=r.start_step,
                first_step=r.first_step,
                last_step=r.last_step,
                energy_j=joules.total.energy_j,
                lost_j=joules.lost.energy_j,
                energy_reason=joules.total.reason,
                environment=r.environment,
                replay=r.replay,
            )
            for r, joules in zip(rows, used, strict=False)
        ]
    )


async def checkpoints(session: AsyncSession, id: UUID) -> Checkpoints:
    await starts_of(session, id)
    rows = (await session.execute(CHECKPOINTS, {"id": id})).mappings()
    return Checkpoints(items=[CheckpointView(**{f: row[f] for f in CheckpointView.model_fields}) for row in rows])


async def artifacts(session: AsyncSession, id: UUID) -> Artifacts:
    await starts_of(session, id)
    rows = (await session.execute(ARTIFACTS, {"id": id, "artifact_id": None})).mappings()
    return Artifacts(items=[ArtifactView(**row) for row in rows])


async def artifact(session: AsyncSession, id: UUID, artifact_id: UUID) -> ArtifactView:
    """Raises 404."""
    row = (await session.execute(ARTIFACTS, {"id": id, "artifact_id": artifact_id})).mappings().one_or_none()
    if row is None:
        raise OpsError(ErrorCode.NOT_FOUND, "this operation has no such artifact; look with `ops artifacts`")
    return ArtifactView(**row)


async def events(session: AsyncSession, id: UUID, after: int) -> Events:
    await starts_of(session, id)
    rows = (await session.execute(EVENTS, {"id": id, "after": after})).all()
    return Events(items=[event_view(row) for row in rows])


def event_view(row: Row[Any]) -> EventView:
    """`row` has what `tell` wants."""
    fields = EventView.model_fields.keys() - {"message"}
    return EventView(**{f: getattr(row, f) for f in fields}, message=tell(row))


async def workers(session: AsyncSession, lease_s: float, id: UUID | None = None) -> Workers:
    """Those seen within a day, or the one; the attempts of older ones keep their names."""
    views: dict[UUID, WorkerView] = {}
    for row in (await session.execute(WORKERS, {"lease_s": lease_s, "id": id})).mappings():
        slot = SlotView(**{f: row[f] for f in SlotView.model_fields})
        seen = views.get(row["incarnation"])
        values = {f: row[f] for f in WorkerView.model_fields if f not in ("id", "slots")}
        views[row["incarnation"]] = WorkerView(
            id=row["incarnation"], slots=[*(seen.slots if seen else []), slot], **values
        )
    return Workers(items=list(views.values()))


async def workloads(session: AsyncSession) -> Workloads:
    rows = (await session.execute(WORKLOADS)).mappings()
    return Workloads(items=[WorkloadView(**row) for row in rows])


def lineage(starts: list[int]) -> list[LineageEntry]:
    """Attempt a counts from its start to the lowest start of any later attempt."""
    entries: list[LineageEntry] = []
    end: int | None = None
    for number in range(len(starts), 0, -1):
        start = starts[number - 1]
        entries.insert(0, LineageEntry(attempt=number, start_step=start, end_step=end))
        end = start if end is None else min(end, start)
    return entries


def counted(row: Row[Any], end_step: int | None) -> Iterator[tuple[int, float]]:
    """The points of a row of metrics that count: those before a later attempt starts."""
    points = zip(row.steps, row.values, strict=True)
    return ((step, value) for step, value in points if end_step is None or step < end_step)


async def starts_of(session: AsyncSession, id: UUID) -> list[int]:
    """Where each attempt began. Raises 404."""
    row = (await session.execute(STARTS, {"id": id})).one_or_none()
    if row is None:
        raise not_found(id)
    return list(row.starts or [])


def summary(row: Row[Any]) -> dict[str, Any]:
    what = ("id", "name", "status", "kind", "workload", "labels", "submitted_by", "priority", "attempt", "error")
    family, times = ("parent_id", "children"), ("created_at", "started_at", "ended_at")
    return {name: getattr(row, name) for name in (*what, *family, *times)} | {"progress": _progress(row)}


def _progress(row: Row[Any]) -> ProgressView | None:
    if row.children is not None:
        ended, total = sum(row.children.get(status, 0) for status in TERMINAL), sum(row.children.values())
        return ProgressView(step=ended, steps_total=total, percent=100 * ended / total)
    if row.start_step is None:
        return None
    told = dict(row.progress or {})
    if row.told_attempt != row.attempt:
        told = {"step": row.start_step, "steps_total": told.get("steps_total")}
    total = told.get("steps_total")
    return ProgressView(**told, percent=100 * told["step"] / total if total else None)


def _resumed_from(row: Row[Any]) -> ResumedFrom | None:
    if row.checkpoint_id is None:
        return None
    return ResumedFrom(
        checkpoint_id=row.checkpoint_id,
        checkpoint_type=row.checkpoint_type,
        created_at=row.checkpoint_created_at,
        epoch=row.checkpoint_epoch,
        step=row.checkpoint_step,
    )


def _forked_from(row: Row[Any]) -> ForkedFrom | None:
    if row.forked_from_checkpoint_id is None:
        return None
    return ForkedFrom(
        operation_id=row.fork_operation_id, checkpoint_id=row.forked_from_checkpoint_id, step=row.fork_step
    )


def _logs(row: Row[Any]) -> str | None:
    written = row.logged_event_seq == row.event_seq and row.job["execution"].get("logger") != Logger.NONE
    return f"{row.id}/{LOGS}" if written else None


def cursor_of(at: datetime, id: UUID) -> str:
    """Of the last row of a page whose newest come first."""
    return base64.urlsafe_b64encode(f"{at.isoformat()}|{id}".encode()).decode()


def read_cursor(cursor: str | None) -> tuple[str, UUID]:
    """The rows before it are the next page. Raises 422 for one that is not ours."""
    if cursor is None:
        return _NEWEST
    try:
        at, id = base64.urlsafe_b64decode(cursor).decode().split("|")
        return datetime.fromisoformat(at).isoformat(), UUID(id)
    except (ValueError, binascii.Error):
        raise OpsError(ErrorCode.INVALID, "cursor: not one that this service gave; start without it") from None
