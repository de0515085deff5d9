"""What a user submits, and the job that it resolves to."""

from enum import StrEnum
from typing import Any, Self

from pydantic import Field, model_validator

from ops_contract.lifecycle import Kind
from ops_contract.wire import Name, Wire


class Accelerator(StrEnum):
    """Where a job may run; AUTO takes a GPU slot where a worker offers one, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class OptimizerName(StrEnum):
    ADAMW = "adamw"
    SGD = "sgd"


class SchedulerName(StrEnum):
    """The learning rate over the run."""

    CONSTANT = "constant"
    COSINE = "cosine"  # linear warm-up over 5 % of the steps, then half a cosine to zero


class CheckpointEvery(Wire):
    """A period: every n epochs or every n steps, exactly one of them."""

    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class Execution(Wire):
    """How to run it. Every default is part of the stored job."""

    accelerator: Accelerator = Accelerator.AUTO
    deterministic: bool = True
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; the first attempt's slot decides when null"
    )
    num_workers: int = Field(0, ge=0, le=64, description="data loading processes")
    max_epochs: int = Field(1, ge=1, le=1_000_000)
    max_steps: int | None = Field(None, ge=1, description="optimizer updates; ends the run before max_epochs does")
    batch_size: int = Field(32, ge=1, le=1_000_000, description="samples per forward and backward pass")
    accumulate_grad_batches: int = Field(1, ge=1, le=100_000, description="batches per optimizer update")
    gradient_clip: float | None = Field(None, gt=0, allow_inf_nan=False, description="global norm")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    optimizer: OptimizerName = OptimizerName.ADAMW
    scheduler: SchedulerName = SchedulerName.CONSTANT
    checkpoint_every: CheckpointEvery = CheckpointEvery(epochs=1)


class JobSpec(Wire):
    """The body of POST /operations. `config` belongs to the workload and is checked against its schema."""

    kind: Kind = Kind.TRAINING
    workload: Name
    config: dict[str, Any] = {}
    execution: Execution = Execution()
    priority: int = Field(0, ge=-1000, le=1000, description="higher runs first")
    max_retries: int = Field(3, ge=0, le=1000)
    name: Name | None = None
    labels: dict[Name, Name] = Field({}, max_length=64)


class Job(Wire):
    """The resolved job as stored, shown and sent to workers: defaults and all."""

    kind: Kind
    workload: str
    config: dict[str, Any]
    execution: Execution
