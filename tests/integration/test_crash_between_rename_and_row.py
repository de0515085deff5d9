"""Scenario 22 through the real trainer: killed when a checkpoint is on disk and its row is not."""

import asyncio
import sys
from pathlib import Path

import pytest

from helpers.store import Held, Store, held
from ops_backend.orphans import OrphanSweeper
from ops_contract.jobs import CheckpointEvery, Execution
from ops_contract.lifecycle import Outcome
from ops_contract.reports import ArtifactSaved, CheckpointSaved

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # pytest puts it there only when it collects unit tests
from training_child import Operation


def digits(root: Path) -> Operation:
    knobs = Execution(max_steps=9, checkpoint_every=CheckpointEvery(steps=3))
    return Operation(root, "digits", config={"channels": 2, "hidden": 8}, execution=knobs)


async def committed(store: Store, run: Held, operation: Operation, since: int) -> Held:
    """As the API has them: the rows of what was reported."""
    kinds = CheckpointSaved | ArtifactSaved
    return await store.report(run, *(report for report in operation.reports[since:] if isinstance(report, kinds)))


@pytest.mark.slow
async def test_the_orphan_goes_and_the_resume_is_exact(store: Store, tmp_path: Path) -> None:
    await store.worker(slots=2)
    run = await store.running()
    operation, undisturbed = digits(tmp_path), digits(tmp_path)
    operation.id = run.operation_id
    assert await asyncio.to_thread(operation.run, die_unreported=9) is None
    run = await committed(store, run, operation, 0)
    orphan = tmp_path / str(operation.id) / "1-9"
    assert orphan.exists()
    sweeper = OrphanSweeper(store.sessions, tmp_path, 1.0)
    await sweeper.sweep()
    assert orphan.exists(), "for all that the database knows, its attempt lives"

    await store.expire(run)
    await store.lose(run)
    await sweeper.sweep()

    assert not orphan.exists()
    claim, reported = await store.claim(), len(operation.reports)
    assert claim is not None
    assert claim.checkpoint is not None
    assert claim.checkpoint.step == operation.checkpoints[-1].step < 9
    assert await asyncio.to_thread(operation.run) is Outcome.COMPLETED
    await store.finish(await committed(store, held(claim), operation, reported), Outcome.COMPLETED)
    await sweeper.sweep()
    assert await asyncio.to_thread(undisturbed.run) is Outcome.COMPLETED
    assert operation.bits() == undisturbed.bits()
    assert operation.final_state() == undisturbed.final_state()
    rows = await store.fetch("SELECT path FROM checkpoints UNION SELECT path FROM artifacts")
    assert all((tmp_path / row.path).exists() for row in rows)
    assert "2-9-model" in {path.name for path in (tmp_path / str(operation.id)).iterdir()}
