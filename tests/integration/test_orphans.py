"""Directories that a crash left without a row: which go, and which stay."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from helpers.store import Held, Store, held, saved
from ops_backend import orphans
from ops_backend.orphans import OrphanSweeper
from ops_contract.lifecycle import Outcome, Phase
from ops_contract.reports import ArtifactSaved


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    root = tmp_path / "storage"
    root.mkdir()
    return root


@pytest.fixture
async def run(store: Store) -> Held:
    await store.worker(slots=4)
    return await store.running()


def make(storage: Path, operation: object, *names: str) -> None:
    for name in names:
        (storage / str(operation) / name).mkdir(parents=True)
        (storage / str(operation) / name / "state.json").write_text("{}")


def left(storage: Path, operation: object) -> set[str]:
    return {path.name for path in (storage / str(operation)).iterdir()}


def everything(storage: Path) -> list[Path]:
    return sorted(storage.rglob("*"))


def artifact(run: Held, step: int) -> ArtifactSaved:
    path = f"{run.operation_id}/{run.attempt}-{step}-model/model.safetensors"
    return ArtifactSaved(
        artifact_id=uuid4(), name="model.safetensors", step=step, path=path, size_bytes=1, sha256="0" * 64
    )


async def sweep(store: Store, storage: Path, limit: int = 1000) -> None:
    await OrphanSweeper(store.sessions, storage, 1.0, limit).sweep()


async def test_directories_without_a_row_go_when_their_attempt_has_ended(
    store: Store, run: Held, storage: Path
) -> None:
    """Scenario 22."""
    rowless = ["1-5", "1-7-evaluate", "1-9.tmp", "1-8-model", "1-8-model.tmp"]
    make(storage, run.operation_id, "1-0", "1-4-evaluate", "1-6-model", *rowless)
    evaluating = saved(run, 4, phase=Phase.EVALUATE)
    run = await store.report(run, saved(run, 0), evaluating, artifact(run, 6))
    await sweep(store, storage)
    assert len(left(storage, run.operation_id)) == 8, "a live attempt publishes first, and reports later"

    await store.finish(run, Outcome.FAILED)
    await asyncio.gather(sweep(store, storage), sweep(store, storage))

    assert left(storage, run.operation_id) == {"1-0", "1-4-evaluate", "1-6-model"}


async def test_files_that_a_job_keeps_stay_as_long_as_one_of_them_has_a_row(
    store: Store, run: Held, storage: Path
) -> None:
    """Another attempt may have replaced some of them; the output directory is nobody's but the program's."""
    make(storage, run.operation_id, "1-5-files", "1-55-files", "1-6-files.tmp", "1-6-finish", "output")
    kept = artifact(run, 5).model_copy(
        update={"name": "files/out/a b.txt", "path": f"{run.operation_id}/1-5-files/out/a b.txt"}
    )
    run = await store.finish(await store.report(run, kept), Outcome.FAILED)

    await sweep(store, storage)

    assert left(storage, run.operation_id) == {"1-5-files", "output"}


@pytest.mark.parametrize("status", ["corrupt", "deleting"])
async def test_a_row_of_any_status_keeps_its_files(store: Store, run: Held, storage: Path, status: str) -> None:
    make(storage, run.operation_id, "1-0")
    run = await store.finish(await store.report(run, saved(run, 0)), Outcome.FAILED)
    await store.execute("UPDATE checkpoints SET status = :status", status=status)

    await sweep(store, storage)

    assert left(storage, run.operation_id) == {"1-0"}


async def test_only_the_ended_attempts_of_an_operation_are_swept(store: Store, run: Held, storage: Path) -> None:
    make(storage, run.operation_id, "1-5", "2-5", "2-6.tmp", "3-5")
    await store.expire(run)
    await store.lose(run)
    claim = await store.claim()
    assert claim is not None
    assert held(claim).attempt == 2

    await sweep(store, storage)

    assert left(storage, run.operation_id) == {"2-5", "2-6.tmp", "3-5"}


async def test_names_that_are_not_ours_are_not_touched(store: Store, run: Held, storage: Path, tmp_path: Path) -> None:
    names = ["logs", "1-5.bak", "1-x", "01-5", "1-5-evaluate-model", "-5", "1-", "1-5 ", "1-5-model.tmp.tmp"]
    make(storage, run.operation_id, *names)
    (storage / str(run.operation_id) / "1-6").write_text("a file")
    make(tmp_path, "elsewhere", "1-5")
    (storage / str(run.operation_id) / "1-7").symlink_to(tmp_path / "elsewhere" / "1-5")
    make(storage, uuid4(), "1-5")
    make(storage, "notes", "1-5")
    linked = await store.running()
    (storage / str(linked.operation_id)).symlink_to(tmp_path / "elsewhere")
    for attempt in (run, linked):
        await store.finish(attempt, Outcome.FAILED)
    before = everything(storage)

    await sweep(store, storage)

    assert everything(storage) == before
    assert left(tmp_path, "elsewhere") == {"1-5"}


async def test_a_storage_that_is_not_there_is_an_error_that_changes_nothing(store: Store, storage: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await sweep(store, storage / "not mounted")

    assert everything(storage) == []


async def test_every_operation_comes_up_however_many_there_are(store: Store, run: Held, storage: Path) -> None:
    runs = [run, *[await store.running() for _ in range(3)]]
    for one in runs:
        make(storage, one.operation_id, "1-5")
        await store.finish(one, Outcome.FAILED)
    sweeper = OrphanSweeper(store.sessions, storage, 1.0, limit=3)

    await sweeper.sweep()
    assert sum(bool(left(storage, one.operation_id)) for one in runs) == 1
    await sweeper.sweep()
    assert sum(bool(left(storage, one.operation_id)) for one in runs) == 0
    make(storage, min(str(one.operation_id) for one in runs), "1-5")
    await sweeper.sweep()

    assert not any(left(storage, one.operation_id) for one in runs)


async def test_what_is_published_reported_and_ended_while_the_sweep_looks_stays(
    store: Store, run: Held, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(storage, run.operation_id, "1-0")
    listing = orphans.published_in

    def then_all_happens(*arguments: Any) -> Any:
        found = listing(*arguments)
        asyncio.run_coroutine_threadsafe(report_and_end(), loop).result()
        return found

    async def report_and_end() -> None:
        await store.finish(await store.report(run, saved(run, 0)), Outcome.FAILED)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(orphans, "published_in", then_all_happens)

    await sweep(store, storage)

    assert left(storage, run.operation_id) == {"1-0"}


async def test_the_model_that_a_dead_attempt_left_gives_way_to_its_successors(
    store: Store, run: Held, storage: Path
) -> None:
    """Killed between the model and the finish."""
    make(storage, run.operation_id, "1-9-model", "2-9-model")
    run = await store.report(run, saved(run, 9), artifact(run, 9))
    await store.expire(run)
    await store.lose(run)
    await sweep(store, storage)
    assert left(storage, run.operation_id) == {"1-9-model", "2-9-model"}
    claim = await store.claim()
    assert claim is not None
    again = held(claim)

    await store.finish(await store.report(again, artifact(again, 9)), Outcome.COMPLETED)
    await sweep(store, storage)

    assert left(storage, run.operation_id) == {"2-9-model"}
    assert [row.path for row in await store.fetch("SELECT path FROM artifacts")] == [artifact(again, 9).path]
