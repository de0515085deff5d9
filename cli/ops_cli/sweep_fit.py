"""`ops sweep fit`: the fits of a sweep that anybody ran, without a server."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json
from ops_cli.exits import invalid, require

if TYPE_CHECKING:
    from ops_contract.study_results import SweepFit


def fit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of runs: a .csv with a head, or a .json.")],
    params: Annotated[str, typer.Option(metavar="COL", help="The column of parameters, N.")] = "model_size",
    tokens: Annotated[str | None, typer.Option(metavar="COL", help="Of tokens trained on, D; else C/6N.")] = None,
    flops: Annotated[str | None, typer.Option(metavar="COL", help="Of FLOPs, C; else 6ND.")] = None,
    loss: Annotated[str, typer.Option(metavar="COL", help="Of the final loss.")] = "final_loss",
    budget: Annotated[
        str | None, typer.Option(metavar="COL", help="Of the budget; else runs of about the same FLOPs share one.")
    ] = None,
    predict: Annotated[
        list[float] | None, typer.Option(metavar="C", help="FLOPs to say the optimum of; may be repeated.")
    ] = None,
    drop_worst: Annotated[
        int, typer.Option(metavar="K", min=0, help="Leave out the K runs farthest from a first fit.")
    ] = 0,
    bootstraps: Annotated[int, typer.Option(min=0, max=100_000, help="Resamples, for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="The optima alone, as a table in Markdown.")] = False,
    json: Json = False,
) -> None:
    """What is compute-optimal, from the results of a sweep.

    Both fits of Hoffmann et al. 2022, with 95 % intervals: a parabola through each budget (approach 2), and L = E +
    A/N^alpha + B/D^beta (approach 3). Needs no server.

    \b
    ops sweep fit runs.csv --params n --tokens d --loss val_loss --predict 1e21
    ops sweep fit results.json --markdown
    """
    if markdown and json:
        raise typer.BadParameter("--markdown goes without --json")
    if unfit := [each for each in predict or () if not 0 < each < math.inf]:
        raise typer.BadParameter(f"{unfit[0]}: give FLOPs above 0, such as 1e21", param_hint="--predict")
    require("scipy", "studies", "ops: fitting")
    from ops_cli import sweep_columns
    from ops_studies import fits, tables

    rows, left_out = sweep_columns.read(file)
    columns = sweep_columns.choose(rows, params=params, tokens=tokens, flops=flops, loss=loss, budget=budget)
    runs = [columns.run(row) for row in rows]
    found = fits.fit(runs, predict or (), bootstraps=bootstraps, seed=seed, drop_worst=drop_worst)
    if found.approach2 is None and found.approach3 is None:
        raise invalid("; ".join(["these runs allow no fit", *left_out, *found.warnings]))
    for warning in [*left_out, *found.warnings]:
        print(f"ops: {show.harmless(warning)}", file=sys.stderr)
    if json:
        print(found.model_copy(update={"warnings": left_out + found.warnings}).model_dump_json())
    elif markdown:
        print(tables.chinchilla(found), end="")
    else:
        print_fit(found)


def print_fit(found: "SweepFit") -> None:
    _print_facts(found)
    if found.approach3 and found.approach3.outliers:
        print()
        _print_outliers(found)
    if found.predictions:
        print()
        _print_optima(found)


def _print_facts(found: "SweepFit") -> None:
    from ops_studies.tables import estimate

    facts = {"runs": f"{found.points}" + (f", without {', '.join(found.dropped)}" if found.dropped else "")}
    if (second := found.approach2) and second.params and second.tokens:
        r2 = "" if second.params.r2 is None else f", r² {second.params.r2:.4f}"
        bias = "" if second.bias is None else f", off by about {second.bias:+.4f}"
        facts["approach 2"] = f"N ~ C^a{r2}{bias}"
        facts |= {"  a": estimate(second.params.exponent, 4), "  b, of D": estimate(second.tokens.exponent, 4)}
    if third := found.approach3:
        r2 = "" if third.r2 is None else f", r² {third.r2:.4f}"
        facts["approach 3"] = f"L = E + A/N^alpha + B/D^beta{r2}, rmse {third.rmse_log:.2g} of log L"
        facts |= {f"  {name}": estimate(getattr(third, name), 4) for name in ("E", "A", "B", "alpha", "beta")}
    show.print_facts({label: show.plain(value) for label, value in facts.items()})


def _print_outliers(found: "SweepFit") -> None:
    table = show.table("OUTLIER", "OFF THE FIT", "ROBUST Z", right=("OFF THE FIT", "ROBUST Z"), wide=["OUTLIER"])
    for each in found.approach3.outliers if found.approach3 else ():
        table.add_row(show.cut(each.experiment_id), f"{math.expm1(each.residual):+.2%}", f"{each.robust_z:+.1f}")
    show.print_rich(table)


def _print_optima(found: "SweepFit") -> None:
    """The intervals of N and the loss; those of D and D/N follow from C = 6ND, and are in --json and --markdown."""
    from ops_studies.tables import count, estimate

    columns = ("C", "BY", "PARAMS", "TOKENS", "TOKENS/PARAM", "LOSS")
    table = show.table(*columns, right=("C", "TOKENS", "TOKENS/PARAM"))
    for each in found.predictions:
        c = f"{each.budget:.3g}" + ("*" if each.extrapolates else "")
        rest = (count(each.tokens.value), count(each.tokens_per_param.value), estimate(each.loss, 4))
        table.add_row(c, str(each.approach), estimate(each.params), *rest)
    show.print_rich(table)
    if any(each.extrapolates for each in found.predictions):
        print("* beyond the budgets that were run")
