"""The files of operations that have ended, written from the rows of a real Postgres."""

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import yaml

from helpers.store import Held, Store, held, losses, saved, started
from ops_backend import exporter, storage
from ops_backend.exporter import Exporter
from ops_backend.store.log_files import read_if_unlogged
from ops_contract.jobs import Job
from ops_contract.lifecycle import Outcome
from ops_contract.operations import Operation


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "storage"
    root.mkdir()
    return root


@pytest.fixture
def export(store: Store, root: Path) -> Callable[[], Awaitable[None]]:
    """One turn of a backend's exporter."""
    return Exporter(store.sessions, root, 1.0).export


async def running(store: Store, **execution: Any) -> Held:
    await store.worker()
    return await store.running(execution=execution)


async def cancelled(store: Store, run: Held) -> Held:
    await store.cancel(run.operation_id)
    return await store.finish(run, Outcome.CANCELLED)


async def resumed(store: Store, run: Held, checkpoint: Any = None) -> Held:
    assert await store.resume(run.operation_id, checkpoint)
    claim = await store.claim()
    assert claim is not None
    return held(claim)


def logs_of(root: Path, run: Held) -> Path:
    return root / str(run.operation_id) / "logs"


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def metrics(root: Path, run: Held) -> list[str]:
    return (logs_of(root, run) / "metrics.csv").read_text().splitlines()


async def is_written(store: Store, run: Held) -> bool:
    return (await store.get(run.operation_id)).logs == f"{run.operation_id}/logs"


async def test_they_are_written_when_the_operation_has_ended_and_not_before(
    store: Store, root: Path, export: Any
) -> None:
    run = await running(store, seed=7)
    run = await store.report(run, started(), losses((0, 0.5), (1, 0.25)), losses((0, 0.0), (1, 0.0), name="epoch"))
    await export()
    assert (listed(root), await is_written(store, run)) == ([], False)

    await store.finish(run, Outcome.COMPLETED)
    await export()

    operation: Operation = await store.get(run.operation_id)
    assert operation.logs == f"{run.operation_id}/logs"
    assert listed(logs_of(root, run)) == ["hparams.yaml", "metrics.csv"]
    assert metrics(root, run) == ["epoch,step,loss", "0,0,0.5", "0,1,0.25"]
    assert Job.model_validate(yaml.safe_load((logs_of(root, run) / "hparams.yaml").read_text())) == operation.job


async def test_they_are_written_once(store: Store, root: Path, export: Any) -> None:
    run = await cancelled(store, await running(store))
    await export()
    before = {path.name: path.stat().st_ino for path in logs_of(root, run).iterdir()}

    await export()

    assert {path.name: path.stat().st_ino for path in logs_of(root, run).iterdir()} == before


async def test_an_operation_that_never_ran_still_has_its_hparams(store: Store, root: Path, export: Any) -> None:
    await store.worker()
    id = await store.submit()
    await store.cancel(id)
    await export()
    assert yaml.safe_load((root / str(id) / "logs" / "hparams.yaml").read_text())["workload"] == "toy"


async def test_who_wants_none_gets_none(store: Store, root: Path, export: Any) -> None:
    run = await cancelled(store, await running(store, logger="none"))
    await export()
    assert listed(root) == []
    assert (await store.get(run.operation_id)).logs is None
    assert await unwritten(store) == 0


async def unwritten(store: Store) -> int:
    [row] = await store.fetch("SELECT count(*) AS n FROM operations WHERE logged_event_seq IS DISTINCT FROM event_seq")
    return int(row.n)


async def test_tensorboard_has_one_event_file_also_after_a_resume(store: Store, root: Path, export: Any) -> None:
    run = await running(store, logger="tensorboard")
    run = await store.report(run, started(), saved(run, 0), losses((0, 0.5)))
    run = await cancelled(store, run)
    await export()
    run = await resumed(store, run)
    run = await store.report(run, started(), losses((0, 0.5), (1, 0.25)))
    await cancelled(store, run)
    await export()
    [events, hparams] = sorted(logs_of(root, run).iterdir())
    assert events.name.startswith("events.out.tfevents.")
    assert hparams.name == "hparams.yaml"
    assert events.read_bytes().count(b"loss") == 2


async def test_a_resume_from_an_old_checkpoint_leaves_each_step_once(store: Store, root: Path, export: Any) -> None:
    """Scenario 26; and before it ends again nothing says that the files are of its newest end."""
    run = await running(store)
    old = saved(run, 1)
    points = [(0, 0.5), (1, 0.4), (2, 0.3)]
    run = await store.report(run, started(), losses(points[0]), old, losses(*points[1:]), saved(run, 3))
    run = await cancelled(store, run)
    await export()
    assert len(metrics(root, run)) == 4

    run = await resumed(store, run, old.checkpoint_id)
    assert not await is_written(store, run)
    run = await store.report(run, started(1), losses((1, 0.41)))
    run = await cancelled(store, run)
    await export()

    assert metrics(root, run) == ["epoch,step,loss", ",0,0.5", ",1,0.41"]
    assert await is_written(store, run)


async def test_what_a_crash_left_between_file_and_row_is_written_again(
    store: Store, root: Path, export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(Exception):
        pass

    def dies_after(*arguments: Any) -> None:
        storage.show_logs(*arguments)
        raise Died

    run = await cancelled(store, await running(store))
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "show_logs", dies_after)
        with pytest.raises(Died):
            await export()
    assert not await is_written(store, run)
    (logs_of(root, run) / "metrics.csv").write_text("older")

    await export()

    assert await is_written(store, run)
    assert metrics(root, run) == ["epoch,step"]


async def test_an_operation_that_moves_meanwhile_keeps_the_files_it_had(
    store: Store, root: Path, export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that was slow must not put an older end in the place of a newer one."""
    run = await running(store)
    run = await store.report(run, started(), saved(run, 0), losses((0, 0.5)))
    run = await cancelled(store, run)
    writing, may_go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(*arguments: Any) -> None:
        storage.write_logs(*arguments)
        loop.call_soon_threadsafe(writing.set)
        asyncio.run_coroutine_threadsafe(may_go_on.wait(), loop).result()

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "write_logs", slow)
        slow_export = asyncio.create_task(export())
        await writing.wait()
    run = await resumed(store, run)
    run = await store.report(run, started(), losses((0, 0.5), (1, 0.25)))
    run = await cancelled(store, run)
    may_go_on.set()
    await slow_export
    assert not (logs_of(root, run) / "metrics.csv").exists()
    assert not await is_written(store, run)

    await export()

    assert metrics(root, run) == ["epoch,step,loss", ",0,0.5", ",1,0.25"]


async def test_of_two_backends_one_writes(store: Store, root: Path) -> None:
    run = await cancelled(store, await running(store))
    async with store.sessions.begin() as one, store.sessions.begin() as other:
        assert await read_if_unlogged(one, run.operation_id) is not None
        assert await read_if_unlogged(other, run.operation_id) is None


async def test_a_root_that_is_not_mounted_is_said_once_and_waited_for(
    store: Store, root: Path, export: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = await cancelled(store, await running(store))
    await store.cancel(await store.submit())
    os.rmdir(root)
    with caplog.at_level(logging.WARNING, "ops_backend.exporter"):
        await export()
        await export()
    [line] = caplog.messages
    assert "No such file or directory" in line
    assert str(root) in line
    assert not await is_written(store, run)

    os.mkdir(root)
    await export()
    assert await is_written(store, run)


async def test_a_full_disk_leaves_the_old_files_whole_and_is_tried_again(
    store: Store, root: Path, export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await running(store)
    run = await store.report(run, started(), saved(run, 0), losses((0, 0.5)))
    run = await cancelled(store, run)
    await export()
    run = await cancelled(store, await resumed(store, run))
    before = {path.name: path.read_bytes() for path in logs_of(root, run).iterdir()}

    def full(ended: Any) -> dict[str, Any]:
        return {"metrics.csv": no_room}

    def no_room(out: BinaryIO) -> None:
        out.write(b"epoch,")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "files", full)
        await export()
    assert {path.name: path.read_bytes() for path in logs_of(root, run).iterdir()} == before
    assert not await is_written(store, run)

    await export()
    assert await is_written(store, run)


@pytest.mark.parametrize("place", ["operation", "logs"])
async def test_no_link_is_followed_out_of_the_root_and_others_are_written(
    store: Store, root: Path, export: Any, tmp_path: Path, place: str
) -> None:
    ended = []
    for _ in range(2):
        ended.append(await cancelled(store, await running(store)))
    [linked, other] = ended
    outside = tmp_path / "outside"
    outside.mkdir()
    link = logs_of(root, linked) if place == "logs" else logs_of(root, linked).parent
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)

    await export()

    assert list(outside.iterdir()) == []
    assert [await is_written(store, run) for run in (linked, other)] == [False, True]


async def test_a_link_in_the_place_of_a_file_is_replaced_not_written_through(
    store: Store, root: Path, export: Any, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("keep")
    run = await cancelled(store, await running(store))
    logs_of(root, run).mkdir(parents=True)
    for name in ("metrics.csv", ".metrics.csv.tmp"):
        (logs_of(root, run) / name).symlink_to(mine)

    await export()

    assert mine.read_text() == "keep"
    assert metrics(root, run) == ["epoch,step"]


async def test_those_that_cannot_be_written_do_not_stand_in_the_way_of_the_others(
    store: Store, root: Path, export: Any
) -> None:
    """A turn takes twenty; these are more."""
    await store.worker(slots=1)
    ids = [await store.submit() for _ in range(25)]
    for id in ids:
        await store.cancel(id)
    for id in sorted(ids)[:20]:
        (root / str(id)).write_text("not a directory")

    await export()
    await export()

    written = [id for id in ids if (await store.get(id)).logs]
    assert sorted(written) == sorted(ids)[20:]
