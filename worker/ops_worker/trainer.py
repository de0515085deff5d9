"""The trainer process: one attempt, then exit. User code runs here and nowhere else.

`python -m ops_worker.trainer --in-fd N --out-fd M` speaks `ops_contract.pipe` with its agent; `--describe` prints the
installed workloads as JSON and exits.
"""

import argparse
import contextlib
import errno
import faulthandler
import inspect
import os
import re
import signal
import sys
import threading
import time
import traceback
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NoReturn

from pydantic import TypeAdapter, ValidationError

from ops_contract.agents import WorkloadOffer
from ops_contract.jobs import Accelerator
from ops_contract.lifecycle import Outcome
from ops_contract.pipe import STACKS_SIGNAL, Alive, Hello, ProgressNow, RunJob, Stop, line, to_trainer
from ops_contract.reports import Fault, Finish, Note, Progress, Report
from ops_contract.wire import Wire
from relight.manifest import CheckpointCorrupt, CheckpointMissing
from relight.process import die_with_parent
from relight.training.faults import TrainingFault
from relight.workload import Workload

GROUP = "relight.workloads"
_MAX_MESSAGE_CHARS = 2_000
_MAX_SAID_CHARS = 1_800  # of an exception, so that what to do about it still fits
_MAX_TRACEBACK_CHARS = 8_000
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = re.compile(r"out of memory|(can't|cannot|not enough|unable to) (allocate )?memory", re.IGNORECASE)
_ALIVE_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ops_worker.trainer")
    parser.add_argument("--in-fd", type=int, help="inherited descriptor of the agent's messages")
    parser.add_argument("--out-fd", type=int, help="inherited descriptor for messages to the agent")
    parser.add_argument("--describe", action="store_true", help="print the installed workloads as JSON and exit")
    given = parser.parse_args()
    if given.describe:
        describe()
    elif given.in_fd is None or given.out_fd is None:
        parser.error("give --in-fd and --out-fd, or --describe")
    else:
        serve(given.in_fd, given.out_fd)


def serve(in_fd: int, out_fd: int) -> NoReturn:
    """Warm up, take one job, run it, say how it ended, exit."""
    # Before the seconds that importing torch takes. To stop is the agent's to say, through the pipe: a signal to a
    # whole process group must not kill what is being saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # In C: also when Python code loops or a call never returns. A descriptor of its own: user code may redirect stderr.
    faulthandler.register(STACKS_SIGNAL, file=os.dup(2), all_threads=True)
    die_with_parent(os.getppid())
    from relight.training.numerics import warm_up

    warm_up()
    agent = AgentPipe(in_fd, out_fd)
    agent.send(Hello(pid=os.getpid()))
    agent.finish(run(agent.job(), agent))


def run(job: RunJob, agent: "AgentPipe") -> Finish:
    """How the job ended; raises nothing, whatever the workload does."""
    from relight.training.attempt import Attempt, Site

    try:
        workload_type = find_workload(job.start.job.workload)
        site = Site(Path(job.storage_root), job.device, job.cores)
        if job.start.job.execution.accelerator is Accelerator.AUTO and job.device == "cpu":
            agent.report(Note(message=_fell_back()))
        outcome = Attempt(workload_type, job.start, site, agent, agent.should_stop).run()
        return Finish(outcome=outcome)
    except (CheckpointMissing, CheckpointCorrupt) as error:
        code = "checkpoint_missing" if isinstance(error, CheckpointMissing) else "checkpoint_corrupt"
        return Finish(outcome=Outcome.CHECKPOINT_CORRUPT, error=_fault(code, str(error)))
    except TrainingFault as error:
        return Finish(outcome=Outcome.FAILED, permanent=error.permanent, error=_fault(error.code, error.message))
    # SystemExit too: user code may call sys.exit, and that is no reason to end without a word.
    except BaseException as error:
        return Finish(outcome=Outcome.FAILED, error=_unexpected(error))


def find_workload(name: str) -> type[Workload[Any]]:
    """The installed workload of this name. Raises a permanent TrainingFault."""
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _load(entry)
    known = ", ".join(sorted(entry.name for entry in entry_points(group=GROUP))) or "none"
    raise TrainingFault(
        "unknown_workload", f"no workload {name!r} is installed here; there are: {known}", permanent=True
    )


def _fell_back() -> str:
    """What `auto` came to on a CPU slot, for the operation's events."""
    import torch

    built = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]  # torch's own
    found = torch.cuda.is_available()
    torch_says = "finds CUDA" if found else "finds no CUDA device" if built else "is not compiled for CUDA"
    return (
        "accelerator auto resolved to cpu: no live worker offers a GPU for this workload; "
        f"torch {torch.__version__} here {torch_says}"
    )


def describe() -> None:
    """Print a JSON list of WorkloadOffer; what does not load is left out, with a line on stderr."""
    offers = []
    with contextlib.redirect_stdout(sys.stderr):  # what a module prints while it loads is not JSON
        for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
            try:
                offers.append(_offer(entry.name, _load(entry)))
            except Exception as error:
                print(f"workload {entry.name} is left out: {error}", file=sys.stderr)
    sys.stdout.buffer.write(TypeAdapter(list[WorkloadOffer]).dump_json(offers) + b"\n")


class AgentPipe:
    """The trainer's end: a sink for reports, the one job, and whether to stop. The agent's end means exit at once."""

    def __init__(self, in_fd: int, out_fd: int) -> None:
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._jobs: SimpleQueue[RunJob] = SimpleQueue()
        self._why: Literal["cancelled", "preempted"] | None = None
        self._sending = threading.Lock()  # a line is written whole, whichever thread reports
        self._alive_at_s = -_ALIVE_S
        for fd in (in_fd, out_fd):
            os.set_inheritable(fd, False)  # a process that user code starts must not keep them open
        # Its own thread: an agent that waits for us to read never blocks us while we wait for it.
        threading.Thread(target=self._listen, name="agent-pipe", daemon=True).start()

    def job(self) -> RunJob:
        return self._jobs.get()

    def should_stop(self) -> Literal["cancelled", "preempted"] | None:
        """The training thread asks between steps and validation batches: that it asks is its sign of life."""
        now_s = time.monotonic()
        if now_s - self._alive_at_s >= _ALIVE_S:
            self._alive_at_s = now_s
            self.send(Alive())
        return self._why

    def report(self, report: Report) -> None:
        self.send(report)

    def progress(self, progress: Progress) -> None:
        self.send(ProgressNow(progress=progress))

    def send(self, message: Wire) -> None:
        data = memoryview(line(message))
        try:
            with self._sending:
                while data:
                    data = data[os.write(self._out_fd, data) :]
        except BrokenPipeError:
            os._exit(1)

    def finish(self, finish: Finish) -> NoReturn:
        """The last message. Leaves without joining threads or loader processes: one that hangs would keep us."""
        self.send(finish)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(0)

    def _listen(self) -> None:
        with open(self._in_fd, "rb", closefd=False) as messages:
            for text in messages:
                self._take(text)
        os._exit(1)

    def _take(self, text: bytes) -> None:
        try:
            message = to_trainer.validate_json(text)
        except ValidationError as error:
            print(f"the agent sent what this trainer does not understand: {error}", file=sys.stderr, flush=True)
            os._exit(2)
        if isinstance(message, Stop):
            self._why = self._why or message.why
        else:
            self._jobs.put(message)


def _load(entry: EntryPoint) -> type[Workload[Any]]:
    try:
        loaded = entry.load()
    except BaseException as error:  # a module may call sys.exit
        raise TrainingFault(
            "import_failed", f"workload {entry.name} ({entry.value}) does not import: {_said(error)}", permanent=True
        ) from error
    if not (inspect.isclass(loaded) and issubclass(loaded, Workload)):
        raise TrainingFault("import_failed", f"{entry.value} is not a subclass of relight.Workload", permanent=True)
    return loaded


def _offer(name: str, workload_type: type[Workload[Any]]) -> WorkloadOffer:
    title = (workload_type.__doc__ or "").strip().partition("\n")[0]
    schema = workload_type.Config.model_json_schema()
    return WorkloadOffer(name=name, title=title, config_schema=schema, reports=workload_type.reports)


def _unexpected(error: BaseException) -> Fault:
    trace = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK_CHARS:]
    number = error.errno if isinstance(error, OSError) else None
    if number in _DISK_FULL:
        return _fault("disk_full", f"{_said(error)}; make room in the storage root, then resume", traceback=trace)
    # torch's own OutOfMemoryError is a RuntimeError, and its CPU allocator raises no other.
    no_memory = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    if isinstance(error, MemoryError) or number == errno.ENOMEM or no_memory:
        advice = "a smaller batch_size with a larger accumulate_grad_batches needs less"
        return _fault("out_of_memory", f"{_said(error)}; {advice}", traceback=trace)
    return _fault("exception", f"{_said(error)}; details.traceback says where", traceback=trace)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_SAID_CHARS]


def _fault(code: str, message: str, **details: str) -> Fault:
    return Fault(
        code=code,
        message=_text(message)[:_MAX_MESSAGE_CHARS],
        details={name: _text(text) for name, text in details.items()},
    )


def _text(text: str) -> str:
    """As the wire and Postgres take it: without NUL and lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")


if __name__ == "__main__":
    main()
