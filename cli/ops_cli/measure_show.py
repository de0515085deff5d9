"""`ops measure show`: every figure of a measurement, or the points of a study side by side."""

from itertools import islice
from typing import TYPE_CHECKING, get_args

from ops_cli import show, studies
from ops_cli.connect import Json, OperationId, with_client
from ops_cli.exits import not_found

if TYPE_CHECKING:
    from ops_contract.measurements import Figure, MeasurementResult
    from ops_contract.operations import Operation
    from ops_contract.study_results import GridResult
    from relight.client import Client

NOT_KNOWN = "not known"


@with_client
def show_measured(client: "Client", operation_id: OperationId, json: Json = False) -> None:
    """What a measurement, or a study of them, has given.

    Every figure with its unit, how far it may be off, and where it comes from, or why it is not known. Of a study the
    points side by side, with 95 % intervals; a star is on the Pareto front of throughput and energy.

    \b
    ops measure show 1f6e
    ops plot 1f6e --to energy.svg
    """
    from ops_contract.measurements import MeasurementResult
    from ops_contract.study_results import GridResult

    results = client.results(client.resolve(operation_id))
    content, operation = results.content, results.operation
    if isinstance(content, MeasurementResult):
        print(content.model_dump_json()) if json else _print_measurement(content)
    elif isinstance(content, GridResult) and content.rows:
        print(content.model_dump_json()) if json else _print_study(content)
    elif operation.kind == "study" and json:
        print(show.json_array(client.children(operation.id)))
    elif operation.kind == "study":
        _print_so_far(client, operation)
    else:
        raise _nothing_yet(operation)


def _print_measurement(result: "MeasurementResult") -> None:
    table = show.table("FIGURE", "VALUE", "±", "UNIT", "SOURCE", right=("VALUE", "±"), wide=["SOURCE"])
    for name, figure in _in_order(result):
        table.add_row(name, *_cells(figure))
    show.print_rich(table)
    for reason, names in _unknown(result).items():
        show.print_words(f"Not known: {', '.join(names)}: {reason}")
    if result.devices:
        print()
        _print_devices(result)
    print()
    show.print_facts({label: show.plain(value) for label, value in _facts(result).items()}, wrapped=True)
    for warning in result.warnings:
        show.print_words(f"Warning: {warning}")


def _cells(figure: "Figure") -> tuple[str, ...]:
    value = NOT_KNOWN if figure.value is None else show.short(figure.value)
    bound = "–" if figure.uncertainty is None else show.short(figure.uncertainty)
    return value, bound, show.plain(figure.unit), show.plain(figure.source)


def _in_order(result: "MeasurementResult") -> "list[tuple[str, Figure]]":
    """Of the contract: a database sorts the names of an object."""
    from ops_contract.measurements import FigureName

    return [(name, result.figures[name]) for name in get_args(FigureName) if name in result.figures]


def _unknown(result: "MeasurementResult") -> dict[str, list[str]]:
    """By their reason, which they often share."""
    found: dict[str, list[str]] = {}
    for name, figure in _in_order(result):
        if figure.reason is not None:
            found.setdefault(figure.reason, []).append(name)
    return found


def _print_devices(result: "MeasurementResult") -> None:
    columns = ("ENERGY", "±", "ABOVE IDLE", "MAX", "TEMP", "TICKS")
    table = show.table("DEVICE", "SOURCE", *columns, "WHY", right=columns, wide=["DEVICE", "SOURCE", "WHY"])
    for each in result.devices:
        source = f"{each.source}, {each.quality}".replace("_", " ")
        energy = (
            show.quantity(each.energy_j, "J"),
            show.number(each.error_j),
            show.quantity(each.energy_adjusted_j, "J"),
        )
        state = (show.quantity(each.power_max_w, "W"), show.quantity(each.temperature_max_c, "°C"))
        ticks = "–" if each.ticks is None else str(each.ticks)
        why = show.plain((each.reason or "").replace("_", " "))
        table.add_row(show.plain(each.name or each.device), source, *energy, *state, ticks, why)
    show.print_rich(table)


def _facts(result: "MeasurementResult") -> dict[str, str]:
    from ops_contract.measurements import MeasurementPhase

    baseline, warmup, slowed = result.baseline, result.warmup, result.thermal_throttle
    took = [f"{phase} {result.phases_s[phase]:.1f} s" for phase in MeasurementPhase if phase in result.phases_s]
    idle = ", ".join(f"{device} {show.quantity(power, 'W')}" for device, power in baseline.power_w.items())
    aged = f", {show.duration(baseline.age_s)} old" if baseline.age_s is not None else ""
    drifted = f", drift {100 * baseline.drift:.1f} %" if baseline.drift is not None else ""
    settled = {None: "", True: ", settled", False: ", not settled"}[warmup.converged]
    reasons = ", ".join(f"{why} {s:.3g} s" for why, s in slowed.reasons.items()).replace("_", " ")
    throttled = f"for {show.quantity(slowed.duration_s, 's')}: {reasons}" if slowed.throttled else "never"
    return {
        "tokens": f"{result.tokens_in:,} in, {result.tokens_out:,} out, of {result.n_prompts:,} prompts",
        "idle power": (idle or NOT_KNOWN) + aged + drifted + (f" ({baseline.reason})" if baseline.reason else ""),
        "warm-up": f"{warmup.batches} batches{settled}" + (f", cv {warmup.cv:.3f}" if warmup.cv is not None else ""),
        "slowed": NOT_KNOWN if slowed.throttled is None else throttled,
        "phases": ", ".join(took).replace("_", " "),
        "samples": result.series or "none",
        "config": result.config_hash[:16],
    }


def _print_study(result: "GridResult") -> None:
    from ops_studies import comparison

    _print_table(result)
    told = list(comparison.not_measured(result))
    for line in islice(told, studies.LISTED):
        print(show.harmless(line))
    if len(told) > studies.LISTED:
        print(f"… and {len(told) - studies.LISTED:,} more; --json has all")
    studies.print_notes(result.skipped, result.warnings)


def _print_table(result: "GridResult") -> None:
    from ops_studies import comparison

    rows = comparison.compared(result)
    columns = comparison.known_columns(rows)
    heads = [head.upper() for head in columns.values()]
    table = show.table("", "POINT", "N", *heads, right=("N", *heads), wide=["POINT"])
    for row in rows:
        values = [comparison.said(row.figures.get(name)) for name in columns]
        table.add_row("★" if row.on_front else "", show.plain(row.name), str(row.n), *values)
    show.print_rich(table)
    if not any(row.on_front for row in rows):
        print("No joules per token are known; `ops measure show` of a run says why.")


def _print_so_far(client: "Client", operation: "Operation") -> None:
    """Without intervals: these are said once all have ended."""
    from ops_cli.study_plot import so_far
    from ops_contract.study_results import GridResult

    found = so_far(client, operation)
    if isinstance(found, GridResult) and found.groups:
        _print_table(found)
    print(show.progress_line(operation))


def _nothing_yet(operation: "Operation") -> Exception:
    short = str(operation.id)[:8]
    if operation.kind != "measurement":
        return not_found(f"{short} is no measurement; see `ops status {short}`")
    why = f": {show.fault(operation.error)}" if operation.error else f"; see `ops status {short}`"
    return not_found(f"{short} is {operation.status} and has no figures{why}")
