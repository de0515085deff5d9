"""Studies on the running service: a grid of commands, one of which fails, and a sweep that is killed in the middle."""

import random
import secrets
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from helpers.service import Service, eventually, kill
from ops_contract.history import AttemptView
from ops_contract.plans import ChildResult
from ops_contract.study_results import GridResult, SweepResult

# Every run tells two values; that of `second` fails until the file is there.
PROGRAM = """
import pathlib, sys, relight
given = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
if given["point"] == "second" and not pathlib.Path(given["until"]).exists():
    sys.exit(3)
relight.report(0, score=len(given["point"]))
relight.report(1, score=len(given["point"]) + int(given["extra"]))
"""


def test_a_failed_child_is_run_again_alone_and_the_others_results_stay(service: Service, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    axes: dict[str, Any] = {"args.point": ["first", "second", "third"], "args.extra": [1, 10]}
    command = ["python", "-c", PROGRAM, f"--until={mended}"]
    grid = {"type": "grid", "axes": axes, "order": "interleave"}
    id = service.client.submit({"command": command, "study": grid, "max_retries": 0, "name": "points"}).id

    failed = service.wait(id, "failed", "completed")

    assert failed.error
    assert failed.error.code == "children_failed"
    assert "2 of 6 children did not complete" in failed.error.message
    assert failed.children == {"completed": 4, "failed": 2}
    assert {len(scores) for scores in _scores(service, id).values()} == {0, 1}
    done = [child.operation_id for child in service.client.children(id) if child.status == "completed"]
    mended.touch()
    service.client.resume(id)
    completed = service.wait(id, "completed", "failed")

    assert completed.children == {"completed": 6}
    assert completed.error is None
    assert _scores(service, id) == {
        f"{point} {extra}": [float(len(point) + extra)] for point in axes["args.point"] for extra in (1, 10)
    }
    assert {service.get(child).attempt for child in done} == {1}
    assert service.events(id) == ["submit", "claim", "plan", "reduce", "claim", "fail", "resume", "claim", "plan",
                                  "reduce", "claim", "complete"]  # fmt: skip
    again = [c for c in service.client.children(id) if "replan" in service.events(c.operation_id)]
    assert {child.about.point["args.point"] for child in again} == {"second"}  # type: ignore[union-attr]


def _scores(service: Service, id: UUID) -> dict[str, list[float]]:
    """By point, of its completed runs."""
    result = service.client.results(id).content
    assert isinstance(result, GridResult)
    return {
        f"{group.point['args.point']} {group.point['args.extra']}": [s.mean for s in [group.metrics.get("score")] if s]
        for group in result.groups
    }


SWEEP = {
    "workload": "bytelm",
    "config": {"max_bytes": 2_000_000, "validation_bytes": 20_000, "n_layer": 1, "n_head": 1},
    "execution": {"batch_size": 16, "learning_rate": 0.01, "scheduler": "cosine", "checkpoint_every": {"steps": 25}},
    "study": {
        "type": "isoflop",
        "budgets": [3e9, 1e10, 3e10],
        "size": "config.d_model",
        "sizes": {"low": 2, "high": 64, "multiple_of": 2},
        "per_budget": 5,
        "predict": [1e11],
    },
    "max_retries": 9,
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_that_is_killed_cancelled_and_resumed_equals_one_that_nobody_touched(service: Service) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    luck = random.Random(seed)
    untouched = service.client.submit(SWEEP | {"name": "untouched"}).id
    _until_ended(service, untouched)
    id = service.client.submit(SWEEP | {"name": "killed"}).id

    for _ in range(3):
        victim, attempt = _one_in_the_middle(service, id, luck)
        kill(attempt.trainer_pid)
        service.until(victim, lambda o, n=attempt.number: o.attempt > n or o.ended_at is not None, "goes on")
    service.worker_of(_one_in_the_middle(service, id, luck)[1]).kill()
    service.have_workers(2)
    _one_in_the_middle(service, id, luck)
    service.client.cancel(id)
    cancelled = service.wait(id, "cancelled")
    assert cancelled.children
    assert cancelled.children.get("completed", 0) < 15
    done = {c.operation_id: service.get(c.operation_id).attempt for c in _completed(service, id)}
    service.client.resume(id)
    _until_ended(service, id)

    assert {child: service.get(child).attempt for child in done} == done
    told, expected = (_told(service, each) for each in (id, untouched))
    assert told == expected
    assert told["fit"]["approach2"]["params"] is not None
    assert told["fit"]["approach3"] is not None
    attempts = [a for c in service.client.children(id) for a in service.attempts(c.operation_id)]
    assert sum(a.outcome == "failed" for a in attempts) >= 3
    assert any(a.start_step > 0 for a in attempts), "no child went on from a checkpoint of its own"


def _until_ended(service: Service, id: UUID) -> None:
    service.until(id, lambda o: o.ended_at is not None, "has ended", wait_s=600)
    assert service.get(id).status == "completed", service.get(id).error


def _one_in_the_middle(service: Service, id: UUID, luck: random.Random) -> tuple[UUID, AttemptView]:
    """A child that has saved a checkpoint and trains on, with its attempt."""

    def look() -> tuple[UUID, AttemptView] | None:
        running = [c.operation_id for c in service.client.children(id) if c.status == "running"]
        luck.shuffle(running)
        for child in running:
            attempt = service.attempts(child)[-1]
            if attempt.started_at and any(c.attempt == attempt.number and c.step for c in service.checkpoints(child)):
                return child, attempt
        return None

    return eventually(look, "a child is in the middle of its training", lambda: service.logs(), wait_s=300)


def _completed(service: Service, id: UUID) -> list[ChildResult]:
    return [child for child in service.client.children(id) if child.status == "completed"]


def _told(service: Service, id: UUID) -> dict[str, Any]:
    """All that does not depend on who was killed: not what it took."""
    result = service.client.results(id).content
    assert isinstance(result, SweepResult)
    taken = {"operation_id", "wall_time_seconds", "energy_j", "energy_reason", "timestamp"}
    return result.model_dump(exclude={"rows": {"__all__": taken}, "joules": True})
