"""A study's attempt: plan the children, or reduce what they gave. In a trainer process, for it asks the user's code."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from ops_contract.agents import Validated
from ops_contract.energy import Use
from ops_contract.jobs import Job, kind_of
from ops_contract.lifecycle import Outcome, Status
from ops_contract.measurements import MEASUREMENT, METHOD_VERSION, MeasurementConfig
from ops_contract.pipe import Mark, RunJob
from ops_contract.plans import ChildResult, Plan
from ops_contract.problems import Problem, problems_of
from ops_contract.reports import Exactness, Finish, Result, Started
from ops_contract.resolving import resolved_execution
from ops_contract.studies import NOT_RUN, IsoFlop
from ops_contract.study_results import GridResult, SweepResult
from ops_studies import fits, grid, isoflop
from ops_studies.points import Base, Unplannable
from relight.pipe import AgentPipe
from relight.training import planning
from relight.training.faults import TrainingFault, fault
from relight.training.sizing import Sizer
from relight.training.source import source_digest, source_files
from relight.workload import AnyWorkload, LoopWorkload

# A report travels in one body, of which the API takes no more than 8 MiB.
MAX_PLAN_BYTES = 6 * 2**20
_INEXACT = "what its children take differs from run to run; losses and fits follow from theirs alone"


def run(job: RunJob, workload_type: AnyWorkload | None, agent: AgentPipe) -> Finish:
    """`workload_type` is null for commands and measurements. Raises TrainingFault, and whatever the workload raises."""
    study, children = job.start.job, job.start.children
    agent.report(_started())
    if children is None:
        try:
            planned = plan(study, workload_type, agent.alive)
        except Unplannable as error:
            raise TrainingFault("unplannable", str(error), permanent=True) from error
        agent.report(Result(content=_announced(study, planned)))
        finish = Finish(outcome=Outcome.PLANNED, plan=planned)
    else:
        agent.report(Result(content=reduce(study, workload_type, children, job.start.planned)))
        finish = _ending(children)
    agent.mark(Mark(at_s=time.monotonic(), use=Use.STARTUP, then=Use.STARTUP, step=0))
    return finish


def plan(job: Job, workload_type: AnyWorkload | None, alive: Callable[[], None] = lambda: None) -> Plan:
    """Raises Unplannable, TrainingFault, and what the workload raises. `alive` is called as it goes on."""
    if workload_type is None:
        planned = grid.plan(_measurements(job) if job.workload == MEASUREMENT else Base(job))
    else:
        base = planning.base(job, workload_type)
        is_sweep = isinstance(job.study, IsoFlop)
        planned = planning.sweep(base, workload_type, alive) if is_sweep else _grid(base, workload_type)
    if (size := len(planned.model_dump_json())) > MAX_PLAN_BYTES:
        problem = f"its plan takes {size:,} bytes, more than the {MAX_PLAN_BYTES:,} that can be sent: vary less at once"
        raise Unplannable.of("study", problem)
    return planned


def judged(job: Job, workload_type: AnyWorkload | None) -> Validated:
    """What is wrong with a study, or what it would plan. Raises as `plan`, but for Unplannable."""
    try:
        return Validated(plan=plan(job, workload_type))
    except Unplannable as error:
        return Validated(problems=error.problems)


def reduce(
    job: Job,
    workload_type: AnyWorkload | None,
    children: Sequence[ChildResult],
    planned: SweepResult | GridResult | None,
) -> SweepResult | GridResult:
    """`planned` has what was skipped, and what was warned of, when the children were planned."""
    skipped, warnings = (planned.skipped, planned.warnings) if planned else ([], [])
    if not isinstance(job.study, IsoFlop):
        return grid.reduce(children, skipped, warnings, kind_of(job.workload))
    assert workload_type is not None
    monitor = resolved_execution(job.execution, workload_type.reports).checkpoint_monitor
    assert monitor is not None, "a sweep of what reports nothing is not planned"
    fit = partial(fits.fit_rows, predict=job.study.predict)
    return isoflop.reduce(job.study, children, monitor, fit, fits.joule_optima, skipped, warnings)


def _measurements(job: Job) -> Base:
    """No digest of the libraries: a resume after an update goes on, and each result says what it ran on."""
    return Base(job, _checked, digests={"method": str(METHOD_VERSION)})


def _checked(config: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Problem]]:
    try:
        return MeasurementConfig.model_validate(config).model_dump(mode="json"), []
    except ValidationError as error:
        problems = problems_of(error, MeasurementConfig, "config.")
        return config, [Problem(field=field, problem=problem) for field, problem in problems]


def _grid(base: Base, workload_type: AnyWorkload) -> Plan:
    """The data are those of its first valid point; what a point's own config says of them is in its key anyway."""
    if issubclass(workload_type, LoopWorkload):
        code = source_digest(source_files(workload_type))
        return grid.plan(replace(base, digests={"code": code, "data": None}))
    first = grid.plan(base).children[0]
    return grid.plan(planning.with_digests(base, Sizer(workload_type, first.config, first.execution)))


def _announced(job: Job, planned: Plan) -> SweepResult | GridResult:
    """What there is to say before any child has run."""
    said = {"rows": [], "skipped": planned.skipped, "warnings": planned.warnings}
    if isinstance(job.study, IsoFlop):
        return SweepResult(flops=job.study.flops, embeddings=job.study.embeddings, **said)
    return GridResult(**said)


def _ending(children: Sequence[ChildResult]) -> Finish:
    """It fails where a child has no result: so it can be resumed, which runs that one again."""
    missing = [child for child in children if child.status is not Status.COMPLETED]
    if not missing:
        return Finish(outcome=Outcome.COMPLETED)
    first = missing[0]
    how = f"{first.status}: {first.error}" if first.error else first.status
    message = (
        f"{len(missing)} of {len(children)} children did not complete, such as {first.name} ({how}). "
        f"{_not_run(missing)}What the others gave is in its results; a resume runs those that are missing"
    )
    return Finish(outcome=Outcome.FAILED, permanent=True, error=fault("children_failed", message))


def _not_run(missing: Sequence[ChildResult]) -> str:
    names = [child.name for child in missing if child.error == NOT_RUN]
    return f"{len(names)} were {NOT_RUN}: {grid.in_short(names)}. " if names else ""


def _started() -> Started:
    environment = {"python": platform.python_version(), "platform": platform.platform()}
    exactness = Exactness(promise="best_effort", reasons=[_INEXACT])
    return Started(trainer_pid=os.getpid(), start_step=0, exactness=exactness, environment=environment)
