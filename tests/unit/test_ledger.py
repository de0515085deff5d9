"""What sums of windows mean, without the rows that they are read from (test_store_energy has those)."""

from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops_backend.store.ledger import LIVE, Sum, view
from ops_backend.store.ledger_views import EPOCHS, Account, Rates, whole
from ops_contract.energy import Use
from ops_contract.ledger import EnergyLedger, Joules
from ops_contract.lifecycle import Outcome, Status
from ops_contract.operations import EnergyView

ID, WORKER = uuid4(), UUID(int=1)
COUNTS = ("windows", "unknown", "without_error", "energy_uj", "error_uj", "duration_us", "steps", "units")
COLUMNS = (*COUNTS, *(f"lost_{column}" for column in COUNTS), "split_windows", "split_unknown", "split_error_uj")


def row(**changes: Any) -> dict[str, Any]:
    """One window of ten joules that trained, but for the changes."""
    key = {"attempt": 1, "incarnation": WORKER, "device": "GPU-0", "source": "nvml_counter", "quality": "measured"}
    what = {"use": "train", "partly_shared": False, "reason": None, "windows": 1, "energy_uj": 10_000_000}
    return dict.fromkeys(COLUMNS, 0) | key | what | changes


def device(**changes: Any) -> dict[str, Any]:
    asked = (
        "power_max_w",
        "temperature_max_c",
        "memory_used_max_bytes",
        "sm_clock_mean_mhz",
        "utilization_mean_percent",
    )
    known = {"worker": "w", "known_us": 4_000_000, "baseline_w": 1.0, "baseline_uj": 4_000_000}
    return (
        row(duration_us=5_000_000) | dict.fromkeys(asked) | known | {"has_state": True, "without_baseline": 0} | changes
    )


def ledger(
    *entries: dict[str, Any],
    outcomes: tuple[str, ...] = (Outcome.COMPLETED,),
    devices: tuple[dict[str, Any], ...] = (),
    throttled: tuple[Any, ...] = (),
    epochs: tuple[dict[str, Any], ...] = (),
    rates: Rates = Rates(),  # noqa: B008 - it is frozen
) -> EnergyLedger:
    return whole(Account(ID, Status.COMPLETED, outcomes, entries), devices, throttled, epochs, rates)


UNMEASURED = {"quality": "none", "source": "none", "unknown": 1, "energy_uj": 0}

numbers = st.integers(0, 10**12)
sums = st.builds(Sum, numbers, numbers, numbers, numbers, numbers, st.none() | st.sampled_from("abc"))


@given(sums, sums)
def test_a_sum_of_two_has_what_both_have_and_the_first_of_their_reasons(one: Sum, other: Sum) -> None:
    both = one + other

    for name in ("energy_uj", "error_uj", "known", "unknown", "without_error"):
        assert getattr(both, name) == getattr(one, name) + getattr(other, name)
    assert both.reason == min([r for r in (one.reason, other.reason) if r], default=None)


@pytest.mark.parametrize(
    ("part", "joules"),
    [
        (Sum(), (0.0, 0.0, 0.0, None)),
        (Sum(5_000_000, 1_000_000, known=2, reason="why"), (5.0, 5.0, 1.0, None)),
        (Sum(5_000_000, 1_000_000, known=1, unknown=1, reason="why"), (None, 5.0, 1.0, "why")),
        (Sum(5_000_000, 1_000_000, known=2, without_error=1), (5.0, 5.0, None, None)),
        (Sum(unknown=1, reason="why"), (None, None, None, "why")),
    ],
)
def test_what_is_unknown_leaves_what_is_known(part: Sum, joules: tuple[Any, ...]) -> None:
    told = part.joules()

    assert (told.energy_j, told.known_j, told.error_j, told.reason) == joules


@pytest.mark.parametrize(
    ("changes", "per_step_j", "per_unit_j", "reason"),
    [
        ({"steps": 4, "units": 40}, 2.5, 0.25, None),
        ({"steps": 4}, 2.5, None, "no_units"),
        ({}, None, None, "no_steps"),
        ({"steps": 4, "units": 40, "unknown": 1, "reason": "device_lost"}, None, None, "device_lost"),
    ],
)
def test_joules_per_work_say_why_they_are_unknown(
    changes: dict[str, Any], per_step_j: float | None, per_unit_j: float | None, reason: str | None
) -> None:
    told = ledger(row(**changes)).per_work

    assert (told.per_step_j, told.per_unit_j, told.reason) == (per_step_j, per_unit_j, reason)


def test_work_counts_once_for_all_devices_of_an_attempt_and_less_what_was_done_again() -> None:
    first = {"steps": 10, "lost_steps": 3, "units": 100, "lost_units": 30, "duration_us": 7_000_000}
    found = ledger(
        row(**first),
        row(**first | {"device": "GPU-1", "steps": 11}),
        row(**first | {"incarnation": UUID(int=2)}),
        row(use="save", steps=99, units=99, duration_us=2_000_000),
        row(attempt=2, steps=5, units=50),
        outcomes=(Outcome.LOST, Outcome.COMPLETED),
    )

    assert (found.per_work.steps, found.per_work.units) == (8 + 5, 70 + 50)
    assert [(each.steps, each.lost_steps, each.units) for each in found.attempts] == [(8, 3, 70), (5, 0, 50)]
    assert [(each.number, each.duration_s) for each in found.attempts] == [(1, 9.0), (2, 0.0)]


def test_a_device_whose_quality_changed_on_the_way_did_the_work_of_both_parts() -> None:
    found = ledger(row(steps=10, units=100), row(steps=4, units=40, quality="upper_bound"))

    assert (found.per_work.steps, found.per_work.units) == (14, 140)


def test_an_attempt_without_windows_took_no_time_that_is_known() -> None:
    found = ledger(row(attempt=2), outcomes=(Outcome.LOST, LIVE))

    assert [each.duration_s for each in found.attempts] == [None, 0.0]


@pytest.mark.parametrize(
    ("changes", "energy_j", "idle_j", "reason"),
    [
        ({}, 6.0, 4.0, None),
        ({"baseline_uj": None}, 10.0, 0.0, None),
        ({"without_baseline": 1}, None, None, "no_baseline"),
        ({"without_baseline": 1, "quality": "upper_bound"}, 10.0, 0.0, None),
    ],
)
def test_what_is_above_idle_is_known_by_the_baselines_of_what_is_in_the_sums(
    changes: dict[str, Any], energy_j: float | None, idle_j: float | None, reason: str | None
) -> None:
    told = ledger(row(), devices=(device(**changes),)).above_idle

    assert (told.energy_j, told.idle_j, told.reason) == (energy_j, idle_j, reason)


def test_without_a_total_nothing_is_above_idle_and_nothing_costs() -> None:
    found = ledger(row(unknown=1, reason="device_lost"), devices=(device(),), rates=Rates(400.0, 0.5, "EUR"))

    for reason in (found.above_idle.reason, found.carbon.reason, found.cost.reason):
        assert reason == "device_lost"
    assert (found.above_idle.energy_j, found.carbon.co2_g, found.cost.amount) == (None, None, None)
    assert (found.carbon.g_per_kwh, found.cost.price_per_kwh, found.cost.currency) == (400.0, 0.5, "EUR")


def test_only_a_device_that_tells_its_state_was_not_slowed() -> None:
    silent, fine = ledger(row(), devices=(device(has_state=False),)), ledger(row(), devices=(device(),))

    assert (silent.thermal_throttle.throttled_s, silent.thermal_throttle.reason) == (None, "not_told")
    assert (fine.thermal_throttle.throttled_s, fine.thermal_throttle.reason) == ({}, None)
    assert [silent.devices[0].throttled_s, fine.devices[0].throttled_s] == [None, {}]


def test_a_device_is_told_with_its_mean_power_while_it_was_known_and_its_own_slowness() -> None:
    slow = {"device": "GPU-0", "incarnation": WORKER, "source": "nvml_counter", "quality": "measured"}
    slow |= {"reason": "hw_thermal", "throttled_us": 500_000, "longest_us": 250_000}
    others = [
        slow | each for each in ({"device": "GPU-1"}, {"incarnation": ID}, {"source": "rapl"}, {"quality": "none"})
    ]
    unmeasured = {"source": "none", "quality": "none", "known_us": 0, "unknown": 1, "reason": "no_meter"}

    found = ledger(
        row(),
        devices=(
            device(power_max_w=9.0, windows=3, unknown=1, reason="why", error_uj=1_000_000),
            device(**unmeasured),
            device(without_error=1),
        ),
        throttled=tuple(SimpleNamespace(**each) for each in (slow, *others)),
    )

    measured, bare, unsure = found.devices
    assert unsure.energy == Joules(energy_j=10.0, known_j=10.0, error_j=None, reason=None)
    assert (measured.power_mean_w, measured.power_max_w, measured.duration_s) == (2.5, 9.0, 5.0)
    assert measured.energy == Joules(energy_j=None, known_j=10.0, error_j=1.0, reason="why")
    assert (measured.throttled_s, measured.baseline_w) == ({"hw_thermal": 0.5}, 1.0)
    assert (measured.source, measured.quality, measured.worker, measured.worker_id) == (
        "nvml_counter",
        "measured",
        "w",
        WORKER,
    )
    assert (bare.source, bare.quality, bare.power_mean_w) == (None, None, None)
    assert (bare.energy.known_j, bare.energy.reason) == (None, "no_meter")
    assert found.thermal_throttle.throttled_s == {"hw_thermal": 5 * 0.25}


@pytest.mark.parametrize(("last", "left_out"), [(EPOCHS - 1, 0), (EPOCHS, 1), (EPOCHS + 41, 42)])
def test_epochs_that_are_left_out_are_counted(last: int, left_out: int) -> None:
    assert ledger(row(), epochs=(row(epoch=last),)).epochs_left_out == left_out
    assert ledger(row()).epochs_left_out == 0


def test_an_epoch_has_the_longest_time_of_each_attempt_and_what_it_takes_a_step() -> None:
    each = {"epoch": 3, "steps": 4, "units": 8}
    rows = (
        row(**each, duration_us=2_000_000),
        row(**each, device="GPU-1", duration_us=3_000_000),
        row(**each, attempt=2, duration_us=1_000_000),
        row(epoch=4, quality="upper_bound", windows=1),
        row(epoch=5, quality="none", unknown=1, energy_uj=0, reason="no_meter"),
        row(epoch=6),
        row(epoch=6, quality="upper_bound", device="GPU-1"),
    )
    shared_at_times = row(quality="upper_bound", device="GPU-1", partly_shared=True)

    three, four, five, six = ledger(row(), shared_at_times, epochs=rows).epochs

    assert (three.epoch, three.total_j, three.duration_s, three.steps, three.units) == (3, 30.0, 4.0, 8, 16)
    assert (three.per_step_j, three.per_unit_j, three.reason) == (3.75, 1.875, None)
    assert (four.epoch, four.total_j, four.known_j, four.reason) == (4, None, None, "shared_device")
    assert (five.epoch, five.total_j, five.known_j, five.reason) == (5, None, None, "no_meter")
    assert (six.epoch, six.total_j, six.known_j, six.reason) == (6, None, 10.0, "shared_device")


def test_what_a_device_used_while_it_was_shared_is_missing_where_it_is_in_the_sums_at_other_times() -> None:
    at_times = row(quality="upper_bound", partly_shared=True, windows=2, lost_windows=1, lost_energy_uj=4_000_000)
    always = row(quality="upper_bound", device="cpu-0")

    partly, beside = ledger(row(), at_times), ledger(row(), always)

    assert (partly.total.energy_j, partly.total.known_j, partly.total.reason) == (None, 10.0, "shared_device")
    assert (partly.useful.reason, partly.lost.reason) == ("shared_device", "shared_device")
    assert (beside.total.energy_j, beside.total.reason) == (10.0, None)
    for found in (partly, beside):
        assert found.upper_bound is not None
        assert found.upper_bound.known_j == 10.0


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([], "not_measured"),
        ([{"quality": "upper_bound"}], "shared_device"),
        ([UNMEASURED | {"reason": "rebooted"}, UNMEASURED | {"reason": "no_meter"}], "no_meter"),
        ([{"use": "unattributed"}], "not_measured"),
    ],
)
def test_of_an_ended_attempt_that_nothing_is_known_of_every_part_is_unknown(
    entries: list[dict[str, Any]], reason: str
) -> None:
    found = ledger(*(row(**each) for each in entries))

    parts = (found.total, found.useful, found.lost, found.overhead, *found.overhead_by_use.values())
    assert {(part.energy_j, part.known_j, part.reason) for part in parts} == {(None, None, reason)}
    assert list(found.overhead_by_use) == [Use.STARTUP, Use.RESTORE, Use.EVALUATE, Use.SAVE, Use.FINISH]


def test_a_gap_of_one_attempt_leaves_what_the_others_used_known() -> None:
    found = ledger(row(), row(use="save", energy_uj=1_000_000), outcomes=(Outcome.COMPLETED, Outcome.LOST))

    parts = (found.total, found.useful, found.overhead, found.overhead_by_use[Use.SAVE])
    assert [(part.energy_j, part.known_j) for part in parts] == [(None, 11.0), (None, 10.0), (None, 1.0), (None, 1.0)]
    assert (found.lost.energy_j, found.lost.reason) == (None, "not_measured")


@pytest.mark.parametrize(
    ("qualities", "worst"),
    [
        (["measured"], "measured"),
        (["measured", "estimated"], "estimated"),
        (["measured", "upper_bound"], "measured"),
        (["upper_bound"], "upper_bound"),
        (["none"], None),
    ],
)
def test_the_quality_is_the_worst_in_the_sums(qualities: list[str], worst: str | None) -> None:
    assert ledger(*(row(quality=quality, device=quality) for quality in qualities)).quality == worst


def test_what_is_unknown_and_lost_is_no_zero_that_was_kept() -> None:
    lost = {"windows": 1, "lost_windows": 1, "unknown": 1, "lost_unknown": 1, "energy_uj": 0, "reason": "no_meter"}

    found = ledger(row(**lost))

    assert {(part.energy_j, part.known_j) for part in (found.total, found.useful, found.lost)} == {(None, None)}


def test_what_is_lost_and_unknown_has_its_own_reason() -> None:
    kept = row(windows=2, lost_windows=1, unknown=1, reason="a device was lost")
    lost = row(device="GPU-1", windows=1, lost_windows=1, unknown=1, lost_unknown=1, energy_uj=0, reason="no_counter")

    found = ledger(kept, lost)

    assert (found.useful.reason, found.lost.reason) == ("a device was lost", "no_counter")


def test_an_epoch_tells_what_of_it_was_lost() -> None:
    (epoch,) = ledger(row(), epochs=(row(epoch=0, windows=2, lost_windows=1, lost_energy_uj=4_000_000),)).epochs

    assert (epoch.total_j, epoch.useful_j, epoch.lost_j, epoch.overhead_j) == (10.0, 6.0, 4.0, 0.0)


@pytest.mark.parametrize("status", list(Status))
def test_the_status_has_the_figures_of_the_ledger(status: Status) -> None:
    outcomes = (Outcome.LOST, Outcome.COMPLETED)
    entries = (
        row(error_uj=500_000, lost_windows=1, windows=2, lost_energy_uj=4_000_000),
        row(attempt=2, use="save", quality="estimated", energy_uj=1_000_000),
        row(attempt=2, use="unattributed", energy_uj=3_000_000),
        row(attempt=2, quality="upper_bound", device="cpu-0", energy_uj=7_000_000),
    )

    whole_ledger = whole(Account(ID, status, outcomes, entries), (), (), (), Rates())

    assert view(entries, outcomes, status) == EnergyView(
        total_j=11.0,
        known_j=11.0,
        error_j=0.5,
        useful_j=6.0,
        lost_j=4.0,
        overhead_j=1.0,
        unattributed_j=3.0,
        upper_bound_j=7.0,
        quality="estimated",
        provisional=status is not Status.COMPLETED,
        reason=None,
    )
    assert (whole_ledger.total.energy_j, whole_ledger.lost.energy_j) == (11.0, 4.0)
    assert whole_ledger.provisional == (status is not Status.COMPLETED)
