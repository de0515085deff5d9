"""Sweeps whose law is known: Chinchilla's, as Hoffmann et al. 2022 have it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ops_studies.runs import Run

ALPHA, BETA, A, B, E = 0.34, 0.28, 406.4, 410.7, 1.69
EXPONENT = BETA / (ALPHA + BETA)  # of N_opt
BUDGETS = tuple(np.geomspace(1e18, 3e21, 8))


def optimal_params(flops: float) -> float:
    """With 6 FLOPs a parameter and token."""
    return float((ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** EXPONENT)


def loss(params: float, tokens: float) -> float:
    return float(E + A / params**ALPHA + B / tokens**BETA)


def run(params: float, flops: float, k: float = 6.0, m: float = 1.0) -> Run:
    """C = k·N^m·D."""
    tokens = flops / (k * params**m)
    return Run(f"{flops:.3g}-{params:.3g}", params, tokens, flops, loss(params, tokens), flops)


def centred(budgets: Sequence[float] = BUDGETS, sizes: int = 16, factor: float = 32, off: float = 1) -> list[Run]:
    """Sizes from 1/factor to factor times the optimum of their budget, or `off` times that."""
    spread = np.geomspace(1 / factor, factor, sizes) * off
    return [run(optimal_params(budget) * each, budget) for budget in budgets for each in spread]


def same_sizes(budgets: Sequence[float] = BUDGETS, sizes: int = 16) -> list[Run]:
    """Under every budget, from the smallest optimum to the largest."""
    params = np.geomspace(optimal_params(budgets[0]), optimal_params(budgets[-1]), sizes)
    return [run(each, budget) for budget in budgets for each in params]


def noisy(runs: Sequence[Run], share: float, seed: int) -> list[Run]:
    """Losses times exp(share · a standard normal number)."""
    factors = np.exp(share * np.random.default_rng(seed).standard_normal(len(runs)))
    return [replace(each, loss=each.loss * float(factor)) for each, factor in zip(runs, factors, strict=True)]
