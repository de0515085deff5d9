"""Commands and jobs with an environment of their own: a real agent, real runners, real trainers."""

import os
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from helpers.agents import FAKE_TRAINER, AgentProcess, eventually, running_agent
from helpers.fake_api import FakeApi, FakeHold
from helpers.processes import alive
from ops_contract.agents import Validate
from ops_contract.jobs import Code, Execution, Job
from ops_contract.lifecycle import Kind, Outcome
from ops_contract.reports import Finish, LogChunk, Metrics

SECRET = "hunter2-and-more"
WAITS = 'print(\'{"step": 3, "loss": 2}\'); import time; time.sleep(1000)'


@pytest.fixture(scope="module")
async def agent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentProcess]:
    """It runs user code, and knows two secrets."""
    mounted = tmp_path_factory.mktemp("mounted")
    (mounted / "FROM_FILE").write_text("file value\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPS_USER_CODE", "1")
        patch.setenv("OPS_SECRET_HF_TOKEN", SECRET)
        patch.setenv("OPS_SECRETS_DIR", str(mounted))
        directory = tmp_path_factory.mktemp("agent")
        async with FakeApi(cancel_grace_s=10) as api, running_agent(api, directory, command=FAKE_TRAINER) as agent:
            yield await agent.ready()


async def run(agent: AgentProcess, *command: str, **setup: Any) -> FakeHold:
    """Start a command, or with `workload` a training of the fake trainer."""
    hold = agent.api.claim(uuid4(), agent.incarnation)
    execution = setup.pop("execution", Execution(stall_timeout_s=None))
    config, kind = setup.pop("config", {}), Kind.COMMAND if command else Kind.TRAINING
    job = Job(
        kind=kind,
        workload="command" if command else "fake",
        config=config,
        execution=execution,
        command=list(command) or None,
        **setup,
    )
    order = agent.order(hold).model_copy(update={"job": job})
    answer = await agent.post(f"/{kind}/start", order)
    assert answer.status_code == 202, answer.text
    return hold


async def python(agent: AgentProcess, code: str, **setup: Any) -> FakeHold:
    return await run(agent, "python", "-c", code, **setup)


async def ended(hold: FakeHold) -> Finish:
    await eventually(lambda: hold.finish, timeout_s=60)
    assert hold.finish
    return hold.finish


async def test_a_command_runs_beside_the_warm_trainer_with_its_secrets_and_nobody_else_sees_them(agent):
    code = """import os
print('{"step": 3, "length": %d}' % len(os.environ["HF_TOKEN"]))
assert os.environ["FROM_FILE"] == "file value"
"""
    warm = agent.children()

    hold = await python(agent, code, secrets=["HF_TOKEN", "FROM_FILE"])
    finish = await ended(hold)
    other = await run(agent, config={"reports": 1})
    await ended(other)

    assert finish == Finish(outcome=Outcome.COMPLETED), finish
    assert hold.trainer_gone_at_finish
    (metrics,) = [report for report in hold.accepted if isinstance(report, Metrics)]
    assert metrics.series[0].floats() == [len(SECRET)]
    assert set(warm) <= {*agent.children(), other.started.trainer_pid}
    assert other.started.environment["secrets"] == []
    assert SECRET not in "".join(report.model_dump_json() for report in hold.accepted)
    kept = [path for path in agent.state_dir.rglob("*") if path.is_file()]
    assert any(b"length" in path.read_bytes() for path in kept if path.suffix == ".log")
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()]


async def test_a_missing_secret_is_a_permanent_fault_that_names_the_variable_to_set(agent):
    finish = await ended(await run(agent, "true", secrets=["HF_TOKEN", "NOT_THERE"]))

    assert finish.outcome is Outcome.FAILED
    assert finish.permanent
    assert finish.error.code == "missing_secret"
    assert "OPS_SECRET_NOT_THERE" in finish.error.message
    assert SECRET not in finish.model_dump_json()


async def test_a_failed_command_has_its_last_words_and_a_killed_one_its_signal(agent):
    failed = await ended(await run(agent, "sh", "-c", "echo last words; exit 7"))
    hold = await python(agent, WAITS)
    await eventually(lambda: hold.steps)
    os.kill(hold.started.trainer_pid, 9)
    killed = await ended(hold)

    assert failed.error.code == killed.error.code == "command_failed"
    assert "code 7" in failed.error.message
    assert failed.error.details["log_tail"] == "last words\n"
    assert "SIGKILL" in killed.error.message


async def test_a_flood_of_output_costs_a_bounded_number_of_reports_and_no_number(agent):
    code = """import os
for step in range(40):
    os.write(1, b'{"step": %d, "loss": 1}\\n' % step + b"x" * 1_000_000 + b"\\n")
print("last words")"""

    hold = await python(agent, code)
    finish = await ended(hold)

    chunks = [report for report in hold.accepted if isinstance(report, LogChunk)]
    assert finish == Finish(outcome=Outcome.COMPLETED)
    assert hold.steps == list(range(40))
    assert hold.output.startswith(b'{"step": 0')
    assert hold.output.endswith(b"x\nlast words\n")
    assert len(hold.output) < 4 * 2**20
    assert len(hold.output) + sum(chunk.skipped for chunk in chunks) > 40_000_000
    assert hold.accepted[-1] is finish


async def test_a_cancelled_command_saves_and_one_that_is_cancelled_by_force_is_gone(agent):
    code = "import signal, sys; signal.signal(15, lambda *_: (open('saved', 'w'), sys.exit(3)));" + WAITS
    hold = await python(agent, code, artifacts=["saved"])
    await eventually(lambda: hold.steps)
    await agent.cancel(hold)
    finish = await ended(hold)
    deaf = await python(agent, "import signal; signal.signal(15, signal.SIG_IGN);" + WAITS)
    await eventually(lambda: deaf.steps)
    await agent.cancel(deaf, force=True)
    forced = await ended(deaf)

    assert finish == Finish(outcome=Outcome.CANCELLED)
    assert "files/saved" in [getattr(report, "name", "") for report in hold.accepted]
    assert forced.outcome is Outcome.CANCELLED
    assert forced.error.code == "killed"
    assert deaf.trainer_gone_at_finish


@pytest.mark.slow
async def test_a_silent_command_is_killed_only_where_a_stall_timeout_was_given(agent):
    finish = await ended(await python(agent, WAITS, execution=Execution(stall_timeout_s=0.7)))

    assert finish.error.code == "stalled"
    assert "reported nothing" in finish.error.message
    assert 'File "<string>", line 1' in finish.error.details["log_tail"]


async def test_a_training_that_sets_what_is_read_at_the_start_gets_a_process_started_with_it(agent):
    warm = agent.children()

    hold = await run(agent, config={"reports": 1}, env={"PYTHONOPTIMIZE": "1", "OMP_NUM_THREADS": "7"})
    finish = await ended(hold)
    broken = await ended(await run(agent, config={}, env={"PYTHONHOME": "/nowhere"}))
    after = await run(agent, config={"reports": 1})
    await ended(after)

    assert finish == Finish(outcome=Outcome.COMPLETED)
    assert hold.started.trainer_pid not in warm
    assert after.started.trainer_pid in warm
    assert broken.error.code == "child_not_ready"
    assert "PYTHONHOME" in broken.error.message


async def test_a_command_dies_with_its_agent_and_what_it_started_too(tmp_path, monkeypatch):
    monkeypatch.setenv("OPS_USER_CODE", "1")
    async with FakeApi() as api, running_agent(api, tmp_path, command=FAKE_TRAINER) as agent:
        await agent.ready()
        code = "import subprocess; print('{\"step\": %d, \"x\": 1}' % subprocess.Popen(['sleep', '99']).pid);" + WAITS
        hold = await python(agent, code)
        await eventually(lambda: len(hold.steps) > 1)
        child = max(hold.steps)

        agent.process.kill()

        await eventually(lambda: not alive(hold.started.trainer_pid) and not alive(child))


@pytest.mark.slow
async def test_an_agent_that_is_told_to_end_hands_a_command_back(tmp_path, monkeypatch):
    monkeypatch.setenv("OPS_USER_CODE", "1")
    async with FakeApi(cancel_grace_s=10) as api, running_agent(api, tmp_path, command=FAKE_TRAINER) as agent:
        await agent.ready()
        hold = await python(agent, WAITS)
        await eventually(lambda: hold.steps)

        agent.process.terminate()

        assert await ended(hold) == Finish(outcome=Outcome.PREEMPTED)
        assert await agent.exit_code() == 0


@pytest.mark.parametrize(
    "named",
    [
        {"command": ["true"], "kind": Kind.COMMAND, "workload": "command"},
        {"workload": "pkg.mine:Class"},
        {"code": Code(sha256="0" * 64)},  # no submit lets that through: the installed name would be the snapshot's
        {"env": {"PYTHONPATH": "/tmp/of-mine"}},
    ],
    ids=["command", "class", "snapshot", "variables"],
)
async def test_a_worker_without_user_code_refuses_whatever_names_code_also_when_it_is_called_directly(closed, named):
    job = Job(**{"kind": Kind.TRAINING, "workload": "fake", "config": {}, "execution": Execution()} | named)
    order = closed.order(closed.api.claim(uuid4(), closed.incarnation)).model_copy(update={"job": job})

    answers = [
        await closed.post(f"/{job.kind}/start", order),
        await closed.post("/validate", Validate(incarnation=closed.incarnation, job=job)),
    ]

    assert [(each.status_code, each.json()["error"]["code"]) for each in answers] == [(409, "no_user_code")] * 2
    assert "OPS_USER_CODE=1 allows it" in answers[0].json()["error"]["message"]


async def test_a_command_is_not_taken_for_a_training(closed):
    mine = closed.order(closed.api.claim(uuid4(), closed.incarnation))
    assert (await closed.post("/command/start", mine)).status_code == 422


@pytest.fixture(scope="module")
async def closed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentProcess]:
    """It runs no user code."""
    directory = tmp_path_factory.mktemp("closed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPS_USER_CODE", "0")
        async with FakeApi() as api, running_agent(api, directory, command=FAKE_TRAINER) as agent:
            yield await agent.ready()
