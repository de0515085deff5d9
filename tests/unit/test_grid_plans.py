"""A grid's points, orders and keys, and what is left out of it and why."""

import json
import random
from collections import Counter
from itertools import pairwise
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.study_jobs import DIGESTS, base
from ops_contract.plans import ChildPlan, GridAbout, Plan
from ops_contract.studies import MAX_CHILDREN
from ops_studies import grid
from ops_studies.keys import content_key
from ops_studies.orders import williams_row, williams_rows
from ops_studies.points import Refused, Unplannable, named

AXES = {"config.d_model": [64, 128], "execution.learning_rate": [0.1, 0.01]}


def planned(study: dict[str, Any], **spec: Any) -> Plan:
    return grid.plan(base({"type": "grid"} | study, **spec))


def about(child: ChildPlan) -> GridAbout:
    assert isinstance(child.about, GridAbout)
    return child.about


def values(plan: Plan) -> list[tuple[Any, ...]]:
    return [tuple(about(child).point.values()) for child in plan.children]


def order(study: dict[str, Any]) -> list[tuple[int, int]]:
    """(d_model, cycle) of the children of a grid over d_model 0, 4, 8, …"""
    return [(child.config["d_model"], about(child).cycle) for child in planned(study).children]


# Points


def test_the_last_axis_changes_fastest_and_experiments_come_after_the_product() -> None:
    plan = planned({"axes": AXES, "experiments": [{"config.dropout": 0.5}, {}]})

    assert values(plan) == [(64, 0.1), (64, 0.01), (128, 0.1), (128, 0.01), (0.5,), ()]
    assert plan.children[2].config == {"d_model": 128, "n_head": 4, "dropout": 0.0}
    assert plan.children[2].execution.learning_rate == 0.1
    assert [child.name for child in plan.children[3:]] == ["d_model=128 learning_rate=0.01", "dropout=0.5", "base"]


def test_every_alternative_is_combined_with_every_value_of_the_axes() -> None:
    pairs = [{"execution.optimizer": "sgd", "execution.learning_rate": 1}, {"execution.optimizer": "adamw"}]
    plan = planned({"axes": {"config.d_model": [64, 128]}, "alternatives": pairs})

    assert values(plan) == [(64, "sgd", 1), (64, "adamw"), (128, "sgd", 1), (128, "adamw")]
    assert values(planned({"alternatives": pairs})) == [("sgd", 1), ("adamw",)]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=30)
def test_there_are_as_many_children_as_the_product_says(
    lengths: list[int], alternatives: int, experiments: int, cycles: int
) -> None:
    study = {
        "axes": {f"env.AXIS_{i}": list(range(length)) for i, length in enumerate(lengths)},
        "alternatives": [{"env.ALTERNATIVE": i} for i in range(alternatives)],
        "experiments": [{"env.EXPERIMENT": i} for i in range(experiments)],
        "cycles": cycles,
    }
    plan = planned(study)

    assert len(plan.children) == (prod(lengths) * (alternatives or 1) + experiments) * cycles
    assert len({child.key for child in plan.children}) == len(plan.children)
    assert plan.skipped == []


def test_a_point_is_written_over_the_base_wherever_its_path_leads() -> None:
    point = {
        "config.block.attention.heads": 2,
        "execution.checkpoint_every": {"steps": 5},
        "env.LEVEL": 3,
        "env.FAST": True,
        "env.OLD": None,
        "resources.cores": 2,
    }
    [child] = planned({"experiments": [point]}, config={"block": {"size": 1}}, env={"OLD": "x", "SAME": "y"}).children

    assert child.config["block"] == {"size": 1, "attention": {"heads": 2}}
    assert child.execution.checkpoint_every.steps == 5  # type: ignore[union-attr]  # one that was given
    assert child.env == {"LEVEL": "3", "FAST": "true", "SAME": "y"}
    assert child.resources.cores == 2


def test_arguments_are_appended_to_a_command() -> None:
    points = [
        {"args.lr": 0.1, "args.model": "gpt", "args.model.size": "big one", "args.amp": True},
        {"args.amp": False, "args.lr": None},
    ]
    plan = planned({"experiments": points}, command=["python", "train.py"])

    program = ["python", "train.py"]
    assert [child.command for child in plan.children] == [
        [*program, "--lr=0.1", "--model=gpt", "--model.size=big one", "--amp"],
        program,
    ]


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ({"config.d_model": 6}, "config: d_model 6 is no multiple of n_head"),
        ({"config.widht": 6}, "config.widht: no such field"),
        ({"execution.lerning_rate": 1}, "execution.lerning_rate: no such field; did you mean learning_rate?"),
        ({"execution.learning_rate": "fast"}, "execution.learning_rate: must be a number"),
        ({"execution.scheduler": "multistep"}, "execution.scheduler_milestones: scheduler multistep needs at least"),
        ({"execution.checkpoint_monitor": "bleu"}, "this workload does not report 'bleu'; it reports val_loss, accur"),
        ({"config.d_model.x": 6}, "config.d_model.x: config.d_model is no object"),
        ({"config.block": {}, "config.block.size": 1}, "config.block and config.block.size write the same field"),
        ({"args.lr": 1}, "args.lr: only a command has arguments"),
        ({"env.OPS_HOME": 1}, "names that begin with OPS_"),
        ({"env.TOKEN": 1}, "env and secrets both name TOKEN"),
        ({"resources.cores": 0}, "resources.cores: Input should be greater than or equal to 1"),
    ],
)
def test_what_the_job_or_the_workload_refuses_is_skipped_and_says_why(point: dict[str, Any], reason: str) -> None:
    plan = planned({"experiments": [{}, point]}, secrets=["TOKEN"], config={"d_model": 64})

    assert len(plan.children) == 1
    [skipped] = plan.skipped
    assert skipped.what == named(point)
    assert reason in skipped.reason


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ({"config.d_model": 6}, "a command has neither workload nor config"),
        ({"execution.learning_rate": 1}, "execution.learning_rate: does nothing for a command"),
    ],
)
def test_a_command_has_no_config_and_few_knobs(point: dict[str, Any], reason: str) -> None:
    [skipped] = planned({"experiments": [{}, point]}, command=["true"]).skipped

    assert reason in skipped.reason


def test_what_follows_from_a_value_is_resolved_for_each_point() -> None:
    points = [{"execution.checkpoint_monitor": name} for name in ("val_loss", "accuracy")]

    assert [c.execution.checkpoint_mode for c in planned({"experiments": points}).children] == ["min", "max"]


def test_a_grid_without_a_valid_point_says_what_is_wrong_with_each() -> None:
    with pytest.raises(Unplannable, match=r"d_model=6: config: d_model 6 is no multiple") as few:
        planned({"axes": {"config.d_model": [6, 7]}})
    with pytest.raises(Unplannable) as many:
        planned({"axes": {"config.d_model": [4 * i + 1 for i in range(100)]}})

    assert [problem.field for problem in few.value.problems] == ["study", "study"]
    assert len(many.value.problems) == 21
    assert many.value.problems[-1].problem == "and 80 more like these"


@pytest.mark.parametrize(
    ("study", "field"),
    [
        ({"axes": {f"config.x{i}": list(range(1000)) for i in range(20)}}, "study.axes"),
        ({"axes": {"config.dropout": [i / 1000 for i in range(1000)]}, "cycles": 3}, "study.cycles"),
    ],
)
def test_more_children_than_a_study_may_have_are_refused_before_they_are_made(
    study: dict[str, Any], field: str
) -> None:
    with pytest.raises(Unplannable, match=f"at most {MAX_CHILDREN:,}") as refused:
        planned(study)

    assert refused.value.problems[0].field == field


def test_a_field_that_is_an_axis_and_in_an_alternative_is_refused() -> None:
    with pytest.raises(Unplannable, match=r"study.alternatives.1: config.d_model is an axis too"):
        planned({"axes": AXES, "alternatives": [{}, {"config.d_model": 1}]})


def test_names_are_readable_short_and_without_control_characters() -> None:
    long = {"config.note": "x" * 300 + "\n", "execution.seed": 1, "config.seed": 2}

    assert named({"execution.seed": 1, "config.seed": 2}) == "execution.seed=1 config.seed=2"
    assert named({"args.text": "a\n\tb"}, " · cycle 2") == "text=a b · cycle 2"
    assert len(named(long, " · cycle 2")) == 200
    assert named(long, " · cycle 2").endswith("x… · cycle 2")


# Cycles and orders


def test_a_trainings_cycles_have_seeds_of_their_own() -> None:
    study = {"axes": {"config.d_model": [64, 128]}, "cycles": 3}

    def seeds(**spec: Any) -> list[int]:
        return [child.execution.seed for child in planned(study, **spec).children]

    assert seeds(execution={"seed": 5}) == [5, 6, 7, 5, 6, 7]
    study["vary_seed"] = False
    assert seeds(execution={"seed": 5}) == [5] * 6
    assert len({child.key for child in planned(study).children}) == 6


def test_a_commands_cycles_differ_only_in_their_key() -> None:
    one, two = planned({"experiments": [{}], "cycles": 2}, command=["true"]).children

    assert (one.key, one.name) != (two.key, two.name)
    assert one.model_dump(exclude={"key", "name", "about"}) == two.model_dump(exclude={"key", "name", "about"})


def test_a_point_whose_last_cycle_would_have_no_seed_is_skipped() -> None:
    points = [{}, {"execution.seed": 2**63 - 2}]
    [skipped] = planned({"experiments": points, "cycles": 3}).skipped

    assert "execution.seed" in skipped.reason
    assert planned({"experiments": points, "cycles": 2}).skipped == []


SIZES = {"axes": {"config.d_model": [0, 4, 8]}, "cycles": 3}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sequential", [(size, cycle) for size in (0, 4, 8) for cycle in range(3)]),
        ("interleave", [(size, cycle) for cycle in range(3) for size in (0, 4, 8)]),
        ("reverse", [(0, 0), (4, 0), (8, 0), (8, 1), (4, 1), (0, 1), (0, 2), (4, 2), (8, 2)]),
        ("latin_square", [(0, 0), (4, 0), (8, 0), (8, 1), (4, 1), (0, 1), (4, 2), (8, 2), (0, 2)]),
    ],
)
def test_orders(name: str, expected: list[tuple[int, int]]) -> None:
    assert order(SIZES | {"order": name}) == expected


def test_a_shuffle_is_another_one_in_each_cycle_and_the_same_one_again() -> None:
    study = {"axes": {"config.d_model": list(range(0, 80, 4))}, "cycles": 3, "order": "shuffle", "seed": 7}
    once = order(study)

    cycles = [[size for size, at in once if at == cycle] for cycle in range(3)]
    assert [cycle for _, cycle in once] == sorted(cycle for _, cycle in once)
    assert all(sorted(each) == list(range(0, 80, 4)) for each in cycles)
    assert len({tuple(each) for each in cycles}) == 3
    assert order(study) == once
    assert order(study | {"seed": 8}) != once


def test_a_shuffle_prefers_no_place() -> None:
    """Each of six orders of three points, over 600 cycles: 100 expected, and a chi-squared of 20.5 is one in 1,000."""
    pairs = order({"axes": {"config.d_model": [0, 4, 8]}, "cycles": 600, "order": "shuffle"})
    found = Counter(tuple(size for size, _ in pairs[at : at + 3]) for at in range(0, len(pairs), 3))

    assert len(found) == 6
    assert sum((count - 100) ** 2 / 100 for count in found.values()) < 20.5


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13, 20])
def test_a_latin_square_is_balanced(n: int) -> None:
    rows = [williams_row(n, number) for number in range(williams_rows(n))]
    places = Counter((place, each) for row in rows for place, each in enumerate(row))
    neighbours = Counter(pair for row in rows for pair in pairwise(row))

    assert len(rows) == (n if n % 2 == 0 or n == 1 else 2 * n)
    assert all(sorted(row) == list(range(n)) for row in rows)
    assert places == {(place, each): len(rows) // n for place in range(n) for each in range(n)}
    assert neighbours == {(a, b): len(rows) // n for a in range(n) for b in range(n) if a != b}


@pytest.mark.parametrize(("cycles", "warned"), [(3, True), (6, False), (12, False)])
def test_a_latin_square_that_is_not_whole_is_warned_of(cycles: int, warned: bool) -> None:
    plan = planned(SIZES | {"cycles": cycles, "order": "latin_square"})

    assert [f"over 6 cycles of 3 points, and multiples of it; not over {cycles}" in each for each in plan.warnings] == (
        [True] if warned else []
    )


# Keys


def test_points_that_come_to_the_same_job_run_once_a_cycle() -> None:
    points: list[dict[str, Any]] = [
        {},
        {"config.d_model": 64},
        {"config.dropout": 0},
        {"execution.learning_rate": 1e-3},
    ]
    plan = planned({"experiments": [*points, {"config.d_model": 128}], "cycles": 2})

    assert values(plan) == [(), (), (128,), (128,)]
    assert [(each.what, each.reason) for each in plan.skipped] == [
        (named(point), "comes to the same job as base") for point in points[1:]
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def shuffled(value: Any, draw: random.Random) -> Any:
    """The same value, with its names in another order."""
    if isinstance(value, dict):
        return {name: shuffled(value[name], draw) for name in draw.sample(list(value), len(value))}
    return [shuffled(each, draw) for each in value] if isinstance(value, list) else value


def as_a_browser_writes_it(value: Any) -> Any:
    return json.loads(json.dumps(value), parse_float=lambda text: float(text) if "." not in text else _whole(text))


def _whole(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5), st.randoms())
@settings(max_examples=100)
def test_equal_jobs_have_equal_keys(config: dict[str, Any], draw: random.Random) -> None:
    job = base({"type": "grid", "experiments": [{}]}).job
    key = content_key(job.model_copy(update={"config": config}), DIGESTS)

    for same in (shuffled(config, draw), json.loads(json.dumps(config)), as_a_browser_writes_it(config)):
        assert content_key(job.model_copy(update={"config": same}), dict(reversed(DIGESTS.items()))) == key


@given(json_values, json_values)
@settings(max_examples=100)
def test_other_configs_have_other_keys(one: Any, two: Any) -> None:
    job = base({"type": "grid", "experiments": [{}]}).job
    keys = [content_key(job.model_copy(update={"config": {"x": value}}), DIGESTS) for value in (one, two)]

    assert (keys[0] == keys[1]) == _same(one, two)


def _same(one: Any, two: Any) -> bool:
    """As Python says, but for True == 1."""
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


@pytest.mark.parametrize(
    "change",
    [
        {"workload": "digits"},
        {"config": {"d_model": 128}},
        {"execution": {"seed": 1}},
        {"execution": {"num_workers": 1}},
        {"env": {"A": "1"}},
        {"secrets": ["A"]},
        {"workdir": "sub"},
        {"artifacts": ["out/**"]},
        {"resources": {"cores": 1}},
        {"workload": "mine:Model", "code": {"sha256": "a" * 64}},
        {"command": ["true"]},
    ],
    ids=str,
)
def test_whatever_decides_a_result_is_in_the_key(change: dict[str, Any]) -> None:
    def key(**spec: Any) -> str:
        return planned({"experiments": [{}]}, **spec).children[0].key

    assert key(**change) != key()


def test_other_code_and_other_data_are_other_keys_and_what_git_said_is_not() -> None:
    def key(digests: dict[str, str | None] = DIGESTS, **code: Any) -> str:
        spec = {"workload": "mine:Model", "code": {"sha256": "a" * 64} | code}
        return planned({"experiments": [{}]}, digests=digests, **spec).children[0].key

    changed: list[dict[str, str | None]] = [DIGESTS | {name: value} for name in DIGESTS for value in ("e" * 64, None)]
    assert len({key(), *map(key, changed)}) == 5
    assert key(commit="abc", dirty=True) == key()


def test_a_key_is_the_same_under_every_version_of_the_code() -> None:
    """A new knob changes it, and unfinished studies run their children again: then say so in the changelog."""
    [child] = planned({"experiments": [{}]}, config={"d_model": 64}).children

    assert child.key == "1d60bebceb568df137b34cdae7112fdc0795517930a07cf1ef81d9f67020f66d"


def test_a_refused_point_leaves_the_base_as_it_was() -> None:
    study = base({"type": "grid", "experiments": [{}]}, config={"block": {"size": 1}})
    with pytest.raises(Refused):
        study.at({"config.block.size": 2, "config.n_head": 5})

    assert study.job.config == {"block": {"size": 1}}
