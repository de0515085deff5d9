"""What an attempt makes of its job. Of the user's own code nobody may have been able to say it at submit."""

from typing import Any

from pydantic import BaseModel

from ops_contract.jobs import Execution, Job, is_users_own
from ops_contract.reports import Resolved
from ops_contract.resolving import Unresolvable, resolved_execution
from relight.importing import config_problems, with_defaults
from relight.training.faults import TrainingFault
from relight.workload import AnyWorkload


def checked_config(workload_type: AnyWorkload, config: dict[str, Any]) -> BaseModel:
    """Raises a permanent TrainingFault with all that it refuses."""
    if problems := config_problems(workload_type, config):
        wrong = "; ".join(f"{p.field}: {p.problem}" for p in problems)
        raise TrainingFault("bad_config", f"the workload refuses its config: {wrong}", permanent=True)
    return workload_type.Config.model_validate(config)


def resolved_knobs(workload_type: AnyWorkload, job: Job) -> Execution:
    """What was resolved at submit stays as it is."""
    if not is_users_own(job.workload):
        return job.execution
    try:
        return resolved_execution(job.execution, workload_type.reports)
    except Unresolvable as error:
        raise TrainingFault("bad_config", str(error), permanent=True) from error


def resolved(workload_type: AnyWorkload, job: Job, knobs: Execution) -> Resolved | None:
    """For the API to keep, where it has something else."""
    if not is_users_own(job.workload):
        return None
    now = Resolved(config=with_defaults(workload_type, job.config), execution=knobs)
    return now if now != Resolved(config=job.config, execution=job.execution) else None
