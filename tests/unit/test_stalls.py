"""When a trainer counts as hung, and what the kernel says of memory."""

import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import pytest

from ops_contract.agents import StartTraining
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind
from ops_contract.pipe import RunJob
from ops_worker.deaths import oom_kills
from ops_worker.processes import JobProcess
from ops_worker.stalls import StallClock


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def ticks(stalls: StallClock, clock: Clock, n: int) -> list[bool]:
    def one() -> bool:
        clock.now_s += stalls.tick_s
        return stalls.tick()

    return [one() for _ in range(n)]


def test_silence_for_the_timeout_is_a_stall() -> None:
    clock = Clock()
    stalls = StallClock(10.0, clock)

    assert ticks(stalls, clock, 10) == [False] * 9 + [True]


def test_a_sign_of_life_begins_the_silence_anew() -> None:
    clock = Clock()
    stalls = StallClock(10.0, clock)
    ticks(stalls, clock, 9)

    stalls.sign_of_life()

    assert ticks(stalls, clock, 10) == [False] * 9 + [True]


def test_who_waits_for_a_hung_one_is_nearly_taken_for_hung_too() -> None:
    clock = Clock()
    hung, waits, works = StallClock(10.0, clock), StallClock(10.0, clock), StallClock(10.0, clock)
    for second in range(10):
        clock.now_s += 1.0
        stalled = [stalls.tick() for stalls in (hung, waits, works)]
        if second == 0:
            waits.sign_of_life()
        works.sign_of_life()

    assert stalled == [True, False, False]
    assert [stalls.nearly for stalls in (hung, waits, works)] == [True, True, False]


def test_time_in_which_the_agent_itself_was_stopped_does_not_count() -> None:
    clock = Clock()
    stalls = StallClock(10.0, clock)
    ticks(stalls, clock, 7)

    clock.now_s += 3600.0

    assert not stalls.tick()
    assert ticks(stalls, clock, 1) == [True]


def test_without_a_timeout_nothing_is_a_stall() -> None:
    clock = Clock()

    assert not any(ticks(StallClock(None, clock), clock, 10_000))


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/a/b", "a/b/memory.events"),
        ("0::/", "memory.events"),
        ("0::/of/the/host", "memory.events"),  # what a container without its own namespace is told
        ("7:blkio:/\n4:memory:/a\n0::/", "memory/a/memory.oom_control"),
        ("4:memory,hugetlb:/of/the/host\n0::/", "memory/memory.oom_control"),
    ],
)
def test_oom_kills_are_those_of_our_cgroup_of_either_version(tmp_path: Path, line: str, file: str) -> None:
    proc, root = tmp_path / "proc", tmp_path / "root"
    proc.write_text(f"{line}\n")
    (root / file).parent.mkdir(parents=True)
    (root / file).write_text("oom 9\nunder_oom 0\noom_kill 3\noom_group_kill 1\n")

    assert oom_kills(proc, root) == 3


def test_oom_kills_that_cannot_be_read_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "proc").write_text("0::/a\n")

    assert oom_kills(tmp_path / "proc", tmp_path) is None
    assert oom_kills(tmp_path / "absent", tmp_path) is None


def run_job() -> RunJob:
    job = Job(kind=Kind.TRAINING, workload="fake", config={}, execution=Execution())
    order = StartTraining(incarnation=uuid4(), operation_id=uuid4(), attempt=1, slots=[0], deadline_s=1, job=job)
    return RunJob(start=order, storage_root="/", directory="/", device="cpu", cores=1)


@pytest.mark.parametrize(
    ("status", "before", "after", "code"),
    [
        (-signal.SIGKILL, 3, 4, "out_of_memory"),
        (-signal.SIGKILL, 3, 3, "trainer_killed"),
        (-signal.SIGKILL, None, None, "trainer_killed"),
        (-signal.SIGKILL, 3, None, "trainer_killed"),
        (-signal.SIGSEGV, 3, 4, "trainer_killed"),
        (3, 3, 4, "trainer_exited"),
    ],
)
async def test_a_sigkill_beside_which_the_kernels_count_rose_is_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, status: int, before: int | None, after: int | None, code: str
) -> None:
    monkeypatch.setattr("ops_worker.processes.oom_kills", lambda: before)
    nothing: Any = None
    process = JobProcess(Mock(pid=1), run_job(), nothing)
    process.begin()
    monkeypatch.setattr("ops_worker.deaths.oom_kills", lambda: after)

    finish = process._death(status)

    assert finish is not None
    assert finish.error is not None
    assert finish.error.code == code


@pytest.mark.parametrize("wrong", [0, -1, float("inf"), float("nan")])
def test_a_stall_timeout_that_contradicts_itself_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="stall_timeout_s"):
        Execution(stall_timeout_s=wrong)
