"""`ops sweep`: compute-optimal sizes of models."""

import typer

from ops_cli import sweep_fit


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Find the size of model and the data that make the most of FLOPs.")
    group.command()(sweep_fit.fit)
    app.add_typer(group, name="sweep")
