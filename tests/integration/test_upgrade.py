"""A database of an older version comes up with all that it had; one of a newer version is left as it is."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.databases import Databases, connect
from helpers.store import Store
from ops_backend.database import Sessions, migrate
from ops_backend.store import curves, lists, queries
from ops_backend.store.transitions import lose_if_expired
from ops_contract.agents import WorkloadOffer
from ops_contract.lifecycle import Status

DATA = Path(__file__).parent / "data"


async def old_database(databases: Databases, revision: str) -> str:
    """As that version left it."""
    url = await databases.empty()
    await migrate(url, revision)
    connection = await connect(url)
    # As it was dumped: tables that refer to each other, in any order.
    await connection.execute("SET session_replication_role = replica")
    await connection.execute((DATA / f"schema-{revision}.sql").read_text())
    await connection.close()
    return url


# The later one has given up the checkpoints before the last.
@pytest.mark.parametrize(("revision", "steps"), [("0001", [0, 48, 96]), ("0013", [96])])
async def test_what_an_older_version_left_is_all_there_and_what_ran_goes_on(
    revision: str, steps: list[int], databases: Databases
) -> None:
    url = await old_database(databases, revision)

    await migrate(url)

    sessions = Sessions(url, 2)
    store = Store(sessions)
    async with sessions.begin() as session:
        page = await lists.list_page(session, lists.Filter(), 10, None)
        ran, done = page.items
        assert [(o.name, o.status) for o in (ran, done)] == [("halfway", "running"), ("done", "completed")]
        loss = (await curves.read(session, done.id, "loss")).points
        assert [step for step, _ in loss] == list(range(96))
        assert len((await curves.read(session, done.id, "val_loss")).points) == 2
        checkpoints = (await queries.checkpoints(session, ran.id)).items
        assert [c.step for c in checkpoints if c.in_lineage] == steps
        assert [e.name for e in (await queries.events(session, done.id, 0)).items][-1] == "complete"
    [attempt] = await store.attempts(ran.id)
    await store.execute("UPDATE holds SET lease_expires_at = now() - interval '1 s'")
    async with sessions.begin() as session:
        assert await lose_if_expired(session, ran.id, attempt.number) is Status.PENDING
    await store.worker("new", workloads=[WorkloadOffer(name="digits", config_schema={"type": "object"})])
    claim = await store.claim()
    assert claim is not None
    assert claim.checkpoint is not None
    assert (claim.operation_id, claim.attempt, claim.checkpoint.step) == (ran.id, 2, 96)
    await sessions.dispose()


async def test_a_newer_schema_is_refused_with_what_to_do_and_stays_as_it_is(
    databases: Databases, tmp_path: Path
) -> None:
    url = await databases.fresh()
    connection = await connect(url)
    await connection.execute("UPDATE alembic_version SET version_num = '9999'")

    refused = await asyncio.to_thread(serve, url, tmp_path)

    assert refused.returncode == 1
    assert "9999 was made by a newer Relight" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert await connection.fetchval("SELECT version_num FROM alembic_version") == "9999"
    await connection.close()


def serve(url: str, storage: Path) -> subprocess.CompletedProcess[str]:
    settings = {"OPS_DATABASE_URL": url, "OPS_API_TOKEN": "x" * 16, "OPS_STORAGE_ROOT": str(storage), "OPS_PORT": "0"}
    command = [sys.executable, "-m", "ops_backend", "server"]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=60)
