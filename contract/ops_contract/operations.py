"""What readers of the API see."""

import math
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import Field

from ops_contract.energy import DeviceNow, Quality
from ops_contract.jobs import Code, Job
from ops_contract.lifecycle import CheckpointStatus, CheckpointType, Drain, Event, Kind, Outcome, Phase, Status
from ops_contract.measurements import MeasurementProgress
from ops_contract.plans import ChildResult, Plan
from ops_contract.reports import Exactness, Fault, ResultContent
from ops_contract.wire import Name, Text, Wire


class ProgressView(Wire):
    percent: float | None = None
    epoch: int | None = None
    step: int | None = None
    steps_total: int | None = None
    loss: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    measurement: MeasurementProgress | None = None


class EnergyView(Wire):
    """Joules; null with a reason where it is not known, never 0.0. `known_j` of the total is known all the same.

    total = useful + lost + overhead; `unattributed_j` and `upper_bound_j` stand beside it, null where there is none.
    `provisional`: a later attempt may yet make useful joules lost ones. GET …/energy has the whole ledger.
    """

    total_j: float | None = None
    known_j: float | None = None
    error_j: float | None = None
    useful_j: float | None = None
    lost_j: float | None = None
    overhead_j: float | None = None
    unattributed_j: float | None = None
    upper_bound_j: float | None = None
    quality: Quality | None = None
    provisional: bool = True
    reason: str | None = None


class CancelRequest(Wire):
    reason: Text = ""
    force: bool = False


class ResumeRequest(Wire):
    """`accept_changes`: go on though code or data are not the checkpoint's, until there is one under the new ones."""

    from_checkpoint: UUID | None = None
    accept_changes: bool = False


class ResumedFrom(Wire):
    checkpoint_id: UUID
    checkpoint_type: CheckpointType
    created_at: datetime
    epoch: int
    step: int


class ResumeAccepted(Wire):
    """`resumed_from` null: a command that has no checkpoint runs again."""

    operation_id: UUID
    status: Status
    resumed_from: ResumedFrom | None


class ForkOverrides(Wire):
    """What differs from the parent's job, field by field; `config`, `execution` and `env` by their own names."""

    config: dict[str, Any] = {}
    execution: dict[str, Any] = {}
    command: list[str] | None = None
    code: Code | None = None
    env: dict[str, str] = {}
    labels: dict[Name, Name] = {}
    priority: int | None = None
    max_retries: int | None = None


class ForkRequest(Wire):
    """`from_checkpoint`: any committed one of the operation; by default the newest of its lineage.

    `accept_changes`: as for a resume.
    """

    from_checkpoint: UUID | None = None
    accept_changes: bool = False
    overrides: ForkOverrides = ForkOverrides()
    name: Name | None = None


class ForkedFrom(Wire):
    """Where a fork begins. `operation_id` is whose checkpoint it is."""

    operation_id: UUID
    checkpoint_id: UUID
    step: int


class ReplayRequest(Wire):
    """`from_checkpoint`: by default the newest of the lineage with reported steps after it, else the beginning.

    At most `steps` steps are redone, by default all that were reported.
    """

    from_checkpoint: UUID | None = None
    steps: int | None = Field(None, ge=1, lt=2**63)


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


class LineageEntry(Wire):
    """Attempt `attempt` counts from `start_step` until a later one starts; null while it counts for nothing."""

    attempt: int
    start_step: int
    end_step: int | None


class EngineView(Wire):
    """The job of a scheduler that is to start a worker for it. `state` and `reason` are the scheduler's own words.

    `job` is the scheduler's id of it; null until it has given one.
    """

    engine: str
    job: str | None
    state: str
    reason: str | None
    asked_at: datetime


class OperationSummary(Wire):
    """A row of the list. `children`: of a study, how many there are of each status; null before it has planned them."""

    id: UUID
    name: str
    status: Status
    kind: Kind
    workload: str
    labels: dict[str, str]
    submitted_by: str
    priority: int
    attempt: int
    parent_id: UUID | None = None
    children: dict[Status, int] | None = None
    progress: ProgressView | None
    error: Fault | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None


class Operation(OperationSummary):
    """`logs` is where its files are, below the storage root; null until those of its newest end are written.

    `engine`: what a scheduler was asked for on its behalf, while it waits for that or runs on it; null: nothing.
    """

    job: Job
    max_retries: int
    failures: int
    cancel_reason: str | None
    exit_unconfirmed: bool
    not_before: datetime | None
    exactness: Exactness | None
    energy: EnergyView
    resumed_from: ResumedFrom | None
    forked_from: ForkedFrom | None
    replay_of: UUID | None
    lineage: list[LineageEntry]
    engine: EngineView | None = None
    logs: str | None = None


class Children(Wire):
    """A study's children in the order of its plan, each with what it has given so far."""

    items: list[ChildResult]
    next_cursor: str | None


class StudyPreview(Wire):
    """What a study would run, and take on the `slots` that could run it now.

    Time and energy go by the median of the newest trainings of the same workload on as many devices, `by_trainings` of
    them; null with the reason where they are not known.
    """

    job: Job
    plan: Plan | None
    slots: int
    time_s: float | None = None
    energy_j: float | None = None
    by_trainings: int = 0
    reason: str | None = None


class ResultView(Wire):
    """What an operation came to, as its attempt `attempt` said it."""

    attempt: int
    created_at: datetime
    content: ResultContent


class Results(Wire):
    """None while it has not come to any; one then."""

    items: list[ResultView]


class OperationPage(Wire):
    items: list[OperationSummary]
    next_cursor: str | None


class LiveCounts(Wire):
    """How many operations have not ended. What has ended is kept for good, and not counted."""

    pending: int
    running: int
    waiting: int
    cancelling: int


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


class SlotView(Wire):
    index: int
    device: Literal["cpu", "cuda", "mps"]
    device_uuid: str | None
    cores: int
    operation_id: UUID | None
    attempt: int | None


class DrainRequest(Wire):
    """POST /workers/{id}/drain."""

    preempt: bool = Field(False, description="hand back what runs, from a checkpoint, instead of letting it finish")


class WorkerView(Wire):
    """`live` while its last heartbeat is younger than a lease; `draining` while no more work goes to it.

    `drain` is what an operator wishes; None while it drains by itself, because its process is ending.
    """

    id: UUID
    name: str
    host: str
    url: str
    live: bool
    draining: bool
    drain: Drain | None
    user_code: bool = Field(False, description="runs commands and workloads that its users bring")
    registered_at: datetime
    last_seen_at: datetime
    versions: dict[str, str]
    slots: list[SlotView]
    devices: list[DeviceNow] = Field([], description="its GPUs, as its last heartbeat told them")


class Workers(Wire):
    items: list[WorkerView]


class WorkloadView(Wire):
    name: str
    title: str
    config_schema: dict[str, Any]
    reports: dict[str, str]


class Workloads(Wire):
    items: list[WorkloadView]


Ended = Literal[Status.COMPLETED, Status.FAILED, Status.CANCELLED]


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


class Health(Wire):
    """`version` of Relight."""

    status: Literal["ok"]
    version: str
