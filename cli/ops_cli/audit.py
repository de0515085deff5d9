"""The audit: who did what, and from where."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json, age_s, with_client

if TYPE_CHECKING:
    from ops_contract.audit import AuditEntry
    from relight.client import Client

TARGET_CHARS = 8


def register(app: typer.Typer) -> None:
    app.command()(audit)


@with_client
def audit(
    client: "Client",
    who: Annotated[str | None, typer.Option(metavar="NAME", help="Of a token.")] = None,
    action: Annotated[str | None, typer.Option(help="operation.cancel, token.create, access.refused, …")] = None,
    target: Annotated[str | None, typer.Option(metavar="ID", help="Or its beginning.")] = None,
    since: Annotated[str | None, typer.Option(metavar="AGE|DAY", help="12h, 30d, or 2026-11-26.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    json: Json = False,
) -> None:
    """Who did what, and from where; newest first.

    With --json all that is known of each, the program that asked too.

    \b
    ops audit --since 7d --action operation.delete
    """
    from ops_contract.audit import Action
    from ops_contract.problems import offer

    if action is not None and action not in list(Action):
        raise typer.BadParameter(f"no such action {action}; {offer(action, Action)}")
    items = client.audit(who=who, action=action, target=target, since=_moment(since) if since else None, limit=limit)
    if json:
        print(show.json_array(items))
        return
    table = show.table("AT", "WHO", "FROM", "ACTION", "TARGET", "DETAIL", wide=["WHO", "FROM", "DETAIL"])
    now = datetime.now().astimezone()
    for item in items:
        target_id = show.plain((item.target or "–")[:TARGET_CHARS])
        names = (show.cut(item.who or "–"), show.cut(item.address), item.action, target_id)
        table.add_row(show.moment(item.at, now), *names, show.plain(_detail(item)))
    show.print_rich(table)


def _moment(text: str) -> datetime:
    """Raises BadParameter. A day begins where the user is."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        pass
    try:
        return datetime.now(UTC) - timedelta(seconds=age_s(text))
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{error.message}, or a day like 2026-11-26") from error


def _detail(item: "AuditEntry") -> str:
    known = {"times": item.count} if item.count > 1 else {}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in (known | item.detail).items())
