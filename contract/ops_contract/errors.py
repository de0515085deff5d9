"""The one shape of an error, and its codes."""

from enum import StrEnum
from typing import Any

from ops_contract.wire import Wire


class ErrorCode(StrEnum):
    """Each code belongs to one HTTP status."""

    NOT_FOUND = "not_found"
    NO_CHECKPOINT = "no_checkpoint"
    INVALID = "invalid"
    UNKNOWN_WORKLOAD = "unknown_workload"
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"
    NOT_CANCELLABLE = "not_cancellable"
    NOT_RESUMABLE = "not_resumable"
    NOT_REPLAYABLE = "not_replayable"
    CHECKPOINT_IN_USE = "checkpoint_in_use"
    NOT_DELETABLE = "not_deletable"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    FENCED = "fenced"
    OUT_OF_ORDER = "out_of_order"
    BUSY = "busy"
    STALE = "stale"
    DEVICE_TAKEN = "device_taken"
    INCARNATION_TAKEN = "incarnation_taken"
    DEVICE_NOT_READY = "device_not_ready"
    NO_USER_CODE = "no_user_code"
    WEBHOOK_EXISTS = "webhook_exists"
    TOKEN_EXISTS = "token_exists"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    TOO_LARGE = "too_large"
    HEAD_TOO_LARGE = "head_too_large"
    RATE_LIMITED = "rate_limited"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.NO_CHECKPOINT: 404,
    ErrorCode.INVALID: 422,
    ErrorCode.UNKNOWN_WORKLOAD: 422,
    ErrorCode.CHECKPOINT_CORRUPT: 422,
    ErrorCode.NOT_CANCELLABLE: 409,
    ErrorCode.NOT_RESUMABLE: 409,
    ErrorCode.NOT_REPLAYABLE: 409,
    ErrorCode.CHECKPOINT_IN_USE: 409,
    ErrorCode.NOT_DELETABLE: 409,
    ErrorCode.IDEMPOTENCY_CONFLICT: 409,
    ErrorCode.FENCED: 409,
    ErrorCode.OUT_OF_ORDER: 409,
    ErrorCode.BUSY: 409,
    ErrorCode.STALE: 409,
    ErrorCode.DEVICE_TAKEN: 409,
    ErrorCode.INCARNATION_TAKEN: 409,
    ErrorCode.DEVICE_NOT_READY: 409,
    ErrorCode.NO_USER_CODE: 409,
    ErrorCode.WEBHOOK_EXISTS: 409,
    ErrorCode.TOKEN_EXISTS: 409,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.HEAD_TOO_LARGE: 431,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.INTERNAL: 500,
}


class ErrorDetail(Wire):
    """What went wrong, and what to do about it."""

    code: ErrorCode
    message: str
    details: dict[str, Any] = {}


class ErrorBody(Wire):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class OpsError(Exception):
    """An error that knows its own status and code; the API and the workers answer with its `body`."""

    def __init__(self, code: ErrorCode, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    @property
    def http_status(self) -> int:
        return HTTP_STATUS[self.code]

    def body(self) -> ErrorBody:
        return ErrorBody(error=ErrorDetail(code=self.code, message=self.message, details=self.details))


def without_prefix(message: str) -> str:
    """What a validator of ours said, as it said it: pydantic puts the kind of exception before it."""
    return message.removeprefix("Value error, ")
