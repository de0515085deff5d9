"""What runs in a user's environment. Names load on first use: a client needs no torch, a workload no httpx."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relight.async_client import AsyncClient
    from relight.client import Client
    from relight.command_reports import report
    from relight.measuring import measure
    from relight.optimal.search import find_optimal
    from relight.run import Run
    from relight.workload import Env, LoopControl, LoopWorkload, Workload

__all__ = [
    "AsyncClient",
    "Client",
    "Env",
    "LoopControl",
    "LoopWorkload",
    "Run",
    "Workload",
    "find_optimal",
    "measure",
    "report",
]

_HOMES = {
    "AsyncClient": "relight.async_client",
    "Client": "relight.client",
    "Env": "relight.workload",
    "LoopControl": "relight.workload",
    "LoopWorkload": "relight.workload",
    "Run": "relight.run",
    "Workload": "relight.workload",
    "find_optimal": "relight.optimal.search",
    "measure": "relight.measuring",
    "report": "relight.command_reports",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
