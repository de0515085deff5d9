"""Operations as the driver itself has them: to see that nothing has changed, nothing needs to be read."""

import json
from types import SimpleNamespace
from typing import Any
from uuid import UUID

from sqlalchemy import JSON
from sqlalchemy.dialects.postgresql import asyncpg

from ops_backend.store.queries import OPERATIONS, operation_of
from ops_backend.tables import operations
from ops_contract.operations import Operation

STATEMENT = str(OPERATIONS.compile(dialect=asyncpg.dialect()))  # type: ignore[no-untyped-call] # as it is there
JSON_COLUMNS = {
    *(column.name for column in operations.c if isinstance(column.type, JSON)),
    *("progress", "exactness", "energy", "children", "engine"),
}


async def rows(driver: Any, ids: list[UUID]) -> list[Any]:
    """Those that there are, each for `operation`; JSON is text."""
    found: list[Any] = await driver.fetch(STATEMENT, ids)
    return found


def operation(row: Any) -> Operation:
    values = {name: json.loads(v) if v is not None and name in JSON_COLUMNS else v for name, v in row.items()}
    return operation_of(SimpleNamespace(**values))
