"""A study of measurements as a table: its points side by side, with intervals, the Pareto front marked."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ops_contract.lifecycle import Status
from ops_contract.measurements import FigureName
from ops_contract.study_results import GridResult, Statistic
from ops_studies import pareto
from ops_studies.points import named

# What is compared, and how it is headed.
COLUMNS: dict[FigureName, str] = {
    "tokens_per_s": "tokens/s",
    "j_per_output_token": "J/token",
    "j_per_output_token_adjusted": "J/token above idle",
    "first_token_p50_s": "first token (s)",
    "mfu": "MFU",
}
UNKNOWN = "–"


@dataclass(frozen=True)
class Compared:
    """`n`: of how many cycles. `figures` has only what is known."""

    name: str
    n: int
    figures: dict[FigureName, Statistic]
    on_front: bool


def compared(result: GridResult) -> list[Compared]:
    """In the order of the study; a point without a completed run has no figure."""
    return [
        Compared(
            named(group.point),
            max((each.n for each in group.metrics.values()), default=0),
            {name: group.metrics[name] for name in COLUMNS if name in group.metrics},
            on_front,
        )
        for group, on_front in zip(result.groups, pareto.of_groups(result.groups), strict=True)
    ]


def known_columns(rows: Sequence[Compared]) -> dict[FigureName, str]:
    """Those that at least one point has; throughput and energy in any case."""
    always = (pareto.THROUGHPUT, pareto.ENERGY)
    return {k: head for k, head in COLUMNS.items() if k in always or any(k in row.figures for row in rows)}


def markdown(result: GridResult) -> str:
    """With 95 % intervals; a star for what is on the Pareto front of throughput and energy."""
    rows = compared(result)
    columns = known_columns(rows)
    head = ["point", "cycles", *columns.values(), "front"]
    lines = [head, ["---", *["---:"] * (1 + len(columns)), ":---:"]]
    for row in rows:
        values = [said(row.figures.get(name)) for name in columns]
        lines.append([row.name.replace("|", "\\|"), str(row.n), *values, "★" if row.on_front else ""])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def said(value: Statistic | None) -> str:
    if value is None:
        return UNKNOWN
    if value.low is None or value.high is None:
        return _short(value.mean, 4)
    return f"{_short(value.mean, 4)} ± {_short((value.high - value.low) / 2, 2)}"


def _short(value: float, digits: int) -> str:
    """In full rather than with an exponent."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def not_measured(result: GridResult) -> Iterator[str]:
    """What has no figures and why: each failure by its name, what was not run by its number."""
    for row in result.rows:
        if row.status is Status.FAILED:
            yield f"{row.name} failed: {row.error_message or 'no reason given'}"
    others = Counter(
        f"{row.status}{f' ({row.error_message})' if row.error_message else ''}"
        for row in result.rows
        if row.status not in (Status.COMPLETED, Status.FAILED)
    )
    yield from (f"not measured: {count} {why}" for why, count in sorted(others.items()))
