"""How often to save."""

from itertools import count
from math import expm1

import pytest

from ops_contract.agents import FailureRecord
from ops_contract.jobs import CheckpointEvery
from relight.training.interval import (
    Pace,
    SaveTimes,
    best_interval_s,
    bounded_s,
    mean_time_between_failures_s,
)

HOUR_S = 3600.0


def overhead(interval_s: float, stall_s: float, mtbf_s: float) -> float:
    """Wall time for a second of work when failures are exponential (Daly 2006, equation 20), without restarts."""
    return mtbf_s * expm1((interval_s + stall_s) / mtbf_s) / interval_s


@pytest.mark.parametrize("mtbf_s", [60.0, HOUR_S, 24 * HOUR_S])
@pytest.mark.parametrize("share", [1e-7, 1e-4, 0.01, 0.2])
def test_the_interval_is_where_the_expected_overhead_is_least(share: float, mtbf_s: float) -> None:
    stall_s = share * mtbf_s
    tried = (mtbf_s * 1.02**-n for n in range(600))
    best_s = min(tried, key=lambda interval_s: overhead(interval_s, stall_s, mtbf_s))

    chosen_s = best_interval_s(stall_s, mtbf_s)

    assert chosen_s == pytest.approx(best_s, rel=0.03)
    assert overhead(chosen_s, stall_s, mtbf_s) <= overhead(best_s, stall_s, mtbf_s) * 1.001


def test_values_by_hand() -> None:
    # sqrt(2 * 2 * 100) = 20, sqrt(2 / 200) = 0.1: 20 * (1 + 0.1 / 3 + 0.01 / 9) - 2
    assert best_interval_s(2.0, 100.0) == pytest.approx(18.68889, abs=1e-5)
    assert best_interval_s(200.0, 100.0) == 100.0
    assert mean_time_between_failures_s(FailureRecord()) == 24 * HOUR_S
    assert mean_time_between_failures_s(FailureRecord(running_s=12 * HOUR_S, failures=2)) == 12 * HOUR_S
    assert [bounded_s(s, 0.0) for s in (0.0, 5.0, 1e6)] == [1.0, 5.0, 1800.0]
    assert [bounded_s(5.0, 7.0), bounded_s(1e6, 2000.0)] == [7.0, 2000.0]


def test_seconds_are_counted_from_the_last_save() -> None:
    ticks = count()
    times = SaveTimes(saved_at_s=0.0, whole_s=0.0)
    notes: list[str] = []
    pace = Pace(CheckpointEvery(seconds=3), FailureRecord(), times, lambda: float(next(ticks)), notes.append)

    assert [pace.is_due() for _ in range(5)] == [False, False, False, True, True]
    times.saved_at_s = 4.0
    assert [pace.is_due() for _ in range(3)] == [False, False, True]
    assert notes == []


def test_auto_goes_by_the_newest_measurements_and_tells_what_changed_twofold() -> None:
    now_s = 0.0
    times = SaveTimes(saved_at_s=0.0, whole_s=0.1)
    notes: list[str] = []
    pace = Pace("auto", FailureRecord(), times, lambda: now_s, notes.append)

    def first_due_s() -> float:
        nonlocal now_s
        now_s = 0.0
        while not pace.is_due():
            now_s += 1
        return now_s

    assert first_due_s() == 132  # the bound of 0.1 s: sqrt(2 * 0.1 * 86400) = 131.4
    times.add_stall(0.09)
    assert first_due_s() == 125
    assert len(notes) == 1
    for _ in range(5):
        times.add_stall(0.001)
    assert first_due_s() == 14
    assert [note.split(":")[0] for note in notes] == ["a checkpoint every 2.19 min", "a checkpoint every 13.1 s"]
    assert "stops training for 1 ms" in notes[1]
    times.commit_s = 20.0
    assert first_due_s() == 20


def test_what_auto_tells_is_in_numbers_as_people_write_them() -> None:
    times = SaveTimes(saved_at_s=0.0, whole_s=0.16)
    notes: list[str] = []
    pace = Pace("auto", FailureRecord(running_s=1234.4 * 3600, failures=0), times, lambda: 0.0, notes.append)
    times.add_stall(0.16)
    pace.is_due()
    assert "stops training for 160 ms" in notes[0]
    assert "of 1,234 h of attempts" in notes[0]
