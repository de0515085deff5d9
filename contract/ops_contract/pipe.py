"""Lines of JSON between an agent and its trainer process. The trainer speaks first, with its version."""

import signal
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from ops_contract.agents import StartTraining, WorkloadOffer
from ops_contract.energy import Use
from ops_contract.reports import ArtifactSaved, CheckpointSaved, Finish, Metrics, Note, Progress, Result, Started
from ops_contract.wire import PIPE_VERSION, Step, Wire

# A trainer answers it, whatever it is doing, with the Python stacks of all its threads on stderr.
STACKS_SIGNAL = signal.SIGUSR1


class Hello(Wire):
    """Warm: everything is imported that any job needs."""

    kind: Literal["hello"] = "hello"
    version: int = PIPE_VERSION
    pid: int


class Description(Wire):
    """What `--describe` prints: the interpreter's versions, and what it can run."""

    version: int = PIPE_VERSION
    versions: dict[str, str] = {}
    workloads: list[WorkloadOffer]


class ProgressNow(Wire):
    """Not a report: overwritten by the next one."""

    kind: Literal["progress"] = "progress"
    progress: Progress


class Alive(Wire):
    """The training thread gets on. Only it may send this: a helper thread also lives beside a step that hangs."""

    kind: Literal["alive"] = "alive"


class Mark(Wire):
    """From the mark before until `at_s` (CLOCK_MONOTONIC, s) the time went to `use`; the device has done all of it.

    `then` is what it goes on with: where it dies, the rest belongs there. `step` is the next one to train. `epoch` and
    `units` (samples or tokens trained on) are of the time before. `edge`: a later attempt may begin here, so that no
    window may reach across.
    """

    kind: Literal["mark"] = "mark"
    at_s: float = Field(allow_inf_nan=False)
    use: Use
    then: Use
    step: Step
    epoch: Step | None = None
    units: int = Field(0, ge=0, lt=2**63)
    edge: bool = False


class Rank(Wire):
    """Which process of a gang this one is, and where rank 0 listens: it does so on a descriptor that it inherited."""

    rank: int = Field(ge=0)
    local_rank: int = Field(ge=0)
    world_size: int = Field(ge=2)
    host: str
    port: int


class RunJob(Wire):
    """The one job of this process. `storage_root` is an absolute path; `device` as torch names it.

    `directory` is the attempt's own, and is gone after it: the job's snapshot lies there, if it has one. It runs in
    the job's `workdir` below it. `environ` is the job's environment, secrets included.

    For a measurement, which reads the meters itself: the uuid of the slot's GPU, the configured watts of a busy core,
    and the worker's directory for what it took when idle, which outlives attempts.
    """

    kind: Literal["job"] = "job"
    start: StartTraining
    storage_root: str
    directory: str
    environ: dict[str, str] = Field({}, repr=False)
    device: str
    cores: int
    rank: Rank | None = None
    device_uuid: str | None = None
    cpu_power_w: float | None = None
    baselines: str | None = None


class Stop(Wire):
    """Checkpoint at the very next step boundary and finish. The end of the pipe means exit at once."""

    kind: Literal["stop"] = "stop"
    why: Literal["cancelled", "preempted"]


FromTrainer = Annotated[
    Hello | Alive | ProgressNow | Mark | Started | Metrics | CheckpointSaved | ArtifactSaved | Result | Note | Finish,
    Field(discriminator="kind"),
]
# What a command may say on RELIGHT_FD, which its runner passes on. A Finish is why it cannot go on, if it then fails.
FromCommand = Annotated[
    Hello | Alive | ProgressNow | Mark | Started | Metrics | CheckpointSaved | ArtifactSaved | Note | Finish,
    Field(discriminator="kind"),
]
ToTrainer = Annotated[RunJob | Stop, Field(discriminator="kind")]

from_trainer: TypeAdapter[FromTrainer] = TypeAdapter(FromTrainer)
to_trainer: TypeAdapter[ToTrainer] = TypeAdapter(ToTrainer)
from_command: TypeAdapter[FromCommand] = TypeAdapter(FromCommand)


def line(message: Wire) -> bytes:
    """One message as one line."""
    return message.model_dump_json().encode() + b"\n"
