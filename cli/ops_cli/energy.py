"""`ops energy`: the ledger of an operation, its windows, and a drawing of its power."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from ops_cli import show
from ops_cli.connect import Json, OperationId, with_client
from ops_cli.exits import ExitCode
from ops_cli.plot import FORMATS, new_figure, require_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ops_contract.history import AttemptView
    from ops_contract.ledger import BookedWindow, EnergyLedger, Joules
    from relight.client import Client

LAST_EPOCHS = 10


def register(app: typer.Typer) -> None:
    app.command()(energy)


@with_client
def energy(
    client: "Client",
    operation_id: OperationId,
    windows: Annotated[bool, typer.Option("--windows", help="What was added up, as csv.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw power over time into a .png, .svg or .pdf.")
    ] = None,
    json: Json = False,
) -> None:
    """What it cost in joules: useful, lost, overhead.

    \b
    ops energy 1f6e
    ops energy 1f6e --windows > windows.csv
    ops energy 1f6e --plot power.png
    """
    if plot is not None:
        if windows or json:
            raise typer.BadParameter("--plot goes without --windows and --json")
        if plot.suffix not in FORMATS:
            raise typer.BadParameter(f"{plot}: give a file that ends in one of {', '.join(FORMATS)}")
        require_matplotlib()
    found = client.resolve(operation_id)
    if plot is not None:
        _draw(client.energy_windows(found), client.attempts(found), plot)
    elif windows:
        items = client.energy_windows(found)
        if json:
            print(show.json_array(items))
        else:
            show.print_csv(_flat(window.model_dump(mode="json")) for window in items)
    elif json:
        print(client.energy(found).model_dump_json())
    else:
        _print(client.energy(found))


def _print(ledger: "EnergyLedger") -> None:
    _print_uses(ledger)
    if ledger.devices:
        print()
        _print_devices(ledger)
    if len(ledger.attempts) > 1:
        print()
        _print_attempts(ledger)
    if ledger.epochs:
        print()
        _print_epochs(ledger)
    print()
    show.print_facts(_facts(ledger))


def _print_uses(ledger: "EnergyLedger") -> None:
    table = show.table("WHAT", "ENERGY", "SHARE", "ERROR", "WHY", right=("ENERGY", "SHARE", "ERROR"), wide=["WHY"])
    rows: dict[str, Joules | None] = {"useful": ledger.useful, "lost": ledger.lost, "overhead": ledger.overhead}
    if ledger.total.known_j is not None:
        rows |= {f"  {use}": joules for use, joules in ledger.overhead_by_use.items() if joules.energy_j != 0}
    rows |= {"total": ledger.total, "unattributed": ledger.unattributed, "upper bound": ledger.upper_bound}
    for label, joules in rows.items():
        if joules is not None:
            share = "" if label in ("unattributed", "upper bound") else _share(joules, ledger.total)
            error = "–" if joules.error_j is None else f"± {_joules(joules.error_j)}"
            table.add_row(label, _energy(joules), share, error, show.cut(_why(joules)))
    show.print_rich(table)


def _print_devices(ledger: "EnergyLedger") -> None:
    columns = ("ENERGY", "MEAN", "MAX", "TEMP", "TIME")
    table = show.table("DEVICE", "SOURCE", *columns, right=columns, wide=["DEVICE"])
    for each in ledger.devices:
        temperature = f"{each.temperature_max_c:.0f} °C" if each.temperature_max_c is not None else "–"
        source = f"{each.source}, {each.quality}".replace("_", " ") if each.source else "none"
        watts = (show.quantity(each.power_mean_w, "W"), show.quantity(each.power_max_w, "W"))
        cells = (*watts, temperature, show.duration(each.duration_s))
        table.add_row(show.cut(each.device), source, _energy(each.energy), *cells)
    show.print_rich(table)


def _print_attempts(ledger: "EnergyLedger") -> None:
    columns = ("TOTAL", "USEFUL", "LOST", "OVERHEAD", "STEPS", "REDONE")
    table = show.table("ATTEMPT", *columns, "WHY", right=columns, wide=["WHY"])
    for each in ledger.attempts:
        shares = (_energy(joules) for joules in (each.total, each.useful, each.lost, each.overhead))
        done = str(each.steps + each.lost_steps)
        table.add_row(str(each.number), *shares, done, str(each.lost_steps), show.cut(_why(each.total)))
    show.print_rich(table)


def _print_epochs(ledger: "EnergyLedger") -> None:
    columns = ("TOTAL", "LOST", "J/STEP", "J/UNIT", "STEPS", "TIME")
    table = show.table("EPOCH", *columns, right=columns)
    for each in ledger.epochs[-LAST_EPOCHS:]:
        per = (show.number(each.per_step_j), show.number(each.per_unit_j), str(each.steps))
        energies = (_at_least(each.total_j, each.known_j), _joules(each.lost_j))
        table.add_row(str(each.epoch), *energies, *per, show.duration(each.duration_s))
    show.print_rich(table)
    before = len(ledger.epochs) - LAST_EPOCHS + ledger.epochs_left_out
    if before > 0:
        print(f"and {before} before; --json has {'the newest 1000' if ledger.epochs_left_out else 'all'}")


def _facts(ledger: "EnergyLedger") -> dict[str, str]:
    work, idle, carbon, cost = ledger.per_work, ledger.above_idle, ledger.carbon, ledger.cost
    throttled = ledger.thermal_throttle
    slowed = ", ".join(f"{why} {show.duration(s)}" for why, s in (throttled.throttled_s or {}).items()) or "never"
    return {
        "quality": (ledger.quality or "none").replace("_", " "),
        "so far": "a later attempt may yet make useful joules lost ones" if ledger.provisional else "no: completed",
        "per step": _or_why(_joules(work.per_step_j), work.reason),
        "per unit": _or_why(_joules(work.per_unit_j), work.reason),
        "above idle": _or_why(_joules(idle.energy_j), idle.reason),
        "carbon": _or_why(f"{show.number(carbon.co2_g)} g CO2", carbon.reason),
        "cost": _or_why(f"{show.number(cost.amount)} {cost.currency or ''}".rstrip(), cost.reason),
        "slowed by": _or_why(slowed.replace("_", " "), throttled.reason),
    }


def _energy(joules: "Joules") -> str:
    return _at_least(joules.energy_j, joules.known_j)


def _at_least(energy_j: float | None, known_j: float | None) -> str:
    """What is known of one that is not known whole stands in the place of it, marked."""
    return f"≥ {_joules(known_j)}" if energy_j is None and known_j is not None else _joules(energy_j)


def _why(joules: "Joules") -> str:
    return (joules.reason or "").replace("_", " ")


def _share(joules: "Joules", total: "Joules") -> str:
    if joules.energy_j is None or not total.energy_j:
        return "–"
    return f"{100 * joules.energy_j / total.energy_j:.1f}%"


def _joules(energy_j: float | None) -> str:
    return show.quantity(energy_j, "J")


def _or_why(text: str, reason: str | None) -> str:
    return f"not known ({reason.replace('_', ' ')})" if reason else text


def _flat(window: Mapping[str, Any]) -> dict[str, Any]:
    """Of a csv: empty is not known, and `reason` says why; the state of the device has columns of its own."""
    from ops_contract.energy import DeviceState

    state = window["state"] or {}
    throttled = "; ".join(f"{why}={s}" for why, s in state.get("throttled_s", {}).items())
    columns = {name: state.get(name) for name in DeviceState.model_fields} | {"throttled_s": throttled}
    return {name: value for name, value in window.items() if name != "state"} | columns


def _draw(windows: "Sequence[BookedWindow]", attempts: "Sequence[AttemptView]", path: Path) -> None:
    if not any(window.energy_j is not None for window in windows):
        print("ops: nothing was measured of this operation; `ops energy ID` says why", file=sys.stderr)
        raise typer.Exit(ExitCode.NOT_FOUND)
    figure = new_figure()
    axes = figure.subplots()
    starts_s = {each.number: (each.claimed_at - attempts[0].claimed_at).total_seconds() for each in attempts}
    lost_s: set[tuple[float, float]] = set()  # shaded once, however many devices
    for device in sorted({window.device for window in windows}):
        lost_s |= _draw_device(axes, device, [window for window in windows if window.device == device], starts_s)
    for begin_s, end_s in lost_s:
        axes.axvspan(begin_s, end_s, color="tab:red", alpha=0.15, lw=0)
    for number in sorted({window.attempt for window in windows}):
        axes.axvline(starts_s[number], color="0.4", lw=0.8, ls=":")
        axes.annotate(f" {number}", (starts_s[number], 1), xycoords=("data", "axes fraction"), va="top", color="0.4")
    axes.set(xlabel="seconds since the first attempt (dotted: where each began; shaded: lost)", ylabel="power (W)")
    axes.set_ylim(bottom=0)
    axes.legend()
    print(f"Drawn in {save(figure, path)}")


def _draw_device(
    axes: "Axes", device: str, windows: "Sequence[BookedWindow]", starts_s: Mapping[int, float]
) -> set[tuple[float, float]]:
    """A level for each window, from where the one before it ended; a gap where it is not known. Gives what was lost."""
    edges: list[float] = []
    levels: list[float] = []
    lost: set[tuple[float, float]] = set()
    ends_s: dict[tuple[int, UUID], float] = {}
    for window in windows:
        hold = (window.attempt, window.worker_id)
        if hold not in ends_s:
            edges.append(starts_s[window.attempt])
            levels.append(math.nan)
        begin_s = ends_s.get(hold, starts_s[window.attempt])
        end_s = ends_s[hold] = begin_s + window.duration_s
        level_w = math.nan
        if window.energy_j is not None and window.duration_s > 0:
            level_w = window.energy_j / window.duration_s
        edges += [begin_s, end_s]
        levels += [level_w, level_w]
        if window.lost_j:
            lost.add((begin_s, end_s))
    axes.plot(edges, levels, lw=1.2, label=device.replace("_", " "))
    return lost
