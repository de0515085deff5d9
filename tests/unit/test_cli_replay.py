"""`ops fork` and `ops replay`."""

import json
from uuid import uuid4

import pytest

from helpers.answers import operation
from helpers.cli import Api, Ops, api, ops, saved_as
from ops_cli.exits import ExitCode
from ops_contract.history import Difference, ReplayCheck
from ops_contract.lifecycle import Status

__all__ = ["api", "ops"]  # fixtures


def test_fork_sends_what_differs_and_says_where_it_begins(api: Api, ops: Ops) -> None:
    parent, point = api.holds(operation(status=Status.COMPLETED)), saved_as(uuid4())
    api.checkpoints = [point]

    ran = ops(
        *("fork", parent, "--set", "execution.max_epochs=20", "--label", "team=a", "--name", "longer"),
        *("--from-checkpoint", str(point.id)[:6]),
    )

    assert ran.code == ExitCode.DONE
    assert f"from step 144 of {str(parent)[:8]}" in ran.out
    assert api.forked == [
        {
            "from_checkpoint": str(point.id),
            "overrides": {"execution": {"max_epochs": 20}, "labels": {"team": "a"}},
            "name": "longer",
        }
    ]
    assert ops("fork", parent, "--set", "max_epochs=20").code == ExitCode.USAGE


DIFFERENT = ReplayCheck(
    compared=100,
    differing=2,
    first_difference=Difference(
        name="loss", step=112, earlier_attempt=1, was=0.3, now=float("nan"), was_bits="3fd3", now_bits="7ff8"
    ),
    largest_difference=float("nan"),
)


def test_replay_waits_and_says_whether_every_value_is_equal_over_all_attempts(api: Api, ops: Ops) -> None:
    parent = api.holds(operation(status=Status.COMPLETED))
    api.replays = [ReplayCheck(compared=100), None, ReplayCheck(compared=140)]

    ran = ops("replay", parent, "--steps", 61)

    assert (ran.code, ran.out.splitlines()[-1]) == (0, "steps 100 to 160: all 240 values equal bit for bit")
    assert api.replayed == [{"steps": 61}]
    table = ops("attempts", next(id for id in api.states if id != parent)).out
    assert ("140 equal" in table, "–" in table) == (True, True)


def test_replay_says_the_first_difference_and_fails(api: Api, ops: Ops) -> None:
    parent = api.holds(operation(status=Status.COMPLETED))
    api.replays = [ReplayCheck(compared=140), DIFFERENT]

    ran, told = ops("replay", parent), ops("replay", parent, "--json")

    assert (ran.code, told.code) == (ExitCode.FAILED, ExitCode.FAILED)
    assert ran.out.splitlines()[-1] == (
        "steps 100 to 160: 2 of 240 values differ, first loss at step 112, which was 0.3 (3fd3) and is nan (7ff8); "
        "largest difference nan"
    )
    found = json.loads(told.out)
    assert (found["compared"], found["differing"], found["first_difference"]["now"]) == (240, 2, "NaN")
    assert (found["replay_of"], found["status"]) == (str(parent), "completed")


@pytest.mark.parametrize(("status", "checks"), [(Status.FAILED, [ReplayCheck(compared=9)]), (Status.COMPLETED, [None])])
def test_a_replay_that_failed_or_compared_nothing_is_no_proof(
    api: Api, ops: Ops, status: Status, checks: list[ReplayCheck | None]
) -> None:
    parent = api.holds(operation(status=Status.COMPLETED))
    api.replays, api.replay_ends = checks, status

    assert ops("replay", parent).code == ops("replay", parent, "--json").code == ExitCode.FAILED


def test_replay_may_be_left_alone(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = api.holds(operation(status=Status.COMPLETED))

    started, told = ops("replay", parent, "--no-wait"), ops("replay", parent, "--no-wait", "--json")
    monkeypatch.setattr("ops_cli.replay.follow", interrupt)
    detached = ops("replay", parent)

    made = [str(id) for id in api.states if id != parent]
    assert (started.code, told.code, detached.code) == (ExitCode.DONE, ExitCode.DONE, ExitCode.DETACHED)
    assert made[0] in started.out
    assert json.loads(told.out)["id"] == made[1]
    assert f"{made[2][:8]} goes on" in detached.err
    assert api.cancelled == []


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
