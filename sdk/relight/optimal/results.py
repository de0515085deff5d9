"""What `find_optimal` gives: the plan of a sweep, or what came of it; and the file in which it is kept."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError

from ops_contract.lifecycle import Status
from ops_contract.plans import ChildPlan, IsoFlopAbout, Plan, Skipped
from ops_contract.studies import IsoFlop
from ops_contract.study_results import JouleOptimum, Prediction, SweepFit, SweepResult, SweepRow
from ops_contract.wire import Sha256, Wire
from ops_studies import fits, isoflop, tables
from relight.publish import replace_file
from relight.training.directory import locked, say

RESULTS = "results.json"
RUNS = "runs"
_SHOWN = 40


class SweepPlan:
    """What would be trained. `print` shows it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def points(self) -> list[IsoFlopAbout]:
        """In the order in which they are trained: `budget`, `size`, `params` (N), `tokens` (D), `seed`."""
        return [each.about for each in self.plan.children if isinstance(each.about, IsoFlopAbout)]

    @property
    def flops(self) -> float:
        return self.plan.flops or 0.0

    @property
    def skipped(self) -> list[Skipped]:
        return self.plan.skipped

    @property
    def warnings(self) -> list[str]:
        return self.plan.warnings

    def __len__(self) -> int:
        return len(self.plan.children)

    def __str__(self) -> str:
        head = f"{'training':40} {'N':>8} {'D':>8} {'D/N':>8} {'FLOPs':>10}"
        named = list(zip(self.plan.children, self.points, strict=True))
        more = [f"… and {len(named) - _SHOWN} more"] if len(named) > _SHOWN else []
        told = [*(f"skipped: {each.what}: {each.reason}" for each in self.skipped), *self.warnings]
        lines = [_line(child.name, point) for child, point in named[:_SHOWN]]
        return "\n".join([head, *lines, *more, f"{len(self)} trainings, {self.flops:.3g} FLOPs in all", *told])


def _line(name: str, point: IsoFlopAbout) -> str:
    n, d = point.params, point.tokens
    return f"{name:40} {tables.count(n):>8} {tables.count(d):>8} {d / n:>8.3g} {point.flops_per_token * d:>10.3g}"


class SweepResults:
    """What the trainings came to. `print` shows the optima."""

    def __init__(self, result: SweepResult, path: Path) -> None:
        self.result = result
        self.path = path

    @property
    def rows(self) -> list[SweepRow]:
        return self.result.rows

    @property
    def fit(self) -> SweepFit | None:
        return self.result.fit

    @property
    def predictions(self) -> list[Prediction]:
        return self.fit.predictions if self.fit else []

    @property
    def warnings(self) -> list[str]:
        return [*self.result.warnings, *(self.fit.warnings if self.fit else [])]

    def chinchilla_table(self) -> str:
        """In Markdown: what to train under each budget, with 95 % intervals."""
        return tables.chinchilla(self._fit())

    def predict(self, budget: float, approach: Literal[2, 3] | None = None) -> Prediction:
        """The optimum under so many FLOPs, by Approach 3 unless the runs allow only Approach 2.

        Raises ValueError where they allow neither.
        """
        if not 0 < budget < float("inf"):
            raise ValueError(f"budget is {budget}; give FLOPs above 0, such as 1e21")
        found = fits.fit_rows([row for row in self.rows if row.status is Status.COMPLETED], predict=[budget])
        by = {each.approach: each for each in found.predictions if each.budget == budget}
        wanted = by.get(approach) if approach else by.get(3) or by.get(2)
        if wanted is None:
            raise ValueError("; ".join(["these runs allow no prediction", *found.warnings]))
        return wanted

    def __str__(self) -> str:
        done = sum(row.status is Status.COMPLETED for row in self.rows)
        table = self.chinchilla_table() if self.predictions else "no fit\n"
        return "\n".join([table + f"{done} of {len(self.rows)} trainings completed; {self.path}", *self.warnings])

    def _fit(self) -> SweepFit:
        if self.fit is None:
            raise ValueError("; ".join(["no training has a loss that could be fitted", *self.warnings]))
        return self.fit


class Row(SweepRow):
    """`key` is the digest of all that decides it."""

    key: Sha256


class Saved(Wire):
    """A SweepResult, with what to know its rows by; `earlier` are of other plans, or of code and data that changed."""

    format: Literal[1] = 1
    type: Literal["isoflop"] = "isoflop"
    flops: Literal["6N", "counted"] = "6N"
    embeddings: Literal["included", "excluded"] = "included"
    rows: list[Row] = []
    earlier: list[Row] = []
    fit: SweepFit | None = None
    joules: list[JouleOptimum] = []
    skipped: list[Skipped] = []
    warnings: list[str] = []


class ResultsFile:
    """`results.json` of a directory, which one process at a time has, and beside it what runs that are not done keep.

    Raises a permanent TrainingFault while another one has it.
    """

    def __init__(self, directory: Path, study: IsoFlop, plan: Plan, resume: bool) -> None:
        self.directory = directory.absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / RESULTS
        self._study, self._plan = study, plan
        self._lock = locked(
            self.directory, "another find_optimal is at work in {}; wait for its end, or give another output_dir"
        )
        try:
            self._rows = self._read(resume)
            self._sweep()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def missing(self) -> list[ChildPlan]:
        """Those without a result; what failed without one is tried again."""
        return [child for child in self._plan.children if not self._is_done(child.key)]

    def run_directory(self, child: ChildPlan) -> Path:
        return self.directory / RUNS / child.key[:32]

    def add(self, child: ChildPlan, row: SweepRow) -> None:
        self._rows[child.key] = Row(**row.model_dump(), key=child.key)
        counted = {"flops": self._study.flops, "embeddings": self._study.embeddings}
        plan = self._plan
        self._write(SweepResult(**counted, rows=self._so_far(), skipped=plan.skipped, warnings=plan.warnings))
        if self._is_done(child.key):
            shutil.rmtree(self.run_directory(child), ignore_errors=True)

    def finish(self, warnings: Sequence[str]) -> SweepResults:
        """Fitted."""
        fit = partial(fits.fit_rows, predict=self._study.predict)
        plan, told = self._plan, [*self._plan.warnings, *warnings]
        result = isoflop.result(self._study, self._so_far(), fit, fits.joule_optima, plan.skipped, told)
        self._write(result)
        return SweepResults(result, self.path)

    def _is_done(self, key: str) -> bool:
        row = self._rows.get(key)
        return row is not None and row.final_loss is not None

    def _so_far(self) -> list[SweepRow]:
        return [SweepRow(**row.model_dump(exclude={"key"})) for row in self._current()]

    def _current(self) -> list[Row]:
        """As this plan has them: another one may have called them otherwise, or counted N and FLOPs otherwise."""
        return [_as_planned(self._rows[child.key], child) for child in self._plan.children if child.key in self._rows]

    def _write(self, result: SweepResult) -> None:
        rows = self._current()
        keys = {row.key for row in rows}
        saved = Saved(
            rows=rows,
            earlier=[row for key, row in self._rows.items() if key not in keys],
            **{name: getattr(result, name) for name in SweepResult.model_fields if name != "rows"},
        )
        replace_file(self.path, saved.model_dump_json(indent=1))

    def _read(self, resume: bool) -> dict[str, Row]:
        if not resume:
            self._begin_anew()
        try:
            saved = Saved.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValidationError as error:
            aside = self._aside(self.path)
            say(f"{self.path} cannot be read ({error.errors()[0]['msg']}) and is now {aside}; every run begins anew")
            return {}
        return {row.key: row for row in [*saved.earlier, *saved.rows]}

    def _begin_anew(self) -> None:
        """Without the checkpoints of what was not done, too."""
        moved = [self._aside(path).name for path in (self.path, self.directory / RUNS) if path.exists()]
        if moved:
            say(f"resume is False, so every run begins anew; what {self.directory} had is in {' and '.join(moved)}")

    def _aside(self, path: Path) -> Path:
        names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
        return path.rename(next(name for name in names if not name.exists()))

    def _sweep(self) -> None:
        """What a run kept that has a result, where this was killed between the one and the other."""
        for child in self._plan.children:
            if self._is_done(child.key):
                shutil.rmtree(self.run_directory(child), ignore_errors=True)


def _as_planned(row: Row, child: ChildPlan) -> Row:
    about = child.about
    assert isinstance(about, IsoFlopAbout)
    counted = None if row.num_tokens is None else about.flops_per_token * row.num_tokens
    named = {"experiment_id": child.name, "compute_budget": about.budget, "model_size": about.params}
    return row.model_copy(update={**named, "actual_flops": counted})
