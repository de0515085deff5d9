"""Why a training cannot go on, as its operation will say it."""

from ops_contract.lifecycle import Outcome
from ops_contract.reports import Fault, Finish
from relight.manifest import CheckpointCorrupt, CheckpointMissing

MAX_MESSAGE_CHARS = 2_000
MAX_TRACEBACK_CHARS = 8_000


class TrainingFault(Exception):
    """`permanent`: the same job would fail the same way again. The message says what to do.

    `traceback` is of the user's code, where that is what failed.
    """

    def __init__(self, code: str, message: str, *, permanent: bool, traceback: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.permanent = permanent
        self.traceback = traceback


def finish_of(error: TrainingFault | CheckpointMissing | CheckpointCorrupt) -> Finish:
    """The last word of what ends by it."""
    if isinstance(error, TrainingFault):
        details = {"traceback": error.traceback[-MAX_TRACEBACK_CHARS:]} if error.traceback else {}
        told = fault(error.code, error.message, **details)
        return Finish(outcome=Outcome.FAILED, permanent=error.permanent, error=told)
    code = "checkpoint_missing" if isinstance(error, CheckpointMissing) else "checkpoint_corrupt"
    return Finish(outcome=Outcome.CHECKPOINT_CORRUPT, error=fault(code, str(error)))


def fault(code: str, message: str, **details: str) -> Fault:
    return Fault(
        code=code,
        message=plain_text(message)[:MAX_MESSAGE_CHARS],
        details={name: plain_text(text) for name, text in details.items()},
    )


def plain_text(text: str) -> str:
    """As the wire and Postgres take it: without NUL and lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
