"""`ops top`: the workers and what runs and waits, on a screen that keeps itself up to date."""

import math
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ops_cli import show
from ops_cli.connect import Json, Token, Url
from ops_cli.workers import state_of

if TYPE_CHECKING:
    from uuid import UUID

    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from ops_contract.operations import OperationSummary
    from ops_contract.workers import WorkerView
    from relight.client import Client

KEY_WAIT_S = 0.5  # and so the time until a new size of the window is followed
PATIENCE_S = 3.0
LIVE = "running,cancelling,waiting"
AT_MOST = 100  # of each list: one request, and more than a screen has
WIDE = 110  # columns, from which on there is room for more of an operation
NO_LIMIT = 10**6

R = TypeVar("R")

# What the rows are sorted by, each with its value: the least first, what has none last.
SORTS: "dict[str, Callable[[OperationSummary], Any]]" = {
    "queue": lambda each: -math.inf if each.started_at and each.status != "pending" else -each.priority,
    "name": lambda each: each.name,
    "age": lambda each: -each.created_at.timestamp(),
    "done": lambda each: each.progress.percent if each.progress else None,
    "loss": lambda each: each.progress.loss if each.progress else None,
    "speed": lambda each: each.progress.samples_per_s if each.progress else None,
    "left": lambda each: each.progress.eta_s if each.progress else None,
}


def register(app: typer.Typer) -> None:
    app.command()(top)


def top(
    sort: Annotated[str, typer.Option(help=f"{', '.join(SORTS)}.", autocompletion=lambda: list(SORTS))] = "queue",
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="How often the server is asked.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print it once and leave; so too where no terminal is.")] = False,
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Workers and live operations, on a screen that follows them.

    s sorts by something else, r reverses, q or ctrl-C leaves. Every look is three requests, however much runs.
    """
    from relight.client import Client

    if sort not in SORTS:
        raise typer.BadParameter(f"{sort!r} is none of {', '.join(SORTS)}", param_hint="--sort")
    # The default of half a minute would make a frozen server look like one where nothing happens.
    with Client(url, token, timeout_s=PATIENCE_S) as client:
        first, screen = look(client), Screen(sort, client.server.url)
        if json:
            operations = show.json_array([*first.running, *first.pending])
            print(f'{{"workers": {show.json_array(first.workers)},\n"operations": {operations}}}')
        elif once or not _has_screen():
            show.print_rich(screen.render(first, None, show.width(), None))
        else:
            _live(client, screen, first, every)


@dataclass(frozen=True)
class Look:
    """What the server said. Of operations there may be more than these."""

    at: datetime
    workers: "Sequence[WorkerView]"
    running: "Sequence[OperationSummary]"
    pending: "Sequence[OperationSummary]"


def look(client: "Client") -> Look:
    workers = [each for each in client.workers() if each.live]
    running, pending = (list(client.list(status=status, limit=AT_MOST)) for status in (LIVE, "pending"))
    return Look(datetime.now(), workers, running, pending)


class Looking(threading.Thread):
    """Looks again and again, beside the keys: a server that is away must not make them wait."""

    def __init__(self, client: "Client", first: Look, every_s: float) -> None:
        super().__init__(daemon=True)
        self.latest = first
        self.away: str | None = None
        self.refused: Exception | None = None
        self.stopping = threading.Event()
        self._client, self._every_s = client, every_s

    def run(self) -> None:
        from relight.transport import Unreachable

        while not self.stopping.wait(self._every_s):
            try:
                self.latest = look(self._client)
                self.away = None
            except Unreachable as away:
                self.away = str(away)
            except Exception as error:  # a refusal, or the client is closed, because the user has left
                self.refused = error
                return


def _live(client: "Client", screen: "Screen", first: Look, every_s: float) -> None:
    from rich.live import Live

    looking = Looking(client, first, every_s)
    looking.start()
    try:
        with _keys() as key, Live(screen=True, auto_refresh=False) as live:
            while screen.key(key()):
                if looking.refused:
                    raise looking.refused
                size = live.console.size
                live.update(screen.render(looking.latest, looking.away, size.width, size.height), refresh=True)
    except KeyboardInterrupt:
        pass  # as good as q
    finally:
        looking.stopping.set()


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """Gives what was typed since, after a short wait; the first time at once."""
    import termios
    import tty

    terminal, waits = sys.stdin.fileno(), iter((0.0,))
    before = termios.tcgetattr(terminal)
    # Stopped by ctrl-Z it would leave the shell on this screen, without a cursor.
    handler = signal.signal(signal.SIGTSTP, signal.SIG_IGN)

    def key() -> str:
        ready, _, _ = select.select([terminal], [], [], next(waits, KEY_WAIT_S))
        return os.read(terminal, 64).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(terminal)
        yield key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTSTP, handler)


def _has_screen() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Screen:
    """What is shown of a look, in so many columns and, unless `height` is None, rows."""

    def __init__(self, sort: str, url: str) -> None:
        self._sort, self._reverse, self._url = sort, False, url

    def key(self, typed: str) -> bool:
        """False: leave."""
        names = list(SORTS)
        for each in typed:
            if each == "s":
                self._sort = names[(names.index(self._sort) + 1) % len(names)]
            elif each == "r":
                self._reverse = not self._reverse
            elif each in "q\x03":
                return False
        return True

    def render(self, seen: Look, away: str | None, width: int, height: int | None) -> "RenderableType":
        from rich.console import Group

        lines = [_line(self._head(seen))]
        if away:
            lines.append(_line(f"[red]Server away; what was known then:[/] {show.plain(away)}"))
        room = NO_LIMIT if height is None else height - len(lines) - 1  # for the line of the keys
        workers = _workers(seen.workers, max(3, room // 3))
        operations = _operations(self._sorted(seen), seen, width, room - workers.row_count - 3)
        left = room - workers.row_count - operations.row_count - 3
        foot: list[RenderableType] = [*[""] * left, _line(self._keys())] if height is not None else []
        return Group(*lines, workers, "", operations, *foot)

    def _head(self, seen: Look) -> str:
        slots = [slot for worker in seen.workers for slot in worker.slots]
        taken = sum(slot.operation_id is not None for slot in slots)
        counts = ((len(seen.running), "running"), (len(seen.pending), "pending"))
        told = ", ".join(f"{count}{'+' if count == AT_MOST else ''} {word}" for count, word in counts)
        return f"[bold]{told}[/], {taken} of {len(slots)} slots taken   {seen.at:%H:%M:%S}   {show.plain(self._url)}"

    def _keys(self) -> str:
        return f"[dim]sorted by {self._sort}{', reversed' if self._reverse else ''}   s sort   r reverse   q leave[/]"

    def _sorted(self, seen: Look) -> "list[OperationSummary]":
        key = SORTS[self._sort]
        # Within equals the oldest first: in the queue it is the next.
        rows = sorted([*seen.running, *seen.pending], key=lambda each: each.created_at)
        unknown = [each for each in rows if key(each) is None or key(each) != key(each)]  # a NaN has no place either
        known = [each for each in rows if each not in unknown]
        return sorted(known, key=key, reverse=self._reverse) + unknown


def _workers(workers: "Sequence[WorkerView]", room: int) -> "Table":
    table = show.table("WORKER", "STATE", "HOST", "SLOTS", "RUNS", right=("SLOTS",), wide=["RUNS"])
    for each in _fitting(table, workers, room, "workers"):
        runs = [str(slot.operation_id)[:8] for slot in each.slots if slot.operation_id]
        slots = f"{len(runs)}/{len(each.slots)}"
        table.add_row(show.cut(each.name), state_of(each), show.cut(each.host), slots, show.cut(" ".join(runs)))
    if not workers:
        table.add_row("none is live: `ops up` starts some")
    return table


def _operations(rows: "Sequence[OperationSummary]", seen: Look, width: int, room: int) -> "Table":
    more = ("WORKER", "WORKLOAD", "AGE") if width >= WIDE else ()
    numbers = ("DONE", "STEP", "LOSS", "SPEED", "LEFT")
    table = show.table("ID", "NAME", "STATUS", *numbers, *more, right=(*numbers, "AGE"), wide=["NAME"])
    ids, now = show.shortest(each.id for each in rows), datetime.now(UTC)
    places = _places(seen.workers)
    for each in _fitting(table, rows, room, "operations"):
        cells: list[str | Text] = [ids[each.id], show.cut(each.name), show.coloured(each.status), *_figures(each)]
        if more:
            cells += [show.cut(places.get(each.id, "–")), show.cut(each.workload), show.age(each.created_at, now)]
        table.add_row(*cells)
    if not rows:
        table.add_row("nothing", "runs or waits: ops train WORKLOAD")
    return table


def _places(workers: "Sequence[WorkerView]") -> "dict[UUID | None, str]":
    """Where each operation runs: of a gang, all its workers."""
    found: dict[UUID | None, list[str]] = {}
    for worker in workers:
        for id in {slot.operation_id for slot in worker.slots}:
            found.setdefault(id, []).append(worker.name)
    return {id: ", ".join(names) for id, names in found.items()}


def _figures(operation: "OperationSummary") -> tuple[str, ...]:
    told = operation.progress
    if told is None:
        return ("–",) * 5
    if now := told.measurement:
        watts = show.quantity(now.power_w, "W")
        degrees = "–" if now.temperature_c is None else f"{now.temperature_c:.0f} °C"
        return show.percent(told), now.phase.replace("_", " "), degrees, watts, show.duration(told.eta_s)
    step = "–" if told.step is None else str(told.step)
    speed = f"{show.number(told.samples_per_s)}/s" if told.samples_per_s is not None else "–"
    return show.percent(told), step, show.number(told.loss), speed, show.duration(told.eta_s)


def _fitting(table: "Table", rows: "Sequence[R]", room: int, what: str) -> "Iterator[R]":
    """The first of them, and after them a row that says how many are not shown."""
    shown = len(rows) if len(rows) <= room else max(0, room - 1)
    yield from rows[:shown]
    if shown < len(rows):
        wide = next(n for n, column in enumerate(table.columns) if not column.no_wrap)
        table.add_row("…", *[""] * (wide - 1), show.cut(f"{len(rows) - shown} more {what}"))


def _line(text: str) -> "Text":
    from rich.text import Text

    line = Text.from_markup(text, overflow="ellipsis")
    line.no_wrap = True
    return line
