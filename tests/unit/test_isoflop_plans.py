"""Which sizes an IsoFLOP sweep trains on how many tokens, and what it says of those that it does not."""

import tracemalloc
from itertools import combinations, groupby, pairwise
from math import ceil, dist, log
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from helpers.study_jobs import base
from ops_contract.jobs import JobSpec
from ops_contract.plans import ChildPlan, IsoFlopAbout, Plan
from ops_contract.studies import IsoFlop, SizeRange
from ops_studies import isoflop
from ops_studies.isoflop import Candidate, Data, spread
from ops_studies.points import Unplannable

SIZES = list(range(4, 260, 4))
PLENTY = Data(samples=10**9, units_per_sample=64.0)
STUDY = {"type": "isoflop", "budgets": [1e10, 1e11, 1e12], "size": "config.d_model", "sizes": SIZES, "per_budget": 5}


def candidates(sizes: list[int] = SIZES) -> list[Candidate]:
    """N = 12 d² + 256 d, as of a transformer's block and its embedding."""
    study = IsoFlop.model_validate(STUDY)
    return [Candidate.of(study, size, 12 * size**2 + 256 * size, 256 * size, counted=0) for size in sizes]


def planned(
    data: Data = PLENTY, found: list[Candidate] | None = None, spec: dict[str, Any] | None = None, **study: Any
) -> Plan:
    return isoflop.plan(base(STUDY | study, **spec or {}), candidates() if found is None else found, data)


def about(child: ChildPlan) -> IsoFlopAbout:
    assert isinstance(child.about, IsoFlopAbout)
    return child.about


def by_budget(plan: Plan) -> dict[float, list[ChildPlan]]:
    return {budget: list(each) for budget, each in groupby(plan.children, key=lambda child: about(child).budget)}


# Lengths


@given(
    st.floats(1e9, 1e15),
    st.floats(1.0, 2048.0),
    st.integers(1, 4),
    st.booleans(),
    st.integers(1, 64),
    st.integers(1, 50),
)
@settings(max_examples=60)
def test_each_training_spends_its_budget_to_half_a_sample_and_is_admissible(
    budget: float, units: float, accumulate: int, repeat: bool, batch: int, min_steps: int
) -> None:
    data, spec = Data(200_000, units), {"execution": {"batch_size": batch, "accumulate_grad_batches": accumulate}}
    bounds = (2.0, 200.0)
    study = {"budgets": [budget], "tokens_per_param": bounds, "repeat_data": repeat, "min_steps": min_steps}
    try:
        plan = planned(data, spec=spec, **study)
    except Unplannable as error:
        assert "would have" in str(error)  # noqa: PT017  # most of them plan
        return
    for child in plan.children:
        run, samples = about(child), child.execution.max_samples or 0
        assert abs(samples * units * run.flops_per_token - budget) <= units * run.flops_per_token / 2 * (1 + 1e-9)
        assert run.tokens == round(samples * units)
        assert bounds[0] <= run.tokens / run.params <= bounds[1]
        assert ceil(samples / (batch * accumulate)) >= min_steps
        assert (child.execution.max_epochs - 1) * data.samples < samples <= child.execution.max_epochs * data.samples
        assert repeat or child.execution.max_epochs == 1


def test_updates_are_counted_as_the_engine_does_with_a_short_one_at_each_epochs_end() -> None:
    """25 samples of epochs of 10, 4 to an update: 3, 3 and 2."""
    [size] = candidates([4])
    budget = 25 * size.flops_per_token
    data, spec = Data(10, 1.0), {"execution": {"batch_size": 2, "accumulate_grad_batches": 2}}
    study = {"budgets": [budget], "repeat_data": True, "tokens_per_param": (1e-9, 1e9)}

    assert len(planned(data, [size], spec, min_steps=8, **study).children) == 1
    with pytest.raises(Unplannable, match="1 would have fewer than 9 updates"):
        planned(data, [size], spec, min_steps=9, **study)


def test_the_plan_says_what_it_costs_and_what_data_it_needs() -> None:
    plan = planned(Data(2_000_000, 64.0))
    tokens = [about(child).tokens for child in plan.children]

    assert plan.flops == pytest.approx(5 * sum(STUDY["budgets"]), rel=1e-4)  # type: ignore[arg-type]  # floats
    assert plan.tokens_needed == max(tokens)
    assert plan.tokens_there == 128_000_000


# Sizes


rising = st.lists(st.integers(1, 10**9), min_size=2, max_size=9, unique=True).map(sorted)


@given(rising, st.integers(1, 6))
@example([8, 10, 21, 47, 51, 57], 4)  # by absolute distances it would be another choice
@settings(max_examples=100)
def test_no_other_sizes_are_nearer_to_an_even_spacing(params: list[int], count: int) -> None:
    chosen = spread(params, count)
    count = min(count, len(params))
    ends = log(params[0]), log(params[-1])
    targets = np.linspace(*ends, count) if count > 1 else [sum(ends) / 2]

    assert len(set(chosen)) == count
    assert chosen == sorted(chosen)
    distances = [dist([log(params[i]) for i in each], targets) for each in combinations(range(len(params)), count)]
    assert dist([log(params[i]) for i in chosen], targets) <= min(distances) + 1e-9


def test_sizes_rise_in_nearly_even_ratios_over_all_that_is_admissible() -> None:
    for children in by_budget(planned(budgets=[1e12, 1e13])).values():
        params = [about(child).params for child in children]
        steps = [log(b / a) for a, b in pairwise(params)]
        assert len(params) == 5
        assert max(steps) / min(steps) < 1.4
        ratios = [about(child).tokens / about(child).params for child in children]
        assert ratios[0] > 20 > ratios[-1]


@pytest.mark.parametrize(
    ("study", "n", "flops"),
    [
        ({}, 100, 600.0),
        ({"embeddings": "excluded"}, 60, 360.0),
        ({"flops": "counted"}, 100, 777.0),
        ({"flops": "counted", "embeddings": "excluded"}, 60, 777.0),
    ],
)
def test_parameters_and_flops_are_counted_as_the_study_declares(study: dict[str, Any], n: int, flops: float) -> None:
    found = Candidate.of(IsoFlop.model_validate(STUDY | study), 8, params=100, embedding_params=40, counted=777.0)

    assert found == Candidate(8, n, flops)


def test_the_sizes_to_measure_are_jobs_and_those_that_the_workload_refuses_say_why() -> None:
    sizes = {"low": 1, "high": 12, "multiple_of": 2}
    jobs, skipped = isoflop.sizes(base(STUDY | {"sizes": sizes}))

    assert {size: job.config["d_model"] for size, job in jobs.items()} == {4: 4, 8: 8, 12: 12}
    assert [each.what for each in skipped] == ["config.d_model=2", "config.d_model=6", "config.d_model=10"]
    assert "is no multiple of n_head" in skipped[0].reason


def test_a_size_with_the_parameters_of_a_smaller_one_is_skipped() -> None:
    found = candidates([4, 8, 12])
    plan = planned(found=[*found, Candidate(13, found[2].params, 1.0), Candidate(1, 0, 0.0)])

    reasons = {each.what: each.reason for each in plan.skipped}
    assert reasons["config.d_model=13"] == f"has {found[2].params:,} parameters, as config.d_model=12 has"
    assert reasons["config.d_model=1"] == "no parameters or no FLOPs, as the study counts them"


def test_a_field_that_is_no_size_is_refused() -> None:
    with pytest.raises(Unplannable, match=r"study.size: config.d_model does not change how many parameters"):
        planned(found=[Candidate(size, 1000, 6000.0) for size in SIZES])


# Children


def test_small_budgets_come_first_and_each_seed_is_a_whole_curve() -> None:
    plan = planned(budgets=[1e12, 1e10], seeds=2, per_budget=3, spec={"execution": {"seed": 7}})
    runs = [about(child) for child in plan.children]

    assert [run.budget for run in runs] == [1e10] * 6 + [1e12] * 6
    assert [run.seed for run in runs] == [7, 7, 7, 8, 8, 8] * 2
    assert [child.execution.seed for child in plan.children] == [run.seed for run in runs]
    assert [run.size for run in runs[:3]] == sorted(run.size for run in runs[:3]) == [run.size for run in runs[3:6]]
    assert len({child.key for child in plan.children}) == 12
    assert plan.children[3].name == f"C=1e+10 d_model={runs[3].size} seed=8"


def test_the_children_keep_the_knobs_of_the_base() -> None:
    spec = {"execution": {"scheduler": "cosine", "checkpoint_every": {"steps": 9}}, "config": {"dropout": 0.5}}
    child = planned(spec=spec).children[-1]

    assert child.config == {"d_model": about(child).size, "n_head": 4, "dropout": 0.5}
    assert child.execution.scheduler == "cosine"
    assert child.execution.checkpoint_every.steps == 9  # type: ignore[union-attr]  # one that was given
    assert child.execution.max_steps is None


@pytest.mark.parametrize("reference", [None, 10_000.0])
def test_the_learning_rate_goes_by_the_rule(reference: float | None) -> None:
    rule = {"power": -0.5, "reference_params": reference}
    plan = planned(learning_rate_rule=rule, spec={"execution": {"learning_rate": 0.02}})
    smallest = min(about(child).params for child in plan.children)

    for child in plan.children:
        expected = 0.02 * (about(child).params / (reference or smallest)) ** -0.5
        assert child.execution.learning_rate == pytest.approx(expected, rel=1e-12)
    assert {child.execution.learning_rate for child in planned().children} == {1e-3}


def test_budgets_that_come_to_the_same_trainings_run_them_once() -> None:
    plan = planned(budgets=[1e10, 1e10 * (1 + 1e-9)], per_budget=3)

    assert len(plan.children) == 3
    assert plan.skipped[0].reason == f"comes to the same training as {plan.children[0].name}"


def test_a_child_that_the_job_refuses_is_skipped_and_says_why() -> None:
    plan = planned(seeds=2, spec={"execution": {"seed": 2**63 - 1}})

    assert len(plan.children) == len(plan.skipped) == 15
    assert "execution.seed" in plan.skipped[0].reason


# What it warns of and refuses


def test_a_budget_with_too_few_sizes_says_what_the_others_would_have() -> None:
    plan = planned(found=candidates([8, 16, 24, 128]), budgets=[1e10, 1e11])

    assert [len(children) for children in by_budget(plan).values()] == [3, 2]
    assert plan.warnings == [
        "budget 1e+10: 3 of 5 sizes; 1 would have fewer than 0.5 tokens per parameter",
        "budget 1e+11: 2 of 5 sizes; no parabola goes through fewer than 3; 1 would have more than 1000 tokens per "
        "parameter, 1 would have fewer than 0.5 tokens per parameter",
    ]


def test_a_budget_without_any_size_is_skipped() -> None:
    plan = planned(budgets=[1e3, 1e10, 1e11])

    [skipped] = plan.skipped
    assert skipped.what == "budget 1e+3"
    assert skipped.reason == "no size can be trained: 64 would have fewer than 0.5 tokens per parameter"


def test_data_that_are_too_few_are_told_even_where_there_are_sizes_enough() -> None:
    data = Data(5_000, 64.0)
    short, repeated = planned(data, budgets=[1e10, 1e11]), planned(data, budgets=[1e10, 1e11], repeat_data=True)

    assert short.tokens_needed is not None
    assert short.tokens_needed <= 320_000
    assert all("would have more than the 320,000 tokens of the data; repeat_data" in each for each in short.warnings)
    assert len(short.warnings) == 2
    assert repeated.tokens_needed is not None
    assert repeated.tokens_needed > 320_000
    [warning] = repeated.warnings
    assert warning.startswith(f"data are repeated, up to {-(-repeated.tokens_needed // 320_000)} epochs")


def test_data_that_are_too_few_for_any_budget_are_refused() -> None:
    with pytest.raises(Unplannable, match=r"budget 1e\+12: no size can be trained: .*more than the 64 tokens of the"):
        planned(Data(1, 64.0))
    with pytest.raises(Unplannable, match="training data is empty"):
        planned(Data(0, 64.0))


def test_one_budget_is_warned_of() -> None:
    assert planned(budgets=[1e10]).warnings == [
        "there is one budget: a scaling law takes the optima of two, and three to say how well it fits"
    ]


def test_milestones_that_do_not_go_by_the_length_are_warned_of() -> None:
    execution = {"scheduler": "multistep", "scheduler_milestones": [5]}

    assert planned(spec={"execution": execution}).warnings[0].startswith("scheduler multistep has the same milestones")


@pytest.mark.parametrize("knob", [{"max_epochs": 2}, {"max_steps": 9}, {"max_samples": 9}, {"early_stop_patience": 1}])
def test_a_base_that_says_how_long_a_training_is_is_refused(knob: dict[str, int]) -> None:
    with pytest.raises(Unplannable, match="its budget says how long a training is") as refused:
        planned(spec={"execution": knob})

    assert refused.value.problems[0].field == f"execution.{next(iter(knob))}"


def test_what_is_no_loss_is_refused() -> None:
    for knob in ({"checkpoint_monitor": "accuracy"}, {"checkpoint_mode": "max"}):
        with pytest.raises(Unplannable, match=r"execution.checkpoint_monitor: .* is no loss"):
            planned(spec={"execution": knob})


def test_more_trainings_than_a_study_may_have_are_refused() -> None:
    with pytest.raises(Unplannable, match=r"study.per_budget: 3,000 trainings; a study has at most 2,000"):
        planned(budgets=[1e10 * i for i in range(1, 11)], seeds=60)


def test_without_a_size_there_is_no_plan() -> None:
    _, skipped = isoflop.sizes(base(STUDY | {"sizes": [1, 2]}))
    with pytest.raises(Unplannable, match=r"config.d_model=1: config: d_model 1 is no multiple"):
        isoflop.plan(base(STUDY), [], PLENTY, skipped)


def test_a_range_is_judged_without_making_its_sizes() -> None:
    tracemalloc.start()
    try:
        found = SizeRange(low=1, high=1_000_000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(found.values()) == 1_000_000
    assert peak_bytes < 10**6
    with pytest.raises(ValidationError, match="no multiple of 4 lies between 5 and 7"):
        SizeRange(low=5, high=7, multiple_of=4)


def test_a_submit_asks_for_no_more_sizes_than_can_be_measured_and_what_was_stored_is_read() -> None:
    study = STUDY | {"sizes": {"low": 1, "high": 2001}}
    spec = {"workload": "toy", "study": study}

    with pytest.raises(ValidationError, match=r"study\.sizes: 2,001 sizes; at most 2,000 are measured"):
        JobSpec.model_validate(spec)
    study["sizes"]["low"] = 2
    assert JobSpec.model_validate(spec).study is not None
    assert len(IsoFlop.model_validate(STUDY | {"sizes": {"low": 1, "high": 4096}}).asked()) == 4096
