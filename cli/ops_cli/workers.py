"""The workers: what they run, and taking them out of service."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import completing, show
from ops_cli.connect import Json, Token, Url, with_client

if TYPE_CHECKING:
    from ops_contract.energy import DeviceNow
    from ops_contract.workers import SlotView, WorkerView
    from relight.client import Client

Worker = Annotated[
    str,
    typer.Argument(metavar="NAME-OR-ID", help="Of one of `ops workers`.", autocompletion=completing.workers()),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="The workers and what their slots run; drain or undrain one.")
    group.callback(invoke_without_command=True)(workers)
    group.command()(drain)
    group.command()(undrain)
    app.add_typer(group, name="workers")


def workers(context: typer.Context, url: Url = None, token: Token = None, json: Json = False) -> None:
    """The workers, and what their slots run."""
    if context.invoked_subcommand is None:
        _list(json=json, url=url, token=token)
    elif url or token or json:
        raise typer.BadParameter(f"put options after {context.invoked_subcommand}")


@with_client
def _list(client: "Client", json: bool) -> None:
    items = client.workers()
    if json:
        print(show.json_array(items))
        return
    if not items:
        print("No worker has registered. Start one: ops worker (with `ops up` they come by themselves)")
        return
    table = show.table("WORKER", "ID", "STATE", "HOST", "SLOT", "SEEN", right=("SEEN",), wide=["HOST"])
    now, ids = datetime.now(UTC), show.shortest(item.id for item in items)
    for item in items:
        seen = show.age(item.last_seen_at, now)
        for slot in item.slots:
            cells = (state_of(item), show.cut(item.host), _slot(slot), seen)
            table.add_row(show.plain(item.name), ids[item.id], *cells)
    show.print_rich(table)
    if any(item.live and item.devices for item in items):
        print()
        _print_devices(items)


def _print_devices(items: "Sequence[WorkerView]") -> None:
    """As the last heartbeats told them."""
    columns = ("POWER", "TEMP", "BUSY", "MEMORY")
    table = show.table("WORKER", "GPU", *columns, "SLOWED BY", right=columns, wide=["GPU"])
    for item in items:
        for each in item.devices if item.live else ():
            power = "–" if each.power_w is None else f"{each.power_w:.0f} W"
            temperature = "–" if each.temperature_c is None else f"{each.temperature_c:.0f} °C"
            busy = "–" if each.utilization_percent is None else f"{each.utilization_percent:.0f}%"
            slowed = ", ".join(each.throttle).replace("_", " ") or "–"
            cells = (power, temperature, busy, _memory(each), show.plain(slowed))
            table.add_row(show.plain(item.name), show.cut(f"{each.name} {each.device}"), *cells)
    show.print_rich(table)


def _memory(device: "DeviceNow") -> str:
    used, total = device.memory_used_bytes, device.memory_total_bytes
    whole = "" if total is None else f" of {show.size(total)}"
    return "–" if used is None else f"{show.size(used)}{whole}"


@with_client
def drain(
    client: "Client",
    worker: Worker,
    hand_back: Annotated[
        bool, typer.Option("--hand-back", help="Checkpoint what runs there now, to go on elsewhere; not charged.")
    ] = False,
    json: Json = False,
) -> None:
    """Give a worker no more work; what runs there finishes.

    Until undrained or restarted: a restarted worker is another one, and takes work.
    """
    found = client.drain(client.find_worker(worker).id, preempt=hand_back)
    if json:
        print(found.model_dump_json())
        return
    running = sum(slot.operation_id is not None for slot in found.slots)
    if not found.live:
        print(f"{found.name} is gone; should it come back, it gets no work. Restarted it is another one: drain that")
    elif running:
        fate = "handed back, from a checkpoint" if hand_back else "finished first (--hand-back moves it at once)"
        print(f"{found.name} takes no more work; {running} running there: {fate}")
        print("Next: ops workers, until it says drained")
    else:
        print(f"{found.name} is drained: nothing runs there")


@with_client
def undrain(client: "Client", worker: Worker, json: Json = False) -> None:
    """Give a drained worker work again."""
    found = client.undrain(client.find_worker(worker).id)
    print(found.model_dump_json() if json else f"{found.name} takes work again")


def state_of(worker: "WorkerView") -> str:
    if not worker.live:
        return "[red]gone[/]"
    if not worker.draining:
        return "[green]live[/]"
    return "[yellow]draining[/]" if any(slot.operation_id for slot in worker.slots) else "[yellow]drained[/]"


def _slot(slot: "SlotView") -> str:
    device = show.cores(slot.cores)
    if slot.device != "cpu":
        device = f"{slot.device} {(slot.device_uuid or str(slot.index))[:12]}, {device}"
    return f"{device}: {str(slot.operation_id)[:8]} attempt {slot.attempt}" if slot.operation_id else f"{device}: free"
