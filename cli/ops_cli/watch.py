"""Following operations to their end."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Protocol, Self
from uuid import UUID

import typer

from ops_cli import show
from ops_cli.connect import OperationIds, with_client
from ops_cli.exits import ExitCode
from ops_cli.read import next_command

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ops_contract.operations import Operation
    from relight.client import Client

POLL_S = 0.5
LINE_EVERY_PERCENT = 10
NAME_CHARS = 24


def register(app: typer.Typer) -> None:
    app.command()(watch)


@with_client
def watch(
    client: "Client",
    operation_ids: OperationIds,
    json: Annotated[bool, typer.Option("--json", help="A line of JSON at every change.")] = False,
) -> None:
    """Follow operations to their end.

    Ctrl-C detaches and never cancels. The exit code is 0 when all of them completed, 1 when not.

    \b
    ops watch 1f6e 9ab2 && ops compare 1f6e 9ab2
    """
    ids = list(dict.fromkeys(client.resolve(each) for each in operation_ids))
    watch_to_end(client, ids, JsonLines() if json else view_for_people())


def watch_to_end(client: "Client", ids: Sequence[UUID], view: "View") -> None:
    """Leaves with the exit code that says how they ended."""
    with detachable(*ids), view:
        operations = follow_all(client, ids, view)
    for operation in operations:
        view.ended(operation)
    raise typer.Exit(ExitCode.DONE if all(each.status == "completed" for each in operations) else ExitCode.FAILED)


@contextmanager
def detachable(*ids: UUID, back: str = "ops watch") -> Iterator[None]:
    """Ctrl-C leaves the operations alone, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        named = [str(id)[:8] for id in ids]
        goes = f"{named[0]} goes on" if len(named) == 1 else f"all {len(named)} go on"
        print(f"Detached; {goes}.\nBack: {back} {' '.join(named)}    Stop it: ops cancel {named[0]}", file=sys.stderr)
        raise typer.Exit(ExitCode.DETACHED) from None


def follow_all(
    client: "Client",
    ids: Sequence[UUID],
    view: "View",
    sleep: Callable[[float], None] = time.sleep,
    enough: "Callable[[Operation], bool]" = lambda operation: False,
) -> "list[Operation]":
    """Until each has ended, or is `enough`. A server that goes away is waited for, and the view says so."""
    from ops_contract.lifecycle import TERMINAL
    from relight.transport import Unreachable

    seen: dict[UUID, Operation] = {}
    live = list(ids)
    while True:
        try:
            for id in live:
                seen[id] = client.get(id)
                view.show(seen[id])
        except Unreachable as away:
            if len(seen) < len(ids):
                raise  # it was not there to begin with
            view.away(str(away))
        live = [id for id in live if seen[id].status not in TERMINAL and not enough(seen[id])]
        if not live:
            return [seen[id] for id in ids]
        sleep(POLL_S)


def follow(
    client: "Client",
    id: UUID,
    view: "View",
    sleep: Callable[[float], None] = time.sleep,
    enough: "Callable[[Operation], bool]" = lambda operation: False,
) -> "Operation":
    [operation] = follow_all(client, [id], view, sleep, enough)
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


class Away:
    """That the server is, said once for each time."""

    def __init__(self, tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
        self._tell = tell
        self._said = False

    def say(self, message: str) -> None:
        if not self._said:
            self._tell(f"{message} Waiting for it.")
        self._said = True

    def over(self) -> None:
        self._said = False


class Printed:
    """What was shown last of each, by which a view tells whether there is anything new."""

    def __init__(self) -> None:
        self._shown: dict[UUID, object] = {}
        self._away = Away()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def away(self, message: str) -> None:
        self._away.say(message)


class JsonLines(Printed):
    def show(self, operation: "Operation") -> None:
        line = operation.model_dump_json()
        if line != self._shown.get(operation.id):
            print(line, flush=True)
        self._shown[operation.id] = line
        self._away.over()

    def ended(self, operation: "Operation") -> None:
        """The last line has said it."""


class Lines(Printed):
    """For a log file: a line when the status, the attempt or the phase changes, and at every tenth of the way."""

    def show(self, operation: "Operation") -> None:
        progress = operation.progress
        tenth = int((progress.percent if progress and progress.percent else 0) // LINE_EVERY_PERCENT)
        phase = progress.measurement.phase if progress and progress.measurement else None
        now = (operation.status, operation.attempt, phase, tenth)
        if now != self._shown.get(operation.id) and operation.ended_at is None:
            print(f"{headline(operation)}: {show.progress_line(operation)}", flush=True)
        self._shown[operation.id] = now
        self._away.over()

    def ended(self, operation: "Operation") -> None:
        for line in last_lines(operation):
            print(line)


class Bar:
    """A live line each with bar, loss, throughput and time left; changes of the status stay above them."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            expand=True,
            transient=True,
        )
        self._tasks: dict[UUID, TaskID] = {}
        self._over: set[UUID] = set()
        self._headlines: dict[UUID, str] = {}
        self._away = Away(self._say)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, operation: "Operation") -> None:
        line, progress = headline(operation), operation.progress
        if line != self._headlines.get(operation.id) and operation.ended_at is None:
            self._say(line)
        if operation.id not in self._tasks:
            self._tasks[operation.id] = self._progress.add_task("", total=None, figures="")
        if operation.ended_at is not None:
            self._over.add(operation.id)
        self._headlines[operation.id] = line
        self._away.over()
        name = f"{show.plain(operation.name[:NAME_CHARS])} " if len(self._tasks) > 1 else ""
        self._progress.update(
            self._tasks[operation.id],
            description=name + show.coloured(operation.status),
            total=progress.steps_total if progress else None,
            completed=(progress.step or 0) if progress else 0,
            figures=figures(operation),
        )

    def away(self, message: str) -> None:
        self._away.say(message)
        for id in self._tasks.keys() - self._over:
            self._progress.update(self._tasks[id], description="[red]server away[/]")

    def ended(self, operation: "Operation") -> None:
        for line in last_lines(operation):
            self._say(line)

    def _say(self, line: str) -> None:
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
    if progress is not None and progress.measurement is not None:
        from relight.following import phase_line

        return phase_line(progress.measurement)
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
    lines = [f"{operation.name} {operation.status}: {show.progress_line(operation, live=False)}"]
    if operation.error:
        lines.append(show.fault(operation.error))
    return [*lines, f"Next: {next_command(operation)}"]
