"""What starts workers where none runs: a cluster's scheduler, behind four calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from ops_contract.wire import Wire


class EngineAway(Exception):
    """It does not answer: whether it did what it was asked is not known."""


class EngineRefused(Exception):
    """It said no, in its own words, and did nothing."""


class Stage(StrEnum):
    """Where a job of an engine stands, whatever the engine calls it."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


class EngineRequest(Wire):
    """One worker on each of so many nodes. `cores` and `gpus` are of a node; `slots` of its CPU."""

    nodes: int = 1
    slots: int = 1
    gpus: int = 0
    cores: int = 1


@dataclass(frozen=True)
class EngineJob:
    """`state` and `reason` are the engine's own words."""

    external_id: str
    stage: Stage
    state: str
    reason: str | None = None


class Engine(Protocol):
    """Every call raises EngineAway; `submit` raises EngineRefused too."""

    name: str
    title: str

    async def submit(self, name: str, request: EngineRequest) -> str:
        """Its id of a new job of this name."""
        ...

    async def poll(self, names: Sequence[str]) -> dict[str, EngineJob]:
        """Of the jobs of these names those that it knows."""
        ...

    async def kill(self, external_id: str) -> None:
        """In order: its workers are asked to end first. Of a job that has ended it does nothing."""
        ...
