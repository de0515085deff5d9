"""Cursors of pages, opaque to who has them."""

import base64
from datetime import datetime
from uuid import UUID

from ops_contract.errors import ErrorCode, OpsError

# Where the first page begins: a bound as any other, so that the index gives it under every plan.
_NEWEST = ("infinity", UUID(int=2**128 - 1))


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
    except ValueError:  # of base64, UTF-8, or the parts
        raise not_a_cursor() from None


def not_a_cursor() -> OpsError:
    return OpsError(ErrorCode.INVALID, "cursor: not one that this service gave; start without it")
