"""SIGTERM, ctrl-C and a closed terminal as an exception at a place of our choice."""

import signal
import time
from types import FrameType
from typing import Any, Self

TURN_S = 0.1


class StopRequested(Exception):
    pass


class StopRequests:
    """While it is entered, `pause` raises StopRequested once a signal has come. For the main thread.

    An exception raised by the handler itself could hit between starting a process and noting its pid.
    """

    def __init__(self) -> None:
        self.count = 0
        self._raised = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def pause(self, duration_s: float = TURN_S) -> None:
        """Raises at the first request only: what cleans up may pause, too."""
        until = time.monotonic() + duration_s
        while not self._raised:
            if self.count:
                self._raised = True
                raise StopRequested
            if time.monotonic() >= until:
                return
            time.sleep(min(TURN_S, duration_s))
        time.sleep(duration_s)

    @property
    def hurried(self) -> bool:
        """A second request: end faster."""
        return self.count > 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
