"""Where each attempt of an operation begins, and up to which step it counts."""

from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import statement
from ops_backend.store.transitions import not_found
from ops_contract.operations import LineageEntry

# Of operation `o`, in the order of the attempts' numbers, which begin at 1; null without any.
STARTS = "(SELECT array_agg(a.start_step ORDER BY a.number) FROM attempts a WHERE a.operation_id = o.id)"

FIND_STARTS = statement(f"SELECT {STARTS} AS starts FROM operations o WHERE o.id = :id")


async def starts_of(session: AsyncSession, id: UUID) -> list[int]:
    """Where each attempt began. Raises 404."""
    row = (await session.execute(FIND_STARTS, {"id": id})).one_or_none()
    if row is None:
        raise not_found(id)
    return list(row.starts or [])


def lineage(starts: list[int]) -> list[LineageEntry]:
    """Attempt a counts from its start to the lowest start of any later attempt."""
    entries: list[LineageEntry] = []
    end: int | None = None
    for number in range(len(starts), 0, -1):
        start = starts[number - 1]
        entries.insert(0, LineageEntry(attempt=number, start_step=start, end_step=end))
        end = start if end is None else min(end, start)
    return entries
