"""`relight.find_optimal`, and `relight.optimal:Named`, which is what it trains, by names: for `ops sweep run`."""

from relight.optimal.workload import Named

__all__ = ["Named"]
