"""`ops sweep`: a compute-optimal sweep on the service, and what any study has come to."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ops_cli import show, studies, sweep_fit
from ops_cli.code import CodeDir, NoCode, with_code
from ops_cli.connect import Json, OperationId, with_client
from ops_cli.exits import not_found
from ops_cli.operate import DryRun, Pairs, Settings, Watch, WorkloadName, submit_job

if TYPE_CHECKING:
    from ops_contract.study_results import SweepResult
    from relight.client import Client


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="What is compute-optimal, and what any study came to.")
    group.command()(run)
    group.command("show")(show_study)
    group.command()(sweep_fit.fit)
    app.add_typer(group, name="sweep")


@with_client
def run(
    client: "Client",
    workload: WorkloadName,
    budget: Annotated[list[float], typer.Option(metavar="C", help="FLOPs of one training; repeat it: three or more.")],
    size: Annotated[str, typer.Option(metavar="FIELD", help="What makes the model larger: config.d_model.")],
    sizes: Annotated[str, typer.Option(metavar="SIZES", help="32,48,64 or LOW:HIGH[:STEP].")],
    per_budget: Annotated[int | None, typer.Option(metavar="K", help="Sizes under each budget; 7.")] = None,
    seeds: Annotated[int | None, typer.Option(metavar="K", help="Trainings of each point; 1.")] = None,
    flops: Annotated[str | None, typer.Option(help="6N or counted, per token.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="included in N, or excluded.")] = None,
    predict: Annotated[
        list[float] | None, typer.Option(metavar="C", help="FLOPs to say the optimum of; may be repeated.")
    ] = None,
    repeat_data: Annotated[
        bool | None, typer.Option("--repeat-data", help="Train more than one epoch where data are few.")
    ] = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option()] = None,
    label: Pairs = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs first.")] = None,
    max_retries: Annotated[int | None, typer.Option(help="Of each training.")] = None,
    code: CodeDir = None,
    no_code: NoCode = False,
    dry_run: DryRun = False,
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Train several sizes under each budget, and fit the optimum.

    With --dry-run: the grid, its FLOPs, and about how long it takes. A grid of other things: ops submit FILE.

    \b
    ops sweep run bytelm --size config.d_model --sizes 16:128:8 \\
      --budget 1e10 --budget 3e10 --budget 1e11
    """
    from ops_cli import jobs

    flags: dict[str, Any] = {
        "workload": workload,
        "study.type": "isoflop",
        "study.budgets": budget,
        "study.size": size,
        "study.sizes": _sizes(sizes),
        "study.per_budget": per_budget,
        "study.seeds": seeds,
        "study.flops": flops,
        "study.embeddings": embeddings,
        "study.predict": predict or None,
        "study.repeat_data": repeat_data,
        **jobs.about(name, label, priority, max_retries),
    }
    job = jobs.job_from_flags(flags, settings)
    submit_job(client, with_code(client, job, code, no_code), dry_run, watch, json)


@with_client
def show_study(
    client: "Client",
    operation_id: OperationId,
    metric: Annotated[str | None, typer.Option(help="Of a grid, or while it runs.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="A sweep's optima, as a table in Markdown.")] = False,
    table: Annotated[bool, typer.Option("--csv", help="A sweep's runs, as `ops sweep fit` reads them.")] = False,
    json: Json = False,
) -> None:
    """What a study has given.

    Its runs as they come; then a sweep's fits, or a grid's means.

    \b
    ops sweep show 1f6e --markdown
    ops sweep show 1f6e --csv > runs.csv
    """
    from ops_contract.study_results import GridResult, SweepResult

    if [json, markdown, table].count(True) > 1:
        raise typer.BadParameter("give one of --json, --markdown and --csv")
    found = client.resolve(operation_id)
    results = client.results(found)
    content = results.content
    if results.operation.kind != "study":
        raise not_found(f"{str(found)[:8]} is no study; see `ops status {str(found)[:8]}`")
    if json:
        print(content.model_dump_json() if content else show.json_array(client.children(found)))
    elif (markdown or table) and not (isinstance(content, SweepResult) and content.rows):
        raise not_found(f"{str(found)[:8]} has no sweep's results yet; see `ops sweep show`")
    elif isinstance(content, SweepResult) and table:
        show.print_csv(row.model_dump(mode="json") for row in content.rows)
    elif isinstance(content, SweepResult) and markdown:
        _print_markdown(content)
    elif isinstance(content, SweepResult) and content.rows:
        studies.print_sweep(content)
    elif isinstance(content, GridResult) and content.rows:
        studies.print_grid(content, metric)
    else:
        studies.print_children(client.children(found), metric)


def _print_markdown(result: "SweepResult") -> None:
    from ops_studies import tables

    if result.fit is None:
        raise not_found("no training of this sweep has a loss that could be fitted")
    print(tables.chinchilla(result.fit), end="")


def _sizes(text: str) -> dict[str, int] | list[int]:
    """Raises typer.BadParameter."""
    try:
        if ":" not in text:
            return [int(part) for part in text.split(",")]
        low, high, *step = (int(part) for part in text.split(":"))
        if len(step) < 2:
            return {"low": low, "high": high, "multiple_of": step[0] if step else 1}
    except ValueError:
        pass
    raise typer.BadParameter(f"{text}: write 32,48,64 or 32:256:16", param_hint="--sizes")
