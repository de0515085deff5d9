"""Approach 2 of Hoffmann et al. 2022 (§ 3.2): a parabola through the runs of each budget, a law through the vertices.

Of a curve L = E + A/N^α + B/D^β the vertex is not quite the optimum, for it is no parabola in log N. But with x the
distance of log N to the optimum, L − E of one budget is that of another times a constant. So on grids that lie alike
about the optima of their budgets (as wide, equally far off) every vertex is off by the same factor: the exponent is
exact, and only the coefficient is wrong. On others, such as the same sizes under every budget, both are.

The noise is taken to be a share of the loss, the same in all budgets. It gives every vertex a variance, by which it
weighs in the power law, and intervals are Student's.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from ops_contract.study_results import Approach2, BudgetOptimum, Estimate, PowerLaw
from ops_studies.estimates import exp, exp_plus_minus, plus_minus, student
from ops_studies.runs import MIN_SIZES, SAME_BUDGET, Cost, Floats, Runs, Slice

SCATTER_P = 0.01  # of the vertices about their line, if the noise within budgets explained it


@dataclass(frozen=True)
class Parabola:
    """loss = a + b·z + c·z², z = log N − centre. `spread` is the covariance of (a, b, c) for noise of variance 1."""

    slice: Slice
    points: int
    centre: float
    low: float
    high: float
    best: float  # log N of the run with the lowest loss
    coefficients: Floats
    spread: Floats
    squares: float  # of the residuals, as shares of the mean loss
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
        return cls(
            slice=each,
            points=len(x),
            centre=centre,
            low=float(x.min()),
            high=float(x.max()),
            best=float(x[loss.argmin()]),
            coefficients=coefficients,
            spread=inverse @ inverse.T * mean**2,
            squares=squares / mean**2,
            r2=1 - squares / total if len(x) > MIN_SIZES and total > 0 else None,
        )

    @property
    def curvature(self) -> float:
        return float(self.coefficients[2])

    @property
    def vertex(self) -> float:
        """log N of the minimum; NaN where it opens downwards."""
        _, b, c = self.coefficients
        return float(self.centre - b / (2 * c)) if c > 0 else float("nan")

    @property
    def inside(self) -> bool:
        return self.low <= self.vertex <= self.high

    @property
    def usable(self) -> bool:
        """A minimum farther outside than the sizes span is none that these runs know of."""
        width = self.high - self.low
        return self.low - width <= self.vertex <= self.high + width

    @property
    def vertex_variance(self) -> float:
        """By the delta method, for noise of variance 1."""
        _, b, c = self.coefficients
        gradient = np.array([0.0, -1 / (2 * c), b / (2 * c * c)])
        return float(gradient @ self.spread @ gradient)

    def vertex_interval(self, noise: float, t: float) -> tuple[float, float] | None:
        """Fieller's: where the slope b + 2c·z may be 0. None where that has no end, c being hardly above 0."""
        _, b, c = self.coefficients
        v = self.spread * noise * t**2
        quadratic, linear, constant = 4 * (c * c - v[2, 2]), 4 * (b * c - v[1, 2]), b * b - v[1, 1]
        if not quadratic > 0:
            return None
        root = np.sqrt(max(0.0, linear * linear - 4 * quadratic * constant))
        low, high = (self.centre + (-linear + sign * root) / (2 * quadratic) for sign in (-1, 1))
        return exp(low), exp(high)

    def loss_at(self, log_n: float) -> float:
        return float(self._powers(log_n) @ self.coefficients)

    def loss_variance(self, log_n: float) -> float:
        return float(self._powers(log_n) @ self.spread @ self._powers(log_n))

    def _powers(self, log_n: float) -> Floats:
        return np.array([1.0, log_n - self.centre, (log_n - self.centre) ** 2])

    def about_zero(self) -> tuple[float, float, float]:
        """The coefficients of the powers of log N itself."""
        a, b, c = map(float, self.coefficients)
        return a - b * self.centre + c * self.centre**2, b - 2 * c * self.centre, c


@dataclass(frozen=True)
class Law:
    """log N_opt = level + slope · (log C − centre). Half an interval is `t` standard errors; of a loss `noise_t`."""

    level: float
    slope: float
    centre: float
    level_variance: float
    slope_variance: float
    t: float
    r2: float | None
    noise: float
    noise_t: float
    parabolas: list[Parabola]
    cost: Cost

    def params(self, log_c: float) -> Estimate:
        return exp_plus_minus(*self._log_params(log_c))

    def tokens(self, log_c: float) -> Estimate:
        value, half = self._log_params(log_c)
        return exp_plus_minus(self.cost.log_tokens(log_c, value), self.cost.m * half)

    def tokens_per_param(self, log_c: float) -> Estimate:
        value, half = self._log_params(log_c)
        return exp_plus_minus(self.cost.log_tokens(log_c, value) - value, (1 + self.cost.m) * half)

    def loss(self, log_c: float) -> Estimate | None:
        """Between the budgets that were run, on a line in log C and log loss. It has no E to go beyond them by."""
        at = np.log([each.slice.flops for each in self.parabolas])
        losses = np.array([each.loss_at(each.vertex) for each in self.parabolas])
        if not at[0] - 1e-9 <= log_c <= at[-1] + 1e-9 or losses.min() <= 0:
            return None
        shares = np.array([np.interp(log_c, at, one) for one in np.eye(len(at))])
        variances = np.array([each.loss_variance(each.vertex) for each in self.parabolas]) / losses**2
        half = self.noise_t * np.sqrt(self.noise * (np.square(shares) @ variances))
        return exp_plus_minus(float(shares @ np.log(losses)), float(half))

    def power_of_params(self) -> PowerLaw:
        exponent = plus_minus(self.slope, self._slope_half)
        return PowerLaw(coefficient=self.params(0.0), exponent=exponent, r2=self.r2)

    def power_of_tokens(self) -> PowerLaw:
        """C = k·N^m·D makes it of the power law of N."""
        m = self.cost.m
        exponent = plus_minus(1 - m * self.slope, m * self._slope_half)
        return PowerLaw(coefficient=self.tokens(0.0), exponent=exponent, r2=self.r2)

    @property
    def _slope_half(self) -> float:
        return self.t * float(np.sqrt(self.slope_variance))

    def _log_params(self, log_c: float) -> tuple[float, float]:
        off = log_c - self.centre
        half = self.t * np.sqrt(self.level_variance + off * off * self.slope_variance)
        return self.level + self.slope * off, float(half)


def fit(runs: Runs, cost: Cost) -> tuple[Approach2 | None, Law | None, list[str]]:
    """Without two budgets that have a minimum there is no law, and a warning says so."""
    parabolas = _parabolas(runs)
    if not parabolas:
        return (
            None,
            None,
            [f"Approach 2 wants {MIN_SIZES} or more sizes under each of two budgets: none has them"],
        )
    warnings = [told for each in parabolas if (told := _edge(each))]
    if few := len(runs.slices) - len(parabolas):
        warnings.append(f"{few} of {len(runs.slices)} budgets have fewer than {MIN_SIZES} sizes, and so no parabola")
    freedom = sum(each.points - 3 for each in parabolas)
    squares = sum(each.squares for each in parabolas)
    noise, t = (squares / freedom if freedom else float("nan")), student(freedom)
    optima = [_optimum(each, cost, noise, t) for each in parabolas]
    usable = [each for each in parabolas if each.usable]
    if not _apart(usable):
        told = (
            "Approach 2 wants two or more budgets, of FLOPs that differ, with a minimum near the sizes that were run: "
            "there is no power law"
        )
        return Approach2(optima=optima, params=None, tokens=None), None, [*warnings, told]
    law, of_law = _law(usable, cost, squares, freedom)
    found = Approach2(optima=optima, params=law.power_of_params(), tokens=law.power_of_tokens())
    return found, law, warnings + of_law


def exponent(runs: Runs) -> float:
    """Of N_opt, and nothing else; NaN where there is no law."""
    usable = [each for each in _parabolas(runs) if each.usable]
    return _Line.through(usable).slope if _apart(usable) else float("nan")


def _apart(parabolas: list[Parabola]) -> bool:
    """Whether there is a line through them. What budgets are called says nothing of what their runs spent."""
    flops = [each.slice.flops for each in parabolas]
    return bool(flops) and max(flops) > SAME_BUDGET * min(flops)


def _parabolas(runs: Runs) -> list[Parabola]:
    return [found for each in runs.slices if (found := Parabola.through(runs, each))]


@dataclass(frozen=True)
class _Line:
    """level + slope · (log C − centre) through the vertices by weighted least squares. `lever`, `scatter` (of the
    vertices about it) and `total` (about their mean) are weighted sums of squares."""

    level: float
    slope: float
    centre: float
    weight: float
    lever: float
    scatter: float
    total: float

    @classmethod
    def through(cls, parabolas: list[Parabola]) -> "_Line":
        x, y = np.log([each.slice.flops for each in parabolas]), np.array([each.vertex for each in parabolas])
        weight = 1 / np.array([each.vertex_variance for each in parabolas])
        centre, level = float(np.average(x, weights=weight)), float(np.average(y, weights=weight))
        lever = float(weight @ np.square(x - centre))
        slope = float(weight @ ((x - centre) * y)) / lever
        scatter = float(weight @ np.square(y - level - slope * (x - centre)))
        total = float(weight @ np.square(y - level))
        return cls(level, slope, centre, float(weight.sum()), lever, scatter, total)


def _law(usable: list[Parabola], cost: Cost, squares: float, freedom: int) -> tuple[Law, list[str]]:
    """`squares`, with `freedom`, are of the runs about their parabolas: they tell the noise together with the
    vertices' scatter about the line; where that is more than such noise explains, it tells it alone.
    """
    line = _Line.through(usable)
    scatter, of_scatter = line.scatter, len(usable) - 2
    noise = squares / freedom if freedom else float("nan")
    warnings = []
    pooled, of_pooled = squares + scatter, freedom + of_scatter
    if of_scatter == 0:
        warnings.append("two budgets lie on a line whatever the law is: run a third")
    elif noise > 0 and fdtrc(of_scatter, freedom, scatter / of_scatter / noise) < SCATTER_P:
        pooled, of_pooled = scatter, of_scatter
        warnings.append(
            "the optima of the budgets lie farther from a power law than the noise within budgets explains; "
            "Approach 2 takes its intervals from that alone"
        )
    variance = pooled / of_pooled if of_pooled else float("nan")
    law = Law(
        level=line.level,
        slope=line.slope,
        centre=line.centre,
        level_variance=variance / line.weight,
        slope_variance=variance / line.lever,
        t=student(of_pooled),
        r2=1 - scatter / line.total if of_scatter and line.total > 0 else None,
        noise=noise,
        noise_t=student(freedom),
        parabolas=usable,
        cost=cost,
    )
    return law, warnings


def _optimum(each: Parabola, cost: Cost, noise: float, t: float) -> BudgetOptimum:
    """Where no minimum is near, the better end of the sizes that were run stands for it."""
    log_n = each.vertex if each.usable else min((each.low, each.high), key=each.loss_at)
    return BudgetOptimum(
        budget=each.slice.budget,
        points=each.points,
        params=exp(log_n),
        tokens=exp(cost.log_tokens(np.log(each.slice.flops), log_n)),
        loss=each.loss_at(log_n),
        curvature=each.curvature,
        coefficients=each.about_zero(),
        r2=each.r2,
        at_edge=not each.inside,
        usable=each.usable,
        params_interval=each.vertex_interval(noise, t) if each.usable else None,
    )


def _edge(each: Parabola) -> str | None:
    budget = f"{each.slice.budget:.3g} FLOPs"
    if each.inside:
        if each.low < each.best < each.high:
            return None
        end, then = ("smallest", "smaller") if each.best == each.low else ("largest", "larger")
        return f"{budget}: the best run is one of the {end} size; the parabola's minimum is doubtful. Run {then} ones"
    left_out = "" if each.usable else "; it is left out of the power law"
    if each.curvature <= 0:
        return f"{budget}: the parabola opens downwards{left_out}. Run sizes farther apart, or more of them"
    if each.vertex < each.low:
        return f"{budget}: the optimum lies below all sizes that were run{left_out}. Run smaller ones"
    return f"{budget}: the optimum lies above all sizes that were run{left_out}. Run larger ones"
