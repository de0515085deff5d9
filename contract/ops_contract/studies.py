"""What a study varies. Its base is the job itself: each child is that job with a point of the study written over it."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, JsonValue, StringConstraints, model_validator

from ops_contract.wire import Wire

MAX_CHILDREN = 2000
MAX_SIZES = 2000  # each is measured by building its model

# Of a child that was cancelled because of `stop_after_failures`.
NOT_RUN: Final = "not run: as many children of its study in a row have failed as stop_after_failures allows"

# A field of the job, by its path: config.d_model, execution.learning_rate, env.SEED, resources.cores; of a command also
# args.NAME, which is appended as --NAME=VALUE.
FieldPath = Annotated[
    str, StringConstraints(pattern=r"^(config|execution|env|args|resources)\.[^\s\x00-\x1f]+$", max_length=200)
]
Point = dict[FieldPath, JsonValue]


class Grid(Wire):
    """Points: the product of `axes`, times each of `alternatives` if there are any, and then the `experiments`.

    Every point is run `cycles` times. What the workload's schema or the job refuses is skipped, with its reason; points
    that come to the same job run once a cycle.
    """

    type: Literal["grid"] = Field("grid", description="fields over their values")
    axes: dict[FieldPath, Annotated[list[JsonValue], Field(min_length=1)]] = Field(
        {}, description="the values of each field; every combination is a point"
    )
    axes_order: list[FieldPath] = Field(
        [], description="which axis changes slowest, and so on; as they are written where it is empty"
    )
    alternatives: list[Point] = Field([], description="sets of fields that go together, each combined with the axes")
    experiments: list[Point] = Field([], description="further points, as they are")
    cycles: int = Field(1, ge=1, le=1000, description="how often each point is run")
    vary_seed: bool = Field(
        True, description="a training's cycle c has seed + c; else cycles differ in nothing but when they run"
    )
    order: Literal["sequential", "interleave", "shuffle", "reverse", "latin_square"] = Field(
        "sequential",
        description="sequential: all cycles of a point, then the next. interleave: all points, cycle after cycle. "
        "shuffle: all points in a random order of its own in each cycle. reverse: interleave, every other cycle "
        "backwards. latin_square: orders in which every point follows every other equally often (Williams 1949)",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of shuffle")
    stop_after_failures: int | None = Field(
        None,
        ge=1,
        description="when so many children in a row have failed, those that wait are not run; null: never. A resume "
        "of the study runs them all again",
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_the_order(cls, given: Any) -> Any:
        """In a list, for what stores a job sorts the names of an object."""
        if not isinstance(given, dict) or not isinstance(axes := given.get("axes"), dict) or given.get("axes_order"):
            return given
        return {**given, "axes_order": list(axes)}

    @model_validator(mode="after")
    def _something(self) -> Self:
        if sorted(self.axes_order) != sorted(self.axes):
            raise ValueError("axes_order: name each of the axes once, or leave it out")
        if not (self.axes or self.alternatives or self.experiments):
            raise ValueError("give axes, alternatives or experiments: there is nothing to vary")
        return self


class SizeRange(Wire):
    """Every multiple of `multiple_of` from `low` to `high`; a submit may ask for 2,000."""

    low: int = Field(ge=1, lt=2**31, description="the least that may be one")
    high: int = Field(ge=1, lt=2**31, description="the largest")
    multiple_of: int = Field(1, ge=1, lt=2**31, description="such as the number of heads")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.values():
            raise ValueError(f"no multiple of {self.multiple_of} lies between {self.low} and {self.high}")
        return self

    def values(self) -> range:
        first = -(-self.low // self.multiple_of) * self.multiple_of
        return range(first, self.high + 1, self.multiple_of)


class LearningRateRule(Wire):
    """learning_rate · (N / reference_params)^power; `reference_params` is the smallest N of the sweep where null."""

    power: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False, description="0 leaves it the same for all")
    reference_params: float | None = Field(
        None, ge=1, le=1e15, description="the N that has the job's own learning rate"
    )


class IsoFlop(Wire):
    """Compute-optimal sizes (Hoffmann et al. 2022): under each budget C, models of several N on D = C/(6N) tokens.

    `size` is the field of config that makes the model larger. D is trained really: whole samples, the last batch cut.
    """

    type: Literal["isoflop"] = Field("isoflop", description="sizes under budgets of FLOPs")
    budgets: list[Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]] = Field(
        min_length=1, max_length=100, description="FLOPs of one training"
    )
    size: FieldPath = Field(description="the field that is the model's size, such as config.d_model")
    sizes: SizeRange | Annotated[list[int], Field(min_length=1, max_length=MAX_SIZES)] = Field(
        description="the values it may have"
    )
    per_budget: int = Field(7, ge=1, le=100, description="sizes under each budget, evenly spaced in log N")
    seeds: int = Field(1, ge=1, le=100, description="trainings of each point, with seed, seed + 1, …")
    flops: Literal["6N", "counted"] = Field(
        "6N", description="per token: 6N, or what torch counts of one forward and backward pass"
    )
    embeddings: Literal["included", "excluded"] = Field(
        "included", description="whether N counts the parameters of embeddings"
    )
    tokens_per_param: tuple[
        Annotated[float, Field(gt=0, allow_inf_nan=False)], Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ] = Field((0.5, 1000.0), description="sizes with fewer or more tokens per parameter are not admissible")
    min_steps: int = Field(10, ge=1, le=1_000_000, description="nor are those with fewer optimizer updates")
    repeat_data: bool = Field(False, description="train more than one epoch where the data are too few")
    learning_rate_rule: LearningRateRule = Field(LearningRateRule(), description="how it changes with the size")
    predict: list[Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]] = Field(
        [], max_length=100, description="further budgets to say the optimum of"
    )

    def asked(self) -> Sequence[int]:
        """The sizes, rising, each once."""
        return self.sizes.values() if isinstance(self.sizes, SizeRange) else sorted(set(self.sizes))

    @model_validator(mode="after")
    def _budgets_once(self) -> Self:
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError("a budget is there twice")
        if self.tokens_per_param[0] > self.tokens_per_param[1]:
            raise ValueError("tokens_per_param: give the lower bound first")
        if not self.size.startswith("config."):
            raise ValueError("size: it is a field of config, such as config.d_model")
        return self


Study = Annotated[Grid | IsoFlop, Field(discriminator="type")]
