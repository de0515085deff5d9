"""How a fork begins: the tensors of its parent's checkpoint under the hyper-parameters of its own job."""

import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ops_contract.jobs import Job, SchedulerName
from ops_contract.lifecycle import Phase
from relight.training.faults import TrainingFault
from relight.training.state import Cursor, Live

_LENGTH = ("max_epochs", "max_steps", "max_samples", "batch_size", "accumulate_grad_batches")
_HYPER_PARAMETERS = ("learning_rate", "optimizer", "scheduler", "scheduler_milestones")
_JUDGED_BY = ("checkpoint_monitor", "checkpoint_mode")


def forked_tree(tree: dict[str, Any], live: Live, scheduler_steps: str | None, old: Job, new: Job) -> dict[str, Any]:
    """What to restore into `live`, which is freshly built for the job `new`, from a checkpoint of the job `old`.

    A job that changes nothing of it gets the checkpoint as it is, and goes on bit for bit. Raises a permanent
    TrainingFault where the optimizer or the scheduler cannot be carried over.
    """
    judged_anew = new.execution.scheduler is SchedulerName.PLATEAU and _differ(old, new, _JUDGED_BY)
    changed = old.config != new.config or _differ(old, new, _HYPER_PARAMETERS) or judged_anew
    follows_length = live.scheduler is not None and not isinstance(live.scheduler, ReduceLROnPlateau)
    if not changed and not (follows_length and _differ(old, new, _LENGTH)):
        return tree
    cursor = Cursor.from_tree(tree["cursor"])
    if cursor == Cursor():  # nothing was updated yet: optimizer and scheduler are those of the new job
        return {**tree, "optimizer": live.optimizer.state_dict(), "scheduler": _state(live)}
    _advance(live.scheduler, scheduler_steps, cursor)
    return {**tree, "optimizer": _under_new_groups(tree["optimizer"], live.optimizer), "scheduler": _state(live)}


def check_samples_left(cursor: Cursor, samples_per_epoch: int, job: Job) -> None:
    """Raises a permanent TrainingFault where nothing would be left to train, which no row of a checkpoint says.

    What an interrupted evaluation still has to do may be all that is left.
    """
    most, consumed = job.execution.max_samples, cursor.samples(samples_per_epoch)
    if most is not None and most < consumed + (cursor.phase is Phase.UPDATE):
        raise _not_carried_over(
            f"at step {cursor.step} {consumed} samples are trained on; give a max_samples above that, or null"
        )


def _differ(old: Job, new: Job, names: tuple[str, ...]) -> bool:
    return any(getattr(old.execution, name) != getattr(new.execution, name) for name in names)


def _state(live: Live) -> dict[str, Any] | None:
    return None if live.scheduler is None else live.scheduler.state_dict()


def _advance(scheduler: LRScheduler | ReduceLROnPlateau | None, when: str | None, cursor: Cursor) -> None:
    """As many steps as the parent's had taken at the cursor; in phase EVALUATE that of its step is still to come."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise _not_carried_over(
            "a scheduler that goes by metrics cannot be rebuilt for other hyper-parameters; fork with config, "
            "learning_rate, scheduler and its metric as they were, or from the checkpoint of step 0"
        )
    if scheduler is None:
        return
    with warnings.catch_warnings():
        # torch takes it for a mistake in the order of a step; the updates were the parent's.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
        for _ in range({"step": cursor.step, "epoch": cursor.epoch}.get(when or "", 0)):
            scheduler.step()


def _under_new_groups(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The saved moments, parameter by parameter, with the groups' hyper-parameters of the fresh optimizer."""
    groups = optimizer.state_dict()["param_groups"]
    if [list(g["params"]) for g in saved["param_groups"]] != [g["params"] for g in groups]:
        raise _not_carried_over("the optimizer groups its parameters in another way than in the checkpoint")
    if missing := optimizer.defaults.keys() - saved["param_groups"][0].keys():
        raise _not_carried_over(
            f"the checkpoint is of another optimizer: that one had no {', '.join(sorted(missing))}; "
            "keep the optimizer, or fork from the checkpoint of step 0"
        )
    return {**saved, "param_groups": groups}


def _not_carried_over(why: str) -> TrainingFault:
    return TrainingFault("not_forkable", why, permanent=True)
