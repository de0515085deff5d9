"""The files of an operation: metrics.csv or an event file, and hparams.yaml."""

import csv
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from heapq import merge
from io import TextIOWrapper
from itertools import groupby, repeat
from operator import itemgetter
from typing import BinaryIO, Literal

import yaml

from ops_backend import tfevents
from ops_backend.store.log_files import Curve, Recorded
from ops_backend.store.sql import plain
from ops_contract.jobs import Job, Logger

Write = Callable[[BinaryIO], None]


def files(ended: Recorded) -> dict[str, Write]:
    """By name, what writes each; empty for a job that wants none."""
    logger = ended.job.execution.logger
    if logger is Logger.NONE:
        return {}
    name, write = points(ended, logger)
    return {"hparams.yaml": partial(write_hparams, ended.job), name: write}


def points(recorded: Recorded, logger: Literal[Logger.CSV, Logger.TENSORBOARD]) -> tuple[str, Write]:
    """The file with every metric: its name, and what writes it."""
    if logger is Logger.CSV:
        return "metrics.csv", partial(write_metrics, recorded.curves)
    # One name for life: what is written after a resume replaces it, and TensorBoard does not show both.
    name = f"events.out.tfevents.{int(recorded.began_at.timestamp())}.relight"
    return name, partial(write_events, recorded.curves, recorded.began_at)


def write_hparams(job: Job, out: BinaryIO) -> None:
    """The resolved job, defaults and all; `yaml.safe_load` reads it back equal."""
    yaml.safe_dump(plain(job), out, sort_keys=False, encoding="utf-8")


def write_metrics(curves: Mapping[str, Curve], out: BinaryIO) -> None:
    """epoch, step, then the metrics by name: a row a step, empty where a metric was not measured, every bit kept."""
    names = sorted(curves.keys() - {"epoch"})
    text = TextIOWrapper(out, "utf-8", newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["epoch", "step", *names])
    for step, (epoch, *values) in by_step(curves, ["epoch", *names]):
        rows.writerow([int(epoch) if epoch is not None and epoch.is_integer() else epoch, step, *values])
    text.detach()


def write_events(curves: Mapping[str, Curve], began_at: datetime, out: BinaryIO) -> None:
    """An event a step. All carry the time that the operation began: when a step ran is not stored."""
    wall_time_s = began_at.timestamp()
    names = sorted(curves)
    out.write(tfevents.record(tfevents.file_version(wall_time_s)))
    for step, values in by_step(curves, names):
        measured = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        out.write(tfevents.record(tfevents.scalars(wall_time_s, step, measured)))


def by_step(curves: Mapping[str, Curve], names: list[str]) -> Iterator[tuple[int, list[float | None]]]:
    """The values of every step that has any, in the order of `names`; a name without a curve has none."""
    columns = [
        zip(curves[name].steps, repeat(column), curves[name].values, strict=False)
        for column, name in enumerate(names)
        if name in curves
    ]
    for step, points in groupby(merge(*columns), key=itemgetter(0)):
        values: list[float | None] = [None] * len(names)
        for _, column, value in points:
            values[column] = value
        yield step, values
