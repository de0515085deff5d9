"""An operation as its readers see it, and what may be asked of it."""

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import Field

from ops_contract.energy import Quality
from ops_contract.jobs import Code, Job
from ops_contract.lifecycle import CheckpointType, Kind, Status
from ops_contract.measurements import MeasurementProgress
from ops_contract.plans import ChildResult, Plan
from ops_contract.reports import Exactness, Fault
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


class OperationPage(Wire):
    items: list[OperationSummary]
    next_cursor: str | None


class LiveCounts(Wire):
    """How many operations have not ended. What has ended is kept for good, and not counted."""

    pending: int
    running: int
    waiting: int
    cancelling: int
