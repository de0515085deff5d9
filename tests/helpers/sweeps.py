"""Results of studies, made by hand: losses of a known law, parabolas through them, intervals as wide as said."""

import math
from typing import Any, Literal
from uuid import UUID

import numpy as np

from ops_contract.lifecycle import Status
from ops_contract.plans import Skipped
from ops_contract.study_results import (
    Approach2,
    Approach3,
    BudgetOptimum,
    Estimate,
    GridGroup,
    GridResult,
    GridRow,
    JouleOptimum,
    Outlier,
    PowerLaw,
    Prediction,
    Statistic,
    SweepFit,
    SweepResult,
    SweepRow,
)

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28  # Hoffmann et al. 2022
BUDGETS = (1e15, 1e16, 1e17)
SIZES = 5
SEEDS = 2
ASKED = 1e19  # two decades past the largest budget
WIDE = 1.2  # of an interval: value / WIDE to value * WIDE


def sweep_result(fitted: bool = True) -> SweepResult:
    """Three budgets of five sizes and two seeds: one failed, and of one the joules are not known."""
    rows = [_row(b, i, seed) for b in BUDGETS for i in range(SIZES) for seed in range(SEEDS)]
    rows[3] = rows[3].model_copy(
        update={"status": Status.FAILED, "final_loss": None, "error_message": "CUDA out of memory", "energy_j": None}
    )
    rows[0] = rows[0].model_copy(update={"energy_j": None, "energy_reason": "device_lost"})
    joules = [_joules(_of(rows, budget)) for budget in BUDGETS]
    return SweepResult(
        flops="6N",
        embeddings="excluded",
        rows=rows,
        fit=_fit(rows) if fitted else None,
        joules=joules if fitted else [],
        skipped=[Skipped(what="config.d_model=9", reason="d_model: not a multiple of n_head")],
        warnings=["budget 1e+17: 5 of 7 sizes; 2 would have fewer than 10 updates"],
    )


def optimum(flops: float) -> tuple[float, float]:
    """N and D of the law under a budget (equation 4 of the paper)."""
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return g * (flops / 6) ** (BETA / (ALPHA + BETA)), (flops / 6) ** (ALPHA / (ALPHA + BETA)) / g


def loss(params: float, tokens: float) -> float:
    return E + A / params**ALPHA + B / tokens**BETA


def grid_result() -> GridResult:
    """Two learning rates of two widths and a name that somebody else chose, three cycles each; one failed."""
    rows, groups = [], []
    for width in (64, 128):
        for rate, loss_ in ((1e-4, 2.5), (1e-2, 2.0 if width == 64 else 1.8)):
            point: dict[str, Any] = {"config.d_model": width, "execution.learning_rate": rate}
            values = [loss_ + 0.02 * cycle for cycle in range(3)]
            rows += [_grid_row(point, cycle, value) for cycle, value in enumerate(values)]
            mean = sum(values) / 3
            metrics = {"val_loss": Statistic(n=3, mean=mean, sd=0.02, low=mean - 0.05, high=mean + 0.05)}
            groups.append(
                GridGroup(point=point, metrics=metrics | {"wall_time_seconds": Statistic(n=3, mean=width / 2)})
            )
    return GridResult(
        rows=rows, groups=groups, skipped=[Skipped(what="d_model=63", reason="d_model: not a multiple of n_head")]
    )


def _grid_row(point: dict[str, Any], cycle: int, value: float) -> GridRow:
    name = ", ".join(f"{field.rpartition('.')[2]}={each}" for field, each in point.items()) + f" · cycle {cycle}"
    return GridRow(
        operation_id=UUID(int=abs(hash(name)) % 2**64),
        name=name,
        point=point,
        cycle=cycle,
        status=Status.COMPLETED,
        final={"val_loss": value},
        wall_time_seconds=point["config.d_model"] / 2,
        energy_reason="not_measured",
    )


def _row(budget: float, i: int, seed: int) -> SweepRow:
    params = int(optimum(budget)[0] * 3 ** ((i - SIZES // 2) / 2))
    tokens = int(budget / 6 / params)
    return SweepRow(
        experiment_id=f"C={budget:.0e} d_model={64 * (i + 1)} seed={seed}",
        operation_id=UUID(int=1000 + BUDGETS.index(budget) * 100 + i * 10 + seed),
        compute_budget=budget,
        size=64 * (i + 1),
        model_size=params,
        num_tokens=tokens,
        final_loss=loss(params, tokens) + 0.004 * (seed - 0.5) * (-1) ** i,
        actual_flops=6.0 * params * tokens,
        wall_time_seconds=budget / 1e14 * (1 + i / 10),
        energy_j=budget / 1e13 * (1 + i / 5),
        seed=seed,
        status=Status.COMPLETED,
    )


def _joules(rows: list[SweepRow]) -> JouleOptimum:
    best = min(rows, key=_loss)
    frugal = min(
        (row for row in rows if row.energy_j and _loss(row) <= 1.02 * _loss(best)), key=lambda row: row.energy_j or 0
    )
    return JouleOptimum(budget=best.compute_budget, flop_optimal=best.experiment_id, joule_optimal=frugal.experiment_id)


def _of(rows: list[SweepRow], budget: float) -> list[SweepRow]:
    return [row for row in rows if row.compute_budget == budget and row.final_loss is not None]


def _loss(row: SweepRow) -> float:
    assert row.final_loss is not None
    return row.final_loss


def _fit(rows: list[SweepRow]) -> SweepFit:
    optima = [_parabola(rows, budget) for budget in BUDGETS]
    exponent, level = np.polyfit(np.log(BUDGETS), np.log([each.params for each in optima]), 1)
    law = PowerLaw(coefficient=_about(math.exp(level)), exponent=_around(float(exponent), 0.03), r2=0.999)
    of_tokens = PowerLaw(
        coefficient=_about(1 / 6 / math.exp(level)), exponent=_around(1 - float(exponent), 0.03), r2=0.999
    )
    return SweepFit(
        points=len([row for row in rows if row.final_loss is not None]),
        approach2=Approach2(optima=optima, params=law, tokens=of_tokens, bias=0.012),
        approach3=Approach3(
            E=_around(E, 0.05),
            A=_about(A),
            B=_about(B),
            alpha=_around(ALPHA, 0.02),
            beta=_around(BETA, 0.02),
            objective=1e-5,
            r2=0.998,
            rmse_log=0.0012,
            starts=4500,
            bootstraps=1000,
            outliers=[Outlier(experiment_id=rows[-1].experiment_id, residual=0.01, robust_z=3.4)],
        ),
        predictions=[_prediction(approach, b) for b in (*BUDGETS, ASKED) for approach in (2, 3)],  # type: ignore[arg-type]
        warnings=["1e+19 FLOPs: extrapolated, the runs have 1e+15 to 1e+17; the intervals trust the law beyond them"],
    )


def _parabola(rows: list[SweepRow], budget: float) -> BudgetOptimum:
    own = _of(rows, budget)
    c, b, a = map(float, np.polyfit(np.log([row.model_size for row in own]), [_loss(row) for row in own], 2))
    vertex = -b / (2 * c)
    params = math.exp(vertex)
    return BudgetOptimum(
        budget=budget,
        points=len(own),
        params=params,
        tokens=budget / 6 / params,
        loss=a + b * vertex + c * vertex**2,
        curvature=c,
        coefficients=(a, b, c),
        r2=0.98,
        at_edge=False,
        usable=True,
        params_interval=(params / WIDE, params * WIDE),
    )


def _prediction(approach: Literal[2, 3], budget: float) -> Prediction:
    params, tokens = optimum(budget)
    return Prediction(
        approach=approach,
        budget=budget,
        params=_about(params),
        tokens=_about(tokens),
        tokens_per_param=_about(tokens / params),
        loss=_around(loss(params, tokens), 0.02),
        extrapolates=budget == ASKED,
    )


def _about(value: float) -> Estimate:
    return Estimate(value=value, low=value / WIDE, high=value * WIDE)


def _around(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)
