"""What a study comes to: rows as its children end, fits and statistics once it is reduced."""

import math
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from ops_contract.lifecycle import Status
from ops_contract.plans import Skipped
from ops_contract.studies import Point
from ops_contract.wire import Wire


class Estimate(Wire):
    """A value with its 95 % interval; null bounds where there are too few points for one."""

    value: float
    low: float | None = None
    high: float | None = None


class SweepRow(Wire):
    """One training of a sweep. `model_size` is N, `num_tokens` D as really trained, `final_loss` held out, in nats.

    `actual_flops` = FLOPs per token · D. `energy_reason` says why `energy_j` is null. `operation_id` is null outside of
    the service.
    """

    experiment_id: str
    operation_id: UUID | None = None
    compute_budget: float
    size: int
    model_size: int
    num_tokens: int | None = None
    final_loss: float | None = None
    actual_flops: float | None = None
    wall_time_seconds: float | None = None
    energy_j: float | None = None
    energy_reason: str | None = None
    seed: int = 0
    status: Status
    timestamp: datetime | None = None
    error_message: str | None = None

    @property
    def has_loss(self) -> bool:
        """Completed, with a finite one."""
        return self.status is Status.COMPLETED and self.final_loss is not None and math.isfinite(self.final_loss)


class PowerLaw(Wire):
    """quantity = coefficient · C^exponent; `r2` in logarithms."""

    coefficient: Estimate
    exponent: Estimate
    r2: float | None


class BudgetOptimum(Wire):
    """The vertex of the parabola loss = a + b·x + c·x², x = log N, through the runs of one budget.

    `at_edge`: it lies outside of the sizes that were run, or the parabola opens downwards. Then, or farther out than
    the sizes span, it is not `usable` for the power law, and the better end of the sizes stands for it. A null interval
    has no end, as the curvature may be none.
    """

    budget: float
    points: int
    params: float
    tokens: float
    loss: float
    curvature: float
    coefficients: tuple[float, float, float]
    r2: float | None
    at_edge: bool
    usable: bool
    params_interval: tuple[float, float] | None = None


class Approach2(Wire):
    """Hoffmann et al. 2022, § 3.2: N_opt ∝ C^a from the parabolas' vertices.

    `bias` is by how much the exponent a would be off by the grids' not being centred on the optima, estimated by
    fitting this approach to the curve of Approach 3 on the same grid; null without that.
    """

    optima: list[BudgetOptimum]
    params: PowerLaw | None
    tokens: PowerLaw | None
    bias: float | None = None


class Outlier(Wire):
    """A run whose residual in log loss is more than 3 robust standard deviations; it stays in the fit."""

    experiment_id: str
    residual: float
    robust_z: float


class Approach3(Wire):
    """Hoffmann et al. 2022, § 3.3: L = E + A/N^alpha + B/D^beta, Huber loss (delta 1e-3) of log L."""

    E: Estimate
    A: Estimate
    B: Estimate
    alpha: Estimate
    beta: Estimate
    objective: float
    r2: float | None
    rmse_log: float
    starts: int
    bootstraps: int
    outliers: list[Outlier] = []


class Prediction(Wire):
    """The optimum under a budget, as `approach` says. `extrapolates`: no run had so small or so large a budget.

    Approach 2 knows no E: beyond the budgets that were run its loss is null.
    """

    approach: Literal[2, 3]
    budget: float
    params: Estimate
    tokens: Estimate
    tokens_per_param: Estimate
    loss: Estimate | None
    extrapolates: bool


class SweepFit(Wire):
    """A null approach has its reason among the warnings. `dropped` were left out at the user's wish."""

    points: int
    approach2: Approach2 | None = None
    approach3: Approach3 | None = None
    predictions: list[Prediction] = []
    dropped: list[str] = []
    warnings: list[str] = []


class JouleOptimum(Wire):
    """Of one budget the run with the lowest loss, and the one with the fewest joules among those within 1 % of it."""

    budget: float
    flop_optimal: str
    joule_optimal: str


class SweepResult(Wire):
    type: Literal["isoflop"] = "isoflop"
    flops: Literal["6N", "counted"]
    embeddings: Literal["included", "excluded"]
    rows: list[SweepRow]
    fit: SweepFit | None = None
    joules: list[JouleOptimum] = []
    skipped: list[Skipped] = []
    warnings: list[str] = []


class GridRow(Wire):
    """One run of a point. `final` are the last values of its metrics."""

    operation_id: UUID
    name: str
    point: Point
    cycle: int
    status: Status
    final: dict[str, float] = {}
    wall_time_seconds: float | None = None
    energy_j: float | None = None
    energy_reason: str | None = None
    error_message: str | None = None


class Statistic(Wire):
    """Over the completed cycles of a point: Student's 95 % interval of the mean; null bounds and sd for n = 1."""

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


class GridGroup(Wire):
    """A point over its cycles; `metrics` by name, with `wall_time_seconds` and `energy_j` where known of all."""

    point: Point
    metrics: dict[str, Statistic] = {}


class GridResult(Wire):
    type: Literal["grid"] = "grid"
    rows: list[GridRow]
    groups: list[GridGroup] = []
    skipped: list[Skipped] = []
    warnings: list[str] = []


StudyResult = Annotated[SweepResult | GridResult, Field(discriminator="type")]
