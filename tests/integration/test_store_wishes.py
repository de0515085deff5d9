"""A claim costs what there are of different wishes, not of operations that wait, and no wish is taken for another."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import text

from helpers.store import LEASE_S, TOY, Store
from ops_backend.store import claims, gauges
from ops_backend.tables import WISH

# Jobs of which no two fit the same slots, or not with the same ranks: each differs from the first in one thing.
WISHES: list[dict[str, Any]] = [
    {},
    {"resources": {"cores": 2}},
    {"execution": {"accelerator": "cpu"}},
    {"execution": {"threads": 1}},
    {"execution": {"devices": 2, "batch_size": 4}},
    {"execution": {"devices": 2, "batch_size": 4}, "resources": {"nodes": 1}},
    {"env": {"A": "1"}},
]


async def wishes(store: Store) -> list[str]:
    return [row.wish for row in await store.fetch(f"SELECT {WISH} AS wish FROM operations")]


async def test_every_wish_is_told_from_the_others_and_what_decides_nothing_is_none(store: Store) -> None:
    for host in ("a", "b"):
        await store.worker(host, host=host, user_code=True, slots=2, cores=2, slot={"port": 40_000})
    for spec in WISHES:
        await store.submit(**spec)
    await store.execute("""
        INSERT INTO operations (id, name, kind, workload, job, labels, priority, max_retries, submitted_by, status)
        SELECT gen_random_uuid(), 'x', other.kind, other.workload, job, '{}', 0, 0, 'me', 'pending'
          FROM (SELECT job FROM operations ORDER BY created_at LIMIT 1) first,
               (VALUES ('study', 'toy'), ('training', 'other'), ('training', 'a:B'), ('measurement', 'toy'))
                   AS other (kind, workload)
    """)
    different = len(WISHES) + 4
    assert len(set(await wishes(store))) == different
    await store.submit(name="another", labels={"a": "b"}, priority=3)
    assert len(set(await wishes(store))) == different


async def queue_of(store: Store, number: int, cores: int) -> None:
    """So many that wait, all of different jobs."""
    await store.submit()
    # As if the worker that had so many were long gone.
    await store.execute(
        "UPDATE operations SET job = jsonb_set(job, '{resources,cores}', to_jsonb(CAST(:n AS int)))", n=cores
    )
    await store.execute(
        """
        INSERT INTO operations (id, name, kind, workload, job, labels, priority, max_retries, submitted_by, status,
                                event_seq)
        SELECT gen_random_uuid(), 'x', kind, workload, jsonb_set(job, '{config}', jsonb_build_object('number', n)),
               '{}', 0, 0, 'me', 'pending', 1
          FROM operations, generate_series(2, CAST(:number AS int)) n
        """,
        number=number,
    )


# One with statistics, one whose queue has grown since they were made.
@pytest.mark.parametrize("analyzed", [True, False])
async def test_what_fits_nothing_is_looked_at_once_for_each_wish(store: Store, analyzed: bool) -> None:
    await store.worker(slots=20)
    await queue_of(store, 2000, cores=2)
    if analyzed:
        await store.execute("ANALYZE operations")
    assert await store.claim() is None
    assert await rows_read(store, claims.CLAIM.text, "operations", lease_s=LEASE_S) < 20
    fits = await store.submit()
    claim = await store.claim()
    assert claim is not None
    assert claim.operation_id == fits


async def test_the_oldest_that_waits_is_found_without_the_events_of_all(store: Store) -> None:
    await store.worker()
    await queue_of(store, 500, cores=1)
    assert await rows_read(store, gauges.OPERATIONS.text, "events") == 0


async def test_the_first_one_due_of_a_wish_goes_though_an_earlier_one_rests(store: Store) -> None:
    await store.worker()
    resting, due = await store.submit(), await store.submit()
    await store.execute("UPDATE operations SET not_before = now() + interval '1 h' WHERE id = :id", id=resting)
    claim = await store.claim()
    assert claim is not None
    assert claim.operation_id == due


async def rows_read(store: Store, sql: str, table: str, **values: Any) -> int:
    """Of a table, those that a filter drops included."""
    [[plans]] = await store.fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", **values)
    nodes, read = [plans[0]["Plan"]], 0
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if node.get("Relation Name") == table:
            read += round((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
    return read


async def test_a_worker_that_offers_what_is_known_waits_for_no_other_that_registers(store: Store) -> None:
    await store.worker()
    changed = TOY.model_copy(update={"title": "Another title"})
    async with store.sessions.begin() as session:
        await session.execute(text("SELECT FROM workloads FOR UPDATE"))
        async with asyncio.timeout(20):  # what does not wait takes none of it
            await store.worker()
    await store.worker(workloads=[changed])
    assert [row.title for row in await store.fetch("SELECT title FROM workloads")] == ["Another title"]
