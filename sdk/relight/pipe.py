"""A trainer's end of the pipe to its agent, and that of `relight.Run` to the command that it runs in."""

import contextlib
import os
import sys
import threading
import time
from queue import SimpleQueue
from typing import Literal, NoReturn

from pydantic import ValidationError

from ops_contract.pipe import Alive, Mark, ProgressNow, RunJob, Stop, line, to_trainer
from ops_contract.reports import Finish, Progress, Report
from ops_contract.wire import Wire

Why = Literal["cancelled", "preempted"]

_ALIVE_S = 1.0
# Of this process: a line is written whole, whichever thread reports, and by whichever way.
sending = threading.Lock()


class AgentPipe:
    """The trainer's end: a sink for reports, the one job, and whether to stop. The agent's end means exit at once."""

    def __init__(self, in_fd: int, out_fd: int) -> None:
        self.step = 0  # of the last progress
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._jobs: SimpleQueue[RunJob] = SimpleQueue()
        self.why: Why | None = None  # it is to stop; to read it is no sign of life
        self._alive_at_s = -_ALIVE_S
        for fd in (in_fd, out_fd):
            os.set_inheritable(fd, False)  # a process that user code starts must not keep them open
        # Its own thread: an agent that waits for us to read never blocks us while we wait for it.
        threading.Thread(target=self._listen, name="agent-pipe", daemon=True).start()

    def job(self) -> RunJob:
        return self._jobs.get()

    def should_stop(self) -> Why | None:
        """The training thread asks between steps and validation batches: that it asks is its sign of life."""
        self.alive()
        return self.why

    def alive(self) -> None:
        """A sign of life, at most one a second."""
        now_s = time.monotonic()
        if now_s - self._alive_at_s >= _ALIVE_S:
            self._alive_at_s = now_s
            self.send(Alive())

    def report(self, report: Report) -> None:
        self.send(report)

    def progress(self, progress: Progress) -> None:
        self.step = progress.step
        self.send(ProgressNow(progress=progress))

    def mark(self, mark: Mark) -> None:
        self.send(mark)

    def send(self, message: Wire) -> None:
        data = memoryview(line(message))
        try:
            with sending:
                while data:
                    data = data[os.write(self._out_fd, data) :]
        except ConnectionError:
            self.lost()

    def finish(self, finish: Finish) -> NoReturn:
        """The last message. Leaves without joining threads or loader processes: one that hangs would keep us."""
        self.send(finish)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(0)

    def stopped(self, stop: Stop) -> None:
        """Called on the listening thread, for one that cannot wait to be asked."""

    def lost(self) -> NoReturn:
        """Nobody is at the other end any more."""
        os._exit(1)

    def _listen(self) -> None:
        # A socket whose other end died with messages unread is reset; a pipe just ends.
        with contextlib.suppress(ConnectionError), open(self._in_fd, "rb", closefd=False) as messages:
            for text in messages:
                self._take(text)
        self.lost()

    def _take(self, text: bytes) -> None:
        try:
            message = to_trainer.validate_json(text)
        except ValidationError as error:
            # Not the error itself, which shows its input: a job has secrets in it.
            problems = [(problem["loc"], problem["msg"]) for problem in error.errors(include_input=False)]
            print(f"the agent sent what this trainer does not understand: {problems}", file=sys.stderr, flush=True)
            os._exit(2)
        if isinstance(message, Stop):
            self.why = self.why or message.why
            self.stopped(message)
        else:
            self._jobs.put(message)
