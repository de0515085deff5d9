"""`ops demo`: a training that is killed and goes on, beside one that is not, compared bit for bit."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from ops_cli import show
from ops_cli.comparison import NO_VALUES, Run, first_difference
from ops_cli.exits import ExitCode
from ops_cli.plot import require_matplotlib
from ops_cli.stopping import StopRequested, StopRequests
from ops_cli.up import free_port
from ops_cli.watch import follow, view_for_people

if TYPE_CHECKING:
    from ops_cli.stack import Stack, StackSettings
    from ops_contract.jobs import JobSpec
    from ops_contract.operations import Operation
    from relight.client import Client

LEASE_S = 5
# Updates between two checkpoints: a fraction of an epoch at each workload's default size.
CHECKPOINT_STEPS = {"bytelm": 100, "digits": 150}
OTHER_CHECKPOINT_STEPS = 50
CHECKPOINTS_BEFORE_KILL = 2


class DemoError(Exception):
    """The demo did not come to its comparison; the message says why."""


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    workload: Annotated[str, typer.Option(help="What to train.")] = "bytelm",
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="The directory for curves.png.")] = Path("demo-out"),
) -> None:
    """See a killed training go on, bit for bit.

    On a service of its own, which it removes: kills a worker in the middle of a training, lets another go on, and
    compares the curves with those of a run that was left alone. Exit code 1 when they differ.
    """
    from ops_cli.stack import StackError
    from ops_contract.errors import OpsError

    require_matplotlib()
    try:
        with StopRequests() as stops, _service(stops) as demonstration:
            killed = demonstration.killed_run(_job(workload, epochs, "killed"))
            undisturbed = demonstration.undisturbed_run(_job(workload, epochs, "undisturbed"))
    except StopRequested:
        _say("Stopped; nothing is left running.")
        raise typer.Exit(ExitCode.DETACHED) from None
    except (DemoError, StackError, OpsError) as error:
        print(f"ops demo: {error}", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED) from error
    equal = _report(killed, undisturbed, out)
    raise typer.Exit(ExitCode.DONE if equal else ExitCode.FAILED)


@contextmanager
def _service(stops: StopRequests) -> "Iterator[Demonstration]":
    """Two workers of one core each on a directory of its own, which is removed in the end."""
    import shutil
    import tempfile

    from ops_cli.stack import Stack
    from relight.client import Client

    directory = Path(tempfile.mkdtemp(prefix="relight-demo-"))
    # Root's Postgres runs as a system user where namespaces are refused, and that user has to get through.
    directory.chmod(0o711 if os.geteuid() == 0 else 0o700)
    stack = Stack(_settings(directory), stops.pause, _say, _say)
    try:
        _say(f"Starting a service of its own in {directory}")
        stack.start()
        with Client(stack.settings.url, stack.settings.token) as client:
            yield Demonstration(stack, client, stops.pause)
        _say("Stopping the service")
    finally:
        # Nothing in there is wanted later: the shortest grace will do.
        stack.stop(hurried=lambda: True)
        shutil.rmtree(directory, ignore_errors=True)


def _settings(directory: Path) -> "StackSettings":
    import secrets

    from ops_cli.stack import StackSettings

    # Whatever service the caller's OPS_* variables describe, it is not this one.
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OPS_")}
    return StackSettings(
        data_dir=directory,
        token=secrets.token_urlsafe(32),
        port=free_port(),
        workers=2,
        cores=1,
        # What torch and others keep in the directory for temporary files goes with ours.
        environ=environ | {"OPS_LEASE_S": str(LEASE_S), "TMPDIR": str(directory)},
    )


def _job(workload: str, epochs: int, name: str) -> "JobSpec":
    from ops_cli.jobs import job_from_flags

    flags = {
        "workload": workload,
        "name": f"{workload}-{name}",
        "execution.max_epochs": epochs,
        "execution.checkpoint_every": {"steps": CHECKPOINT_STEPS.get(workload, OTHER_CHECKPOINT_STEPS)},
    }
    return job_from_flags(flags)


class Demonstration:
    """A running service of two workers, and what the demo does on it."""

    def __init__(self, stack: "Stack", client: "Client", pause: Callable[[float], None]) -> None:
        self._stack = stack
        self._client = client
        self._pause = pause

    def killed_run(self, job: "JobSpec") -> Run:
        """Its worker is killed some steps after the second periodic checkpoint; the other goes on."""
        _say(f"\n1. Training {job.workload}; its worker will be killed after the second checkpoint")
        operation = self._client.submit(job)
        operation = self._follow(operation.id, self._due_to_die)
        if operation.status != "running":
            raise DemoError(
                f"the training {operation.status} before it could be killed{_because(operation)}; try more --epochs"
            )
        worker = self._client.attempts(operation.id)[-1].worker
        self._stack.kill(next(child for child in self._stack.workers if child.name == worker))
        _say(f"SIGKILL to {worker} about step {show.steps(operation.progress)}; its lease runs out in {LEASE_S} s")
        return self._to_completion(operation.id, "killed, resumed")

    def undisturbed_run(self, job: "JobSpec") -> Run:
        _say("\n2. The same training, left alone")
        return self._to_completion(self._client.submit(job).id, "undisturbed")

    def _due_to_die(self, operation: "Operation") -> bool:
        every = CHECKPOINT_STEPS.get(operation.workload, OTHER_CHECKPOINT_STEPS)
        progress = operation.progress
        if progress is None or (progress.step or 0) < every * CHECKPOINTS_BEFORE_KILL:
            return False
        periodic = [c for c in self._client.checkpoints(operation.id) if c.checkpoint_type == "periodic"]
        # Half-way to the next one, so that there are steps to redo.
        return len(periodic) >= CHECKPOINTS_BEFORE_KILL and (progress.step or 0) >= periodic[-1].step + every / 2

    def _to_completion(self, operation_id: UUID, label: str) -> Run:
        operation = self._follow(operation_id, lambda _: False)
        if operation.status != "completed":
            raise DemoError(f"{operation.name} {operation.status}{_because(operation)}")
        return Run.fetch(self._client, operation_id, label)

    def _follow(self, operation_id: UUID, enough: Callable[["Operation"], bool]) -> "Operation":
        def turn(duration_s: float) -> None:
            self._pause(duration_s)
            self._stack.turn()

        with view_for_people() as view:
            return follow(self._client, operation_id, view, turn, enough)


def _because(operation: "Operation") -> str:
    return f" ({show.fault(operation.error)})" if operation.error else ""


def _report(killed: Run, undisturbed: Run, out: Path) -> bool:
    """Whether the curves are equal, after saying so."""
    from ops_cli.comparison import draw

    difference = first_difference(killed.curves, undisturbed.curves)
    columns = ("ATTEMPTS", "STEPS", "LOSS", "VAL_LOSS", "REDONE", "TIME")
    table = show.table("RUN", *columns, right=columns)
    for run in (killed, undisturbed):
        losses = [show.number(run.last(metric)) for metric in ("loss", "val_loss")]
        counts = (str(len(run.attempts)), str(run.steps), *losses, str(run.redone_steps))
        table.add_row(run.label, *counts, show.duration(run.wall_s))
    show.print_rich("")
    show.print_rich(table)
    values = sum(map(len, undisturbed.curves.values()))
    equal = difference is None and values > 0
    _say(f"Curves equal bit for bit: {f'yes, all {values} values' if equal else f'no, {difference or NO_VALUES}'}")
    _say(f"Drawn in {draw(killed, undisturbed, out / 'curves.png')}")
    return equal


def _say(line: str) -> None:
    print(line, flush=True)
