"""Following one operation to its end."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Protocol, Self
from uuid import UUID

import typer

from ops_cli import show
from ops_cli.connect import OperationId, with_client
from ops_cli.exits import ExitCode
from ops_cli.read import next_command

if TYPE_CHECKING:
    from ops_contract.operations import Operation
    from relight.client import Client

POLL_S = 0.5
LINE_EVERY_PERCENT = 10


def register(app: typer.Typer) -> None:
    app.command()(watch)


@with_client
def watch(
    client: "Client",
    operation_id: OperationId,
    json: Annotated[bool, typer.Option("--json", help="A line of JSON at every change.")] = False,
) -> None:
    """Follow an operation to its end.

    Ctrl-C detaches and never cancels. The exit code is 0 when it completed, 1 when not.
    """
    watch_to_end(client, client.resolve(operation_id), JsonLines() if json else view_for_people())


def watch_to_end(client: "Client", operation_id: UUID, view: "View") -> None:
    """Leaves with the exit code that says how it ended."""
    with detachable(operation_id), view:
        operation = follow(client, operation_id, view)
    view.ended(operation)
    raise typer.Exit(ExitCode.DONE if operation.status == "completed" else ExitCode.FAILED)


@contextmanager
def detachable(operation_id: UUID, back: str = "ops watch") -> Iterator[None]:
    """Ctrl-C leaves the operation alone, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        short = str(operation_id)[:8]
        print(f"Detached; {short} goes on.\nBack: {back} {short}    Stop it: ops cancel {short}", file=sys.stderr)
        raise typer.Exit(ExitCode.DETACHED) from None


def follow(
    client: "Client",
    operation_id: UUID,
    view: "View",
    sleep: Callable[[float], None] = time.sleep,
    enough: "Callable[[Operation], bool]" = lambda operation: False,
) -> "Operation":
    """Until the operation has ended, or is `enough`. A server that goes away is waited for, and the view says so."""
    from ops_contract.lifecycle import TERMINAL
    from relight.client import Unreachable

    operation = client.get(operation_id)
    view.show(operation)
    while operation.status not in TERMINAL and not enough(operation):
        sleep(POLL_S)
        try:
            operation = client.get(operation_id)
        except Unreachable as away:
            view.away(str(away))
        else:
            view.show(operation)
    return operation


class View(Protocol):
    """`show` is called at every poll."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, operation: "Operation") -> None: ...
    def away(self, message: str) -> None: ...
    def ended(self, operation: "Operation") -> None: ...


def view_for_people() -> View:
    return Bar() if sys.stdout.isatty() else Lines()


class JsonLines:
    def __init__(self) -> None:
        self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def show(self, operation: "Operation") -> None:
        line = operation.model_dump_json()
        if line != self._shown:
            print(line, flush=True)
        self._shown = line

    def away(self, message: str) -> None:
        print(message, file=sys.stderr)

    def ended(self, operation: "Operation") -> None:
        """The last line has said it."""


class Lines:
    """For a log file: a line when the status or the attempt changes, and at every tenth of the way."""

    def __init__(self) -> None:
        self._shown: object = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def show(self, operation: "Operation") -> None:
        progress = operation.progress
        tenth = int((progress.percent if progress and progress.percent else 0) // LINE_EVERY_PERCENT)
        now = (operation.status, operation.attempt, tenth)
        if now != self._shown and operation.ended_at is None:
            print(f"{headline(operation)}: {show.progress_line(progress)}", flush=True)
        self._shown = now

    def away(self, message: str) -> None:
        if self._shown != "away":
            print(f"{message} Waiting for it.", file=sys.stderr)
        self._shown = "away"

    def ended(self, operation: "Operation") -> None:
        for line in last_lines(operation):
            print(line)


class Bar:
    """One live line with bar, loss, throughput and time left; changes of the status stay above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            expand=True,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, figures="")
        self._headline = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, operation: "Operation") -> None:
        line, progress = headline(operation), operation.progress
        if line != self._headline and operation.ended_at is None:
            self._progress.console.print(line, highlight=False, markup=False)
        self._headline = line
        self._progress.update(
            self._task,
            description=show.coloured(operation.status),
            total=progress.steps_total if progress else None,
            completed=(progress.step or 0) if progress else 0,
            figures=figures(operation),
        )

    def away(self, message: str) -> None:
        self._progress.update(self._task, description="[red]server away[/]")

    def ended(self, operation: "Operation") -> None:
        for line in last_lines(operation):
            self._progress.console.print(line, highlight=False, markup=False)


def headline(operation: "Operation") -> str:
    """Changes only when something has happened: with the status and the attempt."""
    line = f"{operation.name} is {operation.status}"
    if operation.status == "pending" and operation.attempt:
        return f"{line} after attempt {operation.attempt}"
    if operation.status != "running":
        return line
    start = operation.lineage[-1].start_step if operation.lineage else 0
    return f"{line}, attempt {operation.attempt}" + (f" from step {start}" if start else "")


def figures(operation: "Operation") -> str:
    progress = operation.progress
    if progress is None or progress.step is None:
        return "no step yet"
    loss, speed, left = progress.loss, progress.samples_per_s, progress.eta_s
    parts = {
        show.percent(progress): progress.percent,
        show.steps(progress): progress.step,
        f"loss {show.number(loss)}": loss,
        f"{show.number(speed)}/s": speed,
        show.duration(left): left,
    }
    return " ".join(text for text, value in parts.items() if value is not None)


def last_lines(operation: "Operation") -> list[str]:
    lines = [f"{operation.name} {operation.status}: {show.progress_line(operation.progress, live=False)}"]
    if operation.error:
        lines.append(show.fault(operation.error))
    return [*lines, f"Next: {next_command(operation)}"]
