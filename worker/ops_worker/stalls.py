"""When a trainer counts as hung, or has had its time."""

import time
from collections.abc import Callable

_MOST_OFTEN_S = 1.0


class StallClock:
    """Sums the time without a sign of life in which the agent itself ran; `clock` is monotonic, in seconds.

    Without any sign at all that is the time an attempt has taken.

    `tick` is to be called every `tick_s`. A longer gap means that the agent was stopped too, as on a laptop that
    slept, and counts as no more than two ticks: whatever the trainer sent meanwhile is read before the next ones.
    """

    def __init__(self, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.tick_s = _MOST_OFTEN_S if timeout_s is None else min(_MOST_OFTEN_S, timeout_s / 4)
        self._timeout_s = timeout_s
        self._clock = clock
        self._ticked_at_s = clock()
        self._silent_s = 0.0

    def sign_of_life(self) -> None:
        self._silent_s = 0.0

    @property
    def nearly(self) -> bool:
        """Whether it has been silent so long that one more gap would do."""
        return self._timeout_s is not None and self._silent_s >= self._timeout_s - 2 * self.tick_s

    def tick(self) -> bool:
        """Whether the trainer has been silent for `timeout_s`."""
        now_s = self._clock()
        self._silent_s += min(now_s - self._ticked_at_s, 2 * self.tick_s)
        self._ticked_at_s = now_s
        return self._timeout_s is not None and self._silent_s >= self._timeout_s
