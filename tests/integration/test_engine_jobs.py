"""Jobs of a scheduler as rows: how many, on whose behalf, and what a crash between two steps leaves."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from helpers.store import LEASE_S, Store, held, saved, started
from integration.conftest import TOKEN
from ops_backend.engines import EngineAway, EngineJob, EngineRefused, EngineRequest, Stage
from ops_backend.engines.requests import elastic
from ops_backend.provisioner import Provisioner
from ops_backend.settings import Settings
from ops_backend.store import engine_jobs
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Outcome


class FakeEngine:
    """A scheduler that keeps its jobs by name; `fails` is raised by the next submission, which happened if `had`."""

    name, title = "slurm", "Slurm"

    def __init__(self) -> None:
        self.jobs: dict[str, EngineJob] = {}
        self.requests: list[EngineRequest] = []
        self.killed: list[str] = []
        self.fails: Exception | None = None
        self.had = True
        self.away = False
        self.forgets = False

    async def submit(self, name: str, request: EngineRequest) -> str:
        await asyncio.sleep(0)
        self.requests.append(request)
        if self.fails is None or self.had:
            self.jobs[name] = EngineJob(str(len(self.requests)), Stage.PENDING, "PENDING", "Resources")
        if self.fails is not None:
            failure, self.fails = self.fails, None
            raise failure
        return self.jobs[name].external_id

    async def poll(self, names: Sequence[str]) -> dict[str, EngineJob]:
        if self.away:
            raise EngineAway("no route to slurmctld")
        return {} if self.forgets else {name: self.jobs[name] for name in names if name in self.jobs}

    async def kill(self, external_id: str) -> None:
        self.killed.append(external_id)
        self.become(external_id, Stage.ENDED, "CANCELLED")

    def become(self, external_id: str, stage: Stage, state: str, reason: str | None = None) -> None:
        for name, job in self.jobs.items():
            if job.external_id == external_id:
                self.jobs[name] = EngineJob(external_id, stage, state, reason)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def settings(directory: Path, **changes: Any) -> Settings:
    token = directory / "token"
    token.touch(0o600)
    given = {
        "database_url": "postgresql://x/y", "api_token": "a token of the tests", "storage_root": directory,
        "api_url": "http://api", "slurm_max_jobs": 2, "slurm_after_s": 0.0, "slurm_token_file": token,
        "slurm_cores": 1, "lease_s": LEASE_S,
    }  # fmt: skip
    return Settings.model_validate(given | changes)


def provisioner(
    store: Store, engine: FakeEngine, directory: Path, adopt_s: float = 60.0, **changes: Any
) -> Provisioner:
    return Provisioner(store.sessions, engine, settings(directory, **changes), adopt_s=adopt_s)


@pytest.fixture
async def known(store: Store) -> None:
    """Somebody has offered the workload, and is gone."""
    gone = await store.worker()
    await store.execute("UPDATE workers SET last_seen_at = now() - interval '1 day' WHERE incarnation = :id", id=gone)


@pytest.fixture
def loop(store: Store, engine: FakeEngine, tmp_path: Path, known: None) -> Provisioner:
    return provisioner(store, engine, tmp_path)


async def rows(store: Store) -> list[tuple[Any, ...]]:
    sql = "SELECT operation_id, external_id, state FROM engine_jobs ORDER BY created_at, external_id"
    return [tuple(row) for row in await store.fetch(sql)]


async def notes(store: Store, id: UUID) -> list[str]:
    sql = "SELECT detail->>'message' AS said FROM events WHERE operation_id = :id AND name = 'note' ORDER BY seq"
    return [row.said for row in await store.fetch(sql, id=id)]


async def come(store: Store, external_id: str) -> UUID:
    return await store.worker(f"slurm-{external_id}-n1")


async def test_one_job_an_operation_and_no_more_than_allowed(
    store: Store, engine: FakeEngine, loop: Provisioner
) -> None:
    ids = [await store.submit() for _ in range(3)]

    for _ in range(3):
        await loop.look()

    assert await rows(store) == [(ids[0], "1", "submitted"), (ids[1], "2", "submitted")]
    operation = await store.get(ids[0])
    assert operation.engine is not None
    assert (operation.engine.job, operation.engine.state, operation.engine.reason) == ("1", "PENDING", "Resources")
    assert await notes(store, ids[0]) == ["Slurm was asked for a worker: job 1, 1 node of 1 cores"]
    assert (await store.get(ids[2])).engine is None


async def test_several_backends_at_once_ask_once_for_each(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None
) -> None:
    ids = {await store.submit() for _ in range(3)}
    loops = [provisioner(store, engine, tmp_path, slurm_max_jobs=3) for _ in range(4)]

    for _ in range(3):
        await asyncio.gather(*(each.look() for each in loops))

    assert len(engine.requests) == 3
    assert {row[0] for row in await rows(store)} == ids
    assert [len(await notes(store, id)) for id in ids] == [1, 1, 1]


async def test_the_bound_is_of_all_backends_together(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None
) -> None:
    for _ in range(6):
        await store.submit()
    loops = [provisioner(store, engine, tmp_path, slurm_max_jobs=2) for _ in range(4)]

    for _ in range(4):
        await asyncio.gather(*(each.look() for each in loops))

    assert len(engine.requests) == 2


async def test_who_counts_is_alone(store: Store) -> None:
    async with store.sessions.begin() as first, store.sessions.begin() as second:
        assert await engine_jobs.room(first, 2) == 2
        assert await engine_jobs.room(second, 2) == 0


async def test_nothing_is_asked_for_where_a_slot_is_idle_or_the_wait_was_short(
    store: Store, engine: FakeEngine, tmp_path: Path
) -> None:
    await store.worker()
    await store.submit()

    await provisioner(store, engine, tmp_path).look()
    assert engine.requests == []

    await store.submit(resources={"cores": 1})
    await store.claim()  # its slot is taken: the other one waits
    await provisioner(store, engine, tmp_path, slurm_after_s=3600.0).look()
    assert engine.requests == []
    await provisioner(store, engine, tmp_path).look()
    assert len(engine.requests) == 1


async def test_one_that_the_claim_cannot_place_asks_though_a_slot_is_idle(
    store: Store, engine: FakeEngine, tmp_path: Path
) -> None:
    """As the claim has it: `auto` waits for the GPU that somebody has, and a gang's slots are not for who is behind."""
    await store.worker("gpu", device="cuda")
    await store.worker("cpu", host="h2", slot={"port": 1})
    loop = provisioner(store, engine, tmp_path, slurm_max_jobs=9)
    await store.running(execution={"accelerator": "cuda"})
    await loop.look()
    assert engine.requests == []

    await store.submit(execution={"accelerator": "cpu"})
    await loop.look()
    assert engine.requests == []
    await store.submit()
    await loop.look()
    assert len(engine.requests) == 1


@pytest.mark.parametrize(("ports", "asked"), [((1, 2), 0), ((1, None), 1)], ids=["placed", "no-gang-there"])
async def test_a_gang_asks_where_the_claim_cannot_place_it(
    store: Store, engine: FakeEngine, tmp_path: Path, ports: tuple[int | None, ...], asked: int
) -> None:
    for port in ports:
        await store.worker(f"w{port}", slot={"port": port})
    execution = {"devices": 2, "batch_size": 1024, "accelerator": "cpu"}
    await store.submit(execution=execution, elastic=lambda *_: None)

    await provisioner(store, engine, tmp_path).look()

    assert [request.slots for request in engine.requests] == [2] * asked


async def test_who_is_behind_a_gang_that_reserves_asks_for_a_worker_of_its_own(
    store: Store, engine: FakeEngine, tmp_path: Path
) -> None:
    for port in (1, 2):
        await store.worker(f"w{port}", slot={"port": port})
    await store.running()
    gang = await store.submit(execution={"devices": 2, "batch_size": 1024}, elastic=lambda *_: None)
    small = await store.submit()

    await provisioner(store, engine, tmp_path).look()

    assert [row[0] for row in await rows(store)] == [gang, small]


# ---- what is accepted though nobody has it


GPUS = {"accelerator": "cuda"}
PAIR = {"devices": 4, "batch_size": 1024}


@pytest.mark.parametrize(
    ("gpus", "spec", "nodes", "each"),
    [
        (2, {"execution": GPUS}, 1, 1),
        (0, {"resources": {"cores": 64}}, 1, 64),
        (0, {"execution": PAIR}, 1, 4),
        (2, {"execution": PAIR | GPUS}, 2, 2),
        (2, {"execution": PAIR | GPUS, "resources": {"nodes": 4}}, 4, 1),
    ],
    ids=["gpu", "cores", "gang", "gang-of-gpus", "nodes"],
)
async def test_what_the_scheduler_could_start_is_accepted_and_asked_for(
    store: Store, engine: FakeEngine, tmp_path: Path, gpus: int, spec: dict[str, Any], nodes: int, each: int
) -> None:
    await store.worker()
    changes = {"slurm_gpus_per_node": gpus}

    await store.submit(elastic=elastic(settings(tmp_path, **changes)), **spec)
    await provisioner(store, engine, tmp_path, **changes).look()

    [request] = engine.requests
    assert (request.nodes, request.gpus if gpus else request.cores) == (nodes, each)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(
    ("gpus", "spec", "words"),
    [
        (0, {"execution": GPUS}, "no worker has ever offered a cuda device; Slurm's nodes have 0 GPUs"),
        (0, {"execution": GPUS, "resources": {"cores": 2}}, "Slurm's nodes have 0 GPUs"),
        (2, {"execution": {"accelerator": "mps"}}, "Slurm is never asked for an mps device"),
        (0, {"execution": PAIR | GPUS}, "Slurm's nodes have 0 GPUs"),
        (2, {"execution": PAIR | {"accelerator": "auto"}, "resources": {"nodes": 1}},
         "Slurm's nodes have 2 GPUs each .*, and 1 of them would need 4"),
    ],
    ids=["no-gpu", "no-gpu-of-cores", "mps", "no-gpus", "too-many-on-a-node"],
)  # fmt: skip
async def test_what_neither_the_scheduler_nor_live_workers_could_hold_is_refused_with_the_numbers(
    store: Store, tmp_path: Path, live: bool, gpus: int, spec: dict[str, Any], words: str
) -> None:
    worker = await store.worker()
    if not live:
        await store.execute(
            "UPDATE workers SET last_seen_at = now() - interval '1 day' WHERE incarnation = :id", id=worker
        )

    with pytest.raises(OpsError, match=words) as refused:
        await store.submit(elastic=elastic(settings(tmp_path, slurm_gpus_per_node=gpus)), **spec)

    assert refused.value.code is ErrorCode.INVALID


async def test_what_live_workers_could_hold_is_accepted_whatever_the_scheduler_has(
    store: Store, tmp_path: Path
) -> None:
    await store.worker(device="cuda", slots=4, slot={"port": 1})

    assert await store.submit(
        elastic=elastic(settings(tmp_path, slurm_gpus_per_node=2)), execution=PAIR, resources={"nodes": 1}
    )


async def test_a_fork_too_may_ask_for_what_only_the_scheduler_has(store: Store, tmp_path: Path) -> None:
    await store.worker()
    run = await store.running()
    run = await store.report(run, started(), saved(run, 0))
    wish = {"overrides": {"execution": PAIR}}
    with pytest.raises(OpsError, match="4 are more than the 0 slots"):
        await store.fork(run.operation_id, elastic=elastic(settings(tmp_path, slurm_max_jobs=0)), **wish)

    assert await store.fork(run.operation_id, elastic=elastic(settings(tmp_path)), **wish)


async def test_the_routes_accept_what_the_scheduler_could_start(
    api: httpx.AsyncClient, store: Store, tmp_path: Path
) -> None:
    await store.worker()
    run = await store.running()
    await store.report(run, started(), saved(run, 0))
    job = {"workload": "toy", "execution": PAIR}
    calls = {
        "/operations?dry_run=true": job,
        "/operations": job,
        f"/operations/{run.operation_id}/fork?dry_run=true": {"overrides": {"execution": PAIR}},
        f"/operations/{run.operation_id}/fork": {"overrides": {"execution": PAIR}},
    }
    for path, body in calls.items():
        assert (await api.post(path, json=body)).status_code == 422

    app = api._transport.app  # type: ignore[attr-defined]
    app.state.settings = settings(tmp_path, api_token=TOKEN)  # its loops have begun without

    for path, body in calls.items():
        answer = await api.post(path, json=body)
        assert answer.status_code == (200 if "dry_run" in path else 201), answer.text


async def test_how_long_an_operation_was_due_is_since_its_last_move_whatever_was_noted_meanwhile(
    store: Store, loop: Provisioner
) -> None:
    id = await store.submit()
    await store.execute("UPDATE events SET at = now() - interval '1 hour' WHERE operation_id = :id", id=id)
    await loop.look()
    assert len(await notes(store, id)) == 1
    await come(store, "1")

    claim = await store.claim()

    assert claim is not None
    assert claim.due_s >= 3600


async def test_an_operation_waits_since_its_last_move_whatever_was_noted_meanwhile(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None
) -> None:
    id = await store.submit()
    await store.execute("UPDATE operations SET created_at = now() - interval '1 hour' WHERE id = :id", id=id)
    await store.execute("UPDATE events SET at = now() - interval '1 hour' WHERE operation_id = :id", id=id)
    loop = provisioner(store, engine, tmp_path, slurm_after_s=600.0)

    await loop.look()
    engine.become("1", Stage.ENDED, "CANCELLED")
    await loop.look()
    await store.execute("UPDATE engine_jobs SET ended_at = now() - interval '1 hour'")
    await loop.look()

    assert len(engine.requests) == 2


async def test_a_crash_after_submission_is_found_by_the_name(
    store: Store, engine: FakeEngine, loop: Provisioner
) -> None:
    id = await store.submit()
    engine.fails = EngineAway("the answer was lost")

    await loop.look()
    assert await rows(store) == [(id, None, "intended")]
    await loop.look()

    assert await rows(store) == [(id, "1", "submitted")]
    assert len(engine.requests) == 1
    assert len(await notes(store, id)) == 2


async def test_a_crash_before_submission_ends_the_row_after_a_while_and_not_before(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None
) -> None:
    id = await store.submit()
    engine.fails, engine.had = EngineAway("killed"), False
    patient = provisioner(store, engine, tmp_path)
    await patient.look()
    await patient.look()
    assert await rows(store) == [(id, None, "intended")]

    engine.away = True
    await provisioner(store, engine, tmp_path, adopt_s=0.0).look()
    assert await rows(store) == [(id, None, "intended")]  # it does not answer, so it does not say no
    engine.away = False
    await provisioner(store, engine, tmp_path, adopt_s=0.0).look()

    assert await rows(store) == [(id, None, "ended")]
    assert "was never asked" in (await notes(store, id))[-1]


async def test_a_job_whose_row_was_given_up_while_it_was_submitted_is_killed(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.submit()
    submit = engine.submit

    async def slowly(name: str, request: EngineRequest) -> str:
        await store.execute("UPDATE engine_jobs SET state = 'ended', ended_at = now() WHERE name = :name", name=name)
        return await submit(name, request)

    monkeypatch.setattr(engine, "submit", slowly)
    await provisioner(store, engine, tmp_path).look()

    assert engine.killed == ["1"]


async def test_a_refusal_is_told_in_its_words_and_asked_again_ever_more_rarely(
    store: Store, engine: FakeEngine, loop: Provisioner
) -> None:
    id = await store.submit()
    for failures in (1, 2, 3):
        engine.fails, engine.had = EngineRefused("sbatch: Invalid account"), False
        await loop.look()
        await loop.look()
        assert len(engine.requests) == failures
        sql = "SELECT failures FROM engine_jobs ORDER BY created_at DESC LIMIT 1"
        assert (await store.fetch(sql))[0].failures == failures
        backoff_s = 5 * 2 ** (failures - 1)
        await store.execute(
            "UPDATE engine_jobs SET ended_at = now() - make_interval(secs => :s)", s=float(backoff_s - 1)
        )
        await loop.look()
        assert len(engine.requests) == failures
        await store.execute(
            "UPDATE engine_jobs SET ended_at = now() - make_interval(secs => :s)", s=float(backoff_s + 1)
        )

    operation = await store.get(id)
    assert operation.engine is not None
    assert (operation.engine.state, operation.engine.reason) == ("REFUSED", "sbatch: Invalid account")
    told = await notes(store, id)
    assert len(told) == 3
    assert "asked again in 20 s: sbatch: Invalid account" in told[-1]


async def test_the_job_of_a_cancelled_operation_is_killed_before_a_worker_came(
    store: Store, engine: FakeEngine, loop: Provisioner
) -> None:
    id = await store.submit()
    await loop.look()
    await store.cancel(id)

    await loop.look()
    assert engine.killed == ["1"]
    await loop.look()
    assert [row[2] for row in await rows(store)] == ["ended"]
    assert (await store.get(id)).engine is None


async def test_another_operation_that_waits_for_the_same_takes_the_job_over(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None
) -> None:
    loop = provisioner(store, engine, tmp_path, slurm_max_jobs=1)
    first, second = await store.submit(), await store.submit()
    await loop.look()
    await store.cancel(first)

    await loop.look()

    assert engine.killed == []
    assert await rows(store) == [(second, "1", "submitted")]


async def test_one_that_waits_for_something_else_does_not(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None
) -> None:
    loop = provisioner(store, engine, tmp_path, slurm_max_jobs=1)
    first = await store.submit()
    await loop.look()
    await store.execute("UPDATE slots SET cores = 64")
    await store.submit(resources={"cores": 64})
    await store.cancel(first)

    await loop.look()

    assert engine.killed == ["1"]


async def test_a_worker_that_came_is_left_to_its_idle_time(store: Store, engine: FakeEngine, loop: Provisioner) -> None:
    id = await store.submit()
    await loop.look()
    engine.become("1", Stage.RUNNING, "RUNNING")
    await come(store, "1")
    claim = await store.claim()
    assert claim is not None
    await store.finish(held(claim), Outcome.COMPLETED)

    await loop.look()
    assert engine.killed == []
    engine.become("1", Stage.ENDED, "COMPLETED")
    await loop.look()

    assert await rows(store) == [(id, "1", "ended")]
    assert (await store.fetch("SELECT failures FROM engine_jobs"))[0].failures == 0


async def test_a_job_goes_with_the_operation_that_its_worker_took(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None
) -> None:
    loop = provisioner(store, engine, tmp_path, slurm_max_jobs=2)
    first, second = await store.submit(), await store.submit(priority=5)
    await loop.look()
    assert dict((row[0], row[1]) for row in await rows(store)) == {second: "1", first: "2"}
    engine.become("2", Stage.RUNNING, "RUNNING")
    await come(store, "2")
    claim = await store.claim()
    assert claim is not None
    assert claim.operation_id == second  # which is first in the queue

    await loop.look()

    assert dict((row[0], row[1]) for row in await rows(store)) == {second: "2", first: "1"}
    assert engine.killed == []


async def test_a_preempted_operation_asks_anew_when_its_job_has_ended(
    store: Store, engine: FakeEngine, loop: Provisioner
) -> None:
    id = await store.submit()
    await loop.look()
    engine.become("1", Stage.RUNNING, "RUNNING")
    worker = await come(store, "1")
    claim = await store.claim()
    assert claim is not None
    run = await store.report(held(claim), started())
    await loop.look()
    await store.finish(run, Outcome.PREEMPTED)
    await store.heartbeat(worker, draining=True)

    await loop.look()
    assert len(engine.requests) == 1  # its job has not ended yet
    engine.become("1", Stage.ENDED, "PREEMPTED")
    await loop.look()

    assert [row[1:] for row in await rows(store)] == [("1", "ended"), ("2", "submitted")]
    assert (await store.get(id)).failures == 0


async def test_a_scheduler_that_is_away_is_told_once_and_nothing_is_given_up(
    store: Store, engine: FakeEngine, loop: Provisioner
) -> None:
    id = await store.submit()
    await loop.look()
    engine.away = True
    for _ in range(3):
        await loop.look()
    operation = await store.get(id)
    assert operation.engine is not None
    assert (operation.engine.job, operation.engine.state) == ("1", "UNKNOWN")
    engine.away = False
    await loop.look()

    told = await notes(store, id)
    assert [sum(words in line for line in told) for words in ("does not answer", "answers again")] == [1, 1]
    assert await rows(store) == [(id, "1", "submitted")]


async def test_one_that_comes_while_the_scheduler_is_away_is_told_and_asks_when_it_is_back(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None
) -> None:
    loop = provisioner(store, engine, tmp_path, adopt_s=0.0)
    await store.submit()
    await loop.look()
    engine.away = True
    id = await store.submit()
    await loop.look()
    await loop.look()
    assert len(engine.requests) == 1
    assert ["does not answer" in line for line in await notes(store, id)] == [True]

    engine.away = False
    await loop.look()
    await store.execute("UPDATE engine_jobs SET ended_at = now() - interval '1 hour' WHERE state = 'ended'")
    await loop.look()

    assert len(engine.requests) == 2


async def test_a_job_that_the_scheduler_forgot_has_ended(store: Store, engine: FakeEngine, loop: Provisioner) -> None:
    id = await store.submit()
    await loop.look()
    engine.forgets = True

    await loop.look()

    assert await rows(store) == [(id, "1", "ended")]
    assert "not known" in (await notes(store, id))[-1]


async def test_one_that_is_pending_for_long_is_told_once_with_the_reason(
    store: Store, engine: FakeEngine, tmp_path: Path, known: None
) -> None:
    id = await store.submit()
    loop = provisioner(store, engine, tmp_path, slurm_pending_warn_s=600.0)
    await loop.look()
    engine.become("1", Stage.PENDING, "PENDING", "QOSMaxJobsPerUserLimit")
    await loop.look()
    assert len(await notes(store, id)) == 1
    await store.execute("UPDATE engine_jobs SET created_at = now() - interval '1 hour'")

    for _ in range(3):
        await loop.look()

    told = await notes(store, id)
    assert len(told) == 2
    assert told[-1].startswith("Slurm job 1 has been pending for 3600 s: QOSMaxJobsPerUserLimit")
    for stage, state, reason in (
        (Stage.PENDING, "PENDING", "Priority"),
        (Stage.RUNNING, "RUNNING", None),
        (Stage.PENDING, "REQUEUED", "BeginTime"),
        (Stage.PENDING, "PENDING", "BeginTime"),
    ):
        engine.become("1", stage, state, reason)
        await loop.look()
    assert (await notes(store, id))[2:] == [
        "Slurm job 1 has begun",
        "Slurm job 1 is pending again: REQUEUED (BeginTime)",
    ]


async def test_notes_leave_what_has_ended_alone(store: Store, engine: FakeEngine, loop: Provisioner) -> None:
    id = await store.submit()
    await loop.look()
    await store.cancel(id)
    before = await notes(store, id)
    engine.become("1", Stage.ENDED, "CANCELLED")

    await loop.look()

    assert await notes(store, id) == before


async def test_none_is_asked_for_where_it_is_off(store: Store, engine: FakeEngine, tmp_path: Path, known: None) -> None:
    await store.submit()
    await asyncio.wait_for(provisioner(store, engine, tmp_path, slurm_max_jobs=0).run(), 5)

    assert engine.requests == []


async def test_an_intent_is_refused_where_nothing_waits_or_a_job_is_open(store: Store, known: None) -> None:
    cancelled, waiting = await store.submit(), await store.submit()
    await store.cancel(cancelled)

    async def intend(id: UUID) -> UUID | None:
        async with store.sessions.begin() as session:
            return await engine_jobs.intend(session, id, "slurm", EngineRequest(), 0)

    assert await intend(cancelled) is None
    made = await asyncio.gather(*(intend(waiting) for _ in range(4)))
    assert len([id for id in made if id is not None]) == 1
