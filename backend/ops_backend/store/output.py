"""What the attempts of an operation print: bytes under offsets that count all attempts and what was left out.

A transaction that writes holds its attempt's hold, so there is one writer an operation.
"""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.store.sql import statement
from ops_backend.store.transitions import not_found
from ops_contract.lifecycle import TERMINAL, Status
from ops_contract.reports import LOG_CHUNK_BYTES, LogChunk

# Of an operation's output the first HEAD_BYTES stay, which say what was run, and the last LATE_BYTES.
HEAD_BYTES = 2**20
LATE_BYTES = 4 * 2**20

# `stored` counts what was ever stored before the row: unlike offsets it has no gaps, and the bound goes by it.
NEWEST = statement("""
    SELECT l.start + octet_length(l.data) AS "end", l.stored + octet_length(l.data) AS stored,
           l.attempt = :attempt AS same,
           l.attempt <> :attempt AND substring(l.data FROM octet_length(l.data)) <> '\\x0a' AS breaks_line
      FROM logs l WHERE l.operation_id = :id ORDER BY l.start DESC LIMIT 1
""")

ATTEMPT = statement("""
    SELECT w.name AS worker, a.start_step FROM attempts a JOIN workers w ON w.incarnation = a.incarnation
     WHERE a.operation_id = :id AND a.number = :attempt
""")

INSERT = statement("""
    INSERT INTO logs (operation_id, start, stored, attempt, data) VALUES (:id, :start, :stored, :attempt, :data)
""")

TRIM = statement(f"""
    DELETE FROM logs
     WHERE operation_id = :id AND stored BETWEEN {HEAD_BYTES} AND :stored - {LATE_BYTES + LOG_CHUNK_BYTES}
""")

STATUS = statement("SELECT status FROM operations WHERE id = :id")

END = statement("""
    SELECT start + octet_length(data) FROM logs WHERE operation_id = :id ORDER BY start DESC LIMIT 1
""")

# No row is longer than a chunk, so the index finds the first one.
READ = statement(f"""
    WITH first AS (
        SELECT stored FROM logs
         WHERE operation_id = :id AND start > :start - {LOG_CHUNK_BYTES} AND start + octet_length(data) > :start
         ORDER BY start LIMIT 1
    )
    SELECT l.start, l.data FROM logs l, first
     WHERE l.operation_id = :id AND l.stored >= first.stored AND l.stored < first.stored + :max_bytes
     ORDER BY l.start
""")


@dataclass(frozen=True)
class Output:
    """`data` is what begins at `start`, without a gap. `complete`: it has ended, and this is the end of it."""

    start: int
    data: bytes
    end: int
    complete: bool


async def write(session: AsyncSession, id: UUID, attempt: int, chunk: LogChunk) -> None:
    """After what is there. Where an attempt follows another, a line of ours says so."""
    newest = (await session.execute(NEWEST, {"id": id, "attempt": attempt})).one_or_none()
    end, stored = (newest.end, newest.stored) if newest else (0, 0)
    parts = [(chunk.skipped, chunk.content())]
    if attempt > 1 and not (newest and newest.same):
        parts.insert(0, (0, await _headline(session, id, attempt, bool(newest and newest.breaks_line))))
    for skipped, data in parts:
        row = {"id": id, "attempt": attempt, "start": end + skipped, "stored": stored, "data": data}
        await session.execute(INSERT, row)
        end, stored = end + skipped + len(data), stored + len(data)
    await session.execute(TRIM, {"id": id, "stored": stored})


async def read(session: AsyncSession, id: UUID, offset: int, max_bytes: int) -> Output:
    """From the first byte there is at or after `offset`, or the last `-offset` bytes. Raises 404."""
    # Before the rows: what had ended then has no more to come.
    status = await session.scalar(STATUS, {"id": id})
    if status is None:
        raise not_found(id)
    end = await session.scalar(END, {"id": id}) or 0
    start = min(end, offset if offset >= 0 else max(0, end + offset))
    rows = (await session.execute(READ, {"id": id, "start": start, "max_bytes": max_bytes})).all()
    if rows:
        start = max(start, rows[0].start)
    data = bytearray()
    for row in rows:
        if row.start > start + len(data):
            break
        data += row.data[start - row.start :] if not data else row.data
    del data[max_bytes:]
    end = max(end, start + len(data))  # written meanwhile
    return Output(start, bytes(data), end, Status(status) in TERMINAL and start + len(data) == end)


async def _headline(session: AsyncSession, id: UUID, attempt: int, breaks_line: bool) -> bytes:
    row = (await session.execute(ATTEMPT, {"id": id, "attempt": attempt})).one()
    where = f"attempt {attempt} on {row.worker}" + (f", from step {row.start_step}" if row.start_step else "")
    return f"{chr(10) if breaks_line else ''}--- {where} ---\n".encode()
