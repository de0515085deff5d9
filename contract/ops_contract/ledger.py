"""What the windows of an operation add up to, as its readers see it (GET /operations/{id}/energy).

total = useful + lost + overhead, to the microjoule: sums are those of whole microjoules. Joules of shared devices
(upper bounds) and those that are nobody's (unattributed) stand beside them, and are null where there are none.
"""

from enum import StrEnum
from uuid import UUID

from ops_contract.energy import EnergyWindow, Quality, Source, Use
from ops_contract.wire import Wire


class Unknown(StrEnum):
    """Why a figure is null, beside what meters say of a window (`no_meter`, `device_lost`, `counter_fell`, …)."""

    NOT_STARTED = "not_started"  # no attempt has begun
    NOT_YET = "not_yet_measured"  # the attempt runs, and nothing of it has come
    NOT_MEASURED = "not_measured"  # the attempt has ended, and nothing of it has come
    SHARED_DEVICE = "shared_device"  # others used the device: only an upper bound is known
    NO_BASELINE = "no_baseline"  # what the device takes when it is idle was never measured
    NO_STEPS = "no_steps"
    NO_UNITS = "no_units"
    NOT_CONFIGURED = "not_configured"  # OPS_CARBON_G_PER_KWH, OPS_PRICE_PER_KWH
    NOT_TOLD = "not_told"  # no device says it of itself


class Joules(Wire):
    """`energy_j` null: not all of it is known, for `reason`; `known_j` is what is. `error_j` bounds the error."""

    energy_j: float | None
    known_j: float | None
    error_j: float | None
    reason: str | None


class Shares(Wire):
    """`useful` trained what the result is made of; `lost` was used after the checkpoint that a later attempt went on
    from; `overhead` is everything else that was done once, said apart in `overhead_by_use`.
    """

    quality: Quality | None
    total: Joules
    useful: Joules
    lost: Joules
    overhead: Joules
    overhead_by_use: dict[Use, Joules]
    unattributed: Joules | None
    upper_bound: Joules | None


class AttemptEnergy(Shares):
    """`steps` and `units` that it trained, `lost_steps` of which a later attempt did again."""

    number: int
    duration_s: float | None
    steps: int
    lost_steps: int
    units: int


class EpochEnergy(Wire):
    """Of all attempts. `overhead_j` is its evaluation and what it waited for saves."""

    epoch: int
    total_j: float | None
    known_j: float | None
    useful_j: float | None
    lost_j: float | None
    overhead_j: float | None
    reason: str | None
    duration_s: float
    steps: int
    units: int
    per_step_j: float | None
    per_unit_j: float | None


class DeviceEnergy(Wire):
    """What a device used while the operation held it, and how it was; null is what it does not say."""

    device: str
    worker: str
    worker_id: UUID
    source: Source | None
    quality: Quality | None
    energy: Joules
    duration_s: float
    power_mean_w: float | None
    power_max_w: float | None
    baseline_w: float | None
    temperature_max_c: float | None
    sm_clock_mean_mhz: float | None
    utilization_mean_percent: float | None
    memory_used_max_bytes: int | None
    throttled_s: dict[str, float] | None


class AboveIdle(Wire):
    """The total without what the devices take when they are idle (`idle_j`)."""

    energy_j: float | None
    idle_j: float | None
    reason: str | None


class PerWork(Wire):
    """The useful joules by the steps and units (samples or tokens) that they trained."""

    steps: int
    units: int
    per_step_j: float | None
    per_unit_j: float | None
    reason: str | None


class Carbon(Wire):
    co2_g: float | None
    g_per_kwh: float | None
    reason: str | None


class Cost(Wire):
    amount: float | None
    currency: str | None
    price_per_kwh: float | None
    reason: str | None


class Throttling(Wire):
    """For how long each reason slowed the operation: several devices at the same time count once."""

    throttled_s: dict[str, float] | None
    reason: str | None


class EnergyLedger(Shares):
    """`provisional`: a later attempt may yet make useful joules lost ones. `epochs` are the newest, at most 1000."""

    operation_id: UUID
    provisional: bool
    per_work: PerWork
    above_idle: AboveIdle
    carbon: Carbon
    cost: Cost
    thermal_throttle: Throttling
    attempts: list[AttemptEnergy]
    epochs: list[EpochEnergy]
    epochs_left_out: int
    devices: list[DeviceEnergy]


class BookedWindow(EnergyWindow):
    """`lost_j` of its energy went to steps that a later attempt did again."""

    attempt: int
    worker_id: UUID
    lost_j: float | None


class EnergyWindows(Wire):
    """In the order of their attempts, and of each device's indices."""

    items: list[BookedWindow]
    next_cursor: str | None
