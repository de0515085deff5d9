"""`ops dashboard`: a link that logs a browser in."""

from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli.connect import with_client

if TYPE_CHECKING:
    from relight.client import Client


def register(app: typer.Typer) -> None:
    app.command()(dashboard)


@with_client
def dashboard(
    client: "Client", open_it: Annotated[bool, typer.Option("--open", help="In this machine's browser.")] = False
) -> None:
    """Print a link to the dashboard.

    It logs one browser in, once, within an hour.
    """
    import webbrowser

    link = client.dashboard_link()
    print(link)
    if open_it and not webbrowser.open(link):
        print("No browser found here; open the link yourself.")
