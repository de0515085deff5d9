"""What a study's attempt does in its trainer process: judges, plans, reduces, and how it ends."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from helpers.measurement_jobs import GPT2
from ops_contract.agents import StartTraining
from ops_contract.jobs import Job, JobSpec
from ops_contract.lifecycle import Outcome, Status
from ops_contract.measurements import MeasurementConfig
from ops_contract.pipe import Mark, RunJob
from ops_contract.plans import ChildPlan, ChildResult, Plan, TrainingResult
from ops_contract.reports import Finish, Result, Started
from ops_contract.studies import NOT_RUN
from ops_contract.study_results import GridResult, SweepResult
from ops_worker import studies, trainer

SWEEP: dict[str, Any] = {
    "workload": "bytelm",
    "config": {"max_bytes": 60_000, "n_layer": 1, "n_head": 1},
    "execution": {"batch_size": 4},
    "study": {"type": "isoflop", "budgets": [1e8, 3e8, 1e9], "size": "config.d_model", "sizes": [2, 4, 8, 16]},
}
GRID: dict[str, Any] = {
    "workload": "bytelm",
    "config": {"max_bytes": 60_000},
    "study": {"type": "grid", "axes": {"config.d_model": [8, 10, 16]}, "cycles": 2},
}
MEASUREMENTS: dict[str, Any] = {
    "workload": "measurement",
    "config": {"model": GPT2},
    "study": {"type": "grid", "axes": {"config.batch_size": [1, 2]}, "cycles": 2},
}
TRUE: dict[str, Any] = {"command": ["true"], "study": {"type": "grid", "axes": {"args.n": [1, 2]}}}


class Agent:
    """What it was told."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.report = self.mark = self.said.append

    def alive(self) -> None:
        """A sign of life."""

    def the(self, kind: type) -> Any:
        [found] = [message for message in self.said if isinstance(message, kind)]
        return found


def run(tmp_path: Path, spec: dict[str, Any], **start: Any) -> tuple[Finish, Agent]:
    agent = Agent()
    return trainer.run(_order(tmp_path, spec, **start), agent), agent  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))


def test_a_sweep_is_planned_with_what_its_model_and_data_really_are(tmp_path: Path) -> None:
    finish, agent = run(tmp_path, SWEEP)

    assert finish.outcome is Outcome.PLANNED
    assert finish.plan
    assert finish.plan.tokens_there == 56_960  # 57,000 bytes in whole windows of 64
    assert {child.about.size: child.about.params for child in finish.plan.children}[8] == 3_448  # type: ignore[union-attr]
    announced = agent.the(Result).content
    assert isinstance(announced, SweepResult)
    assert (announced.rows, announced.skipped) == ([], finish.plan.skipped)
    assert agent.the(Started).exactness.promise == "best_effort"
    assert isinstance(agent.said[-1], Mark)


def test_two_plans_of_the_same_study_have_the_same_keys_and_of_other_data_none_in_common(tmp_path: Path) -> None:
    def keys(**config: Any) -> set[str]:
        planned = run(tmp_path, SWEEP | {"config": SWEEP["config"] | config})[0].plan
        assert planned
        return {child.key for child in planned.children}

    assert keys() == keys()
    assert not keys() & keys(max_bytes=59_000)


def test_a_grid_skips_what_the_workload_refuses_and_the_reduction_says_it_again(tmp_path: Path) -> None:
    planned, agent = run(tmp_path, GRID)
    assert planned.plan
    assert [child.name for child in planned.plan.children][:2] == ["d_model=8 · cycle 0", "d_model=8 · cycle 1"]
    assert [child.execution.seed for child in planned.plan.children] == [0, 1, 0, 1]
    [skipped] = planned.plan.skipped
    assert "not a multiple of n_head" in skipped.reason

    children = [_child(planned.plan, place, val_loss=place) for place in range(4)]
    finish, agent = run(tmp_path, GRID, children=children, planned=agent.the(Result).content)

    assert finish.outcome is Outcome.COMPLETED
    result = agent.the(Result).content
    assert isinstance(result, GridResult)
    assert (result.skipped, len(result.rows)) == ([skipped], 4)
    assert [group.metrics["val_loss"].mean for group in result.groups] == [0.5, 2.5]


def test_a_sweep_is_reduced_by_what_was_trained_and_fails_with_the_child_that_has_nothing(tmp_path: Path) -> None:
    planned = run(tmp_path, SWEEP)[0].plan
    assert planned
    children = [_child(planned, place, val_loss=3 - place / 10) for place in range(len(planned.children))]
    lost: dict[str, Any] = {"status": Status.FAILED, "final": {}, "training": None, "error": "no luck"}
    children[0] = children[0].model_copy(update=lost)

    finish, agent = run(tmp_path, SWEEP, children=children)

    assert (finish.outcome, finish.permanent) == (Outcome.FAILED, True)
    assert finish.error
    assert finish.error.code == "children_failed"
    assert f"1 of {len(children)} children did not complete" in finish.error.message
    assert "no luck" in finish.error.message
    result = agent.the(Result).content
    assert isinstance(result, SweepResult)
    assert [row.num_tokens for row in result.rows] == [None, *[640] * (len(children) - 1)]
    assert result.fit
    assert result.fit.points == len(children) - 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": SWEEP["config"] | {"validation_share": 0}}, "no validation data"),
        ({"study": SWEEP["study"] | {"size": "config.depth"}}, "config.depth"),
        ({"study": SWEEP["study"] | {"budgets": [1e10], "tokens_per_param": [0.5, 1e9]}}, "tokens of the data"),
    ],
)
def test_what_cannot_be_planned_is_said_at_submit_and_at_the_start(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    order = _order(tmp_path, SWEEP | changes)
    judged = trainer.validated(order)
    finish, _ = run(tmp_path, SWEEP | changes)
    assert judged.plan is None
    assert said in "; ".join(problem.problem for problem in judged.problems)
    assert finish.error
    assert (finish.error.code, finish.permanent) == ("unplannable", True)
    assert said in finish.error.message


def test_a_grid_of_commands_needs_no_workload(tmp_path: Path) -> None:
    planned = run(tmp_path, TRUE)[0].plan
    assert planned
    assert [child.command for child in planned.children] == [["true", "--n=1"], ["true", "--n=2"]]


def test_a_grid_of_measurements_has_a_key_for_every_cycle_though_no_seed_varies(tmp_path: Path) -> None:
    def children(**config: Any) -> list[ChildPlan]:
        planned = run(tmp_path, MEASUREMENTS | {"config": MEASUREMENTS["config"] | config})[0].plan
        assert planned
        return planned.children

    first, again = children(), children()
    assert len({child.key for child in first}) == 4
    assert [child.key for child in first] == [child.key for child in again]
    assert {child.execution.seed for child in first} == {0}
    assert [child.config["batch_size"] for child in first] == [1, 1, 2, 2]
    assert MeasurementConfig.model_validate(first[0].config).batch_size == 1
    assert first[0].config["task"]["output_tokens"] == 64
    assert not {child.key for child in first} & {child.key for child in children(precision="bfloat16")}


def test_another_method_of_measuring_reuses_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(tmp_path, MEASUREMENTS)[0].plan
    monkeypatch.setattr(studies, "METHOD_VERSION", 99)
    after = run(tmp_path, MEASUREMENTS)[0].plan
    assert before
    assert after
    assert not {child.key for child in before.children} & {child.key for child in after.children}


def test_points_that_measure_nothing_are_skipped_with_the_field(tmp_path: Path) -> None:
    axes = {"config.batch_size": [0, 1], "execution.seed": [0, 1]}
    planned = run(tmp_path, MEASUREMENTS | {"study": {"type": "grid", "axes": axes}})[0].plan
    assert planned
    assert len(planned.children) == 1
    first, _, last = planned.skipped
    assert "config.batch_size: Input should be greater than or equal to 1" in first.reason
    assert "execution.seed: does nothing for a measurement" in last.reason
    wrong = run(tmp_path, MEASUREMENTS | {"config": {"model": 3}})[0]
    assert wrong.error
    assert wrong.error.code == "unplannable"
    assert "config.model" in wrong.error.message


def test_a_study_that_stopped_says_which_were_not_run_and_why(tmp_path: Path) -> None:
    planned = run(tmp_path, MEASUREMENTS)[0].plan
    assert planned
    children = [_child(planned, place, tokens_per_s=1.0) for place in range(4)]
    children[1] = children[1].model_copy(update={"status": Status.FAILED, "final": {}, "error": "no luck"})
    for place in (2, 3):
        cut = {"status": Status.CANCELLED, "final": {}, "error": NOT_RUN}
        children[place] = children[place].model_copy(update=cut)

    finish, agent = run(tmp_path, MEASUREMENTS, children=children)

    assert finish.error
    assert finish.error.code == "children_failed"
    assert "3 of 4 children did not complete, such as batch_size=1 · cycle 1 (failed: no luck)" in finish.error.message
    assert f"2 were {NOT_RUN}: batch_size=2 · cycle 0, batch_size=2 · cycle 1." in finish.error.message
    result = agent.the(Result).content
    assert isinstance(result, GridResult)
    assert [row.error_message for row in result.rows] == [None, "no luck", NOT_RUN, NOT_RUN]


def test_a_plan_that_is_too_large_to_send_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "MAX_PLAN_BYTES", 1000)
    finish = run(tmp_path, TRUE)[0]
    assert finish.error
    assert "vary less at once" in finish.error.message


def _order(tmp_path: Path, content: dict[str, Any], **start: Any) -> RunJob:
    spec = JobSpec.model_validate(content)
    job = Job(
        kind=spec.kind,
        workload=spec.workload or "command",
        config=spec.config,
        execution=spec.execution,
        study=spec.study,
        command=spec.command,
    )
    known = {"incarnation": uuid4(), "operation_id": uuid4(), "attempt": 1, "slots": [0], "deadline_s": 9}
    order = StartTraining(**known, job=job, **start)
    return RunJob(start=order, storage_root=str(tmp_path), directory=str(tmp_path), device="cpu", cores=1)


def _child(planned: Plan, place: int, **final: float) -> ChildResult:
    child = planned.children[place]
    trained = TrainingResult(steps=10, samples=10, units=640, params=1, embedding_params=0)
    return ChildResult(
        key=child.key,
        position=place,
        operation_id=uuid4(),
        name=child.name,
        status=Status.COMPLETED,
        about=child.about,
        final=final,
        training=trained,
    )
