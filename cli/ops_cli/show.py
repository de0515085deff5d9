"""Values as people read them."""

import csv
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from ops_contract.history import ReplayCheck
    from ops_contract.operations import EnergyView, Operation, ProgressView, ResumedFrom
    from ops_contract.reports import Fault
    from ops_contract.wire import Wire

SHORT_FROM = 1e7

STYLES = {
    "pending": "yellow",
    "running": "cyan",
    "waiting": "cyan",
    "cancelling": "yellow",
    "completed": "green",
    "failed": "red",
    "cancelled": "magenta",
}


def number(value: float | None) -> str:
    """Four digits; `nan` and `inf` are said, a missing value is a dash."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def short(value: float) -> str:
    """As `number`, with an exponent from ten millions on: FLOPs and bytes in full say no more."""
    return f"{value:.4g}" if abs(value) >= SHORT_FROM else number(value)


def quantity(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{number(value)} {unit}"


def cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def duration(duration_s: float | None) -> str:
    if duration_s is None or not math.isfinite(duration_s):
        return "–"
    minutes, seconds = divmod(max(0, round(duration_s)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def age(at: datetime | None, now: datetime) -> str:
    return duration((now - at) / timedelta(seconds=1)) if at else "–"


def moment(at: datetime, now: datetime) -> str:
    """In the time zone of `now`; of today without the day."""
    here = at.astimezone(now.tzinfo)
    return here.strftime("%H:%M:%S" if here.date() == now.date() else "%d %b %Y %H:%M")


def size(size_bytes: int) -> str:
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def shortest(ids: Iterable[UUID]) -> Mapping[UUID, str]:
    """Each id cut to where it differs from the others, at eight characters or more."""
    whole = list(ids)
    length = next(n for n in range(8, 37) if len({str(i)[:n] for i in whole}) == len(set(whole)))
    return {i: str(i)[:length] for i in whole}


def steps(progress: "ProgressView | None") -> str:
    if progress is None or progress.step is None:
        return "–"
    return f"{progress.step}/{progress.steps_total}" if progress.steps_total else str(progress.step)


def percent(progress: "ProgressView | None") -> str:
    return "–" if progress is None or progress.percent is None else f"{progress.percent:.0f}%"


def progress_line(operation: "Operation", live: bool = True) -> str:
    """What is known of it, in words; speed and time left only of a live one. A study is as far as its children."""
    progress = operation.progress
    if operation.children and progress:
        return f"{percent(progress)}, {steps(progress)} children"
    if progress and progress.measurement and live:
        from relight.following import phase_line

        return phase_line(progress.measurement)
    if progress is None or progress.step is None:
        return "no step yet"
    parts = {
        f"{percent(progress)}": progress.percent,
        f"epoch {progress.epoch}": progress.epoch,
        f"step {steps(progress)}": progress.step,
        f"loss {number(progress.loss)}": progress.loss,
        f"{number(progress.samples_per_s)} samples/s": progress.samples_per_s if live else None,
        f"{duration(progress.eta_s)} left": progress.eta_s if live else None,
    }
    return ", ".join(text for text, value in parts.items() if value is not None)


def energy(view: "EnergyView") -> str:
    """Never 0 for what is not known: what is known of it, or the most that it can be, and why."""
    reason = (view.reason or "not_measured").replace("_", " ")
    if view.total_j is not None:
        lost = f", {number(view.lost_j)} J of it lost" if view.lost_j else ""
        return f"{number(view.total_j)} J {view.quality or ''}".rstrip() + lost
    if view.known_j is not None:
        return f"at least {number(view.known_j)} J, not all is known ({reason})"
    if view.upper_bound_j is not None:
        return f"at most {number(view.upper_bound_j)} J ({reason})"
    return reason if reason in ("not measured", "not yet measured") else f"not measured ({reason})"


def fault(error: "Fault | None") -> str:
    return f"{error.code}: {error.message}" if error else ""


def came_from(resumed: "ResumedFrom") -> str:
    checkpoint = f"{resumed.checkpoint_type} checkpoint {str(resumed.checkpoint_id)[:8]}"
    return f"epoch {resumed.epoch}, step {resumed.step} ({checkpoint})"


def replayed(check: "ReplayCheck | None") -> str:
    if check is None:
        return "–"
    return f"{check.differing} of {check.compared} values differ" if check.differing else f"{check.compared} equal"


def coloured(status: str) -> str:
    return f"[{STYLES.get(status, 'default')}]{status}[/]"


def table(*columns: str, right: Iterable[str] = (), wide: Collection[str] = ()) -> "Table":
    """Without lines, so that 80 columns suffice; only `wide` give way when they do not."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=column not in wide)
    return made


def print_facts(facts: Mapping[str, str], wrapped: bool = False) -> None:
    """A line each. `wrapped`: what is too long for it goes on in the next."""
    made = table("FACT", "", wide=[""] if wrapped else ())
    made.show_header = False
    for label, value in facts.items():
        made.add_row(f"[bold]{label}[/]", value)
    print_rich(made)


def print_csv(rows: Iterable[Mapping[str, Any]]) -> None:
    """With a head, if there is any."""
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)


def cut(text: str) -> "Text":
    """For the wide column of a list: one line, whatever is left of it."""
    from rich.text import Text

    return Text(harmless(text), no_wrap=True, overflow="ellipsis")


def json_array(items: Iterable["Wire"]) -> str:
    return "[" + ",\n".join(item.model_dump_json() for item in items) + "]"


def plain(text: str) -> str:
    """What others wrote: brackets are no markup, and a terminal obeys none of it."""
    from rich.markup import escape

    return escape(harmless(text))


def harmless(text: str) -> str:
    """Without escapes, other control characters, and what turns the direction of writing."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)


def width() -> int:
    from rich.console import Console

    return Console().width


def print_words(text: str) -> None:
    """A sentence: broken between words on a terminal, whole in a pipe."""
    print_rich(plain(text)) if sys.stdout.isatty() else print(harmless(text))


def print_rich(content: "RenderableType") -> None:
    from rich.console import Console

    Console(highlight=False).print(content)
