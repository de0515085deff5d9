"""Webhooks: who is told when operations end."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json, the_one, with_client
from ops_cli.exits import not_found

if TYPE_CHECKING:
    from uuid import UUID

    from ops_contract.webhooks import DeliveryView, WebhookView
    from relight.client import Client

Webhook = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Of `ops webhooks list`; its beginning is enough.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Have a URL told when operations end.", no_args_is_help=True)
    group.command()(add)
    group.command("list")(list_all)
    group.command("test")(send_sample)
    group.command()(deliveries)
    group.command()(remove)
    app.add_typer(group, name="webhooks")


@with_client
def add(
    client: "Client",
    receiver: Annotated[str, typer.Argument(metavar="RECEIVER", help="Its http or https URL.")],
    format: Annotated[str, typer.Option(help="json, slack (Mattermost too) or discord.")] = "json",
    status: Annotated[str, typer.Option(help="Several are joined by commas.")] = "completed,failed,cancelled",
    label: Annotated[str | None, typer.Option(metavar="KEY[=VALUE]")] = None,
    description: Annotated[str, typer.Option()] = "",
    json: Json = False,
) -> None:
    """Have a URL told when operations end."""
    from pydantic import ValidationError

    from ops_contract.errors import without_prefix

    statuses = [each.strip() for each in status.split(",")]
    try:
        made = client.add_webhook(receiver, format=format, statuses=statuses, label=label, description=description)
    except ValidationError as error:
        problems = (f"{each['loc'][0]}: {without_prefix(each['msg'])}" for each in error.errors())
        raise typer.BadParameter("; ".join(problems)) from error
    if json:
        print(made.model_dump_json())
        return
    print(f"Added {made.id}")
    print(f"Its secret, shown this once: {made.secret}")
    print(f"Next: ops webhooks test {str(made.id)[:8]}")


@with_client
def list_all(client: "Client", json: Json = False) -> None:
    """The webhooks, and how their receivers answer."""
    items = client.webhooks()
    if json:
        print(show.json_array(items))
        return
    if not items:
        print("No URL is told of anything. Add one: ops webhooks add URL")
        return
    table = show.table("ID", "URL", "FORMAT", "WHEN", "LABEL", "LAST", "FAILURES", right=("FAILURES",), wide=["URL"])
    ids = show.shortest(item.id for item in items)
    for item in items:
        cells = (item.format, ",".join(item.statuses), show.plain(item.label or "any"), _last(item), str(item.failures))
        table.add_row(ids[item.id], show.cut(item.url), *cells)
    show.print_rich(table)


@with_client
def send_sample(client: "Client", webhook: Webhook, json: Json = False) -> None:
    """Send a made-up end now, and say what the receiver answered."""
    answer = client.test_webhook(_find(client, webhook))
    if json:
        print(answer.model_dump_json())
    else:
        print(("It arrived: " if answer.delivered else "Not taken: ") + _said(answer.http_status, answer.answer))
    if not answer.delivered:
        raise typer.Exit(1)


@with_client
def deliveries(client: "Client", webhook: Webhook, json: Json = False) -> None:
    """The newest deliveries, and how each was answered."""
    items = client.deliveries(_find(client, webhook))
    if json:
        print(show.json_array(items))
        return
    table = show.table("ID", "OPERATION", "END", "STATE", "TRIES", "ANSWER", right=("TRIES",), wide=["ANSWER"])
    ids = show.shortest(item.id for item in items)
    for item in items:
        answer = show.cut(_said(item.http_status, item.answer))
        cells = (str(item.operation_id)[:8], show.coloured(item.status), _state(item), str(item.tries), answer)
        table.add_row(ids[item.id], *cells)
    show.print_rich(table)


@with_client
def remove(client: "Client", webhook: Webhook) -> None:
    """Send nothing more, what is still due included."""
    id = _find(client, webhook)
    client.remove_webhook(id)
    print(f"Removed {id}")


def _find(client: "Client", beginning: str) -> "UUID":
    """Raises OpsError."""
    found = [item.id for item in client.webhooks() if str(item.id).startswith(beginning.lower())]
    absent = not_found(f"no webhook's id begins with {beginning!r}; see `ops webhooks list`")
    return the_one(found, beginning, "webhooks", absent)


def _last(item: "WebhookView") -> str:
    if item.stopped_at:
        return "[red]stopped: 410[/]"
    if item.last is None:
        return "–"
    return show.plain(str(item.last.http_status or "no answer")) if item.last.state != "due" else _state(item.last)


def _state(item: "DeliveryView") -> str:
    if item.state == "due" and item.next_try_at:
        return f"[yellow]in {show.age(datetime.now(UTC), item.next_try_at)}[/]"
    return "[green]delivered[/]" if item.state == "delivered" else "[red]given up[/]"


def _said(http_status: int | None, answer: str) -> str:
    return " ".join(part for part in (str(http_status or ""), answer) if part) or "–"
