"""Between a study and its children: what its planner wants of each, and what came of each."""

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import Field

from ops_contract.jobs import EnvName, Execution, Resources
from ops_contract.lifecycle import Status
from ops_contract.studies import MAX_CHILDREN, Point
from ops_contract.wire import Name, Sha256, Step, Text, Wire


class IsoFlopAbout(Wire):
    """Where a child stands in an IsoFLOP sweep. `tokens` are planned; N is `params`, counted as the study declares."""

    budget: float
    size: int
    params: int
    flops_per_token: float
    tokens: int
    seed: int


class GridAbout(Wire):
    """`point` as the user wrote it; `cycle` counts from 0."""

    point: Point
    cycle: int


class ChildPlan(Wire):
    """One child: the study's job with these in place of its own, all of them resolved.

    `key` is the SHA-256 of all that decides its result (job, code, data): a child that has it is never run again.
    """

    key: Sha256
    name: Name
    about: IsoFlopAbout | GridAbout
    config: dict[str, Any] = {}
    execution: Execution
    command: list[Text] | None = None
    env: dict[EnvName, Text] = {}
    resources: Resources = Resources()


class Skipped(Wire):
    """A point that is not run, in words: `what` it is and why."""

    what: str
    reason: str


class Plan(Wire):
    """In the order in which children are to begin. The FLOPs and tokens of an IsoFLOP sweep; null for others.

    `tokens_needed` is the largest D of a child, `tokens_there` what one epoch of the data has.
    """

    children: list[ChildPlan] = Field(min_length=1, max_length=MAX_CHILDREN)
    skipped: list[Skipped] = []
    warnings: list[str] = []
    flops: float | None = None
    tokens_needed: int | None = None
    tokens_there: int | None = None


class TrainingResult(Wire):
    """What a completed training says of itself, once, over all its attempts.

    `units` are the tokens or samples really trained on; null where a checkpoint of an older version did not count them.
    `params` are the distinct parameters of the model, frozen ones too, `embedding_params` those of its nn.Embedding
    modules. A fork counts from step 0 of its lineage on.
    """

    steps: Step
    samples: int
    units: int | None
    params: int
    embedding_params: int


class ChildResult(Wire):
    """What is known of a child so far.

    `position` is its place in the plan. `final` are the last values of its metrics; `running_s` the time its attempts
    ran; `energy_reason` says why `energy_j` is null. Of a measurement, `final` are the figures of its result.
    """

    key: Sha256
    position: int
    operation_id: UUID
    name: str
    status: Status
    about: IsoFlopAbout | GridAbout
    final: dict[str, float] = {}
    training: TrainingResult | None = None
    running_s: float | None = None
    energy_j: float | None = None
    energy_reason: str | None = None
    error: str | None = None
    ended_at: datetime | None = None
