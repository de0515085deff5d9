"""Bodies as the API answers them."""

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from ops_contract.history import MetricNames, MetricPoints, MetricSummary
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Status
from ops_contract.operations import EnergyView, Operation, OperationSummary

Points = list[tuple[int, float]]


def operation(**changes: Any) -> Operation:
    """One that runs and has not told its progress yet."""
    plain = {
        "id": uuid4(),
        "name": "digits-1",
        "status": Status.RUNNING,
        "kind": Kind.TRAINING,
        "workload": "digits",
        "labels": {},
        "submitted_by": "operator",
        "priority": 0,
        "attempt": 1,
        "progress": None,
        "error": None,
        "created_at": "2026-01-01T00:00:00Z",
        "started_at": None,
        "ended_at": None,
        "job": Job(kind=Kind.TRAINING, workload="digits", config={}, execution=Execution()),
        "max_retries": 3,
        "failures": 0,
        "cancel_reason": None,
        "exit_unconfirmed": False,
        "not_before": None,
        "exactness": None,
        "energy": EnergyView(reason="not_measured"),
        "resumed_from": None,
        "forked_from": None,
        "replay_of": None,
        "lineage": [],
    }
    return Operation.model_validate(plain | changes)


def summary(whole: Operation) -> OperationSummary:
    return OperationSummary(**{name: getattr(whole, name) for name in OperationSummary.model_fields})


def metric_names(curves: Mapping[str, Points]) -> MetricNames:
    ends = [MetricSummary(name=name, first=points[0], last=points[-1]) for name, points in curves.items()]
    return MetricNames(names=list(curves), metrics=ends)


def metric_points(name: str, points: Points, **changes: Any) -> MetricPoints:
    """The whole of it, in one page."""
    plain = {"name": name, "points": points, "attempt_starts": [(0, 1)], "cursor": "1.1.1.0"}
    return MetricPoints.model_validate(plain | changes)
