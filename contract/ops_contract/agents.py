"""What agents and the API say to each other. Durations are relative: no two clocks are compared."""

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field, StringConstraints

from ops_contract.energy import DeviceNow
from ops_contract.jobs import Job
from ops_contract.lifecycle import Drain, Phase
from ops_contract.plans import ChildResult, Plan
from ops_contract.problems import Problem
from ops_contract.reports import Progress, Report
from ops_contract.study_results import GridResult, SweepResult
from ops_contract.wire import Name, Step, Wire

CREDENTIAL_PREFIX = "rlw_"
Credential = Annotated[str, StringConstraints(pattern=rf"^{CREDENTIAL_PREFIX}[A-Za-z0-9_-]{{43,200}}$")]
Secret = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{43,200}$")]


class SlotOffer(Wire):
    """One place for one trainer. A CPU slot is known by incarnation and index, a GPU slot by host and uuid."""

    index: int = Field(ge=0, lt=2**31)
    device: Literal["cpu", "cuda", "mps"]
    device_uuid: Name | None = None
    cores: int = Field(ge=1, lt=2**31)
    port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="on the host of the worker's URL: where its trainer listens when it is rank 0",
    )


class WorkloadOffer(Wire):
    """A workload that this worker runs: the JSON Schema of its config and the metrics it reports.

    `validates`: its config is checked by code too, which no schema can say.
    """

    name: Name
    title: str = ""
    config_schema: dict[str, Any]
    reports: dict[str, Literal["min", "max"]] = {}
    validates: bool = False


class WorkerRegistration(Wire):
    """POST /workers. The same incarnation again, with the same credential, is the same registration.

    Both secrets are the worker's own: it shows `credential` in all that it says from now on, and is shown `secret` in
    all that it is told.
    """

    incarnation: UUID
    credential: Credential = Field(repr=False)
    secret: Secret = Field(repr=False)
    name: Name
    host: Name
    url: Name
    slots: list[SlotOffer] = Field(min_length=1, max_length=1024)
    workloads: list[WorkloadOffer] = Field(max_length=1000)
    user_code: bool = Field(False, description="runs commands and workloads that its users bring")
    versions: dict[str, str] = {}


class WorkerRegistered(Wire):
    """The API's terms."""

    lease_s: float
    heartbeat_s: float
    cancel_grace_s: float


class HoldRef(Wire):
    operation_id: UUID
    attempt: int = Field(ge=1, lt=2**31)


class Heartbeat(Wire):
    """POST /workers/{incarnation}/heartbeat: renews the leases of the holds it lists."""

    holds: list[HoldRef] = Field([], max_length=1024)
    devices: list[DeviceNow] = Field([], max_length=1024)
    draining: bool = False


class CancelOrder(HoldRef):
    reason: str = ""
    force: bool = False


class HeartbeatAnswer(Wire):
    """`ended`: listed holds that are no longer this worker's; kill their trainers. `cancelling`: stop these."""

    ended: list[HoldRef] = []
    cancelling: list[CancelOrder] = []
    drain: Drain | None = None


class ReportBatch(Wire):
    """POST /operations/{id}/attempts/{n}/reports: consecutive reports, the first numbered `first_seq` (from 1).

    A finish ends a batch. `progress` is the newest, whatever the reports say.
    """

    incarnation: UUID
    first_seq: int = Field(ge=1, lt=2**62)
    reports: list[Report] = Field(min_length=1, max_length=1000)
    progress: Progress | None = None


class ReportsAccepted(Wire):
    """Everything up to `last_seq` is committed."""

    last_seq: int


class CheckpointRef(Wire):
    """A committed checkpoint to restore; `path` is relative to the storage root."""

    checkpoint_id: UUID
    path: Name
    step: Step
    epoch: Step
    phase: Phase
    size_bytes: int
    manifest_sha256: str


class FailureRecord(Wire):
    """How long attempts of late ran in all, and how many of them ended by losing work."""

    running_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    failures: int = Field(0, ge=0)


class Gang(Wire):
    """The ranks that train together, and which of them this worker starts: one in each slot, from `first_rank` on."""

    world_size: int = Field(ge=2, le=1024)
    first_rank: int = Field(ge=0, lt=1024)
    host: Name = Field(description="of rank 0, which listens there")
    port: int = Field(ge=1, le=65535)


class StartTraining(Wire):
    """POST /training/start on a worker (and /training/resume, with a checkpoint).

    202 taken; 200 the same attempt again; 409 `busy` or `stale` (another incarnation, or older than one seen), or
    `device_not_ready`, with everything that is wrong; 404 `no_checkpoint`; 422 `checkpoint_corrupt`.
    """

    incarnation: UUID
    operation_id: UUID
    attempt: int = Field(ge=1, lt=2**31)
    slots: list[Annotated[int, Field(ge=0)]] = Field(
        min_length=1, max_length=1024, description="indexes of the slots it was claimed for; several in a gang only"
    )
    gang: Gang | None = Field(None, description="of several slots, of this worker or of several; null: one slot is all")
    deadline_s: float = Field(gt=0, description="past this many seconds after receipt the trainer must not start")
    job: Job
    checkpoint: CheckpointRef | None = None
    parent_job: Job | None = Field(None, description="of the run whose checkpoint it is, when a fork begins")
    accept_changes: bool = Field(False, description="go on though code or data differ from the checkpoint's")
    children: list[ChildResult] | None = Field(
        None, description="of a study that is to be reduced: what it planned, in its order; null: it is to plan"
    )
    planned: SweepResult | GridResult | None = Field(None, description="of such a study: what its plan said of itself")
    record: FailureRecord = Field(FailureRecord(), description="of this service; for checkpoint_every auto")


class CancelTraining(Wire):
    """POST /operations/{id}/cancel on a worker."""

    incarnation: UUID
    attempt: int = Field(ge=1, lt=2**31)
    reason: str = ""
    force: bool = False


class WorkerHealth(Wire):
    incarnation: UUID
    name: str
    draining: bool
    slots: list[SlotOffer]
    holds: list[HoldRef]


class Validate(Wire):
    """POST /validate on a worker: what its trainers would make of this job. 503 when they do not say in time."""

    incarnation: UUID
    job: Job


# Below the storage root, for an operation's in the place of its id; what a doctor leaves that is killed bears it too.
PROBE_PREFIX = ".doctor-"
PROBE_FILE = "probe"


class ProbeStorage(Wire):
    """POST /storage on a worker: what it sees of `<root>/.doctor-<probe>/<look_for>/probe`, which the API's host made.

    With `publish` it publishes one of its own there, named by its incarnation, and looks for `absent` too, so that a
    cache may remember that it was not there. Without, it removes its own. Waits so long for what is not there yet.
    """

    incarnation: UUID
    probe: UUID
    look_for: Literal["first", "second"]
    absent: Literal["second"] | None = None
    publish: bool
    wait_s: float = Field(ge=0, le=30)


class StorageProbed(Wire):
    """`sha256` of what was found and of what was published; null where that failed, and `…_errno` says by which."""

    root: str
    filesystem: str = ""
    uid: int
    free_bytes: int
    found_sha256: str | None = None
    found_after_ms: float | None = None
    find_errno: str | None = None
    published_sha256: str | None = None
    publish_errno: str | None = None


# Of the JSON of a `Validated`: it comes from users' code, by way of a worker.
VALIDATED_MAX_BYTES = 8 * 2**20


class Validated(Wire):
    """With no problem: the config with its defaults, its JSON Schema, and the metrics that the workload reports.

    Of a study also what it would plan.
    """

    problems: list[Problem] = []
    config: dict[str, Any] = {}
    config_schema: dict[str, Any] = {}
    reports: dict[str, Literal["min", "max"]] = {}
    plan: Plan | None = None
