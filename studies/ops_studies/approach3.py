"""Approach 3 of Hoffmann et al. 2022 (§ 3.3): L(N, D) = E + A/N^α + B/D^β, fitted to the logarithms of the losses.

The objective is the sum over runs of Huber_δ(LSE(log E, log A − α·log N, log B − β·log D) − log L), δ = 1e-3. Besiroglu et
al. 2024 found that the original averaged it: with the tolerances that optimizers have by default the fit then ends early.
Here many fits at once (all starts, all resamples) go down by damped Newton steps until no step makes the sum smaller.
"""

from dataclasses import dataclass

import numpy as np

from ops_contract.study_results import Approach3, Estimate, Outlier
from ops_studies.runs import Cost, Floats, Runs

DELTA = 1e-3
MIN_RUNS, MIN_SPREAD = 6, 3  # five parameters; sizes and lengths of training that differ
START_EXPONENTS = np.geomspace(0.05, 2.0, 8)  # of α and of β: 64 starts
KEPT_STARTS = 6
ROUGH, FINE = 20, 400  # iterations
BOUNDS_OF_EXPONENT = (0.01, 4.0)
FLOAT32 = 1e-6  # losses are often logged as float32: what is nearer to the fit than that is no outlier
OUTLIER_Z = 3.0
CHUNK = 256  # fits at once, for the memory


@dataclass(frozen=True)
class Problem:
    """Columns about their means, so that log A and α hardly depend on one another. θ = (a, b, e, α, β) with
    a = log A − α·mean(log N) and b = log B − β·mean(log D)."""

    x: Floats
    y: Floats
    target: Floats
    mean_x: float
    mean_y: float
    low: Floats
    high: Floats

    @classmethod
    def of(cls, runs: Runs) -> "Problem":
        target = np.log(runs.loss)
        mean_x, mean_y = float(runs.log_n.mean()), float(runs.log_d.mean())
        least, most = target.min() - 25, target.max()  # a term below e^-25 of the loss is none
        low = np.array([least, least, least, BOUNDS_OF_EXPONENT[0], BOUNDS_OF_EXPONENT[0]])
        high = np.array([most, most, most, BOUNDS_OF_EXPONENT[1], BOUNDS_OF_EXPONENT[1]])
        return cls(runs.log_n - mean_x, runs.log_d - mean_y, target, mean_x, mean_y, low, high)

    def log_loss(self, theta: Floats) -> tuple[Floats, Floats]:
        """(fits, runs), and the shares of the three terms in it, (3, fits, runs)."""
        a, b, e, alpha, beta = theta.T[:, :, None]
        terms = np.stack([a - alpha * self.x, b - beta * self.y, e + np.zeros_like(self.x)])
        most = terms.max(axis=0)
        shares = np.exp(terms - most)
        total = shares.sum(axis=0)
        return most + np.log(total), shares / total

    def objective(self, theta: Floats, weight: Floats) -> Floats:
        r = np.abs(self.log_loss(theta)[0] - self.target)
        return np.where(r <= DELTA, r * r / 2, DELTA * (r - DELTA / 2)).__mul__(weight).sum(axis=1)

    def derivatives(self, theta: Floats, weight: Floats) -> tuple[Floats, Floats, Floats]:
        """Gradient, Hessian, and the Hessian of the parabola above the objective (Huber's weights) that is never
        indefinite."""
        fitted, (pa, pb, pe) = self.log_loss(theta)
        r = fitted - self.target
        slope = weight * np.clip(r, -DELTA, DELTA)
        jacobian = np.stack([pa, pb, pe, -pa * self.x, -pb * self.y], axis=1)
        gradient = (jacobian @ slope[:, :, None])[:, :, 0]
        majorant = weight * DELTA / np.maximum(np.abs(r), DELTA)
        inner = weight * (np.abs(r) < DELTA) - slope
        both = np.stack([majorant, inner], axis=1)[:, :, None, :] * jacobian[:, None]
        above, hessian = np.moveaxis(both @ jacobian.transpose(0, 2, 1)[:, None], 1, 0)
        sa, sb, se = slope * pa, slope * pb, slope * pe
        for i, j, value in (
            (0, 0, sa.sum(1)),
            (0, 3, -sa @ self.x),
            (3, 3, sa @ self.x**2),
            (1, 1, sb.sum(1)),
            (1, 4, -sb @ self.y),
            (4, 4, sb @ self.y**2),
            (2, 2, se.sum(1)),
        ):
            hessian[:, i, j] += value
            if i != j:
                hessian[:, j, i] += value
        return gradient, hessian, above

    def descend(self, theta: Floats, weight: Floats, iterations: int) -> tuple[Floats, Floats]:
        """Each fit by itself, until no step makes its objective smaller. Gives where they end, and the objectives."""
        theta = theta.copy()
        value = self.objective(theta, weight)
        damping = np.full(len(theta), 1e-3)
        active = np.arange(len(theta))
        for _ in range(iterations):
            if not len(active):
                break
            here, w = theta[active], weight[active]
            gradient, hessian, above = self.derivatives(here, w)
            scale = np.einsum("fii->fi", above) + 1e-300
            ridge = np.eye(5) * (damping[active, None] * scale + 1e-14 * scale.max(axis=1, keepdims=True))[:, :, None]
            best, best_value = here, value[active]
            for curvature in (hessian, above):
                step = np.linalg.solve(curvature + ridge, -gradient[:, :, None])[:, :, 0]
                there = np.clip(here + np.nan_to_num(step), self.low, self.high)
                there_value = self.objective(there, w)
                lower = there_value < best_value
                best = np.where(lower[:, None], there, best)
                best_value = np.where(lower, there_value, best_value)
            gained = value[active] - best_value
            damping[active] = np.where(gained > 0, np.maximum(damping[active] / 5, 1e-15), damping[active] * 6)
            done = (damping[active] > 1e12) | ((gained > 0) & (gained < 1e-13 * value[active]))
            theta[active], value[active] = best, best_value
            active = active[~done]
        return theta, value

    def starts(self) -> Floats:
        """For a grid of (α, β) the E, A, B that fit best as shares of the loss, all of them positive."""
        alpha, beta = (grid.ravel() for grid in np.meshgrid(START_EXPONENTS, START_EXPONENTS))
        terms = np.stack([np.exp(-np.outer(alpha, self.x)), np.exp(-np.outer(beta, self.y))], axis=2)
        basis = np.concatenate([terms, np.ones((*terms.shape[:2], 1))], axis=2) / np.exp(self.target)[:, None]
        square = basis.transpose(0, 2, 1) @ basis
        ridge = np.eye(3) * 1e-9 * np.trace(square, axis1=1, axis2=2)[:, None, None]
        factors = np.linalg.solve(square + ridge, basis.sum(axis=1)[:, :, None])[:, :, 0]
        least = 1e-3 * np.exp(self.target.min())
        logs = np.log(np.maximum(factors, least))
        return np.clip(np.column_stack([logs, alpha, beta]), self.low, self.high)

    def fit(self) -> tuple[Floats, float, int]:
        """θ, the objective, and how many starts there were."""
        starts = self.starts()
        weight = np.ones((len(starts), len(self.x)))
        theta, value = self.descend(starts, weight, ROUGH)
        kept = np.argsort(value, kind="stable")[:KEPT_STARTS]
        theta, value = self.descend(theta[kept], weight[kept], FINE)
        best = int(value.argmin())
        return theta[best], float(value[best]), len(starts)

    def resampled(self, theta: Floats, bootstraps: int, seed: int) -> Floats:
        """θ of as many fits, each of the runs with random weights, begun at the fit of all.

        Weights of mean 1 instead of numbers of draws (Rubin 1981): a resample of a small grid may have too few runs left to
        determine five parameters. Their variance n/(n − 5) makes up for the residuals' being smaller than the noise.
        """
        n = len(self.x)
        shape = (n - 5) / n
        weights = np.random.default_rng(seed).gamma(shape, 1 / shape, size=(bootstraps, n))
        parts = [weights[i : i + CHUNK] for i in range(0, bootstraps, CHUNK)]
        fits = [self.descend(np.tile(theta, (len(part), 1)), part, FINE)[0] for part in parts]
        return np.concatenate(fits) if fits else np.empty((0, 5))


@dataclass(frozen=True)
class Curve:
    """What Approach 3 says, to be asked for any budget. The first row of `theta` is the fit, the others the resamples'."""

    log_a: Floats
    log_b: Floats
    e: Floats
    alpha: Floats
    beta: Floats
    cost: Cost

    def log_params(self, log_c: float) -> Floats:
        """C = k·N^m·D; dL/dN = 0 along it: N_opt^(α + mβ) = αA/(mβB) · (C/k)^β."""
        m = self.cost.m
        ratio = np.log(self.alpha) + self.log_a - np.log(m * self.beta) - self.log_b
        return (ratio + self.beta * (log_c - self.cost.log_k)) / (self.alpha + m * self.beta)

    @property
    def exponent(self) -> float:
        return float(self.beta[0] / (self.alpha[0] + self.cost.m * self.beta[0]))

    def params(self, log_c: float) -> Estimate:
        return _percentiles(np.exp(self.log_params(log_c)))

    def tokens(self, log_c: float) -> Estimate:
        return _percentiles(np.exp(self._log_tokens(log_c)))

    def tokens_per_param(self, log_c: float) -> Estimate:
        return _percentiles(np.exp(self._log_tokens(log_c) - self.log_params(log_c)))

    def loss(self, log_c: float) -> Estimate:
        return _percentiles(self.loss_at(self.log_params(log_c), self._log_tokens(log_c)))

    def loss_at(self, log_n: Floats, log_d: Floats) -> Floats:
        return self.e + np.exp(self.log_a - self.alpha * log_n) + np.exp(self.log_b - self.beta * log_d)

    def losses_of(self, runs: Runs) -> Floats:
        """As the fit itself has them."""
        e, log_a, log_b, alpha, beta = (each[0] for each in (self.e, self.log_a, self.log_b, self.alpha, self.beta))
        return e + np.exp(log_a - alpha * runs.log_n) + np.exp(log_b - beta * runs.log_d)

    def _log_tokens(self, log_c: float) -> Floats:
        return log_c - self.cost.log_k - self.cost.m * self.log_params(log_c)


def approach3(
    runs: Runs, cost: Cost, bootstraps: int, seed: int
) -> tuple[Approach3 | None, Curve | None, list[str]]:
    """Hoffmann et al. 2022, § 3.3. Without enough runs there is none, and a warning says so."""
    if reason := too_few(runs):
        return None, None, [f"Approach 3 {reason}"]
    problem = Problem.of(runs)
    theta, objective, starts = problem.fit()
    fits = np.vstack([theta, problem.resampled(theta, bootstraps, seed)])
    a, b, e, alpha, beta = fits.T
    log_a, log_b = a + alpha * problem.mean_x, b + beta * problem.mean_y
    curve = Curve(log_a, log_b, np.exp(e), alpha, beta, cost)
    residual = problem.target - problem.log_loss(theta[None])[0][0]
    total = float(np.square(problem.target - problem.target.mean()).sum())
    with np.errstate(over="ignore"):
        summary = Approach3(
            E=_percentiles(curve.e),
            A=_percentiles(np.exp(log_a)),
            B=_percentiles(np.exp(log_b)),
            alpha=_percentiles(alpha),
            beta=_percentiles(beta),
            objective=objective,
            r2=1 - float(residual @ residual) / total if total > 0 else None,
            rmse_log=float(np.sqrt(np.mean(residual**2))),
            starts=starts,
            bootstraps=bootstraps,
            outliers=_outliers(runs, residual),
        )
    return summary, curve, _at_bounds(problem, theta)


def residuals(runs: Runs) -> Floats:
    """In log loss, of the fit without resamples; there have to be enough runs."""
    problem = Problem.of(runs)
    return problem.target - problem.log_loss(problem.fit()[0][None])[0][0]


def too_few(runs: Runs) -> str | None:
    """Why five parameters cannot be told from these runs."""
    if len(runs) < MIN_RUNS:
        return f"wants {MIN_RUNS} or more runs for its five parameters: there are {len(runs)}"
    for name, logs in (("sizes of model", runs.log_n), ("numbers of tokens", runs.log_d)):
        if (found := len(np.unique(np.round(logs, 6)))) < MIN_SPREAD:
            return f"wants {MIN_SPREAD} or more {name}: there are {found}"
    if len(runs.slices) < 2:
        return "wants runs of two or more budgets: within one it cannot tell E from the rest"
    return None


def _percentiles(values: Floats) -> Estimate:
    """The first is the fit, the others its resamples."""
    if len(values) < 2:
        return Estimate(value=float(values[0]))
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(value=float(values[0]), low=float(low), high=float(high))


def _outliers(runs: Runs, residual: Floats) -> list[Outlier]:
    """The median of the deviations has the runs for it that five parameters leave."""
    scale = 1.4826 * float(np.median(np.abs(residual))) * np.sqrt(len(runs) / (len(runs) - 5))
    z = residual / max(scale, FLOAT32)
    far = [i for i in np.argsort(-np.abs(z), kind="stable") if abs(z[i]) > OUTLIER_Z]
    return [Outlier(experiment_id=runs.ids[i], residual=float(residual[i]), robust_z=float(z[i])) for i in far]


def _at_bounds(problem: Problem, theta: Floats) -> list[str]:
    """A parameter that went as far as it may is not determined by these runs."""
    names = ("A", "B", "E", "alpha", "beta")
    stuck = (theta <= problem.low + 1e-9) | (theta >= problem.high - 1e-9)
    found = [name for name, bound in zip(names, stuck, strict=True) if bound]
    if not found:
        return []
    return [f"Approach 3 does not determine {', '.join(found)}: run more budgets, and sizes farther apart"]
