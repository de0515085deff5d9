"""The trainer process: one attempt, then exit. User code runs here and nowhere else.

`python -m ops_worker.trainer --in-fd N --out-fd M` speaks `ops_contract.pipe` with its agent; `--describe` prints the
installed workloads as JSON and exits, `--validate` judges a job.
"""

import argparse
import contextlib
import errno
import faulthandler
import gc
import os
import platform
import re
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NoReturn

from ops_contract.agents import Validated, WorkloadOffer
from ops_contract.jobs import Accelerator, Job, kind_of
from ops_contract.lifecycle import Kind, Outcome
from ops_contract.measurements import MEASUREMENT, MeasurementConfig
from ops_contract.pipe import STACKS_SIGNAL, Description, Hello, RunJob, line
from ops_contract.problems import Problem
from ops_contract.reports import Fault, Finish, Note
from ops_worker import artifacts
from ops_worker.confinement import confine_judgement
from relight.importing import checks_by_code, config_problems, import_workload, with_defaults
from relight.interpreter import versions_of
from relight.manifest import CheckpointCorrupt, CheckpointMissing
from relight.pipe import AgentPipe
from relight.process import die_with_parent
from relight.publish import DISK_FULL
from relight.training.faults import (
    PeerLost,
    TrainingFault,
    fault,
    finish_of,
    finish_of_lost_peer,
    is_peer_lost,
    plain_text,
    traceback_of,
)
from relight.training.team import check_ranks
from relight.workload import AnyWorkload, LoopWorkload

GROUP = "relight.workloads"

_MAX_SAID_CHARS = 1_800  # of an exception, so that what to do about it still fits
_NO_MEMORY = re.compile(r"out of memory|(can't|cannot|not enough|unable to) (allocate )?memory", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ops_worker.trainer")
    parser.add_argument("--in-fd", type=int, help="inherited descriptor of the agent's messages")
    parser.add_argument("--out-fd", type=int, help="inherited descriptor for messages to the agent")
    parser.add_argument("--gang-fd", type=int, help="inherited descriptor of the slot's listening socket")
    parser.add_argument("--describe", action="store_true", help="print the installed workloads as JSON and exit")
    parser.add_argument("--validate", action="store_true", help="judge the job on stdin, print JSON and exit")
    given = parser.parse_args()
    if given.describe:
        gc.disable()  # it ends before there is much
        describe()
    elif given.validate:
        validate()
    elif given.in_fd is None or given.out_fd is None:
        parser.error("give --in-fd and --out-fd, or --describe, or --validate")
    else:
        serve(given.in_fd, given.out_fd, given.gang_fd)


def serve(in_fd: int, out_fd: int, gang_fd: int | None = None) -> NoReturn:
    """Warm up, take one job, run it, say how it ended, exit."""
    # Before the seconds that importing torch takes. To stop is the agent's to say, through the pipe: a signal to a
    # whole process group must not kill what is being saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # In C: also when Python code loops or a call never returns. A descriptor of its own: user code may redirect stderr.
    faulthandler.register(STACKS_SIGNAL, file=os.dup(2), all_threads=True)
    die_with_parent(os.getppid())
    with _all_of_it_stays():
        # Both before the greeting, and what they import: a job that comes waits for none of it.
        from relight.training import attempt, loop_attempt  # noqa: F401
        from relight.training.numerics import warm_up

        warm_up()
    agent = AgentPipe(in_fd, out_fd)
    if gang_fd is not None:
        os.set_inheritable(gang_fd, False)  # rank 0's alone: a process that outlives it must not listen on
    agent.send(Hello(pid=os.getpid()))
    job = agent.job()
    if gang_fd is not None and (job.rank is None or job.rank.rank > 0):
        os.close(gang_fd)  # rank 0's alone: loader processes are forks
        gang_fd = None
    finish = run(job, agent, gang_fd)
    # What a study's job keeps is its children's, and what a gang's does is rank 0's.
    keeps = job.start.job.study is None and _leads(job)
    agent.finish(finish if not keeps else artifacts.keep(job, agent.step, agent, finish))


@contextlib.contextmanager
def _all_of_it_stays() -> Iterator[None]:
    """What is made within it is garbage never: a fifth of the time of importing torch went to looking for some."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run(job: RunJob, agent: AgentPipe, gang_fd: int | None = None) -> Finish:
    """How the job ended; raises nothing, whatever the workload does."""
    from relight.training.attempt import Attempt, Site
    from relight.training.loop_attempt import LoopAttempt

    try:
        enter(job)
        if job.start.job.study is not None:
            from ops_worker import studies

            return studies.run(job, _studied(job.start.job), agent)
        if job.start.job.execution.accelerator is Accelerator.AUTO and job.device == "cpu" and _leads(job):
            agent.report(Note(message=_fell_back()))
        if job.start.job.kind is Kind.MEASUREMENT:
            from ops_worker import measuring

            return measuring.run(job, agent)
        workload_type = find_workload(job.start.job.workload)
        site = Site(Path(job.storage_root), job.device, job.cores)
        if issubclass(workload_type, LoopWorkload):
            outcome = LoopAttempt(workload_type, job.start, site, agent, agent.should_stop).run()
        else:
            stop = agent.should_stop
            outcome = Attempt(workload_type, job.start, site, agent, stop, rank=job.rank, listening_fd=gang_fd).run()
        return Finish(outcome=outcome)
    except (CheckpointMissing, CheckpointCorrupt, TrainingFault) as error:
        return finish_of(error)
    except PeerLost as error:
        return finish_of_lost_peer(error)
    # SystemExit too: user code may call sys.exit, and that is no reason to end without a word.
    except BaseException as error:
        if job.rank is not None and is_peer_lost(error):
            return finish_of_lost_peer(error)
        return Finish(outcome=Outcome.FAILED, error=_unexpected(error))


def _leads(job: RunJob) -> bool:
    return job.rank is None or job.rank.rank == 0


def _studied(job: Job) -> AnyWorkload | None:
    return find_workload(job.workload) if kind_of(job.workload) is Kind.TRAINING else None


def enter(job: RunJob) -> None:
    """Where the job's own code runs, and what it finds in its environment; before any of it is imported."""
    os.environ.update(job.environ)
    os.chdir(Path(job.directory) / job.start.job.workdir)
    sys.path.insert(0, os.getcwd())


def find_workload(name: str) -> AnyWorkload:
    """The installed workload of this name, or the user's own, `module:Class`. Raises a permanent TrainingFault."""
    if ":" in name:
        return import_workload(name)
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return import_workload(entry.value)
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
    """Print a Description as JSON; a workload that does not load is left out, with a line on stderr."""
    offers = []
    with _answering() as answer:
        for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
            try:
                offers.append(_offer(entry.name, import_workload(entry.value)))
            except Exception as error:
                print(f"workload {entry.name} is left out: {error}", file=sys.stderr)
        if find_spec("transformers"):
            offers.append(_measurements())
        versions = {"python": platform.python_version(), **versions_of("relight", "torch")}
        answer.write(line(Description(versions=versions, workloads=offers)))


def validate() -> None:
    """Read a RunJob from stdin and print what its workload makes of its config, as JSON: a Validated."""
    die_with_parent(os.getppid())
    confine_judgement()
    with _answering() as answer:
        job = RunJob.model_validate_json(sys.stdin.buffer.read())
        answer.write(line(validated(job)))
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # what the user's modules started would outlive us


def validated(job: RunJob) -> Validated:
    """Imports the workload and builds its config, nothing else."""
    config = job.start.job.config
    try:
        enter(job)
        if job.start.job.study is not None:
            from ops_worker import studies

            return studies.judged(job.start.job, _studied(job.start.job))
        workload_type = find_workload(job.start.job.workload)
        check_ranks(job.start.job, workload_type, in_gang=True)
        if problems := config_problems(workload_type, config):
            return Validated(problems=problems)
        whole, schema = with_defaults(workload_type, config), workload_type.Config.model_json_schema()
        return Validated(config=whole, config_schema=schema, reports=workload_type.reports)
    except TrainingFault as error:
        return Validated(problems=[Problem(field="workload", problem=plain_text(error.message))])
    except BaseException as error:  # of the user's validators, or what they return
        return Validated(problems=[Problem(field="config", problem=plain_text(_said(error)))])


@contextlib.contextmanager
def _answering() -> Iterator[IO[bytes]]:
    """Stdout for the answer alone: what modules print while they load goes to stderr."""
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        yield answer


def _offer(name: str, workload_type: AnyWorkload) -> WorkloadOffer:
    title = (workload_type.__doc__ or "").strip().partition("\n")[0]
    return WorkloadOffer(
        name=name,
        title=title,
        config_schema=workload_type.Config.model_json_schema(),
        reports=workload_type.reports,
        validates=checks_by_code(workload_type.Config),
    )


def _measurements() -> WorkloadOffer:
    return WorkloadOffer(
        name=MEASUREMENT,
        title="Joules, tokens per second and joules per token of a language model's inference.",
        config_schema=MeasurementConfig.model_json_schema(),
        reports={},
    )


def _unexpected(error: BaseException) -> Fault:
    trace = traceback_of(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in DISK_FULL:
        return fault("disk_full", f"{_said(error)}; make room in the storage root, then resume", traceback=trace)
    # torch's own OutOfMemoryError is a RuntimeError, and its CPU allocator raises no other.
    no_memory = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    if isinstance(error, MemoryError) or number == errno.ENOMEM or no_memory:
        advice = "a smaller batch_size with a larger accumulate_grad_batches needs less"
        return fault("out_of_memory", f"{_said(error)}; {advice}", traceback=trace)
    return fault("exception", f"{_said(error)}; details.traceback says where", traceback=trace)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_SAID_CHARS]


if __name__ == "__main__":
    main()
