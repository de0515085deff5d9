"""The state machine of an operation, as data.

The store's statements, the CHECK constraints, the docs and the history checkers all speak of this one table.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Kind(StrEnum):
    """What an operation does."""

    TRAINING = "training"
    MEASUREMENT = "measurement"  # of the energy of LLM inference; it resumes by running again
    COMMAND = "command"  # any program; it resumes by running again, from a checkpoint of relight.Run if it made one
    STUDY = "study"  # plans children, waits for them, and reduces what they give


class Status(StrEnum):
    """Where an operation stands."""

    PENDING = "pending"  # waits for a slot, or for its backoff to pass
    RUNNING = "running"  # one attempt holds slots
    WAITING = "waiting"  # a study whose children are live
    CANCELLING = "cancelling"  # asked to stop; the trainer may still be alive
    COMPLETED = "completed"  # terminal, for good
    FAILED = "failed"  # terminal, resumable by hand
    CANCELLED = "cancelled"  # terminal, resumable by hand


LIVE = frozenset({Status.PENDING, Status.RUNNING, Status.WAITING, Status.CANCELLING})
TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})
CANCELLABLE = frozenset({Status.PENDING, Status.RUNNING, Status.WAITING})
RESUMABLE = frozenset({Status.FAILED, Status.CANCELLED})

Ended = Literal[Status.COMPLETED, Status.FAILED, Status.CANCELLED]  # of TERMINAL, for a schema


class Event(StrEnum):
    """Why a row was written to an operation's history. All but the last three may move its status."""

    SUBMIT = "submit"
    CLAIM = "claim"
    REFUSE = "refuse"
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"
    COMPLETE = "complete"
    FAIL = "fail"
    RETRY = "retry"
    PREEMPT = "preempt"
    STOP = "stop"
    LOST = "lost"
    PLAN = "plan"
    REDUCE = "reduce"
    REPLAN = "replan"
    CANCEL = "cancel"
    RESUME = "resume"
    FORCE = "force"
    NOTE = "note"
    REPLAY_DIVERGED = "replay_diverged"  # an attempt that promised exactness reported another value of a step


class Outcome(StrEnum):
    """How an attempt ended, as its worker tells it; LOST and REFUSED are the backend's own."""

    COMPLETED = "completed"
    FAILED = "failed"
    PLANNED = "planned"  # a study knows its children
    PREEMPTED = "preempted"  # handed back on request of the worker's host
    CANCELLED = "cancelled"  # stopped because it was told to
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"  # the checkpoint it was given does not restore
    REFUSED = "refused"  # the worker did not take it
    LOST = "lost"  # its lease ran out


class CheckpointStatus(StrEnum):
    """A row is the commit of a checkpoint; what is not COMMITTED is never restored."""

    COMMITTED = "committed"
    CORRUPT = "corrupt"
    DELETING = "deleting"


class CheckpointType(StrEnum):
    """Why a checkpoint was written."""

    INITIAL = "initial"  # before step 0: makes everything resumable
    PERIODIC = "periodic"
    CANCEL = "cancel"
    PREEMPT = "preempt"
    FINAL = "final"


class StudyPhase(StrEnum):
    """What the next attempt of a study does."""

    PLAN = "plan"
    REDUCE = "reduce"


class Phase(StrEnum):
    """What is next at a checkpoint's step: its update, or the evaluation after it."""

    UPDATE = "update"
    EVALUATE = "evaluate"


@dataclass(frozen=True)
class Transition:
    """One row of the table. `charged` says whether the attempt counts against `max_retries`."""

    source: Status | None
    event: Event
    target: Status
    guard: str
    charged: bool = False


_LIVE_HOLD = "the reporting hold has not ended"
_LAST = "of a gang's members without a fault the last one's"
_EXPIRED = "a hold's lease ran out, and no grace"
_TO_GO_ON_FROM = (
    "a committed checkpoint, pinned; a command, a measurement and a study need none. No child of a cancelled study"
)

_STOPPED = "of a study's child also: stop_after_failures of its siblings have failed in a row"

_PLANNED_AGAIN = "its waiting study has planned it again, in a later attempt than the one that it last ran for"

TRANSITIONS: tuple[Transition, ...] = (
    Transition(None, Event.SUBMIT, Status.PENDING, "the job is valid"),
    Transition(Status.PENDING, Event.CLAIM, Status.RUNNING, "due, and slots are free"),
    Transition(Status.RUNNING, Event.REFUSE, Status.PENDING, _LIVE_HOLD),
    Transition(Status.RUNNING, Event.CHECKPOINT_CORRUPT, Status.PENDING, f"{_LIVE_HOLD}; one before remains"),
    Transition(Status.RUNNING, Event.CHECKPOINT_CORRUPT, Status.FAILED, f"{_LIVE_HOLD}; chosen by hand, or the last"),
    Transition(Status.RUNNING, Event.COMPLETE, Status.COMPLETED, f"{_LIVE_HOLD}; {_LAST}"),
    Transition(Status.RUNNING, Event.FAIL, Status.FAILED, f"{_LIVE_HOLD}; permanent, or no retry left", charged=True),
    Transition(Status.RUNNING, Event.RETRY, Status.PENDING, f"{_LIVE_HOLD}; a retry is left", charged=True),
    Transition(Status.RUNNING, Event.PREEMPT, Status.PENDING, f"{_LIVE_HOLD}; {_LAST}"),
    Transition(Status.RUNNING, Event.LOST, Status.PENDING, _EXPIRED),
    Transition(Status.RUNNING, Event.LOST, Status.FAILED, f"{_EXPIRED}; the third started attempt without progress"),
    Transition(Status.RUNNING, Event.PLAN, Status.WAITING, f"{_LIVE_HOLD}; children inserted"),
    Transition(Status.WAITING, Event.REDUCE, Status.PENDING, "no live child, and none to be run again"),
    Transition(Status.PENDING, Event.CANCEL, Status.CANCELLED, f"none; {_STOPPED}"),
    Transition(Status.RUNNING, Event.CANCEL, Status.CANCELLING, "none"),
    Transition(Status.WAITING, Event.CANCEL, Status.CANCELLING, "none"),
    Transition(Status.CANCELLING, Event.COMPLETE, Status.COMPLETED, f"{_LIVE_HOLD}; the last step was done; {_LAST}"),
    Transition(
        Status.CANCELLING, Event.STOP, Status.CANCELLED, f"{_LIVE_HOLD}; any other finish, or a refusal; {_LAST}"
    ),
    Transition(Status.CANCELLING, Event.STOP, Status.CANCELLED, "a study with no hold and no live child"),
    Transition(Status.CANCELLING, Event.LOST, Status.CANCELLED, f"{_EXPIRED}; its exit is unconfirmed"),
    Transition(Status.FAILED, Event.RESUME, Status.PENDING, _TO_GO_ON_FROM),
    Transition(Status.CANCELLED, Event.RESUME, Status.PENDING, _TO_GO_ON_FROM),
    Transition(Status.FAILED, Event.REPLAN, Status.PENDING, _PLANNED_AGAIN),
    Transition(Status.CANCELLED, Event.REPLAN, Status.PENDING, _PLANNED_AGAIN),
)


def allowed(source: Status | None, event: Event, target: Status) -> bool:
    """Whether the table has this move; some events record without moving."""
    if event in (Event.FORCE, Event.NOTE, Event.REPLAY_DIVERGED):
        return source == target
    return any((t.source, t.event, t.target) == (source, event, target) for t in TRANSITIONS)


# An operator's wish: take no more work, and `finish` what there is, or checkpoint and hand it back (`preempt`).
Drain = Literal["finish", "preempt"]
