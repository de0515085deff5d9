"""The oldest Postgres that `OPS_DATABASE_URL` may name: every statement runs there too."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.databases import Databases
from helpers.store import Store, at_once, held, losses, saved, started
from ops_backend.database import Sessions
from ops_backend.store import curves, queries
from ops_contract.lifecycle import Outcome, Status

BIN = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture
def postgres_15() -> Iterator[str]:
    """A server on a socket of its own. Postgres refuses to be root, so root lends it to the package's user."""
    if not (BIN / "postgres").exists():
        pytest.skip("no Postgres 15 here (apt install postgresql-15)")
    user = "postgres" if os.geteuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="pg15-"))
    try:
        if user:
            shutil.chown(home, user)
        initdb = [BIN / "initdb", "-D", home / "data", "-U", "relight", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, user=user, check=True, capture_output=True, cwd=home)
        flags = ["-D", home / "data", "-k", home, "-c", "listen_addresses=", "-c", "fsync=off"]
        with subprocess.Popen(
            [BIN / "postgres", *flags], user=user, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as server:
            assert server.stdout is not None
            assert any("ready to accept connections" in line for line in server.stdout)
            yield f"postgresql+asyncpg://relight@/postgres?host={home}"
            server.terminate()
            server.communicate()
    finally:
        shutil.rmtree(home)


async def test_the_store_runs_on_postgres_15(postgres_15: str) -> None:
    sessions = Sessions(await Databases(postgres_15).fresh(), pool_size=8)
    store = Store(sessions)
    worker = await store.worker()
    run = await store.running()
    run = await store.report(run, started(), losses((0, 1.0)), saved(run, 0), saved(run, 1))
    assert (await store.heartbeat(worker, run)).ended == []
    await store.expire(run)
    assert await store.tick() is True
    await store.execute("UPDATE service SET grace_until = NULL")
    assert sorted(await at_once(*(store.lose(run) for _ in range(4))), key=str)[-1] is Status.PENDING
    claim = await store.claim()
    assert claim is not None
    assert await store.refuse(claim) == "pending"
    claim = await store.claim()
    assert claim is not None
    assert await store.cancel(run.operation_id) is not None
    await store.finish(held(claim), Outcome.CANCELLED)
    assert await store.resume(run.operation_id) is not None
    claim = await store.claim()
    assert claim is not None
    await store.finish(held(claim), Outcome.COMPLETED)

    async with store.sessions.begin() as session:
        page = await queries.list_page(session, queries.Filter(q="toy"), 10, None)
        assert [item.status for item in page.items] == ["completed"]
        assert (await curves.read(session, run.operation_id, "loss")).points == [(0, 1.0)]
        assert len((await queries.checkpoints(session, run.operation_id)).items) == 2
        assert len((await queries.attempts(session, run.operation_id)).items) == 4
        assert len((await queries.workers(session, 60.0)).items) == 1
    await sessions.dispose()
