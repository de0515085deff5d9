"""The audit: who did what, and from where."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from ops_contract.wire import Wire


class Action(StrEnum):
    """What was done, each in the transaction of its change; what was refused, by the minute. Reads are not noted."""

    SUBMIT = "operation.submit"
    CANCEL = "operation.cancel"
    RESUME = "operation.resume"
    FORK = "operation.fork"
    REPLAY = "operation.replay"
    DELETE = "operation.delete"
    CLEAN_UP = "operation.cleanup"  # by age: one for each operation that went, or whose checkpoints did
    DELETE_CHECKPOINT = "checkpoint.delete"
    UPLOAD = "snapshot.upload"
    REGISTER = "worker.register"
    DRAIN = "worker.drain"
    UNDRAIN = "worker.undrain"
    ADD_WEBHOOK = "webhook.add"
    REMOVE_WEBHOOK = "webhook.remove"
    TEST_WEBHOOK = "webhook.test"  # before it is sent
    CREATE_TOKEN = "token.create"
    REVOKE_TOKEN = "token.revoke"
    LINK = "session.link"  # a code that logs a browser in
    LOG_IN = "session.log_in"
    LOG_OUT = "session.log_out"
    UNAUTHENTICATED = "access.refused"  # a secret that is none of ours, or no longer
    FORBIDDEN = "access.forbidden"  # a token that is not for this


class AuditEntry(Wire):
    """`who` is the name of a token, null where it is not known; `count` is of the refusals within a minute."""

    id: UUID
    at: datetime
    who: str | None
    token_id: UUID | None
    action: Action
    target: str | None
    address: str
    user_agent: str | None
    count: int
    detail: dict[str, Any]


class AuditPage(Wire):
    """Newest first."""

    items: list[AuditEntry]
    next_cursor: str | None
