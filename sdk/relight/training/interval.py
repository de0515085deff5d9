"""How often to save: what a save costs this run, weighed against what failures lose. Times are in seconds."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean
from typing import Literal

from ops_contract.agents import FailureRecord
from ops_contract.jobs import CheckpointEvery

SHORTEST_S = 1.0
LONGEST_S = 30 * 60.0
ASSUMED_S = 24 * 3600.0  # one failure in it is assumed before any was seen
_NEWEST = 5


@dataclass
class SaveTimes:
    """What saves of this run cost of late.

    `whole_s` is what reading or writing the whole state took while training waited: a bound until saves beside the
    training are measured. `commit_s` is that of the newest one, from its snapshot to its commit.
    """

    saved_at_s: float
    whole_s: float
    commit_s: float = 0.0
    _stalls_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NEWEST))

    def waited(self, begun_at_s: float, now_s: float) -> None:
        """The whole state was written while training waited."""
        self.saved_at_s = now_s
        self.commit_s = self.whole_s = now_s - begun_at_s

    def add_stall(self, duration_s: float) -> None:
        self._stalls_s.append(duration_s)

    @property
    def stall_s(self) -> float:
        """For how long a save keeps the training from going on: the mean of the newest ones."""
        return fmean(self._stalls_s) if self._stalls_s else self.whole_s


class Pace:
    """Says when a checkpoint is due. `clock` is monotonic; `note` is told what auto decides, and why."""

    def __init__(
        self,
        every: CheckpointEvery | Literal["auto"],
        record: FailureRecord,
        times: SaveTimes,
        clock: Callable[[], float],
        note: Callable[[str], None],
    ) -> None:
        self._every = every
        self._given_s = every.seconds if isinstance(every, CheckpointEvery) else None
        self._record = record
        self._times = times
        self._clock = clock
        self._note = note
        self._told_s: float | None = None

    @property
    def goes_by_time(self) -> bool:
        return not isinstance(self._every, CheckpointEvery) or self._every.seconds is not None

    def is_due_at(self, step: int, epoch: int, epoch_ends: bool) -> bool:
        """At the boundary before `step`, of `epoch`; `epoch_ends` says that one ended there."""
        every = self._every
        if not isinstance(every, CheckpointEvery) or self.goes_by_time:
            return self.is_due()
        if every.steps is not None:
            return step % every.steps == 0
        return epoch_ends and every.epochs is not None and epoch % every.epochs == 0

    def is_due(self) -> bool:
        interval_s = self._given_s if self._given_s is not None else self._auto_s()
        return self._clock() - self._times.saved_at_s >= interval_s

    def _auto_s(self) -> float:
        stall_s, commit_s = self._times.stall_s, self._times.commit_s
        interval_s = bounded_s(best_interval_s(stall_s, mean_time_between_failures_s(self._record)), commit_s)
        if self._told_s is None or not self._told_s / 2 <= interval_s <= self._told_s * 2:
            self._told_s = interval_s
            self._note(_reasoning(interval_s, stall_s, commit_s, self._record))
        return interval_s


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """From the end of a save to the next one, so that saving and redoing together cost least.

    Daly, A higher order estimate of the optimum checkpoint interval for restart dumps (2006), equation 37; its first
    term is Young's, A first order approximation to the optimum checkpoint interval (1974).
    """
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    share = stall_s / (2 * mtbf_s)
    return sqrt(2 * stall_s * mtbf_s) * (1 + sqrt(share) / 3 + share / 9) - stall_s


def mean_time_between_failures_s(record: FailureRecord) -> float:
    return (ASSUMED_S + record.running_s) / (1 + record.failures)


def bounded_s(interval_s: float, commit_s: float) -> float:
    """Saves that come faster than one is committed would only take each other's place."""
    return max(min(interval_s, LONGEST_S), SHORTEST_S, commit_s)


def _reasoning(interval_s: float, stall_s: float, commit_s: float, record: FailureRecord) -> str:
    return (
        f"a checkpoint every {_said(interval_s)}: one stops training for {_said(stall_s)} and takes {_said(commit_s)} "
        f"until it is committed; of {_said(record.running_s)} of attempts {record.failures} were lost or failed (mean "
        f"time between failures {_said(mean_time_between_failures_s(record))}, one failure in 24 h assumed "
        f"beforehand); Young 1974, Daly 2006, between {_said(SHORTEST_S)} and {_said(LONGEST_S)}"
    )


def _said(duration_s: float) -> str:
    units = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
    unit, size_s = next((each for each in units if duration_s >= each[1]), ("ms", 1e-3))
    value = duration_s / size_s
    return f"{value:.3g} {unit}" if value < 100 else f"{value:,.0f} {unit}"  # and never 1.6e+02
