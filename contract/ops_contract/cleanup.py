"""Which of the operations that have ended are to be deleted, and which were."""

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import Field

from ops_contract.lifecycle import Ended, Status
from ops_contract.wire import Name, Wire


class CleanupRequest(Wire):
    """Which operations go: ended so long ago, of these statuses, with this label (`key` or `key=value`).

    `keep_model`: of those that left a model only the checkpoints go. `dry_run`: say what would go, and keep all.
    """

    older_than_s: float = Field(ge=0, le=1e10, allow_inf_nan=False)
    status: set[Ended] = Field({Status.COMPLETED, Status.FAILED, Status.CANCELLED}, min_length=1)
    label: Name | None = None
    keep_model: bool = False
    dry_run: bool = True


class CleanupItem(Wire):
    """`size_bytes` of its checkpoints and models goes. `reason` says why not all of it does."""

    id: UUID
    name: str
    status: Status
    ended_at: datetime
    goes: Literal["all", "checkpoints", "nothing"]
    size_bytes: int
    reason: str | None = None


class Cleanup(Wire):
    """`more`: there may be others; ask again."""

    items: list[CleanupItem]
    size_bytes: int
    more: bool
