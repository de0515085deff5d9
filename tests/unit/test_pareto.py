"""What is on the front of throughput and energy, ties and unknown values included; how figure and table show it."""

import math
import random

import pytest

from helpers.measured import measurement_study, without_joules
from ops_contract.study_results import GridGroup, GridResult, Statistic
from ops_studies import comparison, figures, pareto, plots


def test_the_front_is_what_no_other_point_betters() -> None:
    assert pareto.front([(80, 3.2), (110, 2.1), (330, 1.4), (520, 1.6)]) == [False, False, True, True]
    assert pareto.front([]) == []


@pytest.mark.parametrize(
    ("points", "on"),
    [
        ([(10, 1), (10, 1)], [True, True]),  # equal in both
        ([(10, 1), (10, 2)], [True, False]),
        ([(10, 1), (9, 1)], [True, False]),
        ([(10, 1), (10, 1), (11, 1)], [False, False, True]),
    ],
)
def test_equal_points_are_on_it_together_and_half_a_tie_is_bettered(
    points: list[tuple[float, float]], on: list[bool]
) -> None:
    assert pareto.front(points) == on


def test_what_is_not_known_is_not_on_it_and_keeps_nothing_from_it() -> None:
    points = [None, (math.inf, 1.0), (5.0, math.nan), (3.0, 0.5)]
    assert pareto.front(points) == [False, False, False, True]


def test_it_is_that_of_comparing_all_pairs() -> None:
    draws = random.Random(4)
    points = [(float(draws.randint(0, 12)), float(draws.randint(0, 12))) for _ in range(120)]

    def bettered(x: float, y: float) -> bool:
        return any(a >= x and b <= y and (a, b) != (x, y) for a, b in points)

    assert pareto.front(points) == [not bettered(*point) for point in points]


def test_the_figure_has_all_points_their_intervals_both_ways_and_the_front_as_stairs() -> None:
    panel = plots.throughput(measurement_study())

    bettered, best = panel.points
    assert [bettered.points, best.points] == [[(80, 3.2), (110, 2.1)], [(330, 1.4), (520, 1.6)]]
    assert best.intervals[0] == pytest.approx((1.375, 1.425))
    assert best.x_intervals[0] == (327.5, 332.5)
    assert best.names == ["batch_size=8, precision=float32", "batch_size=8, precision=bfloat16"]
    assert [line.points for line in panel.lines] == [[(330, 1.4), (330, 1.6), (520, 1.6)]]
    assert panel.notes == ["1 of 5 points left out: joules per token are not known"]
    drawn = figures.draw([panel])
    words = [text.get_text() for text in drawn.axes[0].texts]
    assert "batch_size=8, precision=bfloat16" in words
    assert len(drawn.axes[0].collections) == 4  # intervals of both, along both axes


def test_of_many_points_only_those_on_the_front_are_named() -> None:
    groups = [_point(n, float(n), 1.0 + n % 7) for n in range(30)]
    bettered, best = plots.throughput(GridResult(rows=[], groups=groups)).points
    assert (len(bettered.points) + len(best.points), bettered.names) == (30, ())
    assert len(best.names) == len(best.points)


def test_the_table_says_means_intervals_the_front_and_what_has_no_figures() -> None:
    result = measurement_study()
    head, _, *rows = comparison.markdown(result).splitlines()
    assert head == "| point | cycles | tokens/s | J/token | first token (s) | MFU | front |"
    assert rows[2] == "| batch_size=8 precision=float32 | 3 | 330 ± 2.5 | 1.4 ± 0.025 | 0.04 ± 0 | 0.165 | ★ |"
    assert rows[4] == "| batch_size=64 precision=float32 | 0 | – | – | – | – |  |"
    assert list(comparison.not_measured(result)) == [
        "batch_size=64 precision=float32 · cycle 0 failed: backend: out of memory, 4.1 GB wanted",
        "not measured: 2 cancelled",
    ]


def test_large_figures_are_said_in_full() -> None:
    assert comparison.said(Statistic(n=2, mean=12345.6, low=6345.6, high=18345.6)) == "12,346 ± 6,000"
    assert comparison.said(Statistic(n=1, mean=0.21784)) == "0.2178"
    assert comparison.said(None) == "–"


def test_without_joules_nothing_is_on_the_front_and_nothing_is_zero() -> None:
    result = without_joules(measurement_study())
    assert not plots.any_joules(result)
    assert plots.any_joules(measurement_study())
    assert "★" not in comparison.markdown(result)
    assert [row.split(" | ")[3] for row in comparison.markdown(result).splitlines()[2:]] == ["–"] * 5


def _point(n: int, speed: float, joules: float) -> GridGroup:
    metrics = {"tokens_per_s": Statistic(n=1, mean=speed), "j_per_output_token": Statistic(n=1, mean=joules)}
    return GridGroup(point={"config.batch_size": n}, metrics=metrics)
