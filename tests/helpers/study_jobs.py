"""Studies without a service: their bases, and children that have ended."""

from typing import Any
from uuid import uuid4

from ops_contract.jobs import COMMAND, Job, JobSpec
from ops_contract.lifecycle import Status
from ops_contract.plans import ChildPlan, ChildResult, TrainingResult
from ops_contract.problems import Problem
from ops_studies.points import Base

DIGESTS = {"code": "c" * 64, "data": "d" * 64}


def base(study: dict[str, Any], digests: dict[str, str | None] = DIGESTS, **spec: Any) -> Base:
    """A study of a workload with `d_model`, `n_head` and `dropout`, as its user wrote it; with `command`, of that."""
    given = JobSpec.model_validate({"study": study} | ({} if "command" in spec else {"workload": "bytelm"}) | spec)
    fields = {name: getattr(given, name) for name in Job.model_fields if hasattr(given, name)}
    job = Job(**fields | {"workload": given.workload or COMMAND})
    return Base(job, check, {"val_loss": "min", "accuracy": "max"}, digests)


def check(config: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    whole = {"d_model": 64, "n_head": 4, "dropout": 0.0} | config
    problems = [Problem(field=f"config.{name}", problem="no such field") for name in whole.keys() - _FIELDS]
    if not problems and whole["d_model"] % whole["n_head"]:
        problems.append(Problem(field="config", problem=f"d_model {whole['d_model']} is no multiple of n_head"))
    return whole, problems


_FIELDS = {"d_model", "n_head", "dropout", "block"}


def ended(child: ChildPlan, loss: float | None = None, units: int | None = 1, **fields: Any) -> ChildResult:
    """It completed, with that loss, unless `fields` say otherwise."""
    training = TrainingResult(steps=1, samples=1, units=units, params=1, embedding_params=0)
    known = {
        "key": child.key,
        "position": 0,
        "operation_id": uuid4(),
        "name": child.name,
        "status": Status.COMPLETED,
        "about": child.about,
        "final": {} if loss is None else {"val_loss": loss},
        "training": training,
    }
    return ChildResult.model_validate(known | fields)
