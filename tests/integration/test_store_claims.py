"""Who gets which slot."""

import asyncio

import pytest

from helpers.store import LEASE_S, TOY, Held, Store, at_once, held, saved, started, threads
from ops_backend.store import claims
from ops_contract.agents import WorkloadOffer
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Outcome

GPU = {"device_uuid": "GPU-1"}


def on(accelerator: str) -> dict[str, object]:
    return {"execution": {"accelerator": accelerator}}


async def test_auto_takes_the_gpu_first(store: Store) -> None:
    await store.worker("cpu")
    gpu = await store.worker("gpu", device="cuda", slot=GPU)
    await store.submit()
    claim = await store.claim()
    assert claim is not None
    assert claim.members[0].incarnation == gpu


async def test_auto_waits_for_a_busy_gpu_rather_than_crawl_on_a_cpu(store: Store) -> None:
    await store.worker("cpu")
    await store.worker("gpu", device="cuda", slot=GPU)
    await store.running()
    await store.submit()
    assert await store.claim() is None


async def test_auto_waits_for_a_drained_gpu_and_a_job_for_the_cpu_does_not(store: Store) -> None:
    cpu, gpu = await store.worker("cpu"), await store.worker("gpu", device="cuda", slot=GPU)
    await store.drain(gpu, "preempt")
    await store.submit()
    assert await store.claim() is None
    await store.submit(**on("cpu"))
    claim = await store.claim()
    assert claim is not None
    assert claim.members[0].incarnation == cpu


async def test_auto_falls_back_to_the_cpu_where_no_live_worker_has_a_gpu(store: Store) -> None:
    cpu = await store.worker("cpu")
    gone = await store.worker("gpu", device="cuda", slot=GPU)
    await store.execute("UPDATE workers SET last_seen_at = now() - interval '1 h' WHERE incarnation = :i", i=gone)
    await store.submit()
    claim = await store.claim()
    assert claim is not None
    assert claim.members[0].incarnation == cpu


async def test_a_job_for_the_cpu_leaves_the_gpu_alone(store: Store) -> None:
    await store.worker("gpu", device="cuda", slot=GPU)
    await store.submit(**on("cpu"))
    assert await store.claim() is None
    cpu = await store.worker("cpu")
    claim = await store.claim()
    assert claim is not None
    assert claim.members[0].incarnation == cpu


async def test_a_job_for_cuda_never_runs_on_a_cpu(store: Store) -> None:
    gone = await store.worker("gpu", device="cuda", slot=GPU)
    await store.execute("UPDATE workers SET last_seen_at = now() - interval '1 h' WHERE incarnation = :i", i=gone)
    await store.worker("cpu")
    await store.submit(**on("cuda"))
    assert await store.claim() is None


@pytest.mark.parametrize("accelerator", ["cuda", "mps"])
async def test_a_gpu_that_no_worker_has_ever_offered_is_refused(store: Store, accelerator: str) -> None:
    await store.worker("cpu")
    with pytest.raises(
        OpsError, match=rf"^execution\.accelerator: no worker has ever offered a {accelerator} device; "
    ):
        await store.submit(**on(accelerator))
    run = await store.running()
    await store.report(run, started(), saved(run, 0))
    with pytest.raises(OpsError, match=r"overrides\.execution\.accelerator: no worker"):
        await store.fork(run.operation_id, overrides=on(accelerator))
    assert len(await store.fetch("SELECT id FROM operations")) == 1


async def test_mps_goes_to_mps_and_auto_prefers_it_to_a_cpu(store: Store) -> None:
    await store.worker("cpu")
    mac = await store.worker("mac", device="mps", slots=2)
    await store.submit(**on("mps"))
    await store.submit(**on("auto"))
    claims = [await store.claim(), await store.claim()]
    assert [claim and claim.members[0].incarnation for claim in claims] == [mac, mac]


async def test_higher_priority_goes_first_then_the_older(store: Store) -> None:
    await store.worker(slots=3)
    low, old, new = await store.submit(), await store.submit(priority=5), await store.submit(priority=5)
    order = [claim.operation_id for _ in range(3) if (claim := await store.claim())]
    assert order == [old, new, low]


async def test_a_worker_gets_only_workloads_that_it_offers(store: Store) -> None:
    other = WorkloadOffer(name="other", config_schema=TOY.config_schema)
    await store.worker("b", workloads=(other,))
    await store.worker("a")
    await store.submit()
    await store.submit(workload="other")
    first, second = await store.claim(), await store.claim()
    assert first is not None
    assert second is not None
    assert first.members[0].incarnation != second.members[0].incarnation


async def test_the_first_slots_cores_are_frozen_and_preferred_later(store: Store) -> None:
    small = await store.worker("small", cores=1)
    run = await store.running()
    assert (await store.get(run.operation_id)).job.execution.threads == 1
    await store.finish(run, Outcome.PREEMPTED)
    for name in ("big", "bigger"):
        await store.worker(name, cores=4)
    claim = await store.claim()
    assert claim is not None
    assert (claim.members[0].incarnation, claim.job.execution.threads) == (small, 1)


async def test_a_chosen_number_of_threads_stands(store: Store) -> None:
    await store.worker(cores=4)
    run = await store.running(**threads(2))
    assert (await store.get(run.operation_id)).job.execution.threads == 2


async def test_a_draining_or_silent_worker_gets_nothing(store: Store) -> None:
    draining, silent = await store.worker("draining"), await store.worker("silent")
    await store.heartbeat(draining, draining=True)
    await store.execute("UPDATE workers SET last_seen_at = now() - interval '1 h' WHERE incarnation = :i", i=silent)
    await store.submit()
    assert await store.claim() is None


async def test_a_drained_worker_gets_nothing_until_undrained_whatever_it_says_of_itself(store: Store) -> None:
    worker = await store.worker()
    await store.submit()
    await store.drain(worker, "finish")
    assert (await store.heartbeat(worker)).drain == "finish"
    assert await store.claim() is None
    await store.drain(worker, "preempt")
    assert (await store.heartbeat(worker)).drain == "preempt"
    await store.drain(worker, None)
    assert (await store.heartbeat(worker)).drain is None
    assert await store.claim() is not None


async def test_a_restarted_worker_is_not_drained(store: Store) -> None:
    await store.drain(await store.worker("w"), "finish")
    restarted = await store.worker("w")
    await store.submit()
    claim = await store.claim()
    assert claim is not None
    assert claim.members[0].incarnation == restarted


async def test_a_drain_waits_for_the_claim_that_does_not_see_it(store: Store) -> None:
    """So that after its answer nothing more is claimed for that worker."""
    worker = await store.worker()
    await store.submit()
    async with store.sessions.begin() as session:
        assert await claims.claim_next(session, LEASE_S)
        draining = asyncio.create_task(store.drain(worker, "finish"))
        while not await store.fetch("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
            assert not draining.done()
    await draining


async def test_a_slot_is_free_again_when_its_hold_has_ended(store: Store) -> None:
    await store.worker()
    run = await store.running()
    await store.submit()
    assert await store.claim() is None
    await store.finish(run, Outcome.COMPLETED)
    assert await store.claim() is not None


async def test_a_restarted_worker_inherits_nothing(store: Store) -> None:
    """Scenario 19: same name, another owner."""
    await store.worker("w")
    run = await store.running()
    second = await store.worker("w")
    answer = await store.heartbeat(second, Held(run.operation_id, run.attempt, second))
    assert [h.operation_id for h in answer.ended] == [run.operation_id]
    await store.submit()
    claim = await store.claim()
    assert claim is not None
    assert held(claim).incarnation == second


async def test_a_claim_brings_how_long_attempts_ran_and_how_many_lost_work(store: Store) -> None:
    await store.worker(slots=9)
    ends = [Outcome.COMPLETED, Outcome.FAILED, Outcome.PREEMPTED, None, "lost", "unstarted"]
    for end in ends:
        run = await store.running(max_retries=0)
        if end != "unstarted":
            run = await store.report(run, started())
            await store.execute("UPDATE attempts SET started_at = now() - interval '1 h' WHERE ended_at IS NULL")
        if end == "lost":
            await store.expire(run)
            await store.lose(run)
        elif end is not None:
            await store.finish(run, Outcome.FAILED if end == "unstarted" else Outcome(end))

    await store.submit()
    claim = await store.claim()

    assert claim is not None
    assert claim.record.failures == 2
    assert claim.record.running_s == pytest.approx(5 * 3600, abs=60)


async def test_of_agents_that_offer_one_gpu_at_once_one_is_taken(store: Store) -> None:
    answers = await at_once(*(store.worker("gpu", device="cuda", slot=GPU) for _ in range(8)))
    refused = [answer for answer in answers if isinstance(answer, OpsError)]
    assert [refusal.code for refusal in refused] == [ErrorCode.DEVICE_TAKEN] * 7


async def test_a_gpu_is_free_when_its_agent_has_said_goodbye_and_runs_nothing(store: Store) -> None:
    first = await store.worker("gpu", device="cuda", slot=GPU)
    run = await store.running()
    await store.heartbeat(first, run, draining=True)
    with pytest.raises(OpsError) as raised:
        await store.worker("gpu", device="cuda", slot=GPU)
    assert raised.value.code is ErrorCode.DEVICE_TAKEN
    await store.finish(run, Outcome.PREEMPTED)
    await store.worker("gpu", device="cuda", slot=GPU)
