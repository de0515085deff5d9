"""`ops measure`: one measurement, or a study of them where something varies."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ops_cli import measure_show
from ops_cli.connect import Json, with_client
from ops_cli.operate import DryRun, Pairs, Settings, Watch, submit_job

if TYPE_CHECKING:
    from relight.client import Client

Values = Annotated[str | None, typer.Option(metavar="A,B,…", show_default=False)]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Tokens per second and joules per token of a model, measured.")
    group.command()(run)
    group.command("show")(measure_show.show_measured)
    app.add_typer(group, name="measure")


@with_client
def run(
    client: "Client",
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A directory on the worker or a name on Hugging Face, or several: A,B."),
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Instead: gpt2, llama, …; --set config.model.config.NAME=VALUE shapes it."),
    ] = None,
    n_prompts: Values = None,
    input_tokens: Values = None,
    output_tokens: Values = None,
    batch_size: Values = None,
    precision: Values = None,
    attention: Values = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH=A,B,…", help="Any other field, such as config.warmup.batches=1,5; repeatable."),
    ] = None,
    cycles: Annotated[int, typer.Option(min=1, help="How often each point is measured.")] = 1,
    order: Annotated[
        str | None, typer.Option(help="sequential, interleave, shuffle, reverse or latin_square.", show_default=False)
    ] = None,
    gap: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Rest of the idle device before each run.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="fresh, cached, validated or none.")] = None,
    meter: Annotated[
        str | None, typer.Option(help="nvml_counter, nvml_power, rapl or estimate; else the best.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A run that takes longer is killed, and has failed.")
    ] = None,
    stop_after_failures: Annotated[
        int | None, typer.Option(metavar="N", help="When so many in a row have failed, the rest is not run.")
    ] = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option()] = None,
    label: Pairs = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs first.")] = None,
    max_retries: Annotated[int | None, typer.Option(help="Of each run.")] = None,
    dry_run: DryRun = False,
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Measure tokens per second and joules per token.

    Several values with commas make a study of every combination.

    \b
    ops measure run gpt2 --batch-size 1,8 --cycles 3 --order interleave
    ops measure run --random-weights gpt2 --n-prompts 16 --watch
    """
    from ops_cli import jobs

    if (model is None) == (random_weights is None):
        raise typer.BadParameter("give a model, or --random-weights and its type", param_hint="MODEL")
    given = {
        "config.model": model,
        "config.task.n_prompts": n_prompts,
        "config.task.input_tokens": input_tokens,
        "config.task.output_tokens": output_tokens,
        "config.batch_size": batch_size,
        "config.precision": precision,
        "config.attention": attention,
    }
    axes = {path: _values(text, as_text=path == "config.model") for path, text in given.items() if text is not None}
    flags: dict[str, Any] = {
        "workload": "measurement",
        "config.model.model_type": random_weights,
        **{path: values[0] for path, values in axes.items()},
        "config.gap_s": gap,
        "config.baseline.strategy": baseline,
        "config.meter": meter,
        "execution.timeout_s": timeout,
        **jobs.about(name, label, priority, max_retries),
        **_study(axes | _varied(vary or []), cycles, order, stop_after_failures),
    }
    submit_job(client, jobs.job_from_flags(flags, settings), dry_run, watch, json)


def _study(
    axes: Mapping[str, list[Any]], cycles: int, order: str | None, stop_after_failures: int | None
) -> dict[str, Any]:
    """Raises typer.BadParameter."""
    from relight.measuring import study_of

    several = {path: values for path, values in axes.items() if len(values) > 1}
    try:
        return study_of(several, cycles, order, stop_after_failures)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _varied(settings: Iterable[str]) -> dict[str, list[Any]]:
    """Raises typer.BadParameter."""
    found = {}
    for setting in settings:
        path, _, text = setting.partition("=")
        values = _values(text, as_text=False)
        if "." not in path or len(values) < 2:
            raise typer.BadParameter(
                f"{setting}: write a path and several values: config.warmup.batches=1,5", param_hint="--vary"
            )
        found[path] = values
    return found


def _values(text: str, as_text: bool) -> list[Any]:
    """`1,8` or `[1, 8]`: each JSON where it is JSON."""
    from ops_cli.jobs import parsed_value

    if text.startswith("[") and isinstance(whole := parsed_value(text), list) and whole:
        return whole
    return [part if as_text else parsed_value(part) for part in text.split(",")]
