"""`ops sweep`: compute-optimal sizes of models, and what studies came to."""

import typer

from ops_cli import sweep_fit, sweep_run


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="What is compute-optimal, and what any study came to.")
    group.command()(sweep_run.run)
    group.command("show")(sweep_run.show_study)
    group.command()(sweep_fit.fit)
    app.add_typer(group, name="sweep")
