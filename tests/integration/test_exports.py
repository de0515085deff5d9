"""`GET …/export` over real rows: the exporter's own files, at any time, and nothing left behind."""

import asyncio
import errno
import os
import struct
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import AsyncMock

import httpx
import pytest
from test_downloads import TOKEN, over_a_socket

from helpers.store import Held, Store, held, losses, saved, started
from ops_backend.app import create_app
from ops_backend.dispatcher import Dispatcher
from ops_backend.exporter import Exporter
from ops_backend.routes import exports
from ops_backend.settings import Settings
from ops_contract.lifecycle import Outcome
from ops_contract.reports import Metrics, Series
from relight.client import Client

AWKWARD = [float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, 0.1]


@pytest.fixture
async def api(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setattr(Dispatcher, "_claim_all", AsyncMock())  # the tests claim by themselves
    monkeypatch.setattr(Exporter, "run", AsyncMock())  # and export
    app = create_app(Settings(database_url=database_url, api_token=TOKEN, storage_root=tmp_path))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test/api/v1", headers=headers) as client,
    ):
        yield client


async def running(store: Store, **execution: Any) -> Held:
    await store.worker()
    return await store.running(execution=execution)


async def resumed_from_the_middle(store: Store, logger: str) -> Held:
    """Two attempts; the first went further than where the second goes on."""
    run = await running(store, logger=logger)
    middle = saved(run, 2)
    run = await store.report(run, started(), losses((0, 0.5), (1, 0.4)), middle, losses((2, 9.0), (3, 9.0)))
    await store.cancel(run.operation_id)
    await store.finish(run, Outcome.CANCELLED)
    assert await store.resume(run.operation_id, middle.checkpoint_id)
    claim = await store.claim()
    assert claim is not None
    awkward = Metrics(series=[Series.of("val,loss", list(enumerate(AWKWARD, start=2)))])
    return await store.report(held(claim), started(2), losses((2, 0.3)), awkward)


@pytest.mark.parametrize(("logger", "pattern"), [("csv", "metrics.csv"), ("tensorboard", "events.out.tfevents.*")])
async def test_it_is_byte_for_byte_the_file_that_the_ended_operation_leaves(
    api: httpx.AsyncClient, store: Store, tmp_path: Path, logger: str, pattern: str
) -> None:
    run = await resumed_from_the_middle(store, logger)
    url = f"/operations/{run.operation_id}/export"
    early = await api.get(url, params={"format": logger})
    await store.finish(run, Outcome.COMPLETED)
    await Exporter(store.sessions, tmp_path, 1.0).export()
    [file] = (tmp_path / str(run.operation_id) / "logs").glob(pattern)

    answer = await api.get(url, params={"format": logger})

    assert answer.status_code == 200
    assert answer.content == file.read_bytes() == early.content
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{file.name}"'
    assert answer.headers["Content-Length"] == str(len(answer.content))


async def test_a_running_operation_gives_each_step_of_its_lineage_once_and_every_bit(
    api: httpx.AsyncClient, store: Store
) -> None:
    run = await resumed_from_the_middle(store, "none")

    text = (await api.get(f"/operations/{run.operation_id}/export")).text

    header, *rows = [line.split(",") for line in text.replace('"val,loss"', "val").splitlines()]
    assert header == ["epoch", "step", "loss", "val"]
    assert [(row[1], row[2]) for row in rows[:3]] == [("0", "0.5"), ("1", "0.4"), ("2", "0.3")]
    assert [struct.pack("d", float(row[3])) for row in rows[2:]] == [struct.pack("d", value) for value in AWKWARD]


async def test_what_has_not_begun_has_a_header_only(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    assert (await api.get(f"/operations/{await store.submit()}/export")).text == "epoch,step\n"


async def test_refusals_say_what_there_is(api: httpx.AsyncClient, store: Store) -> None:
    run = await running(store)
    unknown = await api.get("/operations/00000000-0000-4000-8000-000000000000/export")
    wrong = await api.get(f"/operations/{run.operation_id}/export", params={"format": "parquet"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "invalid")
    assert "format" in wrong.text
    assert "'csv' or 'tensorboard'" in wrong.text


def nameless_files() -> set[str]:
    """Those that this process has open."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if target.endswith("(deleted)"):
            found.add(target)
    return found


async def test_a_full_disk_is_said_and_leaves_nothing(
    api: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await running(store)
    before = nameless_files()

    def no_room(out: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exports, "points", lambda recorded, logger: ("metrics.csv", no_room))
    answer = await api.get(f"/operations/{run.operation_id}/export")

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "TMPDIR" in answer.json()["error"]["message"]
    assert nameless_files() <= before


async def test_a_few_are_made_at_a_time_and_the_event_loop_goes_on(
    api: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await running(store)
    url = f"/operations/{run.operation_id}/export"
    writing, may_end = threading.Semaphore(0), threading.Event()

    def slow(out: BinaryIO) -> None:
        writing.release()
        assert may_end.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(exports, "points", lambda recorded, logger: ("metrics.csv", slow))
        two = [asyncio.create_task(api.get(url)) for _ in range(2)]
        for _ in two:
            assert await asyncio.to_thread(writing.acquire, timeout=60)
        patch.setattr(exports, "WAIT_S", 0.01)
        third = await api.get(url)
        may_end.set()
        done = await asyncio.gather(*two)

    assert (third.status_code, third.json()["error"]["code"]) == (503, "unavailable")
    assert [answer.status_code for answer in done] == [200, 200]
    assert (await api.get(url)).status_code == 200


async def test_a_client_that_goes_away_leaves_no_file(
    store: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await running(store)
    monkeypatch.setattr(Dispatcher, "_claim_all", AsyncMock())
    monkeypatch.setattr(
        exports, "points", lambda recorded, logger: ("metrics.csv", lambda out: out.truncate(50_000_000))
    )
    before, closed = nameless_files(), threading.Event()
    answer = exports.FileOnce.__call__

    async def told(self: exports.FileOnce, *scope: Any) -> None:
        try:
            await answer(self, *scope)
        finally:
            closed.set()

    monkeypatch.setattr(exports.FileOnce, "__call__", told)

    def leave_in_the_middle(url: str) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        path = f"{url}/api/v1/operations/{run.operation_id}/export"
        with httpx.Client() as client, client.stream("GET", path, headers=headers) as response:
            chunks = response.iter_raw()  # let go of, it would close the connection
            next(chunks)
            assert response.status_code == 200
            assert nameless_files() - before

    with over_a_socket(database_url, tmp_path) as url:
        await asyncio.to_thread(leave_in_the_middle, url)
        assert await asyncio.to_thread(closed.wait, 60)
        assert nameless_files() <= before


async def test_the_client_puts_it_in_place_whole(
    store: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await resumed_from_the_middle(store, "csv")
    monkeypatch.setattr(Dispatcher, "_claim_all", AsyncMock())
    here = tmp_path / "here"

    def twice(url: str) -> list[Path]:
        with Client(url, TOKEN) as client:
            formats = ("csv", "tensorboard", "csv", "tensorboard")
            return [client.export(run.operation_id, format, here) for format in formats]

    with over_a_socket(database_url, tmp_path) as url:
        table, events, *again = await asyncio.to_thread(twice, url)

    assert again == [table, events]
    assert table.read_text().startswith("epoch,step,loss,")
    assert events.name.startswith("events.out.tfevents.")
    assert sorted(path for path in here.rglob("*") if path.is_file()) == sorted([table, events])
