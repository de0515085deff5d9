"""What a dashboard polls stays bounded with a million points and ten thousand operations: counted, not timed."""

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest.mock import patch
from uuid import UUID

import httpx
from sqlalchemy import event
from test_api import serving

from helpers.databases import Databases, connect
from ops_backend.database import Sessions
from ops_backend.store import curves, lists, polls
from ops_backend.store.sql import statement
from ops_contract.lifecycle import Status

ID = UUID(int=1)

# The first operation is the one whose metrics are read; rows of a hundred points, as a training reports them.
FILL = """
    INSERT INTO workers (incarnation, name, host, url, secret, workloads, versions)
    VALUES ('{id}', 'w', 'h', 'http://127.0.0.1:1', '', '{{}}', '{{}}');
    INSERT INTO operations (id, name, kind, workload, job, labels, priority, max_retries, submitted_by, status, attempt,
                            created_at)
    SELECT CAST(lpad(to_hex(n), 32, '0') AS uuid), 'run ' || n, 'training', 'toy',
           '{{"kind": "training", "workload": "toy", "config": {{}}, "execution": {{}}}}',
           jsonb_build_object('team', CAST(n % 7 AS text)), 0, 0, 'operator',
           CASE n % 5 WHEN 0 THEN 'failed' ELSE 'running' END, 1, now() - n * interval '1 s'
      FROM generate_series(1, {operations}) n;
    INSERT INTO attempts (operation_id, number, incarnation, start_step) SELECT id, 1, '{id}', 0 FROM operations;
    INSERT INTO holds (operation_id, attempt, incarnation, lease_expires_at, progress)
    SELECT id, 1, '{id}', now() + interval '1 day', '{{"step": 7}}' FROM operations;
    INSERT INTO metrics (operation_id, attempt, seq, name, first_step, steps, values)
    SELECT '{id}', 1, n, 'loss', n * 100, (SELECT array_agg(n * 100 + i) FROM generate_series(0, 99) i),
           array_fill(CAST(0.5 AS float8), ARRAY[99]) || CAST(n AS float8)
      FROM generate_series(CAST(0 AS bigint), {rows} - 1) n;
    INSERT INTO metrics (operation_id, attempt, seq, name, first_step, steps, values)
    SELECT '{id}', 1, n, name, n * 100, ARRAY[n * 100], ARRAY[0.5]
      FROM generate_series(CAST(0 AS bigint), {rows} - 1) n, unnest(ARRAY['epoch', 'val_loss']) name;
    ANALYZE;
"""

KILOBYTE = 1000
# What is asked, and the most that it may weigh.
READS = {
    "/operations": 30 * KILOBYTE,
    "/operations?limit=500": 300 * KILOBYTE,
    "/operations?q=run 99": 30 * KILOBYTE,
    "/operations?q=0000000": 30 * KILOBYTE,
    "/operations?status=failed": 30 * KILOBYTE,
    "/operations?label=team=3&workload=toy&mine=true": 30 * KILOBYTE,
    "/operations?label=nobody": 30 * KILOBYTE,
    f"/operations/{ID}": 3 * KILOBYTE,
    f"/operations/{ID}/metrics": KILOBYTE,
    f"/operations/{ID}/metrics?name=loss": 30 * curves.PAGE_POINTS,
    f"/operations/{ID}/metrics?name=loss&max_points=1000": 30 * 1000,
    f"/operations/{ID}/metrics?name=loss&max_points=1000&after_step=500": 30 * 1000,
    f"/operations/{ID}/metrics?name=loss&max_points=1000&after_step=500&until_step=600": 30 * 100,
    "/counts": KILOBYTE,
    f"/operations/{ID}/attempts": KILOBYTE,
}


@asynccontextmanager
async def filled(databases: Databases, operations: int, rows: int) -> AsyncIterator[tuple[str, httpx.AsyncClient]]:
    url = await databases.fresh()
    connection = await connect(url)
    await connection.execute(FILL.format(id=ID, operations=operations, rows=rows))
    await connection.close()
    async with serving(url) as api:
        yield url, api


@contextmanager
def statements(api: httpx.AsyncClient) -> Iterator[list[str]]:
    """Those that requests send."""
    engine = api._transport.app.state.sessions._engine.sync_engine  # type: ignore[attr-defined]
    sent: list[str] = []

    def note(connection: object, cursor: object, sql: str, *_: object) -> None:
        sent.append(sql)

    real = polls.rows

    async def of_the_driver(driver: Any, ids: list[UUID]) -> Any:
        sent.append("a poll's")
        return await real(driver, ids)

    event.listen(engine, "before_cursor_execute", note)
    with patch.object(polls, "rows", of_the_driver):
        yield sent
    event.remove(engine, "before_cursor_execute", note)


async def test_reads_of_a_million_points_and_ten_thousand_operations_cost_what_those_of_a_few_do(
    databases: Databases,
) -> None:
    counts: list[dict[str, int]] = []
    for operations, rows in ((3, 3), (10_000, 10_000)):
        async with filled(databases, operations, rows) as (url, api):
            counts.append({})
            for path, limit_bytes in READS.items():
                with statements(api) as sent:
                    answer = await api.get(path)
                assert answer.status_code == 200, answer.text
                assert len(answer.content) <= limit_bytes, path
                counts[-1][path] = len(sent)
    assert counts[0] == counts[1]
    assert set(counts[0].values()) <= {1, 2}
    await check_what_a_page_and_a_drawing_have(url)
    await check_plans(url)


async def check_what_a_page_and_a_drawing_have(url: str) -> None:
    async with serving(url) as api:
        path = f"/operations/{ID}/metrics?name=loss"
        page = (await api.get(path)).json()
        drawn = (await api.get(f"{path}&max_points=1000")).json()
        [late] = (await api.get(f"{path}&after_step=999998")).json()["points"]
        nothing = (await api.get(f"{path}&max_points=1000&cursor={drawn['cursor']}")).json()["points"]
        listed = [(await api.get("/operations?limit=50")).json()]
        while len(listed) < 4:
            listed.append((await api.get(f"/operations?limit=50&cursor={listed[-1]['next_cursor']}")).json())
    assert (len(page["points"]), page["more"]) == (curves.PAGE_POINTS, True)
    assert late == [999_999, 9999.0]
    assert 600 < len(drawn["points"]) <= 1000
    assert (drawn["points"][0], drawn["points"][-1]) == ([0, 0.5], late)
    assert nothing == []
    assert [item["name"] for page in listed for item in page["items"]] == [f"run {n}" for n in range(1, 201)]


async def check_plans(url: str) -> None:
    """No name is found by reading its rows, and no list by sorting all operations."""
    newest = {"cursor_at": "infinity", "cursor_id": UUID(int=2**128 - 1), "limit": 51}
    frequent = ({}, {"q": "run"}, {"label_key": "team"}, {"workload": "toy"})
    rare = ({"workload": "no"}, {"submitted_by": "no"}, {"label_key": "no"}, {"label_key": "team", "label_value": "no"})
    for narrowed in (*frequent, *rare):
        read = await scanned(url, lists.list_of(frozenset(), frozenset(narrowed)), newest | narrowed)
        assert read.get("operations", 0) < 200, narrowed
    for status in (Status.RUNNING, Status.CANCELLING, Status.CANCELLED):
        read = await scanned(url, lists.list_of(frozenset({status}), frozenset()), newest)
        assert read.get("operations", 0) < 200, status
    assert (await scanned(url, curves.SUMMARIES, {"id": ID, "last_steps": [2**63 - 1]}))["metrics"] < 50


async def scanned(url: str, query: Any, values: dict[str, Any]) -> dict[str, int]:
    """Rows that it reads of each table, those that a filter drops included."""
    sessions = Sessions(url, pool_size=1)
    async with sessions.begin() as session:
        [explained] = await session.scalar(statement(f"EXPLAIN (ANALYZE, FORMAT JSON) {query.text}"), values)
    await sessions.dispose()
    read: Counter[str] = Counter()
    nodes = [explained["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        read[node.get("Relation Name", "")] += round(rows * node["Actual Loops"])
    return read
