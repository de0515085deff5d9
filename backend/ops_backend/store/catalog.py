"""Who works here, and what can be run."""

from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import IS_LIVE, of_row, statement
from ops_contract.workers import SlotView, Workers, WorkerView, Workloads, WorkloadView

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


async def workers(session: AsyncSession, lease_s: float, id: UUID | None = None) -> Workers:
    """Those seen within a day, or the one; the attempts of older ones keep their names."""
    views: dict[UUID, WorkerView] = {}
    for row in (await session.execute(WORKERS, {"lease_s": lease_s, "id": id})).mappings():
        slot = of_row(SlotView, row)
        seen = views.get(row["incarnation"])
        values = {f: row[f] for f in WorkerView.model_fields if f not in ("id", "slots")}
        views[row["incarnation"]] = WorkerView(
            id=row["incarnation"], slots=[*(seen.slots if seen else []), slot], **values
        )
    return Workers(items=list(views.values()))


async def workloads(session: AsyncSession) -> Workloads:
    rows = (await session.execute(WORKLOADS)).mappings()
    return Workloads(items=[WorkloadView(**row) for row in rows])
