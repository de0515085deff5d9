"""Energy measurement of LLM inference: what is measured, and what came of it.

A figure that is not known is null with its reason, never 0; one that is known says where it comes from and how far it
may be off.
"""

import hashlib
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from ops_contract.energy import Quality, Source
from ops_contract.wire import Name, Sha256, Text, Wire, canonical

# What stands in `workload` for a measurement.
MEASUREMENT: Final = "measurement"

# Raised where the same config comes to measure something else.
METHOD_VERSION: Final = 1

Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class RandomModel(Wire):
    """An architecture with random weights: what it costs to run is real, what it says is noise."""

    model_type: Name = Field(description="as transformers names it: gpt2, llama, opt, …")
    config: dict[Name, JsonValue] = Field({}, description="over the defaults of that type, such as n_layer or n_embd")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of the weights")


def _name_or_random(value: Any) -> Any:
    """Here, and not by the union: its errors would name its members instead of the field."""
    if isinstance(value, RandomModel) or (isinstance(value, str) and 1 <= len(value) <= 1000):
        return value
    if isinstance(value, dict):
        return RandomModel.model_validate(value)
    raise ValueError("give a directory or a name of up to 1000 characters, or an architecture: {model_type: gpt2, …}")


class Task(Wire):
    """What is asked of the model. Decoding is greedy, so that a run can be repeated."""

    prompts_file: Text | None = Field(
        None, description="a text file on the worker, a prompt a line; null: random tokens, `input_tokens` each"
    )
    n_prompts: int = Field(64, ge=1, le=1_000_000, description="prompts in the window; those of a file are repeated")
    input_tokens: int = Field(
        128, ge=1, le=1_000_000, description="tokens of a prompt; of a prompts file the most, the rest is cut off"
    )
    output_tokens: int = Field(64, ge=1, le=1_000_000, description="tokens to generate for each, at most")
    ignore_eos: bool | None = Field(
        None, description="whether exactly `output_tokens` are generated; null: only with random weights"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of the random tokens")


class Warmup(Wire):
    """Batches before the window, as large as its own; with `cv` until the time of one has settled."""

    batches: int = Field(3, ge=0, le=10_000, description="at least so many")
    cv: Fraction | None = Field(
        0.05, description="until the coefficient of variation of the last batches is below this; null: only `batches`"
    )
    last: int = Field(5, ge=2, le=1000, description="of how many batches in a row")
    most: int = Field(30, ge=1, le=10_000, description="then it goes on all the same, and the result says so")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.batches > self.most or (self.cv is not None and self.last > self.most):
            raise ValueError("most: give at least `batches`, and with `cv` at least `last`")
        return self


class BaselinePolicy(Wire):
    """What the device takes when it is idle, to be subtracted. Measured before the model is loaded."""

    strategy: Literal["fresh", "cached", "validated", "none"] = Field(
        "validated",
        description="fresh: measured each time. cached: what was measured within `ttl_s`. validated: cached, if a "
        "short look differs by less than `drift`, else fresh. none: nothing is subtracted",
    )
    duration_s: float = Field(30.0, gt=0, le=3600, allow_inf_nan=False, description="of a fresh one")
    look_s: float = Field(5.0, gt=0, le=3600, allow_inf_nan=False, description="of the short look")
    ttl_s: float = Field(7200.0, gt=0, le=2_592_000, allow_inf_nan=False, description="how long a cached one holds")
    drift: Fraction = Field(0.1, description="of the cached power, by which the look may differ")


class MeasurementConfig(Wire):
    """What is measured, and how. All of it is in the hash that names the measurement."""

    model: Annotated[
        Annotated[str, Field(min_length=1, max_length=1000)] | RandomModel, BeforeValidator(_name_or_random)
    ] = Field(description="a directory on the worker or a name on Hugging Face; or an architecture with random weights")
    task: Task = Field(Task(), description="what is asked of it")
    engine: Literal["pytorch"] = Field("pytorch", description="pytorch: transformers' generate")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights and activations"
    )
    batch_size: int = Field(1, ge=1, le=100_000, description="prompts at a time")
    attention: Literal["eager", "sdpa", "flash_attention_2"] = Field("sdpa", description="as transformers names it")
    compile: bool = Field(False, description="torch.compile of the forward pass")
    warmup: Warmup = Field(Warmup(), description="before the window")
    thermal_floor_s: Seconds = Field(
        60.0, description="between warm-up and window the model keeps working for so long, so that the device is warm"
    )
    baseline: BaselinePolicy = Field(BaselinePolicy(), description="of the idle device")
    gap_s: Seconds = Field(0.0, description="rest of the idle device before anything is measured")
    first_token_prompts: int = Field(
        8, ge=0, le=10_000, description="prompts of a pass of its own, after the window, that times the first token"
    )
    meter: Literal["auto", "nvml_counter", "nvml_power", "rapl", "estimate"] = Field(
        "auto", description="auto: the best there is. A named one that is not there fails the preflight"
    )

    def digest(self) -> Sha256:
        """SHA-256 of the whole config and of the method's version: equal for measurements that can be compared."""
        content = {"method": METHOD_VERSION, "config": self.model_dump(mode="json")}
        return hashlib.sha256(canonical(content).encode()).hexdigest()


class MeasurementPhase(StrEnum):
    """In this order."""

    PREFLIGHT = "preflight"
    GAP = "gap"
    BASELINE = "baseline"
    LOAD = "load"
    WARMUP = "warmup"
    THERMAL_FLOOR = "thermal_floor"
    WINDOW = "window"
    FIRST_TOKEN = "first_token"
    COMPUTE = "compute"


class MeasurementProgress(Wire):
    """`done` of `total` are prompts, batches or seconds, whatever `unit` says; null watts: no meter tells them."""

    phase: MeasurementPhase
    done: float = Field(0, ge=0, allow_inf_nan=False)
    total: float | None = Field(None, ge=0, allow_inf_nan=False)
    unit: Literal["prompts", "batches", "s"] | None = None
    power_w: float | None = Field(None, ge=0, allow_inf_nan=False)
    temperature_c: float | None = Field(None, allow_inf_nan=False)


FigureName = Literal[
    "tokens_per_s",  # generated tokens over the window
    "total_tokens_per_s",  # with those of the prompts
    "j_per_output_token",
    "j_per_output_token_adjusted",  # less the baseline
    "energy_j",  # of all devices over the window
    "energy_adjusted_j",  # less the baseline
    "power_mean_w",
    "window_s",
    "latency_p50_s",  # of a batch
    "latency_p90_s",
    "latency_p99_s",
    "first_token_p50_s",
    "first_token_p90_s",
    "first_token_p99_s",
    "flops",  # of the window
    "flops_per_s",
    "mfu",  # flops_per_s over the device's peak at this precision
    "peak_memory_bytes",
]


class Figure(Wire):
    """`value` null: not known, for `reason`. `uncertainty` bounds its error, in its unit; null: no bound is known."""

    value: float | None
    unit: Name
    source: Name = Field(description="where it comes from, such as a clock, a meter or a count")
    uncertainty: float | None = Field(None, ge=0)
    reason: Text | None = None

    @model_validator(mode="after")
    def _unknown_has_its_reason(self) -> Self:
        if (self.value is None) != (self.reason is not None):
            raise ValueError("value and reason: exactly one of them is null")
        return self


class DeviceUse(Wire):
    """What one device used in the window. `error_j` bounds the error of its edges; null: no bound is known.

    `ticks`: how often its counter moved in the window; null where it has none.
    `energy_adjusted_j` = `energy_j` - `baseline_w` · window. The state is of the window; null is what it does not say.
    """

    device: Name
    name: Name | None = None
    source: Source
    quality: Quality
    energy_j: float | None
    error_j: float | None = None
    reason: Name | None = None
    baseline_w: float | None = None
    energy_adjusted_j: float | None = None
    ticks: int | None = Field(None, ge=0)
    power_max_w: float | None = None
    temperature_begin_c: float | None = None
    temperature_max_c: float | None = None
    sm_clock_mean_mhz: float | None = None
    utilization_mean_percent: float | None = None
    memory_used_max_bytes: int | None = None
    throttled_s: dict[Name, float] = {}


class ThermalThrottle(Wire):
    """Whether a device was slowed in the window; `throttled` null: no device says.

    `duration_s` counts a moment once, however many reasons and devices it had; `reasons` how long each one held.
    """

    throttled: bool | None
    duration_s: float | None = None
    reasons: dict[Name, float] = {}


class BaselineRecord(Wire):
    """How the idle power was come by. `age_s` of a cached one; `drift` of the look from it, as a fraction."""

    strategy: Literal["fresh", "cached", "validated", "none"]
    origin: Literal["measured", "cache", "none"]
    power_w: dict[Name, float | None] = {}
    duration_s: float | None = None
    age_s: float | None = None
    drift: float | None = None
    reason: Text | None = None


class WarmupRecord(Wire):
    """`converged` null: it was not asked for. `cv` is that of the last batches."""

    batches: int
    latencies_s: list[float] = []
    cv: float | None = None
    converged: bool | None = None
    thermal_floor_s: float = 0.0


class FlopsRecord(Wire):
    """Counted from the modules that ran, a multiply-add as two; `parts` by what they are (attention, linear, …)."""

    prefill: float
    decode: float
    parts: dict[Name, float] = {}
    params: int
    uncounted: list[Name] = Field([], description="modules with parameters whose arithmetic is not known")


class MeasurementResult(Wire):
    type: Literal["measurement"] = "measurement"
    config_hash: Sha256
    methodology: dict[Name, Text] = Field(description="how each kind of figure was come by, in words")
    n_prompts: int
    tokens_in: int
    tokens_out: int
    figures: dict[FigureName, Figure]
    devices: list[DeviceUse] = []
    thermal_throttle: ThermalThrottle
    baseline: BaselineRecord
    warmup: WarmupRecord
    flops: FlopsRecord | None = None
    phases_s: dict[MeasurementPhase, float] = Field({}, description="how long each took")
    environment: dict[str, Any] = {}
    series: Name | None = Field(None, description="the artifact with the samples of the window, as Parquet")
    warnings: list[Text] = []

    def values(self) -> dict[str, float]:
        """The figures that are known, as plain numbers."""
        return {name: figure.value for name, figure in self.figures.items() if figure.value is not None}
