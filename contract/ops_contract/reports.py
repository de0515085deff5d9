"""What an attempt tells: the same models on the trainer's pipe, in the agent's outbox and at the API."""

import base64
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, Self
from uuid import UUID

from pydantic import Field, StringConstraints, model_validator

from ops_contract.jobs import Execution, InnerPath
from ops_contract.lifecycle import CheckpointType, Outcome, Phase
from ops_contract.measurements import MeasurementProgress, MeasurementResult
from ops_contract.plans import Plan, TrainingResult
from ops_contract.study_results import GridResult, SweepResult
from ops_contract.wire import Name, Sha256, Step, Text, Wire, pack_float64, unpack_float64


class Progress(Wire):
    """Where the run stands. Steps count optimizer updates; `loss` is that of the last step. A command has no epochs.

    Those of a measurement are the prompts of its window.
    """

    step: Step
    steps_total: Step | None = None
    epoch: Step | None = 0
    loss: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    measurement: MeasurementProgress | None = None


class Exactness(Wire):
    """Whether a resumed run equals one that never died, bit for bit."""

    promise: Literal["promised", "best_effort"]
    reasons: list[str] = []


class Resolved(Wire):
    """What the submit left open, because no worker was there to say it: with every default."""

    config: dict[str, Any]
    execution: Execution


class Started(Wire):
    """The trainer took the job: before the first step. Of a command, its runner and then the `relight.Run` in it."""

    kind: Literal["started"] = "started"
    trainer_pid: int
    start_step: Step
    exactness: Exactness
    environment: dict[str, Any]
    resolved: Resolved | None = None


class Series(Wire):
    """Values of one metric at increasing steps; `values` is `pack_float64` of as many float64."""

    name: Name
    steps: list[Step] = Field(min_length=1, max_length=100_000)
    values: str

    @model_validator(mode="after")
    def _one_value_a_rising_step(self) -> Self:
        values = self.floats()
        if len(values) != len(self.steps):
            raise ValueError(f"metric {self.name}: {len(self.steps)} steps but {len(values)} values")
        if any(step >= later for step, later in pairwise(self.steps)):
            raise ValueError(f"metric {self.name}: its steps do not rise")
        return self

    @classmethod
    def of(cls, name: str, points: list[tuple[int, float]]) -> Self:
        return cls(name=name, steps=[s for s, _ in points], values=pack_float64([v for _, v in points]))

    def floats(self) -> list[float]:
        return unpack_float64(self.values)


class Metrics(Wire):
    """Each name once."""

    kind: Literal["metrics"] = "metrics"
    series: list[Series] = Field(max_length=1000)

    @model_validator(mode="after")
    def _each_name_once(self) -> Self:
        if len({series.name for series in self.series}) != len(self.series):
            raise ValueError("a metric is there twice")
        return self


class CheckpointSaved(Wire):
    """Published under the storage root; this report is what commits it. `path` is relative to the root."""

    kind: Literal["checkpoint"] = "checkpoint"
    checkpoint_id: UUID
    checkpoint_type: CheckpointType
    step: Step
    epoch: Step
    phase: Phase
    path: Name
    size_bytes: int = Field(ge=0)
    manifest_sha256: Sha256
    monitored: float | None = Field(
        None, description="the monitored metric of this very state; null where not measured"
    )


MODEL: Final = "model.safetensors"


class ArtifactSaved(Wire):
    """A file that a completed run leaves, published under the storage root; `sha256` is of the whole file.

    `name`: the final model's, or `files/` and the path of a file that the job's `artifacts` matched, or `finish` left.
    """

    kind: Literal["artifact"] = "artifact"
    artifact_id: UUID
    name: Literal["model.safetensors"] | Annotated[InnerPath, StringConstraints(pattern=r"^files/[^/]")]
    step: Step
    path: Name
    size_bytes: int = Field(ge=0)
    sha256: Sha256


class Note(Wire):
    """A fact for the operation's history, such as a fallback.

    `inexact` is why the attempt is best effort from now on.
    """

    kind: Literal["note"] = "note"
    message: Text
    inexact: Text | None = None


class Standing(Wire):
    """Only that the batch's progress is another one: of what has nothing else to report for a long time."""

    kind: Literal["standing"] = "standing"


LOG_CHUNK_BYTES: Final = 64 * 1024


class LogChunk(Wire):
    """What the process wrote to stdout and stderr, as it came; `data` is base64 of at most LOG_CHUNK_BYTES.

    `skipped`: so many bytes before these are left out.
    """

    kind: Literal["log"] = "log"
    data: str = Field(min_length=4, max_length=2 * LOG_CHUNK_BYTES)
    skipped: int = Field(0, ge=0, lt=2**50)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if len(self.content()) > LOG_CHUNK_BYTES:
            raise ValueError(f"more than {LOG_CHUNK_BYTES} bytes")
        return self

    @classmethod
    def of(cls, content: bytes, skipped: int = 0) -> Self:
        return cls(data=base64.b64encode(content).decode("ascii"), skipped=skipped)

    def content(self) -> bytes:
        return base64.b64decode(self.data, validate=True)


ResultContent = TrainingResult | MeasurementResult | SweepResult | GridResult


class Result(Wire):
    """What the operation comes to. A later one, of this attempt or another, takes its place."""

    kind: Literal["result"] = "result"
    content: ResultContent


class Fault(Wire):
    """Why an attempt did not complete, and what to do."""

    code: Name
    message: Text
    details: dict[str, Any] = {}


# Of a rank whose collective broke because another one was gone: why that one ended is the other's to say.
PEER_LOST: Final = "peer_lost"


class Finish(Wire):
    """The last report of a hold, sent when its trainer processes are gone.

    `permanent` faults (an import error, a bad config) are not retried. A study that is `planned` has a plan.
    Of a gang: without an error it ends its own hold, and the attempt once no other member's is live; with an error it
    ends the attempt for all.
    """

    kind: Literal["finish"] = "finish"
    outcome: Literal[
        Outcome.COMPLETED,
        Outcome.FAILED,
        Outcome.PLANNED,
        Outcome.PREEMPTED,
        Outcome.CANCELLED,
        Outcome.CHECKPOINT_CORRUPT,
    ]
    permanent: bool = False
    error: Fault | None = None
    plan: Plan | None = None

    @model_validator(mode="after")
    def _planned_with_a_plan(self) -> Self:
        if (self.outcome is Outcome.PLANNED) != (self.plan is not None):
            raise ValueError("plan and outcome planned go together")
        return self


Report = Annotated[
    Started | Metrics | CheckpointSaved | ArtifactSaved | Result | Note | Standing | LogChunk | Finish,
    Field(discriminator="kind"),
]
