"""The ledger adds up: each joule once, whatever is killed, fenced, forked, repeated or late."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.databases import Databases
from helpers.store import Held, Store, at_once, saved, started, window
from ops_backend.database import Sessions
from ops_backend.store.deletion import delete_if_ended
from ops_backend.store.ledger_views import Rates
from ops_contract.energy import EnergyWindow, Quality, Source, Use
from ops_contract.errors import OpsError
from ops_contract.ledger import EnergyLedger, Joules, Shares
from ops_contract.lifecycle import Outcome, Phase, Status
from ops_contract.operations import EnergyView

SHARED = {"device": "cpu-0", "source": Source.RAPL, "quality": Quality.UPPER_BOUND}
NO_METER = {"device": "cpu", "source": None, "quality": None, "energy_j": None, "error_j": None, "reason": "no_meter"}

OPERATION = """
    INSERT INTO operations (id, name, kind, workload, job, labels, priority, max_retries, submitted_by, status)
    VALUES (:id, 'n', 'training', 'toy', '{"workload": "toy", "kind": "training", "config": {}, "execution": {}}',
            '{}', 0, 0, 'me', 'completed')
"""
ATTEMPT = """
    WITH attempted AS (
        INSERT INTO attempts (operation_id, number, incarnation, start_step, starts_at_evaluation, ended_at, outcome)
        VALUES (:id, :n, :worker, :start, :evaluation, now(), 'lost')
    )
    INSERT INTO holds (operation_id, attempt, incarnation, lease_expires_at, ended_at)
    VALUES (:id, :n, :worker, now(), now())
"""


def uj(joules: Joules | None) -> int:
    """Whole microjoules of what is known."""
    return round((joules.known_j or 0.0) * 1e6) if joules else 0


def adds_up(shares: Shares) -> bool:
    parts = uj(shares.useful) + uj(shares.lost) + uj(shares.overhead)
    return uj(shares.total) == parts and uj(shares.overhead) == sum(map(uj, shares.overhead_by_use.values()))


async def next_attempt(store: Store, operation_id: UUID) -> Held:
    claim = await store.claim()
    assert claim is not None
    assert claim.operation_id == operation_id
    return Held(operation_id, claim.attempt, claim.members[0].incarnation)


async def killed(store: Store, held: Held, *, worker: str) -> Held:
    """Its worker is gone; what runs next."""
    await store.expire(held)
    assert await store.lose(held) is Status.PENDING
    await store.worker(worker)
    return await next_attempt(store, held.operation_id)


async def test_the_ledger_of_a_run_killed_twice_fenced_once_and_forked_once_adds_up_exactly(store: Store) -> None:
    """In every attempt a third of a joule in its last place, so that sums of floats would show."""
    third = {"energy_j": 33.333333}
    await store.worker("first")
    one = await store.running()
    one = await store.report(one, started(), saved(one, 0), saved(one, 10))
    await store.book(one, window(1, Use.STARTUP, **third), window(2, Use.TRAIN, (0, 10), **third))
    await store.book(one, window(3, Use.SAVE, (10, 10), **third), window(4, Use.TRAIN, (10, 17), **third))
    two = await killed(store, one, worker="second")  # from step 10
    two = await store.report(two, started(10), saved(two, 20))
    twice = (window(1, Use.RESTORE, (10, 10), **third), window(2, Use.TRAIN, (10, 20), **third))
    await store.book(two, *twice)
    three = await killed(store, two, worker="third")  # from step 20, before two had told all of it
    # The fenced attempt: no report of it counts any more, its joules do.
    with pytest.raises(OpsError, match="ended"):
        await store.report(two, saved(two, 30))
    await store.book(two, *twice, window(3, Use.TRAIN, (20, 24), **third))
    three = await store.report(three, started(20), saved(three, 30))
    await store.book(three, window(1, Use.TRAIN, (20, 30), **third), window(2, Use.EVALUATE, (30, 30), **third))
    fork_id = await store.fork(three.operation_id)
    assert fork_id is not None
    await store.finish(three, Outcome.COMPLETED)
    await store.book(three, window(3, Use.FINISH, (30, 30), **third))
    fork = await next_attempt(store, fork_id)
    await store.book(fork, window(1, Use.TRAIN, (30, 40), energy_j=7.0))

    ledger = await store.energy(one.operation_id)

    assert adds_up(ledger)
    assert not ledger.provisional
    assert uj(ledger.total) == 10 * 33_333_333
    assert uj(ledger.lost) == 2 * 33_333_333
    assert uj(ledger.useful) == 3 * 33_333_333
    assert {use: uj(j) // 33_333_333 for use, j in ledger.overhead_by_use.items()} == {
        Use.STARTUP: 1,
        Use.RESTORE: 1,
        Use.EVALUATE: 1,
        Use.SAVE: 1,
        Use.FINISH: 1,
    }
    assert [uj(a.total) // 33_333_333 for a in ledger.attempts] == [4, 3, 3]
    assert [uj(a.lost) // 33_333_333 for a in ledger.attempts] == [1, 1, 0]
    assert ledger.total.error_j == 10.0
    assert (ledger.per_work.steps, [a.lost_steps for a in ledger.attempts]) == (30, [7, 4, 0])
    assert [a.energy_j for a in await store.attempts(one.operation_id)] == [133.333332, 99.999999, 99.999999]
    assert [a.lost_j for a in await store.attempts(one.operation_id)] == [33.333333, 33.333333, 0.0]
    forked = await store.energy(fork_id)
    assert (uj(forked.total), uj(forked.useful), forked.provisional) == (7_000_000, 7_000_000, True)


async def test_the_same_windows_twice_at_once_count_once(store: Store) -> None:
    await store.worker()
    held = await store.running()
    windows = [window(n, Use.TRAIN, (n, n + 1)) for n in range(1, 40)]
    other_order = [*reversed(windows[20:]), window(100, Use.SAVE, (40, 40))]

    answers = await at_once(*(store.book(held, *(windows if n % 2 else other_order)) for n in range(12)))

    assert [answer for answer in answers if isinstance(answer, Exception)] == []
    assert sum(new.energy_j for answer in answers for new in answer) == 4000.0
    ledger = await store.energy(held.operation_id)
    assert (ledger.total.energy_j, ledger.useful.energy_j) == (4000.0, 3900.0)


async def test_only_who_held_the_attempt_books_for_it(store: Store) -> None:
    await store.worker()
    held = await store.running()
    for stranger in (
        Held(held.operation_id, 1, uuid4()),
        Held(held.operation_id, 2, held.incarnation),
        Held(uuid4(), 1, held.incarnation),
    ):
        with pytest.raises(OpsError, match="never held"):
            await store.book(stranger, window(1))
    assert (await store.energy(held.operation_id)).total.reason == "not_yet_measured"


async def test_what_is_deleted_takes_its_joules_along_and_takes_no_more(store: Store) -> None:
    await store.worker()
    held = await store.running()
    await store.book(held, window(1))
    await store.finish(held, Outcome.COMPLETED)

    gone, *late = await at_once(delete(store, held.operation_id), *(store.book(held, window(n)) for n in range(2, 8)))

    assert gone is True
    assert all(isinstance(answer, list) or "never held" in str(answer) for answer in late)
    left = "SELECT count(*) FROM {} WHERE operation_id = :id"
    for table in ("energy_windows", "energy_sums"):
        assert await store.fetch(left.format(table), id=held.operation_id) == [(0,)]


async def delete(store: Store, id: UUID) -> bool:
    async with store.sessions.begin() as session:
        return await delete_if_ended(session, id)


async def test_an_evaluation_that_is_done_again_is_lost_and_the_update_before_it_is_not(store: Store) -> None:
    """The checkpoint of step 9 was saved during the evaluation that follows its update."""
    await store.worker()
    held = await store.running()
    held = await store.report(held, started(), saved(held, 9, phase=Phase.EVALUATE))
    await store.book(held, window(1, Use.TRAIN, (0, 10)), window(2, Use.EVALUATE, (10, 10)))
    await killed(store, held, worker="second")

    ledger = await store.energy(held.operation_id)

    assert (ledger.useful.energy_j, ledger.lost.energy_j, ledger.overhead.energy_j) == (100.0, 100.0, 0.0)


async def test_a_window_across_a_cut_is_divided_by_its_steps_and_its_error_says_so(store: Store) -> None:
    await store.worker()
    held = await store.running()
    held = await store.report(held, started(), saved(held, 7))
    await store.book(held, window(1, Use.TRAIN, (0, 10), units=1000))
    await killed(store, held, worker="second")

    ledger = await store.energy(held.operation_id)

    assert (ledger.useful.energy_j, ledger.lost.energy_j) == (70.0, 30.0)
    assert (ledger.useful.error_j, ledger.lost.error_j, ledger.total.error_j) == (72.0, 71.0, 144.0 - 1.0)
    assert (ledger.per_work.steps, ledger.per_work.units, ledger.attempts[0].lost_steps) == (7, 700, 3)


async def test_what_is_not_known_is_null_and_says_why(store: Store) -> None:
    """Of a GPU that vanished while it trained the rest stays known."""
    await store.worker()
    held = await store.running()
    lost = {"energy_j": None, "error_j": None, "reason": "device_lost"}
    await store.book(held, window(1, Use.STARTUP), window(2, Use.TRAIN, (0, 5)), window(3, Use.TRAIN, (5, 9), **lost))

    ledger = await store.energy(held.operation_id)

    assert ledger.total == Joules(energy_j=None, known_j=200.0, error_j=2.0, reason="device_lost")
    assert (ledger.useful.energy_j, ledger.useful.known_j, ledger.overhead.energy_j) == (None, 100.0, 100.0)
    assert (ledger.lost.energy_j, ledger.per_work.per_step_j, ledger.per_work.reason) == (0.0, None, "device_lost")
    assert (ledger.carbon.co2_g, ledger.above_idle.energy_j) == (None, None)


@pytest.mark.parametrize(
    ("windows", "reason", "quality", "upper_bound_j"),
    [
        ([], "not_yet_measured", None, None),
        ([NO_METER], "no_meter", None, None),
        ([SHARED], "shared_device", "upper_bound", 100.0),
        ([{"use": Use.UNATTRIBUTED}], "not_yet_measured", "measured", None),
        ([{}, {"quality": Quality.UPPER_BOUND}], "shared_device", "measured", 100.0),
        ([{}, SHARED], None, "measured", 100.0),
        ([{}, {"quality": Quality.ESTIMATED, "device": "cpu"}], None, "estimated", None),
    ],
)
async def test_each_reason_and_quality(
    store: Store, windows: list[dict[str, Any]], reason: str | None, quality: str | None, upper_bound_j: float | None
) -> None:
    await store.worker()
    held = await store.running()
    if windows:
        await store.book(held, *(window(n, **changes) for n, changes in enumerate(windows, 1)))

    shown = (await store.get(held.operation_id)).energy

    assert (shown.reason, shown.quality, shown.upper_bound_j) == (reason, quality, upper_bound_j)
    assert (shown.total_j is None) == (reason is not None)
    assert shown.useful_j != 0.0 or reason is None


async def test_attempts_of_which_nothing_was_measured(store: Store) -> None:
    """Nothing of an ended one takes the total away; one that was refused, or has only begun, does not."""
    await store.worker()
    id = await store.submit()
    waiting = (await store.get(id)).energy
    claim = await store.claim()
    assert claim is not None
    await store.refuse(claim)
    held = await next_attempt(store, id)
    held = await store.report(held, started(), saved(held, 0))
    await store.book(held, window(1, Use.TRAIN, (0, 5)))
    refused = (await store.get(id)).energy
    third = await killed(store, held, worker="second")
    begun = (await store.get(id)).energy
    third = await store.report(third, started(), saved(third, 10))
    await killed(store, third, worker="third")
    silent = (await store.get(id)).energy

    assert (waiting.total_j, waiting.reason) == (None, "not_started")
    assert (refused.total_j, refused.reason, refused.provisional) == (100.0, None, True)
    assert (begun.total_j, begun.lost_j) == (100.0, 100.0)
    assert (silent.total_j, silent.known_j, silent.reason) == (None, 100.0, "not_measured")
    reasons = [a.energy_reason for a in await store.attempts(id)]
    assert reasons == ["not_started", None, "not_measured", "not_yet_measured"]


async def test_figures_beside_the_sums(store: Store) -> None:
    """Two GPUs that were slowed at the same time slowed the operation once."""
    await store.worker("gpu-box")
    held = await store.running()

    def both(index: int, **changes: Any) -> list[EnergyWindow]:
        slowed = [{"hw_thermal": 0.5}, {"hw_thermal": 0.25, "sw_power_cap": 1.0}]
        return [
            window(
                index,
                Use.TRAIN,
                (index, index + 1),
                device=f"GPU-{n}",
                units=10,
                epoch=index,
                baseline_w=20.0,
                state={"power_max_w": 120.0 + index, "temperature_max_c": 60 + n, "throttled_s": each},
                **changes,
            )
            for n, each in enumerate(slowed)
        ]

    await store.book(held, *both(1), *both(2, energy_j=50.0))
    await store.book(held, window(1, Use.UNATTRIBUTED, device="GPU-2"), window(1, **SHARED))

    ledger = await store.energy(held.operation_id, Rates(360.0, 3.6, "EUR"))
    unrated = await store.energy(held.operation_id)

    assert (ledger.total.energy_j, ledger.unattributed, ledger.upper_bound) == (
        300.0,
        Joules(energy_j=100.0, known_j=100.0, error_j=1.0, reason=None),
        Joules(energy_j=100.0, known_j=100.0, error_j=1.0, reason=None),
    )
    assert ledger.thermal_throttle.throttled_s == {"hw_thermal": 1.0, "sw_power_cap": 2.0}
    gpu = next(device for device in ledger.devices if device.device == "GPU-0")
    assert (gpu.worker, gpu.source, gpu.throttled_s) == ("gpu-box", "nvml_counter", {"hw_thermal": 1.0})
    assert (gpu.power_mean_w, gpu.power_max_w, gpu.temperature_max_c, gpu.duration_s) == (75.0, 122.0, 60.0, 2.0)
    assert (gpu.utilization_mean_percent, gpu.memory_used_max_bytes) == (None, None)
    assert (ledger.above_idle.energy_j, ledger.above_idle.idle_j) == (220.0, 80.0)
    assert (ledger.per_work.steps, ledger.per_work.units, ledger.per_work.per_unit_j) == (2, 20, 15.0)
    assert [(e.epoch, e.total_j, e.steps, e.per_step_j, e.duration_s) for e in ledger.epochs] == [
        (1, 200.0, 1, 200.0, 1.0),
        (2, 100.0, 1, 100.0, 1.0),
    ]
    assert (ledger.carbon.co2_g, ledger.cost.amount, ledger.cost.currency) == (
        pytest.approx(0.03),
        pytest.approx(3e-4),
        "EUR",
    )
    assert (unrated.carbon.co2_g, unrated.carbon.reason, unrated.cost.reason) == (
        None,
        "not_configured",
        "not_configured",
    )


@dataclass(frozen=True)
class Begun:
    start_step: int
    at_evaluation: bool
    windows: list[EnergyWindow]


@st.composite
def histories(draw: st.DrawFn) -> list[Begun]:
    """Attempts from any step, with windows of any length, some across the cuts."""
    attempts = []
    for _ in range(draw(st.integers(1, 4))):
        start, step, windows = draw(st.integers(0, 12)), 0, []
        step = start
        for index in range(1, draw(st.integers(1, 6)) + 1):
            until = step + draw(st.integers(0, 4))
            known = draw(st.integers(0, 9)) > 0
            windows.append(
                window(
                    index,
                    draw(st.sampled_from([Use.TRAIN, Use.TRAIN, Use.EVALUATE, Use.SAVE, Use.UNATTRIBUTED])),
                    (step, until),
                    device=draw(st.sampled_from(["GPU-1", "GPU-2"])),
                    quality=draw(st.sampled_from([Quality.MEASURED, Quality.MEASURED, Quality.ESTIMATED])),
                    energy_j=draw(st.integers(0, 10**9)) / 1e6 if known else None,
                    error_j=0.25 if known else None,
                    reason=None if known else "device_lost",
                )
            )
            step = until
        attempts.append(Begun(start, draw(st.booleans()), windows))
    return attempts


def modelled(history: Sequence[Begun]) -> dict[str, int]:
    """Known microjoules, window by window."""
    found = dict.fromkeys(("useful", "lost", "overhead", "unattributed"), 0)
    for number, attempt in enumerate(history):
        for each in attempt.windows:
            energy_uj = round((each.energy_j or 0.0) * 1e6)
            kept_steps = [
                later.start_step + (later.at_evaluation and each.use is Use.TRAIN) for later in history[number + 1 :]
            ]
            lost_uj = 0
            if each.use in (Use.TRAIN, Use.EVALUATE) and kept_steps and each.until_step > (cut := min(kept_steps)):
                again = each.until_step - max(cut, each.first_step)
                steps = each.until_step - each.first_step
                lost_uj = energy_uj if cut <= each.first_step else energy_uj * again // steps
            found["lost"] += lost_uj
            part = {Use.TRAIN: "useful", Use.UNATTRIBUTED: "unattributed"}.get(each.use, "overhead")
            found[part] += energy_uj - lost_uj
    return found


def told(ledger: EnergyLedger) -> dict[str, int]:
    parts = ("useful", "lost", "overhead", "unattributed")
    return {part: uj(getattr(ledger, part)) for part in parts}


async def write(store: Store, worker: UUID, history: Sequence[Begun], order: Any) -> EnergyLedger:
    """The attempts one after another; all windows at the end, in any order, each twice."""
    id = uuid4()
    await store.execute(OPERATION, id=id)
    for number, begun in enumerate(history, 1):
        start = {"start": begun.start_step, "evaluation": begun.at_evaluation}
        await store.execute(ATTEMPT, id=id, n=number, worker=worker, **start)
    sent = [(number, each) for number, begun in enumerate(history, 1) for each in begun.windows] * 2
    order.shuffle(sent)
    for number, each in sent:
        await store.book(Held(id, number, worker), each)
    ledger = await store.energy(id)
    assert_seen_the_same(ledger, (await store.get(id)).energy)
    return ledger


def assert_seen_the_same(ledger: EnergyLedger, shown: EnergyView) -> None:
    assert shown.total_j == ledger.total.energy_j
    assert shown.known_j == ledger.total.known_j
    assert (shown.useful_j, shown.lost_j) == (ledger.useful.energy_j, ledger.lost.energy_j)
    assert (shown.overhead_j, shown.reason) == (ledger.overhead.energy_j, ledger.total.reason)
    for part in ("total", "useful", "lost", "overhead", "unattributed"):
        assert uj(getattr(ledger, part)) == sum(uj(getattr(attempt, part)) for attempt in ledger.attempts)
    assert all(adds_up(attempt) for attempt in ledger.attempts)


def test_any_history_adds_up_whatever_the_order(databases: Databases) -> None:
    """Against a plain model; and the last attempt, which makes joules lost, takes none away."""
    with asyncio.Runner() as runner:
        url = runner.run(databases.fresh())
        sessions = Sessions(url, pool_size=4)
        store = Store(sessions)
        worker = runner.run(store.worker())

        @settings(max_examples=40, database=None, suppress_health_check=list(HealthCheck))
        @given(histories(), st.randoms(use_true_random=False))
        def check(history: list[Begun], order: Any) -> None:
            ledger = runner.run(write(store, worker, history, order))
            assert adds_up(ledger)
            assert told(ledger) == modelled(history)
            in_sums = [w for b in history for w in b.windows if w.use is not Use.UNATTRIBUTED]
            assert uj(ledger.total) == sum(round((w.energy_j or 0.0) * 1e6) for w in in_sums)
            without_unknown = all(w.energy_j is not None for w in in_sums)
            if all(any(w.use is not Use.UNATTRIBUTED for w in b.windows) for b in history):
                assert (ledger.total.energy_j is not None) == without_unknown

        check()
        runner.run(sessions.dispose())
