"""`ops measure`: what a model takes and gives on this hardware, and what came of it."""

import typer

from ops_cli import measure_run, measure_show


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Tokens per second and joules per token of a model, measured.")
    group.command()(measure_run.run)
    group.command("show")(measure_show.show_measured)
    app.add_typer(group, name="measure")
