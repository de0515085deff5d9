"""What a track says of an interval is true within its error, however its meter ticks and whenever it is read."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_contract.energy import Quality, Source
from ops_worker.energy.meters import MeterLost, Reading
from ops_worker.energy.nvml import Look
from ops_worker.energy.track import COARSE_S, KEEP_S, Span, States, Track


class Ticking:
    """A meter that is read by nobody: the test adds its readings."""

    device = "GPU-a"
    quality = Quality.MEASURED

    def __init__(self, source: Source = Source.NVML_COUNTER) -> None:
        self.source = source

    def read(self) -> Reading:
        raise NotImplementedError

    def counter(self) -> float | None:
        return 0.0


class Course:
    """Power that changes every second."""

    def __init__(self, watts: list[float]) -> None:
        self._watts = watts
        self._joules = [sum(watts[:second]) for second in range(len(watts) + 1)]

    def joules(self, at_s: float) -> float:
        second = min(max(0, math.floor(at_s)), len(self._watts) - 1)
        return self._joules[second] + self._watts[second] * (at_s - second)

    def shown(self, at_s: float, tick_s: float) -> float:
        return self.joules(max(0.0, math.floor(at_s / tick_s) * tick_s))


WATTS = st.lists(st.floats(5, 700), min_size=20, max_size=20)
PAUSES = st.lists(st.floats(0.005, 0.6), min_size=20, max_size=200)


def read(course: Course, tick_s: float, pauses: list[float]) -> Track:
    track, at_s, later_s = Track(Ticking()), 0.0, itertools.cycle(pauses)
    while at_s < 19:
        track.add(Reading(at_s, course.shown(at_s, tick_s)))
        at_s += next(later_s)
    return track


@settings(max_examples=60)
@given(WATTS, PAUSES, st.sampled_from([0.02, 0.05, 0.1, 0.3]), st.floats(0, 15), st.floats(0, 15))
def test_the_truth_lies_within_the_error(watts, pauses, tick_s, one_s, other_s):
    course, (since_s, until_s) = Course(watts), sorted([one_s, other_s])
    track = read(course, tick_s, pauses)

    measured = track.between(since_s, until_s, now_s=19)

    assert measured is not None
    assert measured.energy_j is not None, measured.reason
    assert measured.energy_j >= 0
    truth = course.joules(until_s) - course.joules(since_s)
    assert abs(measured.energy_j - truth) <= measured.error_j + 1e-6


def test_what_came_after_the_last_tick_is_in_the_error():
    course = Course([5.0, 700.0, 700.0])
    track = Track(Ticking())
    for at_s in [0.0, 0.45, 0.95, 1.45, 1.95]:
        track.add(Reading(at_s, course.shown(at_s, tick_s=0.5)))

    measured = track.between(0.0, 1.44, now_s=2)

    assert course.joules(1.44) - measured.energy_j == pytest.approx(308, abs=1)
    assert measured.error_j > 308


@settings(max_examples=20)
@given(WATTS, PAUSES, st.lists(st.floats(0, 15), min_size=2, max_size=20, unique=True))
def test_windows_side_by_side_count_no_joule_twice(watts, pauses, edges):
    track = read(Course(watts), 0.1, pauses)
    edges.sort()

    parts = [track.between(*pair, now_s=19).energy_j for pair in itertools.pairwise(edges)]

    assert math.isclose(sum(parts), track.between(edges[0], edges[-1], now_s=19).energy_j, abs_tol=1e-6)


@settings(max_examples=20)
@given(WATTS, PAUSES, st.floats(1, 15))
def test_an_answer_is_given_once_a_reading_shows_what_came_after_and_stays(watts, pauses, until_s):
    course, track, answers, at_s, later_s = Course(watts), Track(Ticking()), [], 0.0, itertools.cycle(pauses)
    while at_s < 19:
        track.add(Reading(at_s, course.shown(at_s, 0.1)))
        answers.append((at_s, track.between(0.0, until_s, now_s=at_s)))
        at_s += next(later_s)

    given_at = [at_s for at_s, answer in answers if answer is not None]

    assert given_at
    assert min(given_at) >= until_s
    assert len({answer for _, answer in answers if answer is not None}) == 1


def test_hours_take_no_more_than_bounded_memory_and_an_edge_stays_what_it_was():
    track, edge_s, hours = Track(Ticking()), 100.03, 4
    for n in range(hours * 36_000):
        at_s = n / 10
        track.add(Reading(at_s, 300 * at_s))
        if n == 2000:
            before = track.between(50.0, edge_s, now_s=at_s)

    assert len(track._points) <= KEEP_S * 10 + 3
    assert len(track._coarse) <= hours * 3600 / COARSE_S + 1
    assert track.between(50.0, edge_s, now_s=at_s) == before
    after = track.between(edge_s, 14_000.0, now_s=at_s)
    assert math.isclose(after.energy_j, 300 * (14_000 - edge_s), rel_tol=1e-6)
    long = track.between(55.5, 14_000.0, now_s=at_s)
    assert abs(long.energy_j - 300 * (14_000 - 55.5)) <= long.error_j


def test_a_loss_is_said_even_where_the_points_around_it_were_dropped():
    track = Track(Ticking())
    for n in range(6000):
        if n == 105:
            track.fail(MeterLost("counter_fell"), n / 10)
        track.add(Reading(n / 10, 30 * (n if n < 105 else n - 100)))

    assert track.between(1.0, 590.0, now_s=600).reason == "counter_fell"
    assert track.between(30.0, 590.0, now_s=600).energy_j is not None


def test_a_loss_that_is_sure_is_said_at_once_and_one_that_may_pass_later():
    for reason, at_once in [("device_lost", "device_lost"), ("read_failed", None)]:
        track = Track(Ticking())
        for n in range(20):
            track.add(Reading(n / 10, 30 * n))
        track.fail(MeterLost(reason), 2.0)

        measured = track.between(1.0, 2.5, now_s=2.6)

        assert (measured and measured.reason) == at_once
        assert track.between(1.0, 2.5, now_s=9.0).reason == reason
        assert track.between(0.5, 1.5, now_s=9.0).energy_j is not None


@pytest.mark.parametrize("seed", range(3))
def test_states_that_were_merged_say_what_the_single_ones_say(seed):
    chance, states, at_s, samples = random.Random(seed), States(), 0.0, []
    for _ in range(3000):
        pause_s, bits, power_w = chance.uniform(0.01, 1), chance.choice([0, 4, 0x44]), chance.randrange(900)
        states.add(Span.of(at_s, at_s + pause_s, Look(power_w=power_w, sm_clock_mhz=power_w, throttle=bits), False))
        at_s += pause_s
        samples.append((pause_s, bits, power_w))

    span = states.between(0, at_s)

    assert span is not None
    assert span.throttled_s[4] == pytest.approx(sum(pause for pause, bits, _ in samples if bits & 4))
    assert span.throttled_s[0x40] == pytest.approx(sum(pause for pause, bits, _ in samples if bits & 0x40))
    assert span.look.power_w == max(power for _, _, power in samples)
    assert span.look.sm_clock_mhz == pytest.approx(sum(pause * power for pause, _, power in samples) / at_s)
    assert len(states._spans) + len(states._old) + len(states._coarse) < len(samples) / 2
