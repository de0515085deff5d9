"""Code and data that are not those of the checkpoint: refused, unless the user said that they are meant."""

from uuid import UUID

from ops_contract.lifecycle import Phase
from relight.manifest import Manifest
from relight.training.faults import TrainingFault

_FILES_NAMED = 5


def accepted(before: Manifest, now: Manifest, accept: bool, accepting: str) -> list[str]:
    """What changed since the checkpoint and was accepted, in words; `accepting` is the command that does it.

    Raises a permanent TrainingFault otherwise.
    """
    code, data = _changed_code(before, now), _changed_data(before, now)
    if accept:
        _refuse_another_length(before, now)
    elif code or data:
        raise TrainingFault(
            "code_changed" if code else "data_changed",
            f"{'; '.join(code + data)}. Put the old {'code' if code else 'data'} back and resume, "
            f"or accept the change: {accepting}",
            permanent=True,
        )
    return code + data


def accepting_resume(operation_id: UUID) -> str:
    """The command that accepts them in the service."""
    return f"ops resume {operation_id} --accept-changes"


def _changed_code(before: Manifest, now: Manifest) -> list[str]:
    if before.code_digest == now.code_digest:
        return []
    names = sorted(before.code_files.keys() | now.code_files.keys())
    pairs = [(name, before.code_files.get(name), now.code_files.get(name)) for name in names]
    files = [f"{name} was {_short(old)} and is {_short(new)}" for name, old, new in pairs if old != new]
    more = [f"and {len(files) - _FILES_NAMED} more files"] if len(files) > _FILES_NAMED else []
    return [f"the workload's code changed: {', '.join(files[:_FILES_NAMED] + more)}"]


def _changed_data(before: Manifest, now: Manifest) -> list[str]:
    changed = []
    if before.data_digest != now.data_digest:
        changed.append(f"the data's digest was {before.data_digest} and is {now.data_digest}")
    if _has_another_length(before, now):
        changed.append(f"the training data had {before.training_samples} samples and has {now.training_samples}")
    return changed


def _refuse_another_length(before: Manifest, now: Manifest) -> None:
    """The position within the epoch, the number of steps and the schedule are counted in the old length."""
    begun = before.step > 0 or before.phase is Phase.EVALUATE
    if begun and _has_another_length(before, now):
        raise TrainingFault(
            "data_changed",
            f"the training data had {before.training_samples} samples and has {now.training_samples}: that cannot be "
            f"accepted at step {before.step}, for position, steps and schedule are counted in it; put the old data "
            "back, or begin anew: ops submit, or ops fork from the checkpoint of step 0 with --accept-changes",
            permanent=True,
        )


def _has_another_length(before: Manifest, now: Manifest) -> bool:
    return before.training_samples not in (None, now.training_samples)


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "not there"
