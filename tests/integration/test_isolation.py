"""Every way in which user code can end or hang a trainer: real agent, real trainer, real user code."""

import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from helpers.agents import AgentProcess, eventually, running_agent
from helpers.fake_api import FakeApi
from ops_contract.jobs import Execution
from ops_contract.lifecycle import Outcome
from ops_contract.reports import Fault, Finish

SITE = '''
import ctypes, os, sys, threading, time
import torch
from pydantic import BaseModel
from torch import nn
from relight import Workload

class Config(BaseModel):
    do: str = "1"

class Fatal(Workload):
    """Does `do` in its third step."""
    Config = Config
    reports = {}
    steps = 0
    def data(self): return [torch.ones(2)] * 16, None
    def model(self): return nn.Linear(2, 1)
    def loss(self, model, batch):
        self.steps += 1
        if self.steps == 3:
            print("the last words", flush=True)
            exec(self.config.do)
        return model(batch).mean(), {}
'''
TRAINER = [sys.executable, "-m", "ops_worker.trainer"]
HANG = Execution(batch_size=1, stall_timeout_s=3)


@pytest.fixture(scope="module")
def workloads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A distribution with the workload above, for agents started meanwhile."""
    site = tmp_path_factory.mktemp("site")
    (site / "fatal-1.dist-info").mkdir()
    (site / "fatal-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fatal\nVersion: 1\n")
    (site / "fatal-1.dist-info" / "entry_points.txt").write_text("[relight.workloads]\nfatal = fatal:Fatal\n")
    (site / "fatal.py").write_text(SITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        yield


@pytest.fixture(scope="module")
async def agent(workloads: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentProcess]:
    async with FakeApi() as api, running_agent(api, tmp_path_factory.mktemp("agent"), command=TRAINER) as agent:
        yield await agent.ready()


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """One of our own that may use 1 GiB of memory."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    version_1 = [path for _, controllers, path in lines if "memory" in controllers.split(",")]
    path, root = (version_1[0], "/sys/fs/cgroup/memory") if version_1 else (lines[0][2], "/sys/fs/cgroup")
    group = Path(root) / path.lstrip("/") / f"relight-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        limit = group / ("memory.limit_in_bytes" if version_1 else "memory.max")
        if not limit.exists():
            pytest.skip("the memory controller is not handed down to cgroups of our own")
        limit.write_text(str(2**30))
        yield group
        deadline_s = time.monotonic() + 20
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline_s:
            time.sleep(0.01)  # the trainers end when they notice that their agent has
    finally:
        group.rmdir()


async def run(agent: AgentProcess, do: str, execution: Execution = Execution(batch_size=1)) -> Finish:  # noqa: B008
    hold = await agent.start(workload="fatal", execution=execution, deadline_s=60, do=do)
    await eventually(lambda: hold.finish, timeout_s=120)
    assert hold.finish
    assert hold.trainer_gone_at_finish
    return hold.finish


async def fault(agent: AgentProcess, do: str, execution: Execution = Execution(batch_size=1)) -> Fault:  # noqa: B008
    finish = await run(agent, do, execution)
    assert finish.outcome is Outcome.FAILED
    assert finish.error
    return finish.error


async def test_an_exception_has_its_place_and_the_last_words_and_the_next_job_is_a_good_one(
    agent: AgentProcess,
) -> None:
    error = await fault(agent, "raise LookupError('no such thing')")
    good = await run(agent, "1")

    assert error.code == "exception"
    assert error.message == "LookupError: no such thing; details.traceback says where"
    assert "in loss" in error.details["traceback"]
    assert error.details["log_tail"].endswith("the last words\n")
    assert good == Finish(outcome=Outcome.COMPLETED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "code", "message", "last_words"),
    [
        ("ctypes.string_at(0)", "trainer_killed", "SIGSEGV", "in loss"),
        ("os.abort()", "trainer_killed", "SIGABRT", "in loss"),
        ("sys.exit(3)", "exception", "SystemExit: 3", "the last words"),
        ("os._exit(3)", "trainer_exited", "code 3", "the last words"),
        ("while True: pass", "stalled", "raise execution.stall_timeout_s", "in loss"),
        ("time.sleep(1e6)", "stalled", "no step or validation batch for 3 s", "in loss"),
        ("lock = threading.Lock(); lock.acquire(); lock.acquire()", "stalled", "3 s", "in loss"),
        ("ctypes.CDLL(None).pause()", "stalled", "3 s", "in loss"),
        ("ctypes.PyDLL(None).pause()", "stalled", "3 s", "in loss"),  # in C, and it keeps the GIL
        ("bytearray(1 << 60)", "out_of_memory", "smaller batch_size", "the last words"),
        ("torch.empty(1 << 50)", "out_of_memory", "smaller batch_size", "the last words"),
        ("print('x' * 100_000_000); os._exit(3)", "trainer_exited", "code 3", "xxx"),
    ],
)
async def test_whatever_ends_or_hangs_it_says_so_with_the_last_words_and_the_next_job_runs(
    agent: AgentProcess, do: str, code: str, message: str, last_words: str
) -> None:
    error = await fault(agent, do, HANG)  # which is the next job of the same worker: two good steps come first

    assert error.code == code
    assert message in error.message
    assert last_words in error.details["log_tail"]


@pytest.mark.slow
async def test_a_flood_of_output_is_bounded_on_the_disk_and_its_end_and_offsets_are_right(agent: AgentProcess) -> None:
    error = await fault(agent, "[print('y' * 999_999) for _ in range(200)]; raise LookupError('the end')")

    logs = (agent.state_dir / "logs").glob("*.log")
    (log,) = [path for path in logs if path.stat().st_size > 200_000_000]
    assert log.stat().st_blocks * 512 < 70 * 2**20
    with log.open("rb") as output:
        assert b"the last words" in output.read(2**20)
        output.seek(200_000_000)
        assert output.read(10).strip(b"y\n") == b""
    assert "yyy" in error.details["log_tail"]
    assert len(error.details["log_tail"]) <= 8192
    assert error.message.startswith("LookupError: the end")


@pytest.mark.slow
async def test_steps_that_take_less_than_the_timeout_are_no_stall_however_many(agent: AgentProcess) -> None:
    slow_steps = "Fatal.loss = lambda self, model, batch: (time.sleep(0.5), model(batch).mean())[1:] + ({},)"

    finish = await run(agent, slow_steps, HANG)

    assert finish == Finish(outcome=Outcome.COMPLETED)


@pytest.mark.slow
async def test_a_kill_by_the_kernel_for_memory_is_told_as_such_and_the_next_job_runs(
    workloads: None, small_cgroup: Path, tmp_path: Path
) -> None:
    async with FakeApi() as api, running_agent(api, tmp_path, command=TRAINER) as agent:
        (small_cgroup / "cgroup.procs").write_text(str(agent.process.pid))  # before it has children
        await agent.ready()
        error = await fault(agent, "hoard = [b'x' * 2**26 + bytes([i]) for i in range(64)]")
        good = await run(agent, "1")

    assert error.code == "out_of_memory"
    assert error.message.startswith("The kernel killed the trainer for memory: use a smaller batch_size")
    assert error.details["log_tail"].endswith("the last words\n")
    assert good == Finish(outcome=Outcome.COMPLETED)
