"""What a job leaves open about checkpoints, decided by what its workload reports: at submit, or else at the start."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ops_contract.jobs import PLAIN_KNOBS, Execution, SchedulerName
from ops_contract.lifecycle import Kind
from ops_contract.problems import problems_of

_DOES_NOTHING = {
    Kind.COMMAND: "does nothing for a command: its own code decides; give it as an argument or in env",
    Kind.MEASUREMENT: "does nothing for a measurement: how it is measured is in config",
}


class Unresolvable(Exception):
    """The job asks for what the workload does not report; `problems` are (field of `execution`, problem) pairs."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"execution.{field}: {problem}" for field, problem in problems))
        self.problems = problems


def resolved_execution(given: Execution, reports: Mapping[str, str]) -> Execution:
    """With the monitored metric, its direction, and what is kept.

    Raises Unresolvable for a metric that the workload does not report, and where nothing would be kept.
    """
    monitor = given.checkpoint_monitor or next(iter(reports), None)
    if monitor is None:
        asked = {
            "checkpoint_mode": given.checkpoint_mode is not None,
            "checkpoint_save_top_k": (given.checkpoint_save_top_k or 0) > 0,
            "early_stop_patience": given.early_stop_patience is not None,
            "scheduler": given.scheduler is SchedulerName.PLATEAU,
        }
        if any(asked.values()):
            problem = "needs a metric to look at, and this workload reports none"
            raise Unresolvable([(name, problem) for name in asked if asked[name]])
        return _with(given, checkpoint_save_top_k=_top_k(given, 0))
    if monitor not in reports:
        offer = f"it reports {', '.join(reports)}" if reports else "it reports none"
        raise Unresolvable([("checkpoint_monitor", f"this workload does not report {monitor!r}; {offer}")])
    mode = given.checkpoint_mode or reports[monitor]
    top_k = _top_k(given, 1)
    return _with(given, checkpoint_monitor=monitor, checkpoint_mode=mode, checkpoint_save_top_k=top_k)


def check_plain_knobs(given: Execution, kind: Kind) -> None:
    """Raises Unresolvable for what only the training engine heeds."""
    plain = Execution().model_dump()
    ignored = [name for name, value in given.model_dump().items() if name not in PLAIN_KNOBS and value != plain[name]]
    if ignored:
        problem = _DOES_NOTHING[kind]
        raise Unresolvable([(name, problem) for name in ignored])


def _top_k(given: Execution, with_auto: int) -> int:
    """Nobody counted how many checkpoints `auto` makes; who gave a period did."""
    if given.checkpoint_save_top_k is not None:
        return given.checkpoint_save_top_k
    return with_auto if given.checkpoint_every == "auto" else -1


def _with(given: Execution, **resolved: Any) -> Execution:
    """Checked again: what was left open may contradict what was given."""
    try:
        return Execution.model_validate(given.model_dump() | resolved)
    except ValidationError as error:
        raise Unresolvable(problems_of(error, Execution)) from error
