"""The checker of histories has to see what a store without one of its guards does."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from chaos.cluster import Cluster, OwnPostgres, cluster_at
from helpers.databases import connect
from helpers.history import LATE, half_gangs, violations
from helpers.service import eventually
from helpers.store import Store, held
from ops_backend.store import webhooks
from ops_contract.lifecycle import Outcome

LONG = {"max_epochs": 400}
REPORTS, TRANSITIONS, CLAIMS = (f"ops_backend.store.{name}" for name in ("reports", "transitions", "claims"))


def zombie(cluster: Cluster) -> None:
    """An agent that is not heard any more, but whose reports arrive, works beside its successor."""
    id = cluster.submit(**LONG)
    cluster.until_step(id, 1)
    name = cluster.attempts(id)[0].worker
    cluster.proxy.weather.mute = lambda who, path: who == name and path.endswith("/heartbeat")
    cluster.until(id, lambda o: o.attempt == 2, "goes on elsewhere")
    eventually(lambda: cluster.query(LATE), "a report of the zombie is accepted", cluster.logs)


def resumed_while_running(cluster: Cluster) -> None:
    id = cluster.submit(**LONG)
    cluster.until_saved(id, 1)
    assert cluster.http.post(f"/operations/{id}/resume").status_code == 202


def cancelled_when_done(cluster: Cluster) -> None:
    id = completed(cluster)
    assert cluster.http.post(f"/operations/{id}/cancel").status_code == 202


def completed(cluster: Cluster) -> UUID:
    id = cluster.submit(max_epochs=1)
    return cluster.wait(id, "completed").id


def claimed_twice(cluster: Cluster) -> None:
    id = cluster.submit(**LONG)
    cluster.until(id, lambda o: o.attempt > 1, "is claimed while it runs")


# The guard and what is put in its place; what brings it out; what the checker then says.
MUTANTS: dict[str, tuple[list[str], Callable[[Cluster], object], str]] = {
    "a report counts after its attempt has ended": (
        [REPORTS, "ADVANCE", "AND ended_at IS NULL", ""],
        zombie,
        "accepted after its attempt had ended",
    ),
    "a finish leaves the hold alive": (
        [TRANSITIONS, "FINISH", "ended_at = now(), last_seq", "last_seq"],
        completed,
        "a slot is held",
    ),
    "resume takes anything": (
        [TRANSITIONS, "RESUME", "status IN ('failed', 'cancelled')", "true"],
        resumed_while_running,
        "is not in the table: resume",
    ),
    "cancel takes anything": (
        [TRANSITIONS, "REQUEST_CANCEL", "status IN ('pending', 'running', 'waiting')", "true"],
        cancelled_when_done,
        "is not in the table: cancel",
    ),
    "a claim leaves it for the next one": (
        [CLAIMS, "CLAIM", "SET status = 'running', attempt", "SET attempt"],
        claimed_twice,
        "began before attempt 1 had ended",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_it_sees_what_a_store_without_a_guard_does(own_postgres: OwnPostgres, tmp_path: Path, mutant: str) -> None:
    removed, provoke, said = MUTANTS[mutant]
    with cluster_at(tmp_path, own_postgres, seed=0, workers=2, mutant=removed) as cluster:
        provoke(cluster)
        found = asyncio.run(checked(cluster))

    assert any(said in violation for violation in found), found


async def test_an_end_that_is_announced_late_is_no_overlap(store: Store, database_url: str, tmp_path: Path) -> None:
    """Only who wrote an event counts: telling webhooks of it writes its row again."""
    await store.worker(user_code=True)
    run = await store.finish(await store.running(command=["true"], max_retries=0), Outcome.FAILED)
    await store.resume(run.operation_id)
    claim = await store.claim()
    assert claim is not None
    async with store.sessions.begin() as session:
        await webhooks.announce(session)
    await store.finish(held(claim), Outcome.COMPLETED)

    assert await store.fetch("SELECT seq FROM events WHERE announced")
    database = await connect(database_url)
    assert await violations(database, tmp_path) == []
    await database.close()


async def checked(cluster: Cluster) -> list[str]:
    database: asyncpg.Connection = await connect(cluster.database_url)
    try:
        return await violations(database, cluster.storage)
    finally:
        await database.close()


def test_it_sees_half_a_gang_and_a_rank_that_is_there_twice() -> None:
    def told(*held: tuple[int, int]) -> list[str]:
        operation = {"id": 1, "kind": "training", "job": '{"execution": {"devices": 3}}'}
        holds = [{"operation_id": 1, "attempt": 1, "first_rank": first, "ranks": ranks} for first, ranks in held]
        return half_gangs([operation], holds)

    assert told((0, 2), (2, 1)) == told((2, 1), (0, 2)) == []
    for wrong in ([(0, 2)], [(0, 2), (1, 2)], [(0, 2), (2, 2)]):
        assert len(told(*wrong)) == 1
