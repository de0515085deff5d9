"""Polls of a status: as fresh as a query each, and few queries however many poll."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from helpers.postgres_proxy import PostgresProxy, postgres_proxy
from helpers.store import Store, losses, saved, started
from ops_backend import status_reads
from ops_backend.database import Drivers, Limits
from ops_backend.status_reads import READERS, StatusReads
from ops_backend.store import polls
from ops_backend.tags import Tagged
from ops_contract.doctor import Health
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.operations import Operation
from ops_contract.reports import Progress


@pytest.fixture
async def drivers(database_url: str) -> AsyncIterator[Drivers]:
    drivers = Drivers(database_url, READERS)
    yield drivers
    await drivers.dispose()


@pytest.fixture
async def reads(store: Store, drivers: Drivers) -> AsyncIterator[StatusReads]:
    await store.worker()
    reads = StatusReads(drivers)
    yield reads
    await reads.close()


@pytest.fixture
def queried(monkeypatch: pytest.MonkeyPatch) -> list[list[UUID]]:
    """The ids of every query that was sent."""
    real, sent = polls.rows, list[list[UUID]]()

    async def counting(driver: Any, ids: list[UUID]) -> Any:
        sent.append(ids)
        return await real(driver, ids)

    monkeypatch.setattr(polls, "rows", counting)
    return sent


def shown(body: Tagged) -> Operation:
    return Operation.model_validate_json(body.answer(None).body)


async def test_a_read_that_begins_after_a_commit_sees_it_whoever_else_reads(store: Store, reads: StatusReads) -> None:
    ids = [await store.submit() for _ in range(8)]
    committed, over = dict.fromkeys(ids, 0), asyncio.Event()

    async def write(id: UUID) -> None:
        for priority in range(1, 20):
            await store.execute("UPDATE operations SET priority = :n WHERE id = :id", n=priority, id=id)
            committed[id] = priority
            assert shown(await reads.get(id)).priority == priority, "a query was under way"

    async def poll(id: UUID) -> int:
        seen = 0
        while not over.is_set():
            at_least = committed[id]
            assert shown(await reads.get(id)).priority >= at_least
            seen += 1
        return seen

    polls = [asyncio.create_task(poll(ids[n % len(ids)])) for n in range(300)]
    await asyncio.gather(*(write(id) for id in ids))
    over.set()
    assert min(await asyncio.gather(*polls)) > 0
    assert [shown(await reads.get(id)).priority for id in ids] == [19] * len(ids)


async def test_every_column_of_json_is_known_as_such(drivers: Drivers) -> None:
    async with drivers.connection() as driver:
        columns = (await driver.prepare(polls.STATEMENT)).get_attributes()

    assert {column.name for column in columns if column.type.name in ("json", "jsonb")} == polls.JSON_COLUMNS


async def test_two_hundred_reads_of_twenty_operations_are_one_query(
    store: Store, reads: StatusReads, queried: list[list[UUID]]
) -> None:
    ids = [await store.submit() for _ in range(20)]

    answers = await asyncio.gather(*(reads.get(ids[n % 20]) for n in range(200)))

    assert [shown(answer).id for answer in answers] == [ids[n % 20] for n in range(200)]
    assert [len(sent) for sent in queried] == [20]


async def test_a_query_has_a_bounded_number_of_ids(
    store: Store, reads: StatusReads, queried: list[list[UUID]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_reads, "IDS_A_QUERY", 8)
    monkeypatch.setattr(status_reads, "BODIES_KEPT", 8)
    ids = [await store.submit() for _ in range(20)]

    answers = await asyncio.gather(*(reads.get(id) for id in ids))

    assert [shown(answer).id for answer in answers] == ids
    assert [len(sent) for sent in queried] == [8, 8, 4]
    assert len(reads._bodies) == 8


async def test_who_comes_while_a_query_is_under_way_waits_for_the_next(
    store: Store, reads: StatusReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, other = await store.submit(), await store.submit()
    real, answered, go = polls.rows, asyncio.Event(), asyncio.Event()

    async def held(driver: Any, ids: list[UUID]) -> Any:
        rows = await real(driver, ids)
        answered.set()
        await go.wait()
        return rows

    monkeypatch.setattr(polls, "rows", held)
    early = asyncio.create_task(reads.get(id))
    await answered.wait()
    await store.cancel(id)
    late = [asyncio.create_task(reads.get(read)) for read in (id, other, id)]
    await asyncio.sleep(0)
    go.set()

    assert shown(await early).status == "pending"
    assert [shown(await read).status for read in late] == ["cancelled", "pending", "cancelled"]


async def test_an_id_that_is_not_there_has_its_own_404_among_those_that_are(store: Store, reads: StatusReads) -> None:
    known, unknown = await store.submit(), uuid4()

    found, missing, again = await asyncio.gather(
        *(reads.get(id) for id in (known, unknown, known)), return_exceptions=True
    )

    assert isinstance(found, Tagged)
    assert found is again
    assert isinstance(missing, OpsError)
    assert (missing.code, str(unknown) in missing.message) == (ErrorCode.NOT_FOUND, True)


async def test_a_row_that_cannot_be_shown_fails_its_own_readers_only(store: Store, reads: StatusReads) -> None:
    good, bad = await store.submit(), await store.submit()
    await store.execute("UPDATE operations SET job = '{\"execution\": {}}' WHERE id = :id", id=bad)

    broken, found = await asyncio.gather(reads.get(bad), reads.get(good), return_exceptions=True)

    assert isinstance(found, Tagged)
    assert isinstance(broken, ValueError)


async def test_a_reader_who_goes_away_disturbs_nobody(store: Store, reads: StatusReads) -> None:
    id = await store.submit()
    waiting = [asyncio.create_task(reads.get(id)) for _ in range(9)]
    await asyncio.sleep(0)
    for gone in waiting[::3]:
        gone.cancel()

    answers = await asyncio.gather(*waiting, return_exceptions=True)

    assert [isinstance(answer, Tagged) for answer in answers] == [n % 3 > 0 for n in range(9)]
    assert shown(await reads.get(id)).id == id


async def test_the_tag_changes_with_the_operation_and_with_nothing_else(
    store: Store, drivers: Drivers, reads: StatusReads
) -> None:
    run = await store.running()
    tags = [(await reads.get(run.operation_id)).tag]
    for batch, step in (([started()], None), ([losses((0, 1.0)), saved(run, 1)], 1), ([losses((1, 0.5))], 2)):
        progress = None if step is None else Progress(step=step)
        run = await store.report(run, *batch, progress=progress)
        tags.append((await reads.get(run.operation_id)).tag)
        fresh = StatusReads(drivers)  # that has nothing kept
        assert (await fresh.get(run.operation_id)).tag == (await reads.get(run.operation_id)).tag == tags[-1]
        await fresh.close()
    assert len(set(tags)) == len(tags)


async def test_a_database_that_is_away_is_told_to_all_who_wait_and_forgotten_when_it_is_back(
    store: Store, database_url: str
) -> None:
    await store.worker()
    ids = [await store.submit() for _ in range(3)]
    async with through_proxy(database_url) as (proxy, reads):
        assert shown(await reads.get(ids[0])).id == ids[0]
        proxy.running.clear()
        refused = await asyncio.gather(*(reads.get(id) for id in ids * 5), return_exceptions=True)
        proxy.running.set()

        assert {type(answer) for answer in refused} == {TimeoutError}
        assert [shown(await reads.get(id)).id for id in ids] == ids


async def test_a_connection_that_died_after_it_had_served_costs_nobody_an_answer(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_reads, "TURN_S", 60.0)
    monkeypatch.setattr(status_reads, "LINGER_S", 60.0)
    await store.worker()
    ids = [await store.submit() for _ in range(3)]
    async with through_proxy(database_url) as (proxy, reads):
        await reads.get(ids[0])
        proxy.cut_all()

        answers = await asyncio.gather(*(reads.get(id) for id in ids * 5))

    assert [shown(answer).id for answer in answers] == ids * 5


@asynccontextmanager
async def through_proxy(database_url: str) -> AsyncIterator[tuple[PostgresProxy, StatusReads]]:
    with tempfile.TemporaryDirectory(prefix="pg") as directory:
        async with postgres_proxy(database_url, Path(directory)) as (proxy, url):
            drivers = Drivers(url, READERS, Limits(wait_s=0.5, transaction_s=0.5))
            reads = StatusReads(drivers)
            yield proxy, reads
            await reads.close()
            await drivers.dispose()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('"a,b", W/{tag} ,"c"', 304),
        ("*", 304),
        ('"other"', 200),
        ("", 200),
        ("unquoted", 200),
    ],
)
def test_if_none_match_is_read_as_the_rfc_says(sent: str, status: int) -> None:
    body = Tagged(Health(status="ok", version="1"))

    answer = body.answer(sent.replace("{tag}", body.tag))

    assert (answer.status_code, answer.headers["ETag"]) == (status, body.tag)
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.body == (b"" if status == 304 else body.answer(None).body)
