"""Runs from a file that anybody wrote: which column is what, and what is wrong in which line."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops_cli.exits import invalid
from ops_cli.show import harmless
from ops_contract.lifecycle import Status
from ops_studies.runs import Run

UNFINISHED = frozenset(Status) - {Status.COMPLETED}


@dataclass(frozen=True)
class Row:
    where: str
    cells: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.cells.get("experiment_id") or self.where)


@dataclass(frozen=True)
class Columns:
    """By name; None where there is none of the kind."""

    params: str
    tokens: str | None
    flops: str | None
    loss: str
    budget: str | None

    def run(self, row: Row) -> Run:
        """Raises OpsError `invalid`. Without tokens or FLOPs, C = 6ND gives them."""
        n, loss = _number(row, self.params), _number(row, self.loss)
        d = _number(row, self.tokens) if self.tokens else _number(row, self.flops) / (6 * n)
        c = _number(row, self.flops) if self.flops else 6 * n * d
        if not (0 < d < math.inf and 0 < c < math.inf):
            raise invalid(f"{row.where}: by C = 6ND it has {d:g} tokens and {c:g} FLOPs: no such run can be")
        return Run(row.name, n, d, c, loss, _number(row, self.budget) if self.budget else None)


def read(path: Path) -> tuple[list[Row], list[str]]:
    """A CSV with a head, or JSON: a list of objects, or an object with them as its `rows`. Those whose status is not
    completed are left out, which the second list says. Raises OpsError `invalid`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise invalid(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise invalid(f"{path} is no text in UTF-8: give a .csv or .json") from error
    rows = list(_json_rows(path, text) if path.suffix == ".json" else _csv_rows(path, text))
    if not rows:
        raise invalid(f"{path} has no run: it needs a head and a row for each")
    done = [row for row in rows if str(row.cells.get("status")) not in UNFINISHED]
    left_out = [row for row in rows if str(row.cells.get("status")) in UNFINISHED]
    return done, [f"{row.name} is left out: it is {row.cells['status']}" for row in left_out]


def choose(
    rows: Sequence[Row], *, params: str, tokens: str | None, flops: str | None, loss: str, budget: str | None
) -> Columns:
    """Those that were named; of tokens, FLOPs and budget also what a sweep of ours calls them, where it is there."""
    there = list(dict.fromkeys(name for row in rows for name in row.cells))
    for option, name in (("params", params), ("tokens", tokens), ("flops", flops), ("loss", loss), ("budget", budget)):
        if name is not None and name not in there:
            listed = ", ".join(map(harmless, there[:20]))
            raise invalid(f"there is no column {name!r}: say which it is with --{option}. There are: {listed}")
    if tokens is None and flops is None:
        tokens, flops = (name if name in there else None for name in ("num_tokens", "actual_flops"))
        if tokens is None and flops is None:
            raise invalid("say which column has the tokens or the FLOPs of each run: --tokens COL or --flops COL")
    if budget is None and "compute_budget" in there:
        budget = "compute_budget"
    return Columns(params, tokens, flops, loss, budget)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        head = list(reader.fieldnames or ())
        if twice := [name for name in head if head.count(name) > 1]:
            raise invalid(f"{path} has two columns {twice[0]!r}: name one of them otherwise")
        for cells in reader:
            where = f"line {reader.line_num}"
            if None in cells or None in cells.values():
                raise invalid(f"{path}, {where}: it has not as many fields as the head")
            yield Row(where, cells)
    except csv.Error as error:
        raise invalid(f"{path}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{path} is not JSON: {error}") from error
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise invalid(f"{path}: give a list of objects, one for each run")
    for number, cells in enumerate(rows, 1):
        yield Row(f"run {number}", cells)


def _number(row: Row, column: str | None) -> float:
    cell = row.cells.get(column or "")
    try:
        value = float(cell) if isinstance(cell, str | int | float) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not 0 < value < math.inf:
        told = "empty" if cell is None or cell == "" else harmless(str(cell))[:50]
        raise invalid(f"{row.where}: {column} is {told}: give a number above 0, or leave the run out")
    return value
