"""The lines of the one table of `make bench`: what is compared, and when a goal is reached."""

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import lines


def test_a_ratio_is_of_the_values_of_the_same_round() -> None:
    line = lines.ratio("poll", "bare", [10.0, 30.0, 20.0], [20.0, 30.0, 80.0], "answers/s", "≥", 0.5)

    assert line.figure == [0.5, 1.0, 0.25]
    assert line.figure_unit == "×"


def test_beyond_is_a_difference_of_the_same_round_in_the_same_unit() -> None:
    line = lines.beyond("restart", "a bare one", [5.0, 7.0], [4.0, 4.0], "s", 2.0)

    assert line.figure == [1.0, 3.0]
    assert (line.figure_unit, line.sign, line.goal) == ("s", "≤", 2.0)


def test_a_limit_is_of_ours_alone() -> None:
    line = lines.limit("start", [3.0, 4.0], "s", 3.5)

    assert line.figure == line.ours
    assert not line.theirs
    assert line.is_reached


@pytest.mark.parametrize("make", [lines.ratio, lines.beyond])
def test_rounds_that_do_not_pair_are_refused(make: object) -> None:
    rest = ("s", "≤", 1.0) if make is lines.ratio else ("s", 1.0)

    with pytest.raises(ValueError, match="zip"):
        make("a", "b", [1.0, 2.0], [1.0], *rest)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("sign", "goal", "reached"), [("≤", 2.0, True), ("≤", 1.9, False), ("≥", 2.0, True), ("≥", 2.1, False)]
)
def test_a_goal_is_reached_by_the_median_alone(sign: str, goal: float, reached: bool) -> None:
    line = lines.ratio("a", "b", [1.0, 2.0, 90.0], [1.0, 1.0, 1.0], "s", sign, goal)  # type: ignore[arg-type]

    assert line.is_reached is reached


def test_every_way_has_a_value_of_each_round_and_another_one_begins_each_time() -> None:
    order: list[str] = []

    def way(name: str) -> Iterator[float]:
        for value in (1.0, 2.0, 3.0):
            order.append(name)
            yield value

    ours, theirs = way("ours"), way("theirs")

    values = lines.in_turn(3, {"ours": lambda: next(ours), "theirs": lambda: next(theirs)})

    assert values == {"ours": [1.0, 2.0, 3.0], "theirs": [1.0, 2.0, 3.0]}
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_a_table_has_median_spread_figure_and_goal_and_marks_what_is_missed() -> None:
    reached = lines.ratio("poll", "bare", [50.0, 60.0, 40.0], [100.0, 100.0, 100.0], "answers/s", "≥", 0.4)
    missed = lines.limit("start", [3.0], "s", 2.0)

    head, _, first, second = lines.table([reached, missed]).splitlines()

    assert head.count("|") == first.count("|") == second.count("|")
    assert first == (
        "| poll | 50.0 (40.0 to 60.0) answers/s | bare | 100 (100 to 100) answers/s | "
        "0.500 (0.400 to 0.600) × | ≥ 0.4 × | yes |"
    )
    assert second == "| start | 3.00 s | the goal itself | – | – | ≤ 2 s | **no** |"


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    parser = ArgumentParser()
    lines.add_option(parser)
    given = parser.parse_args(["--lines", str(tmp_path / "lines.json")])
    line = lines.beyond("restart", "a bare one", [5.0, 7.0], [4.0, 4.0], "s", 2.0)

    lines.write(given.lines, [line])

    assert lines.read(given.lines) == [line]


def test_nothing_is_written_where_nobody_asked() -> None:
    lines.write(None, [lines.limit("start", [3.0], "s", 2.0)])
