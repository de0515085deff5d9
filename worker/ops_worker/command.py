"""The runner of a command: to its agent it is a trainer process, and the job's program is its child. Without torch.

`python -m ops_worker.command --in-fd N --out-fd M` speaks `ops_contract.pipe` with its agent, and on RELIGHT_FD with
`relight.report` and `relight.Run` in the program. The program is in the runner's process group, which the agent kills.
"""

import argparse
import contextlib
import ctypes
import errno
import math
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from ops_contract.energy import Use
from ops_contract.lifecycle import Outcome
from ops_contract.pipe import STACKS_SIGNAL, Alive, Hello, Mark, ProgressNow, RunJob, Stop, from_command, line
from ops_contract.reports import Exactness, Fault, Finish, Metrics, Note, Started
from ops_contract.wire import PIPE_VERSION
from ops_worker import artifacts
from ops_worker.confinement import THREAD_VARIABLES
from ops_worker.deaths import killed_for_memory, oom_kills, signal_name
from ops_worker.points import LARGEST_STEP, MAX_JSON_BYTES, MAX_WAITING, Points
from ops_worker.trainers import MAX_LINE_BYTES
from relight.interpreter import packages
from relight.pipe import AgentPipe
from relight.process import die_with_parent
from relight.publish import have_directory, operation_directory

FLUSH_S = 0.5
DRAIN_S = 2.0
# A scheduler signals every process of a job: what ended the program has reached its agent too, whose word may be later.
WORD_S = 5.0
OUTPUT = "output"
_READ_BYTES = 2**16
_PR_SET_CHILD_SUBREAPER = 36
INEXACT = "a command's own loop is not known to be exact: only what it does with relight.Run is"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ops_worker.command")
    parser.add_argument("--in-fd", type=int, required=True, help="inherited descriptor of the agent's messages")
    parser.add_argument("--out-fd", type=int, required=True, help="inherited descriptor for messages to the agent")
    given = parser.parse_args()
    agent = RunnerPipe(given.in_fd, given.out_fd)
    _own_signals(agent)
    agent.send(Hello(pid=os.getpid()))
    job = agent.job()
    runner = Runner(job, agent)
    finish = runner.run()
    agent.finish(artifacts.keep(job, runner.points.step or 0, agent, finish))


def _own_signals(agent: "RunnerPipe") -> None:
    """Those to the group are for the program, and only the program dies of them.

    It begins with the defaults: a handler does not survive exec, but what is ignored stays ignored, by nohup too.
    """
    for number in signal.valid_signals() - {signal.SIGPIPE}:  # that one Popen restores
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGABRT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGTERM, agent.terminated)
    # Python programs answer an abort with the stacks of all their threads (PYTHONFAULTHANDLER), also while they hang.
    signal.signal(STACKS_SIGNAL, lambda *_: os.killpg(os.getpgrp(), signal.SIGABRT))
    if sys.platform == "linux":  # what the program leaves behind becomes our child: see `_rest_of_the_group`
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


class RunnerPipe(AgentPipe):
    """Hands a stop on at once, and takes the program along when the agent is gone."""

    def __init__(self, in_fd: int, out_fd: int) -> None:
        self.program: Program | None = None
        self.stop: Stop | None = None
        self._terminated_at_s = -math.inf
        self.lock = threading.Lock()
        super().__init__(in_fd, out_fd)

    def stopped(self, stop: Stop) -> None:
        with self.lock:
            if self.stop is None and self.program is not None:
                self.program.stop(stop, has_sigterm=self.was_terminated)
            self.stop = self.stop or stop

    def terminated(self, *_: object) -> None:
        self._terminated_at_s = time.monotonic()

    @property
    def was_terminated(self) -> bool:
        """Whether a SIGTERM has come just now that is not ours."""
        return self.stop is None and time.monotonic() < self._terminated_at_s + WORD_S

    def lost(self) -> NoReturn:
        os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)


class Program:
    """The job's program, and our ends of its stdout and of RELIGHT_FD."""

    def __init__(self, job: RunJob) -> None:
        """Raises OSError."""
        self.socket, theirs = socket.socketpair()
        self.run_attached = False
        directory = Path(job.directory) / job.start.job.workdir
        with theirs:
            self.process = subprocess.Popen(
                job.start.job.command or [],
                cwd=directory,
                env=_environment(job, directory, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                preexec_fn=partial(die_with_parent, os.getpid()),  # also when we are killed
            )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout.fileno()

    def attach(self, job: RunJob, stop: Stop | None) -> None:
        """`relight.Run` is there: from now on a stop is a message to it."""
        if not self.run_attached:
            self.run_attached = True
            self.tell(job.model_copy(update={"environ": {}}))  # it has its environment already
            if stop is not None:
                self.tell(stop)

    def stop(self, stop: Stop, *, has_sigterm: bool) -> None:
        """A second signal would mean that it is not to save first."""
        if self.run_attached:
            self.tell(stop)
        elif not has_sigterm:
            os.killpg(os.getpgrp(), signal.SIGTERM)

    def tell(self, message: RunJob | Stop) -> None:
        with contextlib.suppress(ConnectionError):  # it has closed its end
            self.socket.sendall(line(message))


class Runner:
    """One job from its program's start to its end. `points.step` is the last step that was reported."""

    def __init__(self, job: RunJob, agent: RunnerPipe) -> None:
        self.points = Points()
        self._job = job
        self._agent = agent
        self._printed = Lines(MAX_JSON_BYTES)
        self._told = Lines(MAX_LINE_BYTES)
        self._ended = set[int]()
        self._complained = False
        self._reported = False
        self._gone = False
        self._last_word: Finish | None = None
        self._flush_at_s = 0.0
        self._wakes, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def run(self) -> Finish:
        kills_before = oom_kills()
        if (fault := self._start()) is not None:
            return Finish(outcome=Outcome.FAILED, permanent=fault.code != "command_not_started", error=fault)
        if self._agent.program is None:
            assert self._agent.stop
            return Finish(outcome=Outcome(self._agent.stop.why))
        status = self._attend(self._agent.program)
        if self._agent.stop is not None:
            return Finish(outcome=Outcome(self._agent.stop.why))
        if status == 0:
            return Finish(outcome=Outcome.COMPLETED)
        return self._last_word or Finish(outcome=Outcome.FAILED, error=_failed(status, kills_before))

    def _start(self) -> Fault | None:
        """Why the program cannot be started. After a stop there is none, and no fault."""
        job = self._job.start.job
        if not (Path(self._job.directory) / job.workdir).is_dir():
            message = f"The code that was submitted has no directory {job.workdir!r}: correct `workdir`, submit anew."
            return Fault(code="workdir_missing", message=message)
        try:
            with operation_directory(Path(self._job.storage_root), str(self._job.start.operation_id)) as directory:
                os.close(have_directory(directory, OUTPUT))
            with self._agent.lock:
                if self._agent.stop is None:
                    self._agent.program = Program(self._job)
        except OSError as error:
            return _cannot_start((job.command or [""])[0], error)
        if self._agent.program is not None:
            self._agent.report(self._started(self._agent.program))
            self._mark(Use.STARTUP, 0)
        return None

    def _started(self, program: Program, step: int = 0) -> Started:
        job = self._job.start.job
        environment: dict[str, Any] = {
            "python": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
            "host": socket.gethostname(),
            "cores": self._job.cores,
            "command": job.command,
            "env": sorted(self._job.environ),
            "packages": packages(),
        }
        exactness = Exactness(promise="best_effort", reasons=[INEXACT])
        return Started(trainer_pid=program.process.pid, start_step=step, exactness=exactness, environment=environment)

    def _attend(self, program: Program) -> int:
        """Pass on what it says until it has ended; its exit code, or minus the signal."""
        while self._lives(program):
            self._turn(program, FLUSH_S)
        until_s = time.monotonic() + DRAIN_S  # of what it left behind somebody may write for ever
        while self._turn(program, 0.0) and time.monotonic() < until_s:
            pass
        self._flush(program)
        return program.process.wait()

    def _lives(self, program: Program) -> bool:
        """Or may have been ended by a signal that the agent has got too, and will say so."""
        status = program.process.poll()
        if status is None:
            return True
        if self._agent.stop is not None:
            return _rest_of_the_group()
        if status == -signal.SIGTERM and not self._gone:
            self._agent.terminated()
        self._gone = True
        return self._agent.was_terminated

    def _mark(self, use: Use, step: int) -> None:
        """What it does besides is not known; with relight.Run it says so itself."""
        self._agent.mark(Mark(at_s=time.monotonic(), use=use, then=Use.TRAIN, step=step))

    def _turn(self, program: Program, timeout_s: float) -> bool:
        """Whether the program had said anything."""
        # In this order: what was reported before something was printed is also taken before it.
        sources = [fd for fd in (program.socket.fileno(), program.stdout) if fd not in self._ended]
        readable, _, _ = select.select([*sources, self._wakes], [], [], timeout_s)
        for fd in readable:
            if not (said := _read(fd)):
                self._ended.add(fd)
            elif fd == program.stdout:
                _pass_through(said)
                for text in self._printed.add(said):
                    self.points.add_json(text)
            elif fd == program.socket.fileno():
                for text in self._told.add(said):
                    self._take(program, text)
        if time.monotonic() >= self._flush_at_s or self.points.waiting > MAX_WAITING:
            self._flush(program)
        return not set(sources).isdisjoint(readable)

    def _take(self, program: Program, text: bytes) -> None:
        try:
            message = from_command.validate_json(text)
        except ValidationError as error:
            return self._ignored(error.errors(include_url=False, include_input=False)[0]["msg"])
        if isinstance(message, Metrics):
            self._add(message)
        elif isinstance(message, Finish):
            if message.outcome not in (Outcome.FAILED, Outcome.CHECKPOINT_CORRUPT):
                return self._ignored("how it ends its exit code says")
            self._last_word = message
        elif not isinstance(message, Hello):
            if not isinstance(message, Alive | ProgressNow | Mark):
                self._flush(program)  # the row of a checkpoint commits what was reported before it
            self._agent.send(message)
        elif message.version != PIPE_VERSION:
            self._ignored(f"it speaks version {message.version}, this worker {PIPE_VERSION}: install the same relight")
            program.socket.shutdown(socket.SHUT_RDWR)
        else:
            with self._agent.lock:
                program.attach(self._job, self._agent.stop)

    def _add(self, metrics: Metrics) -> None:
        for series in metrics.series:
            for step, value in zip(series.steps, series.floats(), strict=True):
                self.points.add(series.name, step, value)

    def _ignored(self, why: str) -> None:
        if not self._complained:
            self._agent.report(Note(message=f"what came on RELIGHT_FD is no message of ours, and is ignored: {why}"))
        self._complained = True

    def _flush(self, program: Program) -> None:
        self._flush_at_s = time.monotonic() + FLUSH_S
        if (metrics := self.points.taken()) is not None:
            first = min(series.steps[0] for series in metrics.series)
            if not self._reported and first > 0 and self._job.start.attempt > 1 and not program.run_attached:
                self._agent.report(self._started(program, first))  # it goes on from a file of its own
            self._reported = True
            if not program.run_attached:  # Run tells its own, which says more
                self._agent.progress(self.points.progress())  # it goes on with the report that comes after it
            self._agent.report(metrics)
        while self.points.notes:
            self._agent.report(Note(message=self.points.notes.pop()))
        if not program.run_attached:
            # One that says no steps is in its first until it ends: all of it is done again.
            self._mark(Use.TRAIN, min((self.points.step or 0) + 1, LARGEST_STEP))


class Lines:
    """Bytes as they come, cut into lines; one that is longer than `longest` bytes is left out."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._begun = bytearray()

    def add(self, more: bytes) -> list[bytes]:
        *whole, rest = more.split(b"\n")
        lines = []
        for part in whole:
            if len(self._begun) + len(part) <= self._longest:
                lines.append(bytes(self._begun + part))
            self._begun.clear()
        if len(self._begun) <= self._longest:  # else it is too long already, however it goes on
            self._begun += rest
        return lines


def _environment(job: RunJob, directory: Path, fd: int) -> dict[str, str]:
    order, inherited = job.start, dict(os.environ)
    threads = dict.fromkeys(THREAD_VARIABLES, str(order.job.execution.threads or job.cores))
    # `python` is this worker's.
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    ours = {
        "RELIGHT_OPERATION_ID": str(order.operation_id),
        "RELIGHT_ATTEMPT": str(order.attempt),
        "RELIGHT_FD": str(fd),
        "RELIGHT_OUTPUT_DIR": str(_output_directory(job)),
    }
    return inherited | threads | {"PATH": path, "PWD": str(directory)} | job.environ | ours


def _output_directory(job: RunJob) -> Path:
    """The operation's own, for all its attempts on all workers; deleted with it."""
    return Path(job.storage_root) / str(job.start.operation_id) / OUTPUT


def _rest_of_the_group() -> bool:
    """Whether anybody else lives in our group, such as a script's child, which got the signal too and may be saving."""
    try:
        return os.waitpid(0, os.WNOHANG) is not None
    except ChildProcessError:
        return False


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _READ_BYTES)
    except ConnectionResetError:
        return b""


def _pass_through(said: bytes) -> None:
    """To the log. On a full disk it is lost: no reason to stop the program."""
    left = memoryview(said)
    with contextlib.suppress(OSError):
        while left:
            left = left[os.write(1, left) :]


def _cannot_start(program: str, error: OSError) -> Fault:
    if isinstance(error, FileNotFoundError):
        message = f"There is no program {program!r} on the worker, or none that its first line asks for."
        return Fault(code="program_not_found", message=f"{message} Install it there, or submit its path.")
    if error.errno in (errno.EACCES, errno.ENOEXEC):
        message = f"{program!r} is not executable: {error.strerror}. chmod +x it, or name its interpreter before it."
        return Fault(code="program_not_executable", message=message)
    return Fault(code="command_not_started", message=f"The command could not be started: {error}.")


def _failed(status: int, kills_before: int | None) -> Fault:
    last_words = "`ops logs` has its output, details.log_tail the end of it."
    if killed_for_memory(status, kills_before):
        advice = "let it use less, or give the worker's cgroup (container) more"
        return Fault(code="out_of_memory", message=f"The kernel killed the command for memory: {advice}.")
    how = f"was killed by {signal_name(-status)}" if status < 0 else f"exited with code {status}"
    return Fault(code="command_failed", message=f"The command {how}. {last_words}")


if __name__ == "__main__":
    main()
