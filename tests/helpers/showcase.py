"""A database as a lab has it after a year: for tests of scale, and for pictures of the dashboard."""

from pathlib import Path
from uuid import UUID

from helpers.databases import connect

LARGE = UUID(int=1)  # a million points of loss, some of them NaN
STORMY = UUID(int=2)  # three attempts: killed, lost, running


async def fill(database_url: str, operations: int = 10_000, points: int = 1_000_000) -> None:
    sql = Path(__file__).with_suffix(".sql").read_text()
    for name, value in {"stormy": STORMY, "large": LARGE, "points": points, "operations": operations}.items():
        sql = sql.replace(f"@{name}", str(value))
    connection = await connect(database_url)
    await connection.execute(sql)
    await connection.close()
