"""What a user submits, and the job that it resolves to."""

from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ops_contract.lifecycle import Kind
from ops_contract.measurements import MEASUREMENT
from ops_contract.studies import MAX_SIZES, IsoFlop, Study
from ops_contract.wire import Name, Sha256, Text, Wire

# What stands in `workload` for a command.
COMMAND = "command"

MOST_THREADS = 1024
# Of a snapshot's archive. It holds code; data stay where they are.
SNAPSHOT_MAX_BYTES = 16 * 2**20


class Accelerator(StrEnum):
    """Where a job may run; AUTO takes a GPU slot where a worker offers one, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Logger(StrEnum):
    """What is written below the storage root, in `<operation>/logs/`, when the operation has ended."""

    CSV = "csv"  # metrics.csv and hparams.yaml
    TENSORBOARD = "tensorboard"  # an event file and hparams.yaml
    NONE = "none"


class Strategy(StrEnum):
    """How the ranks of a gang share the work: each computes the gradients of its part of every batch."""

    DDP = "ddp"  # every rank holds the whole model; gradients are averaged
    FSDP = "fsdp"  # parameters, gradients and optimizer state are divided among the ranks (FSDP2)


class OptimizerName(StrEnum):
    ADAM = "adam"
    ADAMW = "adamw"
    SGD = "sgd"


class SchedulerName(StrEnum):
    """The learning rate over the run."""

    CONSTANT = "constant"
    COSINE = "cosine"  # linear warm-up over 5 % of the steps, then half a cosine to zero
    ONECYCLE = (
        "onecycle"  # up to the learning rate over 30 % of the steps, then down to almost nothing; momentum against it
    )
    MULTISTEP = "multistep"  # a tenth of it from each milestone on
    PLATEAU = "plateau"  # a tenth of it after more than ten evaluations without improvement of the monitored metric


class CheckpointEvery(Wire):
    """A period: every n epochs, steps or seconds, exactly one of them."""

    epochs: int | None = Field(None, ge=1, description="at the end of every so many")
    steps: int | None = Field(None, ge=1, description="after every so many optimizer updates")
    seconds: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="at the first step after so long without a save"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if [self.epochs, self.steps, self.seconds].count(None) != 2:
            raise ValueError("give exactly one of epochs, steps and seconds")
        return self


def _period_or_auto(value: Any) -> Any:
    """Here, and not by the union: its errors would name its members instead of the field."""
    if isinstance(value, str) and value != "auto":
        raise ValueError("give auto, or a period: {epochs: n}, {steps: n} or {seconds: n}")
    return value if isinstance(value, str) else CheckpointEvery.model_validate(value)


def _as_text(value: Any) -> Any:
    """YAML and `--set` take 16 for a number."""
    return str(value) if type(value) is int else value


Milestone = Annotated[int, Field(ge=1, lt=2**63)]


class Execution(Wire):
    """How to run it. Every default is part of the stored job."""

    accelerator: Accelerator = Field(
        Accelerator.AUTO, description="auto takes a GPU slot where a worker offers one, else the CPU"
    )
    devices: int = Field(
        1, ge=1, le=1024, description="how many of them one training takes, all at once; on more than one it is a gang"
    )
    strategy: Strategy = Field(
        Strategy.DDP,
        description="of a gang. ddp: every device holds the whole model. fsdp: parameters and optimizer state are "
        "divided among them",
    )
    precision: Annotated[
        Literal["32", "bf16", "16"],
        BeforeValidator(_as_text, json_schema_input_type=Literal["32", "bf16", "16", 32, 16]),
    ] = Field(
        "32",
        description="of forward, loss and evaluation; parameters and optimizer stay float32. bf16 and 16 are torch's "
        "autocast, 16 with scaled gradients, where an update whose gradients overflow is skipped and counts as a step",
    )
    deterministic: bool = Field(True, description="only with it a resume is promised to be exact")
    seed: int = Field(0, ge=0, lt=2**63, description="of all that is drawn: weights, order, samples, dropout")
    threads: int | None = Field(
        None, ge=1, le=MOST_THREADS, description="CPU threads; the first attempt's slot decides when null"
    )
    num_workers: int = Field(0, ge=0, le=64, description="data loading processes")
    max_epochs: int = Field(1, ge=1, le=1_000_000, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="optimizer updates; ends the run before max_epochs does")
    max_samples: int | None = Field(
        None,
        ge=1,
        lt=2**63,
        description="samples trained on, repeats counted; the last batch is cut to it. Ends the run, as max_steps does",
    )
    batch_size: int = Field(
        32, ge=1, le=1_000_000, description="samples per forward and backward pass, of all devices together"
    )
    accumulate_grad_batches: int = Field(1, ge=1, le=100_000, description="batches per optimizer update")
    gradient_clip: float | None = Field(None, gt=0, allow_inf_nan=False, description="global norm")
    learning_rate: float = Field(
        1e-3, gt=0, allow_inf_nan=False, description="where the schedule begins, or its highest"
    )
    optimizer: OptimizerName = Field(OptimizerName.ADAMW, description="unless the workload makes its own")
    scheduler: SchedulerName = Field(
        SchedulerName.CONSTANT,
        description="cosine: warm-up over 5 % of the steps, then half a cosine to zero. onecycle: up over 30 %, then "
        "down. multistep: a tenth from each milestone on. plateau: a tenth after ten evaluations without improvement",
    )
    scheduler_milestones: list[Milestone] | None = Field(
        None, max_length=1000, validate_default=True, description="optimizer updates, rising; for multistep"
    )
    checkpoint_every: Annotated[CheckpointEvery | Literal["auto"], BeforeValidator(_period_or_auto)] = Field(
        "auto", description="auto weighs what a save costs this run against what failures lose (Young 1974, Daly 2006)"
    )
    checkpoint_monitor: Name | None = Field(
        None,
        description="what early stopping and top-k look at; null is the first metric that the workload reports",
    )
    checkpoint_mode: Literal["min", "max"] | None = Field(
        None, description="which way is better; null is what the workload says of the metric"
    )
    checkpoint_save_top_k: int | None = Field(
        None,
        ge=-1,
        le=1_000_000,
        description="how many of the best checkpoints are kept; -1 keeps all. null is -1 with a period that was "
        "given; with checkpoint_every auto it is 1, or 0 where the workload reports no metric",
    )
    checkpoint_save_last: bool = Field(
        True, description="keep the last checkpoint of a completed run, even when it is none of the best"
    )
    early_stop_patience: int | None = Field(
        None, ge=1, le=1_000_000, description="evaluations in a row without improvement that end the run"
    )
    early_stop_min_delta: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="an improvement is larger than this"
    )
    stall_timeout_s: float | None = Field(
        1800.0, gt=0, allow_inf_nan=False, description="no step or validation batch for so long fails the attempt"
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="an attempt that takes longer is killed, and has failed; of a study each of its children's",
    )
    logger: Logger = Field(Logger.CSV, description="the files that are written when the operation has ended")

    @field_validator("devices")
    @classmethod
    def _no_gang_of_macs(cls, devices: int, info: ValidationInfo) -> int:
        if devices > 1 and info.data.get("accelerator") is Accelerator.MPS:
            raise ValueError("mps has no collectives: a gang trains on cuda, or on cpu")
        return devices

    @field_validator("strategy")
    @classmethod
    def _of_a_gang(cls, strategy: Strategy, info: ValidationInfo) -> Strategy:
        if strategy is Strategy.FSDP and info.data.get("devices") == 1:
            raise ValueError("fsdp divides the model among several devices: give devices, or leave ddp")
        return strategy

    @field_validator("batch_size")
    @classmethod
    def _a_sample_for_each(cls, batch_size: int, info: ValidationInfo) -> int:
        if batch_size < (devices := info.data.get("devices", 1)):
            raise ValueError(f"{batch_size} samples cannot be divided among {devices} devices; it is of all of them")
        return batch_size

    @field_validator("scheduler_milestones")
    @classmethod
    def _for_multistep(cls, milestones: list[int] | None, info: ValidationInfo) -> list[int] | None:
        multistep = info.data.get("scheduler") is SchedulerName.MULTISTEP
        if milestones is not None and not multistep:
            raise ValueError("does nothing without scheduler multistep")
        if multistep and not milestones:
            raise ValueError("scheduler multistep needs at least one milestone")
        if milestones is not None and milestones != sorted(set(milestones)):
            raise ValueError("give each milestone once, the earlier first")
        return milestones

    @field_validator("checkpoint_save_last")
    @classmethod
    def _something_is_kept(cls, save_last: bool, info: ValidationInfo) -> bool:
        top_k = info.data.get("checkpoint_save_top_k")
        if not save_last and top_k == -1:
            raise ValueError("false does nothing while checkpoint_save_top_k is -1, which keeps all")
        if not save_last and top_k == 0:
            raise ValueError("false with checkpoint_save_top_k 0 would keep nothing of a completed run")
        return save_last

    @field_validator("early_stop_min_delta")
    @classmethod
    def _with_patience(cls, min_delta: float, info: ValidationInfo) -> float:
        if min_delta and info.data.get("early_stop_patience", 0) is None:
            raise ValueError("does nothing without early_stop_patience")
        return min_delta


def _inside(path: str) -> str:
    """Below the directory it is meant in, whatever that is."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError("give a relative path without ..")
    return path


def _not_ours(name: str) -> str:
    if name.startswith(("OPS_", "RELIGHT_")):
        raise ValueError("names that begin with OPS_ or RELIGHT_ are Relight's own")
    return name


InnerPath = Annotated[Name, AfterValidator(_inside)]
EnvName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200), AfterValidator(_not_ours)
]


class Code(Wire):
    """The user's project as it was at submit: a snapshot that was uploaded before, by its SHA-256.

    `commit` and `dirty` say what git said of the directory, for people.
    """

    sha256: Sha256 = Field(description="of the archive, as it was uploaded")
    commit: Name | None = Field(None, description="that git had checked out")
    dirty: bool | None = Field(None, description="whether files differed from it")


class Resources(Wire):
    """What a slot must have, and where those of a gang lie."""

    cores: int | None = Field(None, ge=1, le=4096, description="CPU cores of each slot, at least")
    nodes: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="over how many hosts a gang is spread, the same number of devices on each; null takes the fewest "
        "that have room",
    )


class Setup(Wire):
    """The user's own code, and what it finds around it."""

    command: list[Annotated[Text, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=1000, description="program and arguments, for kind command"
    )
    code: Code | None = Field(
        None, description="the snapshot it runs in; null where the code is installed on the workers"
    )
    workdir: InnerPath = Field(".", description="where in the snapshot it runs")
    env: dict[EnvName, Text] = Field({}, max_length=200, description="environment variables, stored and shown")
    secrets: list[EnvName] = Field(
        [], max_length=200, description="environment variables whose values the worker knows; they are never stored"
    )
    artifacts: list[InnerPath] = Field(
        [], max_length=100, description="files to keep when it ends, as globs (** too) from the working directory"
    )
    resources: Resources = Field(Resources(), description="what its slots must have")


class JobSpec(Setup):
    """The body of POST /operations: a workload to train, a command to run, or a measurement; with `study` many of them.

    `workload` is one that a worker offers, or `module:Class` of the snapshot or of the worker's environment. `config`
    belongs to the workload and is checked against its schema.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "anyOf": [{"required": ["workload"]}, {"required": ["command"]}],
        }
    )

    kind: Kind = Field(Kind.TRAINING, description="follows from workload, command and study")
    workload: Name | None = Field(
        None, description="what to train: one of `ops workloads`, or `module:Class` of your own"
    )
    config: dict[str, Any] = Field({}, description="the workload's own fields; `ops workloads` shows them")
    execution: Execution = Field(Execution(), description="how to run it")
    study: Study | None = Field(None, description="what to vary; the rest is the base that its children share")
    priority: int = Field(0, ge=-1000, le=1000, description="higher runs first")
    max_retries: int = Field(3, ge=0, le=1000, description="how often it may fail by itself and be tried again")
    name: Name | None = Field(None, description="for people; made from what it runs when null")
    labels: dict[Name, Name] = Field({}, max_length=64, description="of your own, to find it by")

    @model_validator(mode="before")
    @classmethod
    def _a_job_says_what_it_is(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("kind") == Kind.MEASUREMENT and given.get("command") is None:
            return {**given, "workload": given.get("workload") or MEASUREMENT}
        if "kind" not in given:
            if given.get("study") is not None:
                return {**given, "kind": Kind.STUDY}
            if given.get("command") is not None:
                return {**given, "kind": Kind.COMMAND}
            if given.get("workload") == MEASUREMENT:
                return {**given, "kind": Kind.MEASUREMENT}
        return given

    @model_validator(mode="after")
    def _one_thing_to_run(self) -> Self:
        if (self.kind is Kind.STUDY) != (self.study is not None):
            raise ValueError("study and kind study go together")
        if self.workload is None and self.command is None:
            raise ValueError("give a workload to train, or a command to run")
        if self.kind is not Kind.STUDY and (self.kind is Kind.COMMAND) != (self.command is not None):
            raise ValueError("command and kind command go together")
        if self.kind is not Kind.STUDY and (self.kind is Kind.MEASUREMENT) != (self.workload == MEASUREMENT):
            raise ValueError(f"workload {MEASUREMENT} and kind measurement go together")
        if self.workload == MEASUREMENT and self.artifacts:
            raise ValueError("artifacts does nothing for a measurement: its samples are kept as files/series.parquet")
        if self.command is not None and (self.workload or self.config):
            raise ValueError("a command has neither workload nor config; it gets arguments and env")
        if isinstance(self.study, IsoFlop) and (self.command is not None or self.workload == MEASUREMENT):
            raise ValueError("an isoflop study trains a workload; a grid can vary a command, or a measurement")
        # Not a rule of the range itself: a study that was stored before there was one is still read.
        if isinstance(self.study, IsoFlop) and (count := len(self.study.asked())) > MAX_SIZES:
            raise ValueError(f"study.sizes: {count:,} sizes; at most {MAX_SIZES:,} are measured: raise multiple_of")
        if both := set(self.env) & set(self.secrets):
            raise ValueError(f"env and secrets both name {', '.join(sorted(both))}")
        if (nodes := self.resources.nodes) and self.execution.devices % nodes:
            raise ValueError(
                f"resources.nodes: {self.execution.devices} devices cannot be divided evenly among {nodes} nodes"
            )
        if self.code is not None and self.workload is not None and ":" not in self.workload:
            raise ValueError("code does nothing for an installed workload; name one of yours as module:Class")
        return self


# Of `execution`, what a command and a measurement heed; the rest is the training engine's.
PLAIN_KNOBS = frozenset({"accelerator", "threads", "stall_timeout_s", "timeout_s", "logger"})


def kind_of(workload: str) -> Kind:
    """Of what runs it, a study's children too."""
    return {COMMAND: Kind.COMMAND, MEASUREMENT: Kind.MEASUREMENT}.get(workload, Kind.TRAINING)


def is_users_own(workload: str) -> bool:
    """A command, or `module:Class`: what its user brings, instead of what a worker offers."""
    return workload == COMMAND or ":" in workload


class Job(Setup):
    """The resolved job as stored, shown and sent to workers: defaults and all.

    A command's workload is `command`, a measurement's `measurement`.
    """

    kind: Kind
    workload: str
    config: dict[str, Any]
    execution: Execution
    study: Study | None = None
    until_step: int | None = Field(
        None, ge=1, lt=2**63, description="a replay ends before this step; schedules go by the whole run all the same"
    )


def runs_user_code(job: Job) -> bool:
    """A worker takes such a job only where its owner allowed that.

    Variables too say what an interpreter and its libraries load: PYTHONPATH, LD_PRELOAD, CUDA_INJECTION64_PATH, …
    """
    return is_users_own(job.workload) or job.code is not None or bool(job.env)
