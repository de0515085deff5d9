"""What an operation leaves behind: attempts, events, metrics, checkpoints, files, its result."""

import math
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import Field

from ops_contract.lifecycle import CheckpointStatus, CheckpointType, Event, Outcome, Phase, Status
from ops_contract.reports import Fault, ResultContent
from ops_contract.wire import Wire


class Difference(Wire):
    """A value that was reported twice with other bits, first by `earlier_attempt` (of the parent, in a replay).

    The bits are big-endian hex: they keep the sign of a zero, which a JSON number in the database does not.
    """

    name: str
    step: int
    earlier_attempt: int
    was: float
    now: float
    was_bits: str
    now_bits: str


class ReplayCheck(Wire):
    """Values reported again against those reported before. `first_difference` is the first that was reported.

    `largest_difference` is absolute; NaN when one of two differing values was NaN, 0.0 between the two zeros.
    """

    compared: int = 0
    differing: int = 0
    first_difference: Difference | None = None
    largest_difference: float | None = None

    def __add__(self, later: "ReplayCheck") -> "ReplayCheck":
        both = [x for x in (self.largest_difference, later.largest_difference) if x is not None]
        return ReplayCheck(
            compared=self.compared + later.compared,
            differing=self.differing + later.differing,
            first_difference=self.first_difference or later.first_difference,
            largest_difference=next((x for x in both if math.isnan(x)), max(both, default=None)),
        )


class MemberView(Wire):
    """A worker of an attempt, and the ranks that it has: `ranks` of them, from `first_rank` on."""

    worker_id: UUID
    worker: str
    host: str
    first_rank: int
    ranks: int


class AttemptView(Wire):
    """`worker_id`, `worker` and `host` are rank 0's; `members` are all workers, one unless it is a gang's.

    `first_step` and `last_step` are those it reported; null when it reported none.

    `replay` compares what it reported again, of its predecessors or of the run that it replays; null: nothing yet.
    `lost_j` of its `energy_j` a later attempt used again; `energy_reason` says why one of them is null.
    """

    number: int
    worker_id: UUID
    worker: str
    host: str
    world_size: int = Field(1, description="how many ranks train together, one on each device")
    members: list[MemberView] = Field([], description="in the order of their ranks")
    trainer_pid: int | None
    claimed_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    outcome: Outcome | None
    error: Fault | None
    start_step: int
    first_step: int | None
    last_step: int | None
    energy_j: float | None
    lost_j: float | None
    energy_reason: str | None
    environment: dict[str, Any] | None
    replay: ReplayCheck | None


class Attempts(Wire):
    items: list[AttemptView]


class MetricSummary(Wire):
    """The first and the last point that count; null where none does, or none does any more."""

    name: str
    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None


class MetricNames(Wire):
    names: list[str]
    metrics: list[MetricSummary]


class MetricPoints(Wire):
    """`points` are (step, value) along the lineage; `attempt_starts` are (step, attempt).

    `cursor`, sent back, gives what has come since. First forget what you have from step `replaces_from` on: a later
    attempt began there. `more`: there are more points already.
    """

    name: str
    points: list[tuple[int, float]]
    attempt_starts: list[tuple[int, int]]
    more: bool = False
    cursor: str
    replaces_from: int | None = None


class SeriesPoints(Wire):
    """`points` are (step, value)."""

    name: str
    points: list[tuple[int, float]]


class AttemptPoints(Wire):
    """What a report of an attempt brought; without series: where the attempt begins, said again when that changes.

    A point of an attempt counts while its step is before the `start_step` of every later one.
    """

    attempt: int
    start_step: int
    series: list[SeriesPoints]


class CheckpointView(Wire):
    """The first one of a fork is its parent's: `operation_id` says whose it is."""

    id: UUID
    operation_id: UUID
    attempt: int
    checkpoint_type: CheckpointType
    status: CheckpointStatus
    step: int
    epoch: int
    phase: Phase
    path: str
    size_bytes: int
    manifest_sha256: str
    monitored: float | None
    in_lineage: bool
    created_at: datetime


class Checkpoints(Wire):
    items: list[CheckpointView]


class ArtifactView(Wire):
    """A file of a completed operation. `path` is relative to the storage root."""

    id: UUID
    operation_id: UUID
    attempt: int
    name: str
    step: int
    path: str
    size_bytes: int
    sha256: str
    created_at: datetime


class Artifacts(Wire):
    items: list[ArtifactView]


class ResultView(Wire):
    """What an operation came to, as its attempt `attempt` said it."""

    attempt: int
    created_at: datetime
    content: ResultContent


class Results(Wire):
    """None while it has not come to any; one then."""

    items: list[ResultView]


class EventView(Wire):
    """`message` tells it in one sentence, for people."""

    seq: int
    at: datetime
    name: Event
    attempt: int
    from_status: Status | None
    to_status: Status
    detail: dict[str, Any]
    message: str


class Events(Wire):
    items: list[EventView]
