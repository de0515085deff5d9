"""The replay check on real trainings: one that keeps the promise, and one that is secretly not pure."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from helpers.store import Held, Store, held
from ops_contract.agents import StartTraining
from ops_contract.lifecycle import Outcome
from ops_contract.pipe import Mark
from ops_contract.reports import CheckpointSaved, Progress, Report
from relight.training.attempt import Attempt, Site
from relight.workload import MapDataset, Workload


class NoConfig(BaseModel):
    pass


class Pure(Workload[NoConfig]):
    Config = NoConfig

    def data(self) -> tuple[MapDataset, MapDataset | None]:
        return list(torch.arange(48.0).reshape(12, 4) / 48), None  # type: ignore[return-value]

    def data_digest(self) -> str:
        return "numbers"

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch).square().mean(), {}


class Impure(Pure):
    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        noise = int.from_bytes(os.urandom(4)) / 2**32
        return model(batch + noise).square().mean(), {}


class Reports(list[Report]):
    def report(self, report: Report) -> None:
        self.append(report)

    def progress(self, progress: Progress) -> None: ...

    def mark(self, mark: Mark) -> None: ...


pytestmark = pytest.mark.usefixtures("numerics_given_back")


async def trained(store: Store, root: Path, workload: type[Pure]) -> tuple[Held, list[Report]]:
    """The next attempt, and all that its training told."""
    claim = await store.claim()
    assert claim is not None
    start = StartTraining(
        incarnation=claim.members[0].incarnation,
        operation_id=claim.operation_id,
        attempt=claim.attempt,
        slots=[0],
        deadline_s=60,
        job=claim.job,
        checkpoint=claim.checkpoint,
    )
    reports = Reports()
    assert Attempt(workload, start, Site(root, "cpu", 1), reports, lambda: None).run() is Outcome.COMPLETED
    return held(claim), reports


@pytest.mark.parametrize(("workload", "differing", "events"), [(Pure, 0, 0), (Impure, 4, 1)])
async def test_a_workload_that_is_secretly_not_pure_is_seen(
    store: Store, tmp_path: Path, workload: type[Pure], differing: int, events: int
) -> None:
    await store.worker()
    execution: dict[str, Any] = {"batch_size": 2, "checkpoint_every": {"steps": 2}}
    id = await store.submit(execution=execution)
    first, reports = await trained(store, tmp_path, workload)
    # Killed after its sixth step, when the second checkpoint was the newest that had been committed.
    told = [r for r in reports if not isinstance(r, CheckpointSaved) or r.step <= 2]
    await store.finish(await store.report(first, *told), Outcome.PREEMPTED)

    second, reports = await trained(store, tmp_path, workload)
    await store.report(second, *reports)

    check = (await store.attempts(id))[1].replay
    assert check is not None
    assert (check.compared, check.differing) == (12, differing)  # loss, learning rate and epoch of steps 2 to 5
    found = await store.fetch("SELECT detail FROM events WHERE name = 'replay_diverged'")
    assert [(detail["name"], detail["step"]) for (detail,) in found] == [("loss", 2)] * events
