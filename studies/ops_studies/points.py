"""A study's base, and the jobs that points make of it."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from pydantic import JsonValue, ValidationError

from ops_contract.jobs import COMMAND, Execution, Job, JobSpec, Setup, kind_of
from ops_contract.lifecycle import Kind
from ops_contract.plans import ChildPlan, GridAbout, IsoFlopAbout, Skipped
from ops_contract.problems import Problem, problems_of
from ops_contract.resolving import Unresolvable, check_plain_knobs, resolved_execution
from ops_contract.studies import Point
from ops_studies.keys import content_key

# A config with its defaults, and what the workload refuses of it.
Check = Callable[[dict[str, Any]], tuple[dict[str, Any], Sequence[Problem]]]

_LONGEST_NAME = 200
_MOST_PROBLEMS = 20


def _as_it_is(config: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Problem]]:
    return config, []


class Unplannable(Exception):
    """There is nothing to run; `problems` name fields of the study's job, and say what to do."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{each.field}: {each.problem}" for each in problems))
        self.problems = list(problems)

    @classmethod
    def of(cls, field: str, problem: str) -> "Unplannable":
        return cls([Problem(field=field, problem=problem)])

    @classmethod
    def because(cls, skipped: Sequence[Skipped]) -> "Unplannable":
        """Nothing is left."""
        problems = [Problem(field="study", problem=f"{each.what}: {each.reason}") for each in skipped]
        if more := problems[_MOST_PROBLEMS:]:
            problems[_MOST_PROBLEMS:] = [Problem(field="study", problem=f"and {len(more):,} more like these")]
        return cls(problems)


class Refused(Exception):
    """A point makes no job of the base; the message says why."""


@dataclass(frozen=True)
class Base:
    """What the children of a study share.

    `job` is the study's as its user wrote it: were it resolved, its children would keep what follows from the base
    (a width that is null for 4 · d_model, the direction of its metric) under values that they change. `check` is the
    workload's, or a measurement's; `reports` are a training's metrics; a command has neither. `digests` are those of
    code and data.
    """

    job: Job
    check: Check = _as_it_is
    reports: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str | None] = field(default_factory=dict)

    def at(self, point: Point) -> Job:
        """The job with the point written over it, resolved. Raises Refused."""
        try:
            spec = JobSpec.model_validate(self._written(point))
        except ValidationError as error:
            raise Refused(_in_words(problems_of(error, JobSpec))) from error
        try:
            config, problems = self.check(spec.config)
            if problems:
                raise Refused(_in_words((each.field, each.problem) for each in problems))
            return self._job(spec, config, self._execution(spec.execution))
        except Unresolvable as error:
            raise Refused(str(error)) from error

    def key(self, job: Job, repeat: int = 0) -> str:
        return content_key(job, self.digests, repeat)

    def child(self, job: Job, name: str, about: IsoFlopAbout | GridAbout, repeat: int = 0) -> ChildPlan:
        return ChildPlan(
            key=self.key(job, repeat),
            name=name,
            about=about,
            config=job.config,
            execution=job.execution,
            command=job.command,
            env=job.env,
            resources=job.resources,
        )

    def _execution(self, given: Execution) -> Execution:
        """Raises Unresolvable."""
        kind = kind_of(self.job.workload)
        if kind is Kind.TRAINING:
            return resolved_execution(given, self.reports)
        check_plain_knobs(given, kind)
        return given

    def _job(self, spec: JobSpec, config: dict[str, Any], execution: Execution) -> Job:
        setup = {name: getattr(spec, name) for name in Setup.model_fields}
        return Job(kind=spec.kind, workload=self.job.workload, config=config, execution=execution, **setup)

    def _written(self, point: Point) -> dict[str, Any]:
        content = self.job.model_dump(exclude={"kind", "study", "until_step"})
        if self.job.workload == COMMAND:
            content["workload"] = None
        for outer, inner in permutations(point, 2):
            if inner.startswith(f"{outer}.") and not outer.startswith("args."):
                raise Refused(f"{outer} and {inner} write the same field; give one of them")
        for path, value in point.items():
            where, _, name = path.partition(".")
            if where == "args":
                content["command"] = _with_argument(content["command"], name, value)
            elif where == "env":
                content["env"].pop(name, None)
                content["env"] |= {} if value is None else {name: as_text(value)}
            else:
                _set(content, path, value)
        return content


def as_text(value: JsonValue) -> str:
    """Text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def named(point: Point, about: str = "") -> str:
    """A name for people: `d_model=64 dropout=0.1`, then `about`. Fields of one name are said with their paths."""
    last = [path.rpartition(".")[2] for path in point]
    words = (
        f"{name if last.count(name) == 1 else path}={as_text(value)}"
        for name, (path, value) in zip(last, point.items(), strict=True)
    )
    return as_name(" ".join(words) or "base", about)


def as_name(text: str, about: str = "") -> str:
    """One line, cut to what a name may have."""
    line, room = re.sub(r"[\x00-\x1f\x7f]+", " ", text), _LONGEST_NAME - len(about)
    return (line if len(line) <= room else line[: room - 1] + "…") + about


def _set(content: dict[str, Any], path: str, value: JsonValue) -> None:
    """Objects on the way are made where there are none."""
    *way, last = path.split(".")
    inner = content
    for depth, name in enumerate(way, 1):
        if inner.get(name) is None:
            inner[name] = {}
        inner = inner[name]
        if not isinstance(inner, dict):
            raise Refused(f"{path}: {'.'.join(way[:depth])} is no object, so that it has no fields")
    inner[last] = value


def _with_argument(command: list[str] | None, name: str, value: JsonValue) -> list[str]:
    if command is None:
        raise Refused(f"args.{name}: only a command has arguments; vary config or execution")
    if value is None or value is False:
        return command
    return [*command, f"--{name}" if value is True else f"--{name}={as_text(value)}"]


def _in_words(problems: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{field}: {problem}" if field else problem for field, problem in problems)
