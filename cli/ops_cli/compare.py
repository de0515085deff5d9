"""`ops compare`: operations side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from ops_cli import show
from ops_cli.comparison import NO_VALUES, Run, first_difference
from ops_cli.connect import Json, OperationIds, with_client

if TYPE_CHECKING:
    from relight.client import Client

# A training's own; workloads tell those of the metrics that they report.
GOALS = {"loss": "min"}
NOT_COMPARED = ("epoch", "learning_rate")  # the schedule's, not results


def register(app: typer.Typer) -> None:
    app.command()(compare)


@with_client
def compare(client: "Client", operation_ids: OperationIds, json: Json = False) -> None:
    """Operations side by side: jobs, results, cost, every bit.

    Of their jobs only what differs is shown. Curves are compared with those of the first one, all values of all
    metrics.
    """
    ids = list(dict.fromkeys(client.resolve(each) for each in operation_ids))
    if len(ids) < 2:
        raise typer.BadParameter("name two or more operations", param_hint="ID...")
    short = show.shortest(ids)
    runs = [Run.fetch(client, id, short[id]) for id in ids]
    reports = {each.name: each.reports for each in client.workloads()}
    facts = [_facts(run, GOALS | reports.get(run.operation.workload, {})) for run in runs]
    jobs = _differing([run.operation.job for run in runs])
    verdicts = [_verdict(runs[0], run) for run in runs[1:]]
    if json:
        from pydantic_core import to_json

        print(to_json({"operations": facts, "job": jobs, "curves": verdicts}, inf_nan_mode="strings").decode())
        return
    _print(runs, facts, jobs)
    for verdict in verdicts:
        difference = verdict["first_difference"] or NO_VALUES
        equal = f"yes, all {verdict['values']} values" if verdict["equal"] else f"no, {difference}"
        between = "" if len(runs) == 2 else f"{runs[0].label} and {short[verdict['id']]}, "
        show.print_words(f"Curves equal bit for bit: {between}{equal}")


def _facts(run: Run, goals: dict[str, str]) -> dict[str, Any]:
    operation = run.operation
    return {
        "id": operation.id,
        "name": operation.name,
        "workload": operation.workload,
        "status": operation.status,
        "attempts": len(run.attempts),
        "steps": run.steps,
        "redone_steps": run.redone_steps,
        "duration_s": run.wall_s,
        "energy_j": operation.energy.total_j,
        "energy_reason": operation.energy.reason,
        "metrics": {name: _ends(points, goals.get(name)) for name, points in run.curves.items() if points},
    }


def _ends(points: Sequence[tuple[int, float]], goal: str | None) -> dict[str, Any]:
    """`best` is null where nobody knows what is better, or where there is nothing but NaN."""
    values = [value for _, value in points if value == value]
    best = (min if goal == "min" else max)(values, default=None) if goal else None
    return {"last": points[-1][1], "best": best, "goal": goal}


def _differing(jobs: Sequence[Any]) -> dict[str, list[str | None]]:
    """By path, a value for each; null where a job has none."""
    from ops_cli.jobs import leaves

    flat = [dict(leaves(job.model_dump(mode="json"))) for job in jobs]
    paths = list(dict.fromkeys(path for each in flat for path in each))
    values = {path: [each.get(path) for each in flat] for path in paths}
    return {path: each for path, each in values.items() if len(set(each)) > 1 and path != "name"}


def _verdict(first: Run, other: Run) -> dict[str, Any]:
    parting, values = first_difference(first.curves, other.curves), sum(map(len, other.curves.values()))
    equal = parting is None and values > 0
    return {"id": other.operation.id, "equal": equal, "values": values, "first_difference": parting}


def _print(runs: Sequence[Run], facts: Sequence[dict[str, Any]], jobs: dict[str, list[str | None]]) -> None:
    labels = [run.label for run in runs]
    table = show.table("", *labels, wide=labels)
    rows: dict[str, list[str]] = {
        "name": [each["name"] for each in facts],
        "workload": [each["workload"] for each in facts],
        "status": [each["status"] for each in facts],
        "attempts": [str(each["attempts"]) for each in facts],
        "steps": [str(each["steps"]) for each in facts],
        "redone steps": [str(each["redone_steps"]) for each in facts],
        "time": [show.duration(each["duration_s"]) for each in facts],
        "energy": [show.energy(run.operation.energy) for run in runs],
    }
    names = sorted({name for each in facts for name in each["metrics"]} - set(NOT_COMPARED))
    for name in names:
        told = [each["metrics"].get(name, {}) for each in facts]
        rows[name] = [show.number(each.get("last")) for each in told]
        if any(each.get("best") is not None for each in told):
            rows[f"best {name}"] = [show.number(each.get("best")) for each in told]
    rows |= {path: ["–" if value is None else value for value in values] for path, values in jobs.items()}
    for label, cells in rows.items():
        table.add_row(f"[bold]{show.plain(label)}[/]", *map(show.cut, cells))
    show.print_rich(table)
