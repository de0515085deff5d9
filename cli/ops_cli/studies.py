"""A study in words and tables: what it would run, what its children have given, what it came to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ops_cli import show
from ops_cli.compare import NOT_COMPARED
from ops_cli.sweep_fit import print_fit

if TYPE_CHECKING:
    from ops_contract.operations import StudyPreview
    from ops_contract.plans import ChildResult, Plan, Skipped
    from ops_contract.study_results import GridResult, Statistic, SweepResult

# Of what is listed in full only with --json.
LISTED = 40
TAKEN = ("wall_time_seconds", "energy_j")


def print_preview(preview: "StudyPreview") -> None:
    """Its plan, and what that would take."""
    plan = preview.plan
    if plan is not None:
        _print_plan(plan)
        print_notes(plan.skipped, plan.warnings)
    slots = f"{preview.slots} slot{'' if preview.slots == 1 else 's'}"
    if preview.time_s is not None:
        by = f"by the last {preview.by_trainings} of this workload here"
        print(f"It would take about {show.duration(preview.time_s)} on {slots}, {by}.")
    if preview.energy_j is not None:
        print(f"It would use about {show.number(preview.energy_j)} J.")
    if preview.reason:
        print(f"{'Energy' if preview.time_s is not None else 'Time and energy'} not known: {preview.reason}.")


def _print_plan(plan: "Plan") -> None:
    from ops_contract.plans import IsoFlopAbout

    print(f"It would run {len(plan.children):,} operations" + _totals(plan))
    table = show.table("BUDGET", "SIZE", "N", "D", "D/N", "SEED", right=("BUDGET", "SIZE", "N", "D", "D/N", "SEED"))
    grid = show.table("RUN", wide=["RUN"])
    for child in plan.children[:LISTED]:
        about = child.about
        if isinstance(about, IsoFlopAbout):
            ratio = f"{about.tokens / about.params:.3g}"
            cells = (f"{about.budget:.3g}", str(about.size), f"{about.params:,}", f"{about.tokens:,}", ratio)
            table.add_row(*cells, str(about.seed))
        else:
            grid.add_row(show.cut(child.name))
    show.print_rich(table if table.row_count else grid)
    if len(plan.children) > LISTED:
        print(f"… and {len(plan.children) - LISTED:,} more; --json has all")


def _totals(plan: "Plan") -> str:
    if plan.flops is None:
        return ":"
    needed = f"{plan.tokens_needed:,}" if plan.tokens_needed is not None else "–"
    there = f"{plan.tokens_there:,}" if plan.tokens_there is not None else "–"
    return f", {plan.flops:.3g} FLOPs in all; the longest needs {needed} tokens, of {there} that are there:"


def print_children(items: "Sequence[ChildResult]", metric: str | None) -> None:
    """While it runs, or where it ended without a result."""
    if not items:
        print("It has not planned its children yet.")
        return
    ids = show.shortest(item.operation_id for item in items)
    right = ("TRAINED", "VALUE", "TOOK", "JOULES")
    table = show.table("ID", "NAME", "STATUS", *right, right=right, wide=["NAME"])
    for item in items:
        name, value = _value(item, metric)
        trained = f"{item.training.units:,}" if item.training and item.training.units is not None else "–"
        cells = (trained, f"{name} {show.number(value)}" if name else "–", show.duration(item.running_s))
        shown = show.coloured(item.status)
        table.add_row(ids[item.operation_id], show.cut(item.name), shown, *cells, show.number(item.energy_j))
    show.print_rich(table)


def _value(item: "ChildResult", metric: str | None) -> tuple[str, float | None]:
    name = metric or next((n for n in ("val_loss", "loss") if n in item.final), next(iter(item.final), ""))
    return (name, item.final[name]) if name in item.final else ("", None)


def print_sweep(result: "SweepResult") -> None:
    right = ("BUDGET", "SIZE", "N", "D", "LOSS", "TOOK", "JOULES")
    table = show.table("RUN", *right, "STATUS", right=right, wide=["RUN"])
    for row in result.rows:
        tokens = "–" if row.num_tokens is None else f"{row.num_tokens:,}"
        cells = (f"{row.compute_budget:.3g}", str(row.size), f"{row.model_size:,}", tokens)
        took = show.duration(row.wall_time_seconds)
        values = (show.number(row.final_loss), took, show.number(row.energy_j), show.coloured(row.status))
        table.add_row(show.cut(row.experiment_id), *cells, *values)
    show.print_rich(table)
    print(f"N counts embeddings: {result.embeddings}; FLOPs per token: {result.flops}.")
    if result.fit is not None:
        print()
        print_fit(result.fit)
        for warning in result.fit.warnings:
            show.print_words(f"Warning: {warning}")
    for each in result.joules:
        print(f"Budget {each.budget:.3g}: lowest loss {each.flop_optimal[:8]}, fewest joules {each.joule_optimal[:8]}")
    print_notes(result.skipped, result.warnings)


def print_grid(result: "GridResult", metric: str | None) -> None:
    names = [metric] if metric else _shown_metrics(result)
    table = show.table("POINT", "N", *names, right=("N", *names), wide=["POINT"])
    for group in result.groups:
        told = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in group.point.items()) or "the base"
        n = max((each.n for each in group.metrics.values()), default=0)
        table.add_row(show.plain(told), str(n), *(_statistic(group.metrics.get(name)) for name in names))
    show.print_rich(table)
    print_notes(result.skipped, result.warnings)


def _shown_metrics(result: "GridResult") -> list[str]:
    """Those that fit: the held-out ones, else the loss, else what a command calls its own; then what all of it took."""
    there = dict.fromkeys(name for group in result.groups for name in group.metrics)
    own = [name for name in there if name not in (*TAKEN, *NOT_COMPARED)]
    best = [name for name in own if name.startswith(("val_", "final/"))] or [name for name in own if name == "loss"]
    return [*(best or own)[:2], *(name for name in TAKEN if name in there)]


def _statistic(value: "Statistic | None") -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return show.number(value.mean)
    return f"{show.number(value.mean)} ±{show.number((value.high - value.low) / 2)}"


def print_notes(skipped: "Sequence[Skipped]", warnings: Sequence[str]) -> None:
    for each in skipped[:LISTED]:
        print(f"Skipped {show.harmless(each.what)}: {show.harmless(each.reason)}")
    if len(skipped) > LISTED:
        print(f"… and {len(skipped) - LISTED:,} more are skipped; --json has all")
    for warning in warnings:
        show.print_words(f"Warning: {warning}")
