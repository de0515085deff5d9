"""The thread beside the training that publishes checkpoints."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_LOWEST_PRIORITY = 19


class Writer(Generic[T]):
    """Gives jobs to `write`, one at a time; at most one waits.

    Its first error ends it: later jobs are not written, and whoever asks gets that error.
    """

    def __init__(self, write: Callable[[T], None]) -> None:
        self._write = write
        self._changed = threading.Condition()
        self._errand: Callable[[], None] | None = None
        self._current: T | None = None
        self._waiting: T | None = None
        self._closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def help(self, errand: Callable[[], None]) -> None:
        """Run `errand` soon, unless the writer is writing: it is forgotten when another one comes first."""
        with self._changed:
            self._errand = errand
            self._start()

    def put(self, job: T) -> None:
        """Nothing waits. An idle writer is bound to it at once: jobs faster than its waking would starve it."""
        with self._changed:
            if self._current is None:
                self._current = job
            else:
                self._waiting = job
            self._start()

    def withdraw(self) -> T | None:
        """The job that waits; it will not be written."""
        with self._changed:
            job, self._waiting = self._waiting, None
            return job

    def wait(self) -> None:
        """Until every job is written. Raises the writer's error."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._current is None)
        self.raise_failure()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Write what waits, and end the thread. Raises nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        _lower_priority()
        try:
            while (task := self._next()) is not None:
                task()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        """The next thing to do; None at the end. An errand goes first: an update waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._errand is not None or self._current is not None or self._closed)
            if self._errand is not None:
                errand, self._errand = self._errand, None
                return errand
            return None if self._current is None else self._write_current

    def _write_current(self) -> None:
        assert self._current is not None
        self._write(self._current)
        with self._changed:
            self._current, self._waiting = self._waiting, None
            self._changed.notify_all()


def _lower_priority() -> None:
    # On Linux a thread has a priority of its own. At an equal one the hashing takes the cores from the training.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
