"""Why a training cannot go on, as its operation will say it."""

import re
import traceback
from collections.abc import Iterator

from ops_contract.lifecycle import Outcome
from ops_contract.reports import PEER_LOST, Fault, Finish
from relight.manifest import CheckpointCorrupt, CheckpointMissing

MAX_MESSAGE_CHARS = 2_000
_MAX_TRACEBACK_CHARS = 8_000

# Of torch.distributed; all are RuntimeErrors. By name: who has no torch yet knows them too.
_COLLECTIVE_ERRORS = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError"})
# gloo raises plain RuntimeErrors, which begin with where in it they arose: users' code may say the same of its own.
_HUNG_UP = r"gloo.*(closed by peer|reset by peer|broken pipe)"
_GLOO_LOST = r"gloo.*(refused|not connected|pair closure|timed out)"


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


class PeerLost(Exception):
    """Another rank of the gang has failed or is gone: why is its own to say."""


def is_peer_lost(error: BaseException) -> bool:
    """Whether it, or what it arose from, is a collective that broke, and not an error of this rank's own."""
    return any(
        isinstance(each, PeerLost) or (isinstance(each, RuntimeError) and _is_collectives(each))
        for each in _chain(error)
    )


def _is_collectives(error: RuntimeError) -> bool:
    by_name = type(error).__name__ in _COLLECTIVE_ERRORS
    return by_name or has_hung_up(error) or _says(error, _GLOO_LOST)


def has_hung_up(error: RuntimeError) -> bool:
    """Whether gloo says that another rank closed its connection."""
    return _says(error, _HUNG_UP)


def _says(error: RuntimeError, pattern: str) -> bool:
    return re.search(pattern, str(error), re.IGNORECASE | re.DOTALL) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def finish_of_lost_peer(error: BaseException) -> Finish:
    """Nobody is charged for it by this rank."""
    what = f"another rank of this training has failed or is gone: {type(error).__name__}: {error}"
    return Finish(outcome=Outcome.PREEMPTED, error=fault(PEER_LOST, what))


def finish_of(error: TrainingFault | CheckpointMissing | CheckpointCorrupt) -> Finish:
    """The last word of what ends by it."""
    if isinstance(error, TrainingFault):
        details = {"traceback": error.traceback[-_MAX_TRACEBACK_CHARS:]} if error.traceback else {}
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


def traceback_of(error: BaseException) -> str:
    """The end of it, as long as a fault may be."""
    return "".join(traceback.format_exception(error))[-_MAX_TRACEBACK_CHARS:]


def plain_text(text: str) -> str:
    """As the wire and Postgres take it: without NUL and lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
