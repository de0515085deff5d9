"""What is asked of a scheduler for a job, and what never can be."""

from collections.abc import Callable

from ops_backend.engines import EngineRequest
from ops_backend.settings import Settings
from ops_contract.jobs import Accelerator, Execution, Job, Resources
from ops_contract.lifecycle import Kind


class NeverGranted(Exception):
    """No job of the scheduler could hold it; says why, with the numbers."""


def request_for(job: Job, settings: Settings) -> EngineRequest | None:
    """What holds all of its devices, a worker a node; None where the nodes could not. A study only plans."""
    is_study = job.kind is Kind.STUDY
    execution = Execution(accelerator=Accelerator.CPU) if is_study else job.execution
    try:
        return request_of(execution, Resources() if is_study else job.resources, settings)
    except NeverGranted:
        return None


def request_of(execution: Execution, resources: Resources, settings: Settings) -> EngineRequest:
    """Raises NeverGranted."""
    devices, accelerator, gpus_per_node = execution.devices, execution.accelerator, settings.slurm_gpus_per_node
    if accelerator is Accelerator.MPS:
        raise NeverGranted("Slurm is never asked for an mps device")
    if accelerator is Accelerator.CUDA and not gpus_per_node:
        raise NeverGranted("Slurm's nodes have 0 GPUs (OPS_SLURM_GPUS_PER_NODE)")
    on_gpus = accelerator is not Accelerator.CPU and gpus_per_node > 0
    most = gpus_per_node if on_gpus else devices
    nodes = resources.nodes or next(n for n in range(-(-devices // most), devices + 1) if devices % n == 0)
    on_each = devices // nodes
    if on_each > most:
        raise NeverGranted(
            f"Slurm's nodes have {most} GPUs each (OPS_SLURM_GPUS_PER_NODE), and {nodes} of them would need {on_each}"
        )
    # A worker divides its cores among all its slots, and has one on the CPU beside those of GPUs.
    slots, gpus = (1, on_each) if on_gpus else (on_each, 0)
    cores = (resources.cores or settings.slurm_cores) * (slots + gpus)
    return EngineRequest(nodes=nodes, slots=slots, gpus=gpus, cores=cores)


def elastic(settings: Settings) -> Callable[[Execution, Resources], str | None] | None:
    """Why more workers could never hold such a job, None where they could; no function where none are ever started."""
    if settings.slurm_max_jobs == 0:
        return None

    def never(execution: Execution, resources: Resources) -> str | None:
        try:
            request_of(execution, resources, settings)
        except NeverGranted as reason:
            return str(reason)
        return None

    return never
