"""A grid: which points it has, in which order their jobs are run, and what the cycles of each say together."""

import math
from collections.abc import Iterator, Sequence
from itertools import product

from ops_contract.jobs import Job
from ops_contract.lifecycle import Kind, Status
from ops_contract.plans import ChildResult, GridAbout, Plan, Skipped
from ops_contract.studies import MAX_CHILDREN, NOT_RUN, Grid, Point
from ops_contract.study_results import GridGroup, GridResult, GridRow
from ops_contract.wire import canonical
from ops_studies.estimates import statistic
from ops_studies.orders import arranged, williams_rows
from ops_studies.points import Base, Refused, Unplannable, named

_SEEDS = 2**63
_NAMED = 5


def plan(base: Base) -> Plan:
    """Raises Unplannable where no point is valid, or there are too many."""
    grid = base.job.study
    if not isinstance(grid, Grid):
        raise TypeError("the job's study is no grid")
    jobs: dict[str, tuple[Point, Job]] = {}
    skipped = []
    for point in _points(grid):
        try:
            job = base.at(point)
            _check_seeds(job, grid)
        except Refused as error:
            skipped.append(Skipped(what=named(point), reason=str(error)))
            continue
        key = base.key(job)
        if key in jobs:
            skipped.append(Skipped(what=named(point), reason=f"comes to the same job as {named(jobs[key][0])}"))
        else:
            jobs[key] = point, job
    if not jobs:
        raise Unplannable.because(skipped)
    _check_count("study.cycles", f"{len(jobs):,} points in {grid.cycles:,} cycles make", len(jobs) * grid.cycles)
    listed = list(jobs.values())
    children = []
    for index, cycle in arranged(list(jobs), grid):
        point, job = listed[index]
        name = named(point, f" · cycle {cycle}" if grid.cycles > 1 else "")
        children.append(base.child(_in_cycle(job, grid, cycle), name, GridAbout(point=point, cycle=cycle), cycle))
    return Plan(children=children, skipped=skipped, warnings=_warnings(grid, len(jobs)))


def reduce(
    children: Sequence[ChildResult],
    skipped: Sequence[Skipped] = (),
    warnings: Sequence[str] = (),
    kind: Kind = Kind.TRAINING,
) -> GridResult:
    """Rows in the order of the children; a group for each point, of its completed runs. `kind` is the children's."""
    runs = [(each, each.about) for each in children if isinstance(each.about, GridAbout)]
    points: dict[str, tuple[Point, list[ChildResult]]] = {}
    for child, about in runs:
        _, cycles = points.setdefault(canonical(about.point), (about.point, []))
        if child.status is Status.COMPLETED:
            cycles.append(child)
    told = list(warnings)
    not_run = [child.name for child, _ in runs if child.error == NOT_RUN]
    if not_run:
        told.append(f"{len(not_run)} of {len(runs)} are {NOT_RUN}: {in_short(not_run)}")
    groups = [_group(point, cycles, kind, told) for point, cycles in points.values()]
    rows = [_row(child, about) for child, about in runs]
    return GridResult(rows=rows, groups=groups, skipped=list(skipped), warnings=told)


def _points(grid: Grid) -> Iterator[Point]:
    """The last axis changes fastest, alternatives faster still. Raises Unplannable."""
    for number, alternative in enumerate(grid.alternatives):
        if both := alternative.keys() & grid.axes.keys():
            problem = f"{min(both)} is an axis too; give it in one of them"
            raise Unplannable.of(f"study.alternatives.{number}", problem)
    crossed = bool(grid.axes or grid.alternatives)
    count = crossed * math.prod(map(len, grid.axes.values())) * (len(grid.alternatives) or 1)
    _check_count("study.axes", "axes, alternatives and experiments make", count + len(grid.experiments))
    if crossed:
        for values in product(*(grid.axes[name] for name in grid.axes_order)):
            for alternative in grid.alternatives or [{}]:
                yield dict(zip(grid.axes_order, values, strict=True)) | alternative
    yield from grid.experiments


def _check_count(field: str, what: str, count: int) -> None:
    if count > MAX_CHILDREN:
        raise Unplannable.of(field, f"{what} {count:,} runs; a study has at most {MAX_CHILDREN:,}: vary less")


def _check_seeds(job: Job, grid: Grid) -> None:
    if _in_cycle(job, grid, grid.cycles - 1).execution.seed >= _SEEDS:
        raise Refused("execution.seed: its last cycle would have one past 2^63 - 1; begin lower")


def _in_cycle(job: Job, grid: Grid, cycle: int) -> Job:
    if not grid.vary_seed or job.kind is not Kind.TRAINING:
        return job
    execution = job.execution.model_copy(update={"seed": job.execution.seed + cycle})
    return job.model_copy(update={"execution": execution})


def _warnings(grid: Grid, points: int) -> list[str]:
    rows = williams_rows(points) if grid.order == "latin_square" else 1
    if grid.cycles % rows == 0:
        return []
    return [
        f"latin_square is balanced over {rows} cycles of {points} points, and multiples of it; not over {grid.cycles}"
    ]


def in_short(names: Sequence[str]) -> str:
    """The first of them."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _group(point: Point, cycles: list[ChildResult], kind: Kind, told: list[str]) -> GridGroup:
    """What is not finite is left out of the statistics, and told.

    A measurement has an `energy_j` of its own, that of its window: all that its operation took is no figure of it.
    """
    values: dict[str, list[float]] = {}
    for child in cycles:
        for name, value in child.final.items():
            if math.isfinite(value):
                values.setdefault(name, []).append(value)
            else:
                told.append(f"{name} of {child.name} is {value}: it is left out of the mean of its point")
    taken = {"wall_time_seconds": [child.running_s for child in cycles]}
    if kind is not Kind.MEASUREMENT:
        taken["energy_j"] = [child.energy_j for child in cycles]
    for name, known in taken.items():
        if known and None not in known:
            values[name] = [value for value in known if value is not None]
    return GridGroup(point=point, metrics={name: statistic(each) for name, each in values.items()})


def _row(child: ChildResult, about: GridAbout) -> GridRow:
    return GridRow(
        operation_id=child.operation_id,
        name=child.name,
        point=about.point,
        cycle=about.cycle,
        status=child.status,
        final=child.final,
        wall_time_seconds=child.running_s,
        energy_j=child.energy_j,
        energy_reason=child.energy_reason,
        error_message=child.error,
    )
