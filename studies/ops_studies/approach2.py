"""Approach 2 of Hoffmann et al. 2022 (§ 3.2): a parabola through the runs of each budget, a power law through the vertices.

Of a curve L = E + A/N^α + B/D^β the parabola's vertex is not the optimum, for the curve is no parabola in x = log N. But
L − E under one budget is the same function of x − x_opt under another, times a constant: grids that lie alike about their
optima (as wide, equally off) move every vertex equally. Then the exponent is exact, and only the coefficient is off. Grids
that lie otherwise, such as one and the same range of sizes under all budgets, make the exponent wrong too.

Noise is taken as a share of the loss, the same in all budgets. Vertices come with the variance that it gives them, weigh by
it in the power law, and its intervals are Student's.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc, stdtrit

from ops_contract.study_results import Approach2, BudgetOptimum, Estimate, PowerLaw
from ops_studies.runs import Cost, Floats, Runs, Slice

MIN_SIZES = 3
SCATTER_P = 0.01


@dataclass(frozen=True)
class Parabola:
    """loss = a + b·z + c·z², z = log N − centre; `unscaled` is the covariance of (a, b, c) for residuals of variance 1."""

    slice: Slice
    points: int
    centre: float
    low: float
    high: float
    coefficients: Floats
    unscaled: Floats
    mean_loss: float
    squares: float  # of the residuals as shares of the mean loss
    r2: float | None

    @classmethod
    def through(cls, runs: Runs, each: Slice) -> "Parabola | None":
        """None with fewer than three sizes."""
        x, loss = runs.log_n[each.index], runs.loss[each.index]
        if len(np.unique(x)) < MIN_SIZES:
            return None
        centre, mean = float(x.mean()), float(loss.mean())
        basis = np.vander(x - centre, 3, increasing=True)
        q, r = np.linalg.qr(basis)
        inverse = np.linalg.inv(r)
        coefficients = inverse @ (q.T @ loss)
        squares = float(np.square(loss - basis @ coefficients).sum())
        total = float(np.square(loss - mean).sum())
        r2 = 1 - squares / total if len(x) > 3 and total > 0 else None
        spread = inverse @ inverse.T
        return cls(each, len(x), centre, x.min(), x.max(), coefficients, spread, mean, squares / mean**2, r2)

    @property
    def curvature(self) -> float:
        return float(self.coefficients[2])

    @property
    def vertex(self) -> float:
        """log N; NaN where it opens downwards."""
        _, b, c = self.coefficients
        return self.centre - b / (2 * c) if c > 0 else float("nan")

    @property
    def usable(self) -> bool:
        """A minimum farther outside than the sizes span is none that these runs know of."""
        width = self.high - self.low
        return self.curvature > 0 and self.low - width <= self.vertex <= self.high + width

    @property
    def variance(self) -> float:
        """Of the vertex, by the delta method, for noise of variance 1 in the loss as a share."""
        _, b, c = self.coefficients
        gradient = np.array([0.0, -1 / (2 * c), b / (2 * c * c)])
        return float(gradient @ self.unscaled @ gradient) * self.mean_loss**2

    def loss_at(self, log_n: float) -> float:
        return float(np.polynomial.polynomial.polyval(log_n - self.centre, self.coefficients))

    def loss_variance(self, log_n: float) -> float:
        at = (log_n - self.centre) ** np.arange(3)
        return float(at @ self.unscaled @ at) * self.mean_loss**2

    def vertex_interval(self, variance: float, t: float) -> tuple[float, float] | None:
        """Fieller's: where b + 2c·z is not significantly other than 0. None if that has no end, as with c near 0."""
        _, b, c = self.coefficients
        v = self.unscaled * variance * self.mean_loss**2 * t**2
        quadratic, half, constant = 4 * (c * c - v[2, 2]), 2 * (b * c - v[1, 2]), b * b - v[1, 1]
        if quadratic <= 0:
            return None
        root = np.sqrt(max(0.0, half * half - quadratic * constant))
        low, high = ((-half + sign * root) / quadratic for sign in (-1, 1))
        return float(self.centre + low), float(self.centre + high)

    def about_zero(self) -> tuple[float, float, float]:
        """The coefficients in powers of log N itself."""
        a, b, c = map(float, self.coefficients)
        return a - b * self.centre + c * self.centre**2, b - 2 * c * self.centre, c


@dataclass(frozen=True)
class Line:
    """log N_opt = level + slope · (log C − centre), and the variance of both."""

    level: float
    slope: float
    centre: float
    level_variance: float
    slope_variance: float
    t: float | None  # None where there is nothing to tell the noise by
    r2: float | None

    def at(self, log_c: float) -> tuple[float, float]:
        """The value, and half the width of its interval (NaN without one)."""
        off = log_c - self.centre
        half = np.sqrt(self.level_variance + off * off * self.slope_variance) * (np.nan if self.t is None else self.t)
        return self.level + self.slope * off, float(half)

    @property
    def slope_half(self) -> float:
        return float(np.sqrt(self.slope_variance) * (np.nan if self.t is None else self.t))


@dataclass(frozen=True)
class Law:
    """What Approach 2 says, to be asked for any budget."""

    line: Line
    cost: Cost
    usable: list[Parabola]
    noise: float  # variance of the loss, as a share; NaN if not known
    t: float

    def params(self, log_c: float) -> Estimate:
        value, half = self.line.at(log_c)
        return around(value, half)

    def tokens(self, log_c: float) -> Estimate:
        value, half = self.line.at(log_c)
        return around(log_c - self.cost.log_k - self.cost.m * value, self.cost.m * half)

    def tokens_per_param(self, log_c: float) -> Estimate:
        value, half = self.line.at(log_c)
        return around(log_c - self.cost.log_k - (1 + self.cost.m) * value, (1 + self.cost.m) * half)

    def loss(self, log_c: float) -> Estimate | None:
        """Between the budgets that were run, on a line in log C and log loss; nothing beyond: it has no E."""
        at = np.log([each.slice.flops for each in self.usable])
        if not at[0] - 1e-9 <= log_c <= at[-1] + 1e-9:
            return None
        losses = np.array([each.loss_at(each.vertex) for each in self.usable])
        if losses.min() <= 0:
            return None
        shares = np.array([np.interp(log_c, at, one) for one in np.eye(len(at))])
        variances = np.array([each.loss_variance(each.vertex) for each in self.usable]) / losses**2
        half = np.sqrt(np.square(shares) @ variances * self.noise) * self.t
        return around(float(shares @ np.log(losses)), float(half))


def approach2(runs: Runs, cost: Cost) -> tuple[Approach2 | None, Law | None, list[str]]:
    """Hoffmann et al. 2022, § 3.2. Without two budgets that have a minimum there is no law, and a warning says so."""
    parabolas = [found for each in runs.slices if (found := Parabola.through(runs, each))]
    few = len(runs.slices) - len(parabolas)
    if not parabolas:
        return None, None, [f"Approach 2 wants {MIN_SIZES} or more sizes of model under one budget: there are fewer"]
    warnings = [f"{few} of {len(runs.slices)} budgets have fewer than {MIN_SIZES} sizes: no parabola"] if few else []
    warnings += [told for each in parabolas if (told := _edge(each))]
    usable = [each for each in parabolas if each.usable]
    freedom = sum(each.points - 3 for each in parabolas)
    noise = sum(each.squares for each in parabolas) / freedom if freedom else float("nan")
    t = student(freedom) if freedom else float("nan")
    optima = [_optimum(each, cost, noise, t) for each in parabolas]
    if len(usable) < 2:
        told = "Approach 2 wants two or more budgets whose parabola has a minimum near the sizes that were run"
        return Approach2(optima=optima, params=None, tokens=None), None, [*warnings, told]
    line, told_of_line = _line(usable, noise * freedom if freedom else 0.0, freedom)
    law = Law(line, cost, usable, noise, t)
    return Approach2(optima=optima, params=_power(law), tokens=_power_of_tokens(law)), law, warnings + told_of_line


def exponent(runs: Runs) -> float:
    """The exponent of N_opt alone; NaN without two budgets that have a minimum."""
    usable = [found for each in runs.slices if (found := Parabola.through(runs, each)) and found.usable]
    return _line(usable, 0.0, 0)[0].slope if len(usable) > 1 else float("nan")


def student(freedom: float) -> float:
    """Half the width of a 95 % interval, in standard errors."""
    return float(stdtrit(freedom, 0.975))


def around(log_value: float, half: float) -> Estimate:
    """From a logarithm and half the width of its interval; without one where that is NaN."""
    with np.errstate(over="ignore"):
        low, value, high = (float(np.exp(log_value + sign * half)) for sign in (-1, 0, 1))
        value = float(np.exp(log_value))
    return Estimate(value=value) if np.isnan(half) else Estimate(value=value, low=low, high=high)


def _line(usable: list[Parabola], squares: float, freedom: int) -> tuple[Line, list[str]]:
    """Weighted least squares. `squares` of residuals about the parabolas with `freedom`: these, and how the vertices
    scatter about the line, tell the noise together; vertices that scatter more than it explains tell it alone."""
    x, y = np.log([each.slice.flops for each in usable]), np.array([each.vertex for each in usable])
    weight = 1 / np.array([each.variance for each in usable])
    centre = float(np.average(x, weights=weight))
    level = float(np.average(y, weights=weight))
    lever = float(weight @ np.square(x - centre))
    slope = float(weight @ ((x - centre) * (y - level))) / lever
    scatter, scatter_freedom = float(weight @ np.square(y - level - slope * (x - centre))), len(x) - 2
    total = float(weight @ np.square(y - level))
    r2 = 1 - scatter / total if scatter_freedom and total > 0 else None
    warnings = []
    if scatter_freedom == 0:
        warnings.append("two budgets make a line, whatever the law: run a third to test it")
    elif freedom and squares > 0:
        ratio = (scatter / scatter_freedom) / (squares / freedom)
        if fdtrc(scatter_freedom, freedom, ratio) < SCATTER_P:
            squares, freedom = 0.0, 0
            warnings.append(
                "the budgets' optima lie farther from their power law than the noise within budgets explains: "
                "the intervals of Approach 2 come from their scatter alone"
            )
    freedom += scatter_freedom
    variance = (squares + scatter) / freedom if freedom else float("nan")
    t = student(freedom) if freedom else None
    return Line(level, slope, centre, variance / float(weight.sum()), variance / lever, t, r2), warnings


def _power(law: Law) -> PowerLaw:
    at_one, half = law.line.at(0.0)
    return PowerLaw(
        coefficient=around(at_one, half),
        exponent=_plus_minus(law.line.slope, law.line.slope_half),
        r2=law.line.r2,
    )


def _power_of_tokens(law: Law) -> PowerLaw:
    """C = k·N^m·D: the runs' own cost makes the law of D of that of N."""
    at_one, half = law.line.at(0.0)
    return PowerLaw(
        coefficient=around(-law.cost.log_k - law.cost.m * at_one, law.cost.m * half),
        exponent=_plus_minus(1 - law.cost.m * law.line.slope, law.cost.m * law.line.slope_half),
        r2=law.line.r2,
    )


def _plus_minus(value: float, half: float) -> Estimate:
    return Estimate(value=value) if np.isnan(half) else Estimate(value=value, low=value - half, high=value + half)


def _optimum(each: Parabola, cost: Cost, noise: float, t: float) -> BudgetOptimum:
    """Where there is no minimum near, the best size that was run stands for it."""
    vertex = each.vertex if each.usable else min((each.low, each.high), key=each.loss_at)
    log_c = np.log(each.slice.flops)
    interval = each.vertex_interval(noise, t) if each.usable and not np.isnan(noise) else None
    return BudgetOptimum(
        budget=each.slice.budget,
        points=each.points,
        params=float(np.exp(vertex)),
        tokens=float(np.exp(log_c - cost.log_k - cost.m * vertex)),
        loss=each.loss_at(vertex),
        curvature=each.curvature,
        coefficients=each.about_zero(),
        r2=each.r2,
        at_edge=not each.low <= each.vertex <= each.high,
        usable=each.usable,
        params_interval=None if interval is None else around_ends(interval),
    )


def around_ends(interval: tuple[float, float]) -> tuple[float, float]:
    with np.errstate(over="ignore"):
        return float(np.exp(interval[0])), float(np.exp(interval[1]))


def _edge(each: Parabola) -> str | None:
    budget = f"{each.slice.budget:.3g} FLOPs"
    if each.curvature <= 0:
        return f"{budget}: the parabola opens downwards; it is left out of the power law. Run more sizes, farther apart"
    if each.low <= each.vertex <= each.high:
        return None
    smaller = each.vertex < each.low
    where = f"the optimum lies {'below' if smaller else 'above'} every size that was run"
    then = "" if each.usable else ", too far away to be known: it is left out of the power law"
    return f"{budget}: {where}{then}. Run {'smaller' if smaller else 'larger'} models"
