"""What a study of a workload plans, for which its models and data have to be built."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ops_contract.jobs import Job
from ops_contract.plans import Plan, Skipped
from ops_contract.problems import Problem
from ops_contract.studies import IsoFlop
from ops_studies import isoflop
from ops_studies.isoflop import Candidate, Data
from ops_studies.points import Base, Unplannable
from relight.importing import config_problems, with_defaults
from relight.training.faults import TrainingFault
from relight.training.sizing import Sizer
from relight.workload import AnyWorkload


def base(job: Job, workload_type: AnyWorkload) -> Base:
    return Base(job, partial(_checked, workload_type), workload_type.reports)


def sweep(
    base: Base, workload_type: AnyWorkload, alive: Callable[[], None] = lambda: None, data: Data | None = None
) -> Plan:
    """`alive` is called as it goes on; `data` counts in place of the workload's.

    Raises Unplannable, TrainingFault, and what the workload raises.
    """
    study = base.job.study
    assert isinstance(study, IsoFlop)
    sized, skipped = isoflop.sizes(base)
    if not sized:
        raise Unplannable.because(skipped)
    sizer = Sizer(workload_type, next(iter(sized.values())).config, base.job.execution)
    if not sizer.data.validates:
        problem = "it has no validation data, and a sweep compares held-out losses: let data() return some"
        raise Unplannable.of("workload", problem)
    candidates, notes = [], dict[str, None]()
    for size, job in sized.items():
        alive()
        what = f"{study.size}={size}"
        try:
            model = sizer.model(job.config, count_flops=study.flops == "counted")
        except TrainingFault as error:  # such as a width that its heads do not divide
            skipped.append(Skipped(what=what, reason=error.message))
            continue
        notes |= dict.fromkeys(model.notes)
        if study.flops == "counted" and model.flops_per_unit is None:
            skipped.append(Skipped(what=what, reason=f"no FLOPs are counted: {model.flops_reason}"))
            continue
        counted = model.flops_per_unit or 0.0
        candidates.append(Candidate.of(study, size, model.params, model.embedding_params, counted))
    if not candidates:
        raise Unplannable.because(skipped)
    there = data or Data(sizer.data.samples, sizer.data.units_per_sample)
    planned = isoflop.plan(with_digests(base, sizer), candidates, there, skipped)
    return planned.model_copy(update={"warnings": [*planned.warnings, *notes]})


def with_digests(base: Base, sizer: Sizer) -> Base:
    """Those of code and data too; of data that nobody has a digest of at least how many there are."""
    data = sizer.data.data_digest or f"{sizer.data.samples} samples"
    return replace(base, digests={**base.digests, "code": sizer.data.code_digest, "data": data})


def _checked(workload_type: AnyWorkload, config: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Problem]]:
    if problems := config_problems(workload_type, config):
        return config, problems
    return with_defaults(workload_type, config), []
