"""The oldest Postgres that `OPS_DATABASE_URL` may name: every statement runs there too."""

from collections.abc import Iterator

import pytest

from helpers.databases import POSTGRES_15, Databases, debian_postgres
from helpers.store import Store, at_once, held, losses, saved, started
from ops_backend.database import Sessions
from ops_backend.store import catalog, curves, lists, queries
from ops_contract.lifecycle import Outcome, Status


@pytest.fixture
def postgres_15() -> Iterator[str]:
    if not POSTGRES_15.exists():
        pytest.skip("no Postgres 15 here (apt install postgresql-15)")
    with debian_postgres() as server:
        yield f"postgresql+asyncpg://relight@/postgres?host={server.home}"


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
        page = await lists.list_page(session, lists.Filter(q="toy"), 10, None)
        assert [item.status for item in page.items] == ["completed"]
        assert (await curves.read(session, run.operation_id, "loss")).points == [(0, 1.0)]
        assert len((await queries.checkpoints(session, run.operation_id)).items) == 2
        assert len((await queries.attempts(session, run.operation_id)).items) == 4
        assert len((await catalog.workers(session, 60.0)).items) == 1
    await sessions.dispose()
