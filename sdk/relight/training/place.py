"""Where a `Run` keeps what must survive: an attempt of the service, or a directory of the user's own."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol
from uuid import UUID

from ops_contract.agents import FailureRecord
from ops_contract.pipe import Hello
from relight.manifest import Manifest
from relight.pipe import AgentPipe, Why
from relight.training.changes import accepting_resume
from relight.training.checkpoint import restore
from relight.training.faults import TrainingFault
from relight.training.reporting import Sink


class Place(Sink, Protocol):
    """`threads` is the number that was asked for, `cores` how many there are; `accepting` is how changes of code and
    data are accepted."""

    root: Path
    operation_id: UUID
    attempt: int
    threads: int | None
    cores: int | None
    record: FailureRecord
    accept_changes: bool
    accepting: str

    def restored(self) -> tuple[Manifest, Any] | None:
        """What to go on from. Raises TrainingFault, CheckpointMissing, CheckpointCorrupt, OSError."""

    def should_stop(self) -> Why | None: ...

    def has_model(self, step: int) -> bool:
        """Whether a run that ended before this step has published it already."""

    def leave(self) -> NoReturn:
        """After the save that a stop asked for."""

    def over(self) -> None:
        """There will be no step any more."""

    def close(self) -> None: ...


class Service:
    """The attempt of an operation whose command this process is; its runner listens at `fd`."""

    def __init__(self, fd: int) -> None:
        self._runner = _runner(fd)
        self._runner.send(Hello(pid=os.getpid()))
        self._sigterm = _RunnersSigterm()
        job = self._runner.job()
        self._start = start = job.start
        self.root = Path(job.storage_root)
        self.operation_id, self.attempt, self.record = start.operation_id, start.attempt, start.record
        self.threads = start.job.execution.threads
        self.cores: int | None = job.cores
        self.accept_changes = start.accept_changes
        self.accepting = accepting_resume(start.operation_id)
        self.report, self.progress, self.mark, self.should_stop = (
            self._runner.report,
            self._runner.progress,
            self._runner.mark,
            self._runner.should_stop,
        )

    def restored(self) -> tuple[Manifest, Any] | None:
        return restore(self.root, self._start.checkpoint) if self._start.checkpoint else None

    def has_model(self, step: int) -> bool:
        return False

    def leave(self) -> NoReturn:
        raise SystemExit(0)

    def over(self) -> None:
        self._sigterm.give_back()

    def close(self) -> None:
        self._sigterm.give_back()


class _RunnersSigterm:
    """A scheduler's, which signals every process of a job: its stop comes from the runner, as any other.

    A handler of the script's own stays, and threads other than the main one cannot have any. A process that the script
    forks ends by it: held back during the fork, for Python drops a signal that its child has not handled by then.
    """

    def __init__(self) -> None:
        self._ours = False
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._ours, self._forking = True, threading.local()
            signal.signal(signal.SIGTERM, self._take)
            os.register_at_fork(before=self._hold_back, after_in_parent=self._let_come, after_in_child=self._in_child)

    def give_back(self) -> None:
        if self._ours and signal.getsignal(signal.SIGTERM) == self._take:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _take(self, number: int, frame: FrameType | None) -> None:
        pass

    def _hold_back(self) -> None:
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _let_come(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _in_child(self) -> None:
        self.give_back()
        self._let_come()


def _runner(fd: int) -> AgentPipe:
    """Raises a permanent TrainingFault for a descriptor that is not this Run's: it does not survive an exec."""
    try:
        free = os.get_inheritable(fd)
    except OSError:
        free = False
    if not free:
        raise TrainingFault(
            "run_taken",
            "a command has one Run, in the process that the command starts; make the others in commands of their own",
            permanent=True,
        )
    return AgentPipe(fd, fd)
