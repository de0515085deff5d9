"""Approach 3 of Hoffmann et al. 2022 (§ 3.3): L(N, D) = E + A/N^α + B/D^β, fitted to the logarithms of the losses.

The objective is the sum over runs of Huber_δ(LSE(log E, log A − α·log N, log B − β·log D) − log L), δ = 1e-3. Besiroglu
et al. 2024 found that the original took the mean: with the usual tolerances of an optimizer the fit then ends early.
Here many fits at once (all starts, all resamples) go down by damped Newton steps until no step makes the sum smaller.
"""

from dataclasses import dataclass

import numpy as np

from ops_contract.study_results import Approach3, Estimate, Outlier
from ops_studies.estimates import exp_percentiles, percentiles
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
        total: Floats = (weight * np.where(r <= DELTA, r * r / 2, DELTA * (r - DELTA / 2))).sum(axis=1)
        return total

    def residual(self, theta: Floats) -> Floats:
        """Of one fit, in log loss: above 0 where the run is worse than the fit."""
        r: Floats = self.target - self.log_loss(theta[None])[0][0]
        return r

    def derivatives(self, theta: Floats, weight: Floats) -> tuple[Floats, Floats, Floats]:
        """Gradient, Hessian, and one that is never indefinite: of a parabola that touches the objective from above."""
        fitted, (pa, pb, pe) = self.log_loss(theta)
        r: Floats = fitted - self.target
        slope = weight * np.clip(r, -DELTA, DELTA)
        jacobian = np.stack([pa, pb, pe, -pa * self.x, -pb * self.y], axis=1)
        gradient = (jacobian @ slope[:, :, None])[:, :, 0]
        majorant = weight * DELTA / np.maximum(np.abs(r), DELTA)
        inner = weight * (np.abs(r) < DELTA) - slope
        both = np.stack([majorant, inner], axis=1)[:, :, None, :] * jacobian[:, None]
        above, hessian = np.moveaxis(both @ jacobian.transpose(0, 2, 1)[:, None], 1, 0)
        for term, power, share, by in ((0, 3, pa, -self.x), (1, 4, pb, -self.y)):
            bent = slope * share
            hessian[:, term, term] += bent.sum(axis=1)
            hessian[:, term, power] += bent @ by
            hessian[:, power, term] += bent @ by
            hessian[:, power, power] += bent @ by**2
        hessian[:, 2, 2] += (slope * pe).sum(axis=1)
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
        starts: Floats = np.clip(np.column_stack([logs, alpha, beta]), self.low, self.high)
        return starts

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
        """θ of as many fits, begun at that of all runs.

        A resample weighs the runs at random (Rubin 1981) rather than to draw some of them: of a small grid too few
        would be left for five parameters. The variance n/(n − 5) makes up for residuals' being smaller than the noise.
        """
        n = len(self.x)
        shape = (n - 5) / n
        weights = np.random.default_rng(seed).gamma(shape, 1 / shape, size=(bootstraps, n))
        parts = [weights[i : i + CHUNK] for i in range(0, bootstraps, CHUNK)]
        fits = [self.descend(np.tile(theta, (len(part), 1)), part, FINE)[0] for part in parts]
        return np.concatenate(fits) if fits else np.empty((0, 5))


@dataclass(frozen=True)
class Curve:
    """The first of each is the fit's, the others its resamples'."""

    log_a: Floats
    log_b: Floats
    log_e: Floats
    alpha: Floats
    beta: Floats
    cost: Cost

    @classmethod
    def of(cls, problem: Problem, theta: Floats, cost: Cost) -> "Curve":
        a, b, e, alpha, beta = theta.T
        return cls(a + alpha * problem.mean_x, b + beta * problem.mean_y, e, alpha, beta, cost)

    @property
    def exponent(self) -> float:
        """Of N_opt."""
        return float(self.beta[0] / (self.alpha[0] + self.cost.m * self.beta[0]))

    def params(self, log_c: float) -> Estimate:
        return exp_percentiles(self._log_params(log_c))

    def tokens(self, log_c: float) -> Estimate:
        return exp_percentiles(self._log_tokens(log_c))

    def tokens_per_param(self, log_c: float) -> Estimate:
        return exp_percentiles(self._log_tokens(log_c) - self._log_params(log_c))

    def loss(self, log_c: float) -> Estimate:
        of_params = self.log_a - self.alpha * self._log_params(log_c)
        of_tokens = self.log_b - self.beta * self._log_tokens(log_c)
        return exp_percentiles(np.logaddexp(self.log_e, np.logaddexp(of_params, of_tokens)))

    def losses_of(self, runs: Runs) -> Floats:
        """As the fit has them."""
        of_params = self.log_a[0] - self.alpha[0] * runs.log_n
        of_tokens = self.log_b[0] - self.beta[0] * runs.log_d
        losses: Floats = np.exp(np.logaddexp(self.log_e[0], np.logaddexp(of_params, of_tokens)))
        return losses

    def _log_params(self, log_c: float) -> Floats:
        """Where dL/dN = 0 along C = k·N^m·D: N^(α + mβ) = αA/(mβB) · (C/k)^β."""
        m = self.cost.m
        log_ratio = np.log(self.alpha) + self.log_a - np.log(m * self.beta) - self.log_b
        log_params: Floats = (log_ratio + self.beta * (log_c - self.cost.log_k)) / (self.alpha + m * self.beta)
        return log_params

    def _log_tokens(self, log_c: float) -> Floats:
        return self.cost.log_tokens(log_c, self._log_params(log_c))


def fit(runs: Runs, cost: Cost, bootstraps: int, seed: int) -> tuple[Approach3 | None, Curve | None, list[str]]:
    """Without enough runs there is none, and a warning says so."""
    if reason := too_few(runs):
        return None, None, [f"Approach 3 {reason}"]
    problem = Problem.of(runs)
    theta, objective, starts = problem.fit()
    curve = Curve.of(problem, np.vstack([theta, problem.resampled(theta, bootstraps, seed)]), cost)
    residual = problem.residual(theta)
    total = float(np.square(problem.target - problem.target.mean()).sum())
    found = Approach3(
        E=exp_percentiles(curve.log_e),
        A=exp_percentiles(curve.log_a),
        B=exp_percentiles(curve.log_b),
        alpha=percentiles(curve.alpha),
        beta=percentiles(curve.beta),
        objective=objective,
        r2=1 - float(residual @ residual) / total if total > 0 else None,
        rmse_log=float(np.sqrt(np.mean(residual**2))),
        starts=starts,
        bootstraps=bootstraps,
        outliers=_outliers(runs, residual),
    )
    return found, curve, _at_bounds(problem, theta)


def residuals(runs: Runs) -> Floats:
    """In log loss. There have to be enough runs."""
    problem = Problem.of(runs)
    return problem.residual(problem.fit()[0])


def too_few(runs: Runs) -> str | None:
    """Why these runs cannot tell five parameters."""
    if len(runs) < MIN_RUNS:
        return f"wants {MIN_RUNS} or more runs for its five parameters: there are {len(runs)}"
    for name, logs in (("sizes of model", runs.log_n), ("numbers of tokens", runs.log_d)):
        if (found := len(np.unique(np.round(logs, 6)))) < MIN_SPREAD:
            return f"wants {MIN_SPREAD} or more {name}: there are {found}"
    if len(runs.slices) < 2:
        return "wants two or more budgets: within one it cannot tell E from the rest"
    return None


def _outliers(runs: Runs, residual: Floats) -> list[Outlier]:
    """The deviations are smaller than the noise, as five parameters went along with it."""
    scale = 1.4826 * float(np.median(np.abs(residual))) * np.sqrt(len(runs) / (len(runs) - 5))
    z = residual / max(scale, FLOAT32)
    far = [i for i in np.argsort(-np.abs(z), kind="stable") if abs(z[i]) > OUTLIER_Z]
    return [Outlier(experiment_id=runs.ids[i], residual=float(residual[i]), robust_z=float(z[i])) for i in far]


def _at_bounds(problem: Problem, theta: Floats) -> list[str]:
    stuck = (theta <= problem.low + 1e-9) | (theta >= problem.high - 1e-9)
    found = [name for name, at_bound in zip(("A", "B", "E", "alpha", "beta"), stuck, strict=True) if at_bound]
    if not found:
        return []
    return [f"these runs do not determine {', '.join(found)} of Approach 3: run more budgets, and sizes farther apart"]
