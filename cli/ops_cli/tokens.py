"""Tokens: who may do what."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json, age_s, the_one, with_client
from ops_cli.exits import not_found

if TYPE_CHECKING:
    from ops_contract.tokens import TokenView
    from relight.client import Client


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Say who may do what.", no_args_is_help=True)
    group.command()(create)
    group.command("list")(list_all)
    group.command()(revoke)
    app.add_typer(group, name="tokens")


@with_client
def create(
    client: "Client",
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a person or a program: operations show it.")],
    scope: Annotated[
        str, typer.Option(help="read; operate (submits, cancels too); worker (of agents); admin (all).")
    ] = "operate",
    expires: Annotated[str | None, typer.Option(metavar="AGE", help="From now: 12h, 30d, 52w; else never.")] = None,
    json: Json = False,
) -> None:
    """Make a token, and show it this once."""
    from pydantic import ValidationError

    from ops_contract.tokens import TokenRequest

    wish = {"name": name, "scope": scope, "expires_s": age_s(expires) if expires else None}
    try:
        made = client.create_token(TokenRequest.model_validate(wish))
    except ValidationError as error:
        problems = (f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
        raise typer.BadParameter("; ".join(problems)) from error
    if json:
        print(made.model_dump_json())
        return
    until = f"until {made.expires_at:%d %b %Y %H:%M} UTC" if made.expires_at else "until it is revoked"
    print(f"{made.name} may {made.scope} {until}. Its token, shown this once:")
    print(made.token)


@with_client
def list_all(
    client: "Client",
    every: Annotated[bool, typer.Option("--all", help="Those that are revoked or expired too.")] = False,
    json: Json = False,
) -> None:
    """The tokens, and when each was last used."""
    now = datetime.now(UTC)
    items = [item for item in client.tokens() if every or _living(item, now)]
    if json:
        print(show.json_array(items))
        return
    if not items:
        print("No token was made; that of `ops up` is in DIR/token. Make one: ops tokens create NAME")
        return
    table = show.table("ID", "NAME", "SCOPE", "MADE BY", "MADE", "LAST USED", "ENDS", wide=["NAME"])
    ids = show.shortest(item.id for item in items)
    for item in items:
        made, used = f"{show.age(item.created_at, now)} ago", "never"
        if item.last_used_at:
            used = f"{show.age(item.last_used_at, now)} ago"
        cells = (item.scope, show.plain(item.created_by), made, used, _end(item, now))
        table.add_row(ids[item.id], show.cut(item.name), *cells)
    show.print_rich(table)


@with_client
def revoke(
    client: "Client",
    name: Annotated[str, typer.Argument(metavar="NAME|ID", help="Of `ops tokens list`.")],
) -> None:
    """End a token, and whatever came in with it.

    The browsers that it logged in are out within seconds, and so are the workers that it registered.
    """
    living = [item for item in client.tokens() if not item.revoked_at]
    found = [item for item in living if item.name == name or str(item.id).startswith(name.lower())]
    token = the_one(found, name, "tokens", not_found(f"no token is called {name!r}; see `ops tokens list`"))
    client.revoke_token(token.id)
    print(f"Revoked {token.name}")


def _living(item: "TokenView", now: datetime) -> bool:
    return not item.revoked_at and (item.expires_at is None or item.expires_at > now)


def _end(item: "TokenView", now: datetime) -> str:
    if item.revoked_at:
        return "[red]revoked[/]"
    if item.expires_at is None:
        return "never"
    return f"in {show.age(now, item.expires_at)}" if _living(item, now) else "[red]expired[/]"
