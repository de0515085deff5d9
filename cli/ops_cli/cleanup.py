"""Getting rid of operations that have ended: one by one, or by age."""

from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json, age_s, confirm, with_client
from ops_cli.exits import exit_code

if TYPE_CHECKING:
    from relight.client import Client


def register(app: typer.Typer) -> None:
    app.command()(delete)
    app.command()(cleanup)


@with_client
def delete(
    client: "Client",
    operation_id: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, or unique beginnings of them.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete operations that have ended, with all that they left.

    That is history, checkpoints, model and logs. Forks and replays need what they began at: delete them first, or with
    it. What cannot go is said, and the rest goes.
    """
    from ops_contract.errors import OpsError

    chosen = {found.id: found for found in (client.get(client.resolve(prefix)) for prefix in operation_id)}
    # Newest first: forks before what they begin at.
    ordered = sorted(chosen.values(), key=lambda found: found.created_at, reverse=True)
    ids = show.shortest(chosen)
    named = ", ".join(f"{ids[found.id]} ({found.name})" for found in ordered)
    if not yes:
        confirm(f"Delete {named}, with all that they left, for good?")
    refusals = []
    for found in ordered:
        try:
            client.delete(found.id)
            print(show.harmless(f"Deleted {ids[found.id]} ({found.name})"))
        except OpsError as error:
            refusals.append(error)
            typer.echo(show.harmless(f"ops: {ids[found.id]} stays: {error.message}"), err=True)
    if refusals:
        raise typer.Exit(exit_code(refusals[0].http_status))


@with_client
def cleanup(
    client: "Client",
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Since they ended: 12h, 30d, 8w.")],
    status: Annotated[str, typer.Option(help="Several are joined by commas.")] = "completed,failed,cancelled",
    label: Annotated[str | None, typer.Option(metavar="KEY[=VALUE]")] = None,
    keep_model: Annotated[
        bool, typer.Option("--keep-model", help="Of those that left a model only the checkpoints go.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; else only show what would go.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go, whatever else is said.")] = False,
    json: Json = False,
) -> None:
    """Delete operations that ended long ago.

    Without --yes it only shows what would go, and how much.

    \b
    ops cleanup --older-than 30d --keep-model
    """
    from pydantic import ValidationError

    try:
        items = client.cleanup(
            age_s(older_than),
            status=[each.strip() for each in status.split(",")],
            label=label,
            keep_model=keep_model,
            dry_run=dry_run or not yes,
        )
    except ValidationError as error:
        raise typer.BadParameter(f"{error.errors()[0]['msg']}; --status takes completed, failed, cancelled") from error
    if json:
        print(show.json_array(items))
        return
    table = show.table("ID", "NAME", "STATUS", "ENDED", "GOES", "SIZE", "", right=("SIZE",), wide=["NAME", ""])
    ids = show.shortest(item.id for item in items)
    for item in items:
        ended = item.ended_at.astimezone().strftime("%Y-%m-%d")
        cells = (ended, item.goes, show.size(item.size_bytes), show.plain(item.reason or ""))
        table.add_row(ids[item.id], show.cut(item.name), show.coloured(item.status), *cells)
    if items:
        show.print_rich(table)
    going = [item for item in items if item.goes != "nothing"]
    freed = f"{len(going)} of {len(items)}, {show.size(sum(item.size_bytes for item in going))} and their logs"
    print(f"Gone: {freed}" if yes and not dry_run else f"Would go: {freed}. Do it: the same with --yes")
