"""`ops sweep`: compute-optimal sizes of models."""

import typer

from ops_cli import sweep_fit, sweep_run


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Find the size of model and the data that make the most of FLOPs.")
    group.command()(sweep_run.run)
    group.command("show")(sweep_run.show_study)
    group.command()(sweep_fit.fit)
    app.add_typer(group, name="sweep")
