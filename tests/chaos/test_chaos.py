"""Seeded faults beside users who submit, cancel, resume and fork; then the history is checked, and the curves.

`make chaos SEED=… FAULTS=…` plays the same schedule of faults again; who wins a race, no seed decides.
"""

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from chaos.cluster import Cluster, OwnPostgres, cluster_at
from chaos.machine import Machine
from chaos.schedule import DECK, SPACING_S, schedule
from chaos.users import User
from helpers.databases import connect
from helpers.history import violations

MINUTES = float(os.environ.get("MINUTES") or 0)
FAULTS = int(os.environ.get("FAULTS") or MINUTES * 60 / SPACING_S) or sum(number for number, _ in DECK.values())
# The one that is part of every test run has no time for studies.
LONG = sum(number for number, _ in DECK.values()) < FAULTS
EXECUTION = {"max_epochs": 6, "learning_rate": 0.01, "checkpoint_every": {"steps": 20}, "checkpoint_save_top_k": 4}
JOBS: list[dict[str, Any]] = [
    {"workload": "digits", "execution": EXECUTION | {"seed": 1}},
    {"workload": "digits", "execution": EXECUTION | {"seed": 2, "accumulate_grad_batches": 2, "max_epochs": 9}},
]
# Three ranks on two workers: at two the order of a sum hides.
GANGS: list[dict[str, Any]] = [
    {"workload": "digits", "execution": EXECUTION | {"seed": 3, "devices": 3, "batch_size": 30, "max_epochs": 3}},
]
if LONG:
    GANGS.append({"workload": "digits", "execution": EXECUTION | {"seed": 4, "devices": 2, "strategy": "fsdp"}})
SPOILT = ("checkpoint_corrupt", "checkpoint_missing")
# Its children are the same jobs, under a study.
STUDY: dict[str, Any] = {
    "workload": "digits",
    "execution": EXECUTION,
    "study": {
        "type": "grid",
        "experiments": [
            {f"execution.{name}": value for name, value in job["execution"].items() if EXECUTION.get(name) != value}
            for job in JOBS
        ],
    },
}
ATTEMPTS_OF_GANGS = """
    SELECT outcome, count(*) FROM attempts a JOIN operations o ON o.id = a.operation_id
     WHERE (o.job->'execution'->>'devices')::int > 1 GROUP BY outcome ORDER BY outcome
"""


@pytest.mark.timeout(300 + FAULTS * 10)
def test_nothing_is_lost_stuck_or_counted_twice(own_postgres: OwnPostgres, tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(2**32))
    print(f"SEED={seed} FAULTS={FAULTS}", flush=True)
    began_s = time.monotonic()
    with cluster_at(tmp_path, own_postgres, seed, workers=2) as cluster:
        machine = Machine(cluster)
        golden = {job["execution"]["seed"]: cluster.client.submit(job).id for job in (*JOBS, *GANGS)}
        machine.settle()
        curves = {number: cluster.curves(id) for number, id in golden.items()}
        jobs = [*JOBS, *GANGS, *([STUDY] if LONG else [])]
        users = [User(cluster, f"user-{n}", seed, jobs) for n in (1, 2)]
        if LONG:
            cluster.client.submit(STUDY)  # one at least, whatever they choose
        # Those no user ends, nor any number of kills: whatever they do, one of each that was hit is compared.
        survivors = [cluster.client.submit({**job, "max_retries": 1000}).id for job in (GANGS[0], JOBS[1])]
        for user in users:
            user.start()
        print(f"ready after {time.monotonic() - began_s:.0f} s")
        machine.play(schedule(seed, FAULTS))
        for user in users:
            user.leave()
        machine.heal()
        settled = machine.settle()
        # Three attempts in a row that were lost without a new checkpoint are given up, by design.
        given_up = [id for id in survivors if settled[id] == "failed" and cluster.client.get(id).error.code == "lost"]
        for id in given_up:
            cluster.client.resume(id)
        settled = machine.settle() if given_up else settled
        # One whose only checkpoint the machine has spoilt has nothing to go on from, and says so.
        ended = {id: cluster.client.get(id).error for id in survivors if settled[id] != "completed"}
        without = {id for id, error in ended.items() if error and error.code in SPOILT and str(id) in spoilt(machine)}
        orphans = cluster.orphans()
        print(f"settled after {time.monotonic() - began_s:.0f} s: {Counter(settled.values())}")
        completed = [id for id, status in settled.items() if status == "completed"]
        other = [told for id in completed if (told := differs(cluster, id, curves))] + abandoned(cluster, machine)
        models = cluster.query(
            "SELECT DISTINCT job->'execution'->>'seed', sha256 FROM artifacts JOIN operations o "
            "ON o.id = operation_id WHERE o.status = 'completed'"
        )
        gangs = cluster.query(ATTEMPTS_OF_GANGS)
        found, seen = asyncio.run(checked(cluster, machine.damaged))
    summary(machine, cluster, users)
    print(f"attempts of gangs: {dict(gangs)}")

    complaints = [complaint for user in users for complaint in user.complaints]
    wrong = [*found, *other, *orphans, *cluster.proxy.failures, *complaints, *cluster.unexpected()]
    assert not wrong, "\n".join([f"SEED={seed}", *map(str, wrong)])
    assert len(models) == len(golden), f"the same job gave other weights: SEED={seed}"
    assert ended.keys() <= without, f"they did not survive: {ended}; SEED={seed}"
    assert all(seen.values()), f"the checker is blind to: {[what for what, said in seen.items() if not said]}"


def test_a_seed_gives_the_same_schedule_and_each_kind_comes_in_each_deck() -> None:
    faults = schedule(7, FAULTS)

    assert faults == schedule(7, FAULTS) != schedule(8, FAULTS)
    assert {fault.kind for fault in schedule(7, sum(number for number, _ in DECK.values()))} == set(DECK)


def differs(cluster: Cluster, id: UUID, golden: dict[int, dict[str, list[tuple[int, float]]]]) -> str | None:
    """A fork goes on where its parent was: its curve is the end of the undisturbed one, bit for bit."""
    operation, curves = cluster.get(id), cluster.curves(id)
    if operation.kind == "study":
        return None  # its children are among the others, and the history says that all of them have completed
    first = operation.forked_from.step if operation.forked_from else 0
    expected = golden[operation.job.execution.seed]
    if curves["loss"][0][0] != first:
        return f"{id} begins at step {curves['loss'][0][0]}, not at {first}"
    for name, points in expected.items():
        # A fork at the very end of an epoch may have the evaluation of its parent's last step as its first.
        tail = points[len(points) - len(curves.get(name, [])) :]
        if curves.get(name, []) != tail or len(tail) < len([p for p in points if p[0] >= first]):
            return f"{name} of {id} (from step {first}) is not that of the undisturbed run"
    return None


def abandoned(cluster: Cluster, machine: Machine) -> list[str]:
    """What cannot be resumed though it had a checkpoint, and nobody had spoilt one of it or of its parent."""
    rows = cluster.query("""
        SELECT o.id, o.status, c.operation_id AS parent FROM operations o
          LEFT JOIN checkpoints c ON c.id = o.forked_from_checkpoint_id
         WHERE o.status <> 'completed' AND (o.forked_from_checkpoint_id IS NOT NULL OR EXISTS (
               SELECT FROM holds h WHERE h.operation_id = o.id AND h.checkpoint_step IS NOT NULL))
    """)
    by_machine = spoilt(machine)
    return [f"{r['id']} stays {r['status']}" for r in rows if not {str(r["id"]), str(r["parent"])} & by_machine]


def spoilt(machine: Machine) -> set[str]:
    """The operations of the checkpoints that the machine has damaged."""
    return {path.split("/")[0] for path in machine.damaged}


async def checked(cluster: Cluster, damaged: set[str]) -> tuple[list[str], dict[str, bool]]:
    database = await connect(cluster.database_url)
    try:
        found = await violations(database, cluster.storage, damaged)
        return found, await tampered(database, cluster.storage, damaged)
    finally:
        await database.close()


def summary(machine: Machine, cluster: Cluster, users: list[User]) -> None:
    print(f"{sum(machine.done.values())} faults: {dict(sorted(machine.done.items()))}")
    print(f"missed: {dict(sorted(machine.missed.items()))}")
    print(f"network: {dict(sorted(cluster.proxy.hits.items()))}; checkpoints spoilt: {len(machine.damaged)}")
    print(f"users: {dict(sorted(sum((user.answers for user in users), Counter()).items()))}")


TAMPERINGS = {
    "a lost event": "DELETE FROM events WHERE name = 'claim' AND attempt = 1",
    "a transition that is none": "UPDATE events SET name = 'resume' WHERE name = 'complete'",
    "a slot that is held by the dead": "UPDATE holds SET ended_at = NULL",
    "an operation that is stuck": "UPDATE operations SET status = 'running' WHERE status = 'completed'",
    "a metric that was lost": "DELETE FROM metrics WHERE name = 'loss' AND first_step = 0",
    "two attempts at once": "UPDATE attempts SET ended_at = ended_at + interval '1 hour'",
    "a gang that is half there": "DELETE FROM holds WHERE first_rank > 0",
    "output over output": """INSERT INTO logs (operation_id, attempt, start, stored, data)
        SELECT operation_id, number, n, n, 'ab' FROM attempts, (VALUES (2^40), (2^40 + 1)) v(n) WHERE number = 1""",
    "a checkpoint that does not load": "UPDATE checkpoints SET manifest_sha256 = repeat('0', 64)",
    "a good checkpoint that is called corrupt": "UPDATE checkpoints SET status = 'corrupt'",
}


if LONG:
    TAMPERINGS |= {
        "a study that completed without a child": "UPDATE operations SET status = 'failed' WHERE parent_id IS NOT NULL",
        "a child that was made twice": "UPDATE operations SET child_key = id::text WHERE parent_id IS NOT NULL",
    }


async def tampered(database: asyncpg.Connection, storage: Path, damaged: set[str]) -> dict[str, bool]:
    """Whether the checker sees each of these in a history that was all right; nothing of it stays."""
    seen = {}
    for what, sql in TAMPERINGS.items():
        transaction = database.transaction()
        await transaction.start()
        await database.execute(sql)
        seen[what] = bool(await violations(database, storage, damaged))
        await transaction.rollback()
    return seen
