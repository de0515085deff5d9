"""Joules: what an agent measures while an attempt runs, and the ledger that it adds up to.

A window is what one device used between two marks of the attempt. The ledger cuts between windows, never through a
measurement: a mark falls wherever a later attempt may begin.
"""

from enum import StrEnum
from typing import Annotated, Final
from uuid import UUID

from pydantic import Field, model_validator

from ops_contract.wire import Name, Step, Wire


class Source(StrEnum):
    """Where a figure comes from, the better first."""

    NVML_COUNTER = "nvml_counter"  # the GPU's own counter of energy
    NVML_POWER = "nvml_power"  # samples of its power over real intervals
    RAPL = "rapl"  # the CPU package's counter
    ESTIMATE = "estimate"  # a configured wattage times the time


class Quality(StrEnum):
    MEASURED = "measured"
    UPPER_BOUND = "upper_bound"  # others use the device too: it stands beside the sums, never in them
    ESTIMATED = "estimated"


class Use(StrEnum):
    """What an attempt was doing."""

    STARTUP = "startup"
    RESTORE = "restore"
    TRAIN = "train"
    EVALUATE = "evaluate"
    SAVE = "save"  # what the training waited for; a save beside it is part of TRAIN
    FINISH = "finish"
    UNATTRIBUTED = "unattributed"  # after the last that a killed agent had booked: whose it was is not known


# Of one window, so that no sum of them overflows: a kilowatt for eleven days, three years, more steps than those have.
MOST_J: Final = 1e9
MOST_S: Final = 1e8
MOST_STEPS: Final = 10**10

# Said apart from what trained; evaluation too, but that can be lost.
OVERHEAD: Final = frozenset({Use.STARTUP, Use.RESTORE, Use.SAVE, Use.FINISH})


class DeviceState(Wire):
    """Of a window; null where the device does not say. `throttled_s`: how long each reason slowed it."""

    power_max_w: float | None = Field(None, ge=0, allow_inf_nan=False)
    temperature_max_c: float | None = Field(None, allow_inf_nan=False)
    sm_clock_mean_mhz: float | None = Field(None, ge=0, allow_inf_nan=False)
    utilization_mean_percent: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    memory_used_max_bytes: int | None = Field(None, ge=0)
    throttled_s: dict[Name, Annotated[float, Field(ge=0, le=MOST_S)]] = Field({}, max_length=64)


class EnergyWindow(Wire):
    """`index` counts the windows of a hold and device from 1. Steps: `first_step` ≤ s < `until_step`.

    What came after the last mark of an attempt that died belongs to the step in flight. `energy_j` null: not known,
    for `reason`; without a meter (`no_meter`) source and quality are null too. `error_j` bounds the error of its edges.
    `baseline_w` is what the device takes when it is idle.
    """

    index: int = Field(ge=1)
    device: Name
    source: Source | None
    quality: Quality | None
    use: Use
    epoch: Step | None = None
    first_step: Step
    until_step: Step
    units: int = Field(0, ge=0, le=10**15, description="samples or tokens trained on in it")
    duration_s: float = Field(ge=0, le=MOST_S, allow_inf_nan=False)
    energy_j: float | None = Field(ge=0, le=MOST_J, allow_inf_nan=False)
    error_j: float | None = Field(None, ge=0, le=MOST_J, allow_inf_nan=False)
    reason: Name | None = None
    baseline_w: float | None = Field(None, ge=0, le=MOST_J, allow_inf_nan=False)
    state: DeviceState | None = None

    @model_validator(mode="after")
    def _unknown_has_its_reason(self) -> "EnergyWindow":
        if (self.energy_j is None) != (self.reason is not None):
            raise ValueError("energy_j and reason: exactly one of them is null")
        if not 0 <= self.until_step - self.first_step <= MOST_STEPS:
            raise ValueError("until_step lies before first_step, or too far behind it")
        return self


class EnergyBatch(Wire):
    """POST /operations/{id}/attempts/{n}/energy: windows of one hold, whether it has ended or not, however often."""

    incarnation: UUID
    windows: list[EnergyWindow] = Field(min_length=1, max_length=1000)


class EnergyBooked(Wire):
    """Each window of the batch counts, once."""


class DeviceNow(Wire):
    """A GPU at this moment, with every heartbeat; null is what it does not say."""

    device: Name
    name: Name
    power_w: float | None = Field(None, ge=0, allow_inf_nan=False)
    power_limit_w: float | None = Field(None, ge=0, allow_inf_nan=False)
    temperature_c: float | None = Field(None, allow_inf_nan=False)
    utilization_percent: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    memory_used_bytes: int | None = Field(None, ge=0)
    memory_total_bytes: int | None = Field(None, ge=0)
    throttle: list[Name] = []
