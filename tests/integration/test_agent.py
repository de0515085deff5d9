"""Real agent processes and real trainer processes against an API that fails on demand."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from helpers.agents import AgentProcess, eventually, running_agent
from helpers.fake_api import FakeApi, FakeHold
from helpers.processes import alive
from ops_contract.agents import CancelOrder, CancelTraining, CheckpointRef
from ops_contract.jobs import Execution
from ops_contract.lifecycle import Outcome, Phase
from ops_contract.reports import Finish, Note


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentProcess]:
    """One agent with two slots, for tests that leave it alive."""
    async with FakeApi() as api, running_agent(api, tmp_path_factory.mktemp("shared"), slots=2) as agent:
        yield await agent.ready()


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with FakeApi() as api:
        yield api


# ---- ordinary life


async def test_a_run_is_reported_in_order_and_finished_when_its_process_is_gone(shared):
    hold = await shared.start(reports=300, prints="x" * 2_000_000)

    await eventually(lambda: hold.finish)

    assert hold.finish == Finish(outcome=Outcome.COMPLETED)
    assert hold.started
    assert hold.told[0] is hold.started
    assert hold.steps == list(range(300))
    assert hold.progress
    assert hold.progress.step == 299
    assert hold.trainer_gone_at_finish
    assert hold.started.environment["secrets"] == []


async def test_output_comes_while_the_process_lives_and_all_of_it_before_the_finish(shared):
    hold = await shared.start(reports=2, end="wait", prints="hello \u00fc")
    await eventually(lambda: hold.output)
    assert hold.finish is None
    await shared.cancel(hold)
    await eventually(lambda: hold.finish)

    [log] = [path for path in shared.state_dir.glob("logs/*.log") if hold.output in path.read_bytes()]
    assert hold.output == log.read_bytes() == "hello ü\nstep 0\nstep 1\n".encode()


async def test_registers_slots_workloads_and_where_it_listens(shared):
    registration = shared.api.registrations[0]

    assert registration.incarnation == shared.incarnation
    assert registration.url == shared.url
    assert [(slot.index, slot.device) for slot in registration.slots] == [(0, "cpu"), (1, "cpu")]
    assert [workload.name for workload in registration.workloads] == ["fake"]


async def test_a_hold_is_in_the_heartbeats_until_its_finish_is_accepted(shared):
    hold = await shared.start(end="wait")
    await eventually(lambda: hold.started)
    trainer = hold.started.trainer_pid
    hold.unavailable = True
    await shared.cancel(hold)
    await eventually(lambda: not alive(trainer))
    beats = hold.beats

    await eventually(lambda: hold.beats > beats + 3)
    assert hold.finish is None
    hold.unavailable = False
    await eventually(lambda: hold.finish)


# ---- ends of a trainer


async def test_a_killed_trainer_is_reported_with_its_signal_and_last_words(shared):
    hold = await shared.start(reports=5, end="wait", prints="last words")
    await eventually(lambda: len(hold.steps) == 5)

    os.kill(hold.started.trainer_pid, signal.SIGKILL)
    await eventually(lambda: hold.finish)

    assert hold.finish.outcome is Outcome.FAILED
    assert hold.finish.error.code == "trainer_killed"
    assert "SIGKILL" in hold.finish.error.message
    assert "last words" in hold.finish.error.details["log_tail"]
    assert hold.steps == list(range(5))


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        ("exit", "trainer_exited", "code 3"),
        ("crash", "trainer_killed", "SIGSEGV"),
        ("garbage", "trainer_protocol", "no message"),
        ("daemon", "trainer_exited", "code 0"),
    ],
)
async def test_a_trainer_that_ends_without_a_finish_gets_one_that_says_why(shared, end, code, says):
    hold = await shared.start(reports=2, end=end)

    await eventually(lambda: hold.finish)

    assert hold.finish.outcome is Outcome.FAILED
    assert hold.finish.error.code == code
    assert says in hold.finish.error.message
    assert hold.steps == [0, 1]


async def test_a_fault_without_the_last_words_gets_them(shared):
    hold = await shared.start(end="fault", prints="last words")

    await eventually(lambda: hold.finish)

    assert hold.finish.error.code == "exception"
    assert "last words" in hold.finish.error.details["log_tail"]


async def test_a_silent_trainer_is_killed_says_where_it_hung_and_the_slot_works_again(shared):
    hold = await shared.start(reports=5, end="wait", execution=Execution(stall_timeout_s=0.5))

    await eventually(lambda: hold.finish)
    good = await _start_when_free(shared)
    await eventually(lambda: good.finish)

    assert hold.finish.outcome is Outcome.FAILED
    assert hold.finish.error.code == "stalled"
    assert "raise execution.stall_timeout_s" in hold.finish.error.message
    assert "in end\n" in hold.finish.error.details["log_tail"]
    assert hold.steps == list(range(5))
    assert hold.trainer_gone_at_finish
    assert good.finish == Finish(outcome=Outcome.COMPLETED)


async def test_where_a_measurement_stands_is_told_while_it_reports_nothing_and_is_no_sign_of_life(shared):
    hold = await shared.start(reports=0, end="stand", execution=Execution(stall_timeout_s=1.5))

    await eventually(lambda: hold.progress is not None)
    await eventually(lambda: hold.finish)

    assert hold.progress.measurement.power_w == 9.5
    assert hold.progress.steps_total == 4
    assert hold.finish.error.code == "stalled"


async def test_a_trainer_that_takes_longer_than_its_time_is_killed_however_well_it_gets_on(shared):
    hold = await shared.start(reports=10**6, pause_s=0.01, execution=Execution(timeout_s=0.5))

    await eventually(lambda: hold.finish)

    assert hold.finish.outcome is Outcome.FAILED
    assert not hold.finish.permanent
    assert hold.finish.error.code == "timed_out"
    assert "raise execution.timeout_s" in hold.finish.error.message
    assert "in train\n" in hold.finish.error.details["log_tail"]
    assert hold.steps
    assert hold.trainer_gone_at_finish
    good = await _start_when_free(shared)
    await eventually(lambda: good.finish)
    assert good.finish == Finish(outcome=Outcome.COMPLETED)


async def test_a_trainer_that_is_stopping_has_its_grace_however_silent_it_is(tmp_path):
    async with FakeApi(cancel_grace_s=4) as api, running_agent(api, tmp_path) as agent:
        await agent.ready()
        hold = api.claim(uuid4(), agent.incarnation)
        hold.cancelling = CancelOrder(operation_id=hold.ref.operation_id, attempt=1)
        silent = Execution(stall_timeout_s=0.2, timeout_s=0.5)
        await agent.post("/training/start", agent.order(hold, reports=0, end="wait", deaf=True, execution=silent))

        await eventually(lambda: hold.finish)

    assert (hold.finish.outcome, hold.finish.error.code) == (Outcome.CANCELLED, "killed")


async def test_what_a_trainer_started_ends_with_it(shared):
    hold = await shared.start(end="child")

    await eventually(lambda: hold.finish)

    (child,) = [int(report.message) for report in hold.accepted if isinstance(report, Note)]
    await eventually(lambda: not alive(child))


async def test_a_trainer_that_lingers_after_its_finish_is_killed_and_the_finish_counts(shared):
    hold = await shared.start(end="linger")

    await eventually(lambda: hold.finish)

    assert hold.finish == Finish(outcome=Outcome.COMPLETED)
    assert hold.trainer_gone_at_finish


# ---- the API's answers


async def test_lost_answers_count_nothing_twice(shared):
    """Scenario 16."""
    hold = shared.api.claim(uuid4(), shared.incarnation)
    hold.lose_answers = 3
    await shared.post("/training/start", shared.order(hold, reports=20, pause_s=0.01))

    await eventually(lambda: hold.finish and hold.lose_answers == 0)

    assert hold.steps == list(range(20))


@pytest.mark.parametrize("reports", [1, 10_000], ids=["told by a heartbeat", "told while reporting"])
async def test_a_fenced_trainer_is_killed_and_nothing_more_is_said(shared, reports):
    hold = await shared.start(reports=reports, pause_s=0.001, end="wait", deaf=True)
    await eventually(lambda: hold.steps)
    said = len(hold.accepted)

    hold.ended = True
    await eventually(lambda: not alive(hold.started.trainer_pid))

    other = await shared.start()
    await eventually(lambda: other.finish)
    assert len(hold.accepted) == said or reports > 1
    assert hold.finish is None


async def test_a_poisoned_report_is_replaced_by_a_note_and_blocks_nothing(shared):
    hold = shared.api.claim(uuid4(), shared.incarnation)
    hold.refuses = lambda report: isinstance(report, Note) and report.message == "poison"
    hold.most_per_batch = 7
    await shared.post("/training/start", shared.order(hold, reports=50, poison_at=25))

    await eventually(lambda: hold.finish)

    assert hold.steps == list(range(50))
    notes = [report.message for report in hold.accepted if isinstance(report, Note)]
    assert len(notes) == 1
    assert "kind note" in notes[0]
    assert "a value that the database cannot hold" in notes[0]


# ---- cancel


@pytest.mark.parametrize("told_by", ["push", "heartbeat"])
async def test_a_cancelled_trainer_saves_and_stops(shared, told_by):
    hold = await shared.start(end="wait")
    await eventually(lambda: hold.steps)

    if told_by == "push":
        assert (await shared.cancel(hold)).status_code == 202
    else:
        hold.cancelling = CancelOrder(operation_id=hold.ref.operation_id, attempt=1, reason="enough")
    await eventually(lambda: hold.finish)

    assert hold.finish == Finish(outcome=Outcome.CANCELLED)
    assert hold.told[-2].kind == "checkpoint"


async def test_a_cancel_before_the_first_step_still_runs_the_trainer_to_a_checkpoint(tmp_path):
    """Which may have to get warm first: within the grace."""
    async with FakeApi(cancel_grace_s=30) as api, running_agent(api, tmp_path) as agent:
        await agent.ready()
        hold = api.claim(uuid4(), agent.incarnation)
        hold.cancelling = CancelOrder(operation_id=hold.ref.operation_id, attempt=1)
        await agent.post("/training/start", agent.order(hold, end="wait"))
        await eventually(lambda: hold.finish)

    assert hold.finish == Finish(outcome=Outcome.CANCELLED)
    assert hold.told[-2].kind == "checkpoint"


@pytest.mark.parametrize("force", [False, True], ids=["after the grace", "at once with force"])
async def test_a_trainer_that_does_not_stop_is_killed(shared, force):
    hold = await shared.start(end="wait", deaf=True)
    await eventually(lambda: hold.steps)

    await shared.cancel(hold, force=force)
    await eventually(lambda: hold.finish)

    assert hold.finish.outcome is Outcome.CANCELLED
    assert hold.finish.error.code == "killed"
    assert hold.trainer_gone_at_finish


# ---- starts


async def test_the_same_start_again_is_the_same_run(shared):
    """Scenario 20."""
    hold = shared.api.claim(uuid4(), shared.incarnation)
    order = shared.order(hold, end="wait")

    answers = await asyncio.gather(*(shared.post("/training/start", order) for _ in range(5)))

    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 202]
    await eventually(lambda: hold.steps)
    await shared.cancel(hold)
    await eventually(lambda: hold.finish)
    assert sum(report.kind == "started" for report in hold.accepted) == 1


async def test_a_taken_slot_is_busy_and_a_free_one_is_not(shared):
    first = await shared.start(end="wait")

    busy = await shared.post("/training/start", shared.order(shared.api.claim(uuid4(), shared.incarnation)))
    second = await shared.start(slot=1)

    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "busy")
    await eventually(lambda: second.finish)
    await shared.cancel(first)
    await eventually(lambda: first.finish)


async def test_another_incarnation_or_an_older_attempt_is_stale(shared):
    """Scenario 20."""
    hold = await shared.start(attempt=2)
    await eventually(lambda: hold.finish)
    older = shared.order(hold).model_copy(update={"attempt": 1})
    other = shared.order(hold).model_copy(update={"incarnation": uuid4(), "attempt": 3})

    answers = [await shared.post("/training/start", order) for order in (older, other)]

    assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [(409, "stale")] * 2


async def test_a_start_that_arrives_after_its_attempt_ended_never_runs(shared):
    """Scenario 20."""
    hold = shared.api.claim(uuid4(), shared.incarnation)
    hold.ended = True

    answer = await shared.post("/training/start", shared.order(hold))

    assert answer.status_code == 202
    other = await _start_when_free(shared)
    await eventually(lambda: other.finish)
    assert hold.accepted == []


async def test_a_start_that_cannot_be_confirmed_before_its_deadline_never_runs(shared):
    """Scenario 20."""
    hold = shared.api.claim(uuid4(), shared.incarnation)
    shared.api.beats_fail = True
    await shared.post("/training/start", shared.order(hold, deadline_s=0.2))

    other = await _start_when_free(shared, deadline_s=20)
    shared.api.beats_fail = False
    await eventually(lambda: other.finish)

    assert hold.accepted == []  # a beat may still have named it while it went


async def test_refusals_have_the_one_shape(shared):
    hold = shared.api.claim(uuid4(), shared.incarnation)
    order = shared.order(hold)
    checkpoint = CheckpointRef(
        checkpoint_id=uuid4(),
        path="gone/1-1",
        step=1,
        epoch=0,
        phase=Phase.UPDATE,
        size_bytes=1,
        manifest_sha256="0" * 64,
    )
    resume = order.model_copy(update={"checkpoint": checkpoint})

    answers = [
        await shared.post("/training/start", order, secret="guessed"),
        await shared.post("/training/start", '{"incarnation": 7}'),
        await shared.post("/training/start", resume),
        await shared.post("/training/resume", order),
        await shared.post("/training/resume", resume),
        await shared.post("/training/start", order.model_copy(update={"slots": [9]})),
        await shared.post(f"/operations/{uuid4()}/cancel", CancelTraining(incarnation=shared.incarnation, attempt=1)),
        await shared.post("/nowhere", "{}"),
        await shared.post("/health", "{}"),
    ]

    assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [
        (401, "unauthenticated"),
        (422, "invalid"),
        (422, "invalid"),
        (422, "invalid"),
        (404, "no_checkpoint"),
        (422, "invalid"),
        (404, "not_found"),
        (404, "not_found"),
        (405, "method_not_allowed"),
    ]
    assert answers[1].json()["error"]["message"].startswith("incarnation: ")
    assert hold.accepted == []


async def test_a_checkpoint_with_another_manifest_is_corrupt(shared):
    hold = shared.api.claim(uuid4(), shared.incarnation)
    place = shared.state_dir / "storage" / str(hold.ref.operation_id) / "1-1"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    checkpoint = CheckpointRef(
        checkpoint_id=uuid4(),
        path=f"{hold.ref.operation_id}/1-1",
        step=1,
        epoch=0,
        phase=Phase.UPDATE,
        size_bytes=2,
        manifest_sha256="0" * 64,
    )

    answer = await shared.post(
        "/training/resume", shared.order(hold).model_copy(update={"attempt": 2, "checkpoint": checkpoint})
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "checkpoint_corrupt")


async def _start_when_free(agent: AgentProcess, **how: float):
    """Start another on slot 0 as soon as it is given free."""
    hold = agent.api.claim(uuid4(), agent.incarnation)
    async with asyncio.timeout(20):
        while True:
            answer = await agent.post("/training/start", agent.order(hold, **how))
            if answer.status_code != 409:
                return hold


# ---- the API away


async def test_an_agent_waits_for_the_api_and_trains_through_its_absence(tmp_path):
    api = FakeApi()
    await api.down()
    async with running_agent(api, tmp_path) as agent:
        await eventually(lambda: "registering" in (tmp_path / "agent.log").read_text())
        await api.up()
        await agent.ready()
        hold = await agent.start(reports=30, gate=str(tmp_path / "gate"))
        await eventually(lambda: hold.steps)
        await api.down()
        (tmp_path / "gate").touch()
        trainer = hold.started.trainer_pid
        await eventually(lambda: not alive(trainer))
        assert hold.finish is None

        await api.up()
        await eventually(lambda: hold.finish)

    assert hold.finish == Finish(outcome=Outcome.COMPLETED)
    assert hold.steps == list(range(30))
    await api.down()


async def test_registers_again_when_the_api_knows_it_no_more(api, tmp_path):
    async with running_agent(api, tmp_path) as agent:
        await agent.ready()

        api.known.clear()

        await eventually(lambda: len(api.registrations) == 2)
    assert {worker.incarnation for worker in api.registrations} == {agent.incarnation}


# ---- the disk of the outbox


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 16 MB (the log of SQLite alone takes 4), under the outbox alone."""
    place = tmp_path / "outbox"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "relight-test", place]
    if (mounted := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


async def test_a_full_disk_of_the_outbox_pauses_the_training_and_loses_nothing(api, tmp_path, small_disk):
    async with running_agent(api, tmp_path) as agent:
        await agent.ready()
        hold = await agent.start(reports=2000, pause_s=0.001, execution=Execution(stall_timeout_s=1.0))
        await eventually(lambda: len(hold.steps) > 10)
        _fill(small_disk / "ballast")
        await eventually(lambda: _log(agent).count("free some space there, trying again") >= 3)
        beats = hold.beats
        await eventually(lambda: hold.beats > beats)
        assert alive(hold.started.trainer_pid)
        (small_disk / "ballast").unlink()
        await eventually(lambda: hold.finish, timeout_s=60)

    assert hold.finish == Finish(outcome=Outcome.COMPLETED)
    assert hold.steps == list(range(2000))


@pytest.mark.slow
async def test_an_agent_that_finds_its_disk_full_says_where(api, tmp_path, small_disk):
    _fill(small_disk / "ballast")
    async with running_agent(api, tmp_path) as agent:
        code = await agent.exit_code()
    assert code == 1
    assert "make room there, or set OPS_WORKER_STATE_DIR" in _log(agent).splitlines()[-1]
    (small_disk / "ballast").unlink()
    async with running_agent(api, tmp_path) as successor:
        await successor.ready()


def _fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(65536)):
            pass


# ---- ends of an agent


async def test_a_killed_agent_leaves_no_trainer_and_its_successor_sends_what_it_could_not(api, tmp_path):
    async with running_agent(api, tmp_path) as agent:
        await agent.ready()
        hold = await agent.start(reports=50, gate=str(tmp_path / "gate"), end="wait")
        await eventually(lambda: hold.steps)
        await api.down()
        (tmp_path / "gate").touch()
        await eventually(lambda: _trainer_reached(agent, 49))
        await eventually(lambda: hold.output or _stored_output(agent))
        children = agent.children()
        agent.process.kill()
        await agent.process.wait()
        await eventually(lambda: not any(map(alive, children)))
    assert hold.started.trainer_pid in children
    assert stat.S_IMODE(agent.outboxes()[0].stat().st_mode) == 0o600
    accepted, stored = len(hold.accepted), _last_stored(agent)

    await api.up()
    async with running_agent(api, tmp_path) as successor:
        await successor.ready()
        await eventually(lambda: len(successor.outboxes()) == 1)

    assert successor.incarnation != agent.incarnation
    assert accepted < stored == len(hold.accepted)
    assert hold.steps == list(range(len(hold.steps)))
    assert b"hello from the trainer" in hold.output
    assert successor.outboxes()[0].stem == str(successor.incarnation)


async def killed_with_a_backlog(api: FakeApi, state_dir: Path) -> tuple[AgentProcess, FakeHold]:
    """An agent that has reports which the API, away now, does not have."""
    async with running_agent(api, state_dir) as agent:
        await agent.ready()
        hold = await agent.start(reports=50, gate=str(state_dir / "gate"), end="wait")
        await eventually(lambda: hold.steps)
        await api.down()
        (state_dir / "gate").touch()
        await eventually(lambda: _trainer_reached(agent, 40))
        agent.process.kill()
        await agent.process.wait()
    return agent, hold


async def test_the_successor_of_a_fenced_agent_deletes_what_nobody_wants(api, tmp_path):
    _, hold = await killed_with_a_backlog(api, tmp_path)
    hold.ended = True
    said = len(hold.accepted)

    await api.up()
    async with running_agent(api, tmp_path) as successor:
        await successor.ready()
        await eventually(lambda: [path.stem for path in successor.outboxes()] == [str(successor.incarnation)])

    assert len(hold.accepted) == said


@pytest.mark.slow
async def test_what_nobody_takes_from_a_predecessor_stays_and_is_not_asked_about_for_ever(api, tmp_path):
    agent, hold = await killed_with_a_backlog(api, tmp_path)
    api.shut_out.add(agent.incarnation)

    await api.up()
    async with running_agent(api, tmp_path) as successor:
        await successor.ready()
        await eventually(lambda: f"what worker {agent.incarnation} left stays" in (tmp_path / "agent.log").read_text())
        theirs = await successor.start()
        await eventually(lambda: theirs.finish)
    assert str(agent.incarnation) in [path.stem for path in successor.outboxes()]

    api.shut_out.clear()
    async with running_agent(api, tmp_path) as successor:
        await successor.ready()
        await eventually(lambda: str(agent.incarnation) not in [path.stem for path in successor.outboxes()])
    assert hold.steps == list(range(len(hold.steps)))


async def test_who_is_shut_out_trains_on_and_says_the_rest_when_it_is_let_in_again(api, tmp_path):
    async with running_agent(api, tmp_path) as agent:
        await agent.ready()
        hold = await agent.start(reports=50, gate=str(tmp_path / "gate"))
        await eventually(lambda: hold.steps)
        api.shut_out.add(agent.incarnation)
        (tmp_path / "gate").touch()
        await eventually(lambda: _trainer_reached(agent, 49) and "heartbeat: 401" in _log(agent))
        said = len(api.registrations)

        api.shut_out.clear()
        await eventually(lambda: hold.finish)

        assert hold.steps == list(range(50))
        await eventually(lambda: len(api.registrations) > said)
        first, *_, last = api.registrations
        assert first == last


async def test_sigterm_hands_everything_back(api, tmp_path):
    async with running_agent(api, tmp_path) as agent:
        await agent.ready()
        hold = await agent.start(end="wait")
        await eventually(lambda: hold.steps)

        agent.process.send_signal(signal.SIGTERM)
        code = await agent.exit_code()

    assert code == 0
    assert hold.finish == Finish(outcome=Outcome.PREEMPTED)
    assert hold.told[-2].kind == "checkpoint"
    assert agent.incarnation in api.draining
    assert agent.outboxes() == []


async def test_a_draining_agent_takes_nothing_and_kills_what_does_not_stop(tmp_path):
    async with FakeApi(cancel_grace_s=1.0) as api, running_agent(api, tmp_path, slots=2) as agent:
        await agent.ready()
        hold = await agent.start(end="wait", deaf=True)
        await eventually(lambda: hold.steps)

        agent.process.send_signal(signal.SIGTERM)
        await eventually(lambda: agent.incarnation in api.draining)
        refused = await agent.post("/training/start", agent.order(api.claim(uuid4(), agent.incarnation), slot=1))
        code = await agent.exit_code()

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "stale")
    assert code == 0
    assert hold.finish.outcome is Outcome.PREEMPTED
    assert hold.finish.error.code == "killed"


@pytest.mark.slow
async def test_a_second_signal_kills_at_once_and_what_cannot_be_sent_waits_for_the_successor(tmp_path):
    api = FakeApi(cancel_grace_s=600)
    await api.up()
    async with running_agent(api, tmp_path) as agent:
        await agent.ready()
        hold = await agent.start(end="wait", deaf=True)
        await eventually(lambda: hold.steps)
        trainer = hold.started.trainer_pid
        await api.down()

        agent.process.send_signal(signal.SIGTERM)
        await eventually(lambda: "handing back" in (tmp_path / "agent.log").read_text())
        agent.process.send_signal(signal.SIGINT)
        code = await agent.exit_code()
    assert code == 0
    assert not alive(trainer)

    await api.up()
    async with running_agent(api, tmp_path):
        await eventually(lambda: hold.finish)
    assert hold.finish.outcome is Outcome.PREEMPTED
    await api.down()


async def test_a_drained_worker_finishes_or_hands_back_what_it_has_and_works_again(shared):
    hold, other, deaf = await shared.start(end="wait"), None, None
    await eventually(lambda: hold.steps)
    try:
        shared.api.drain = "finish"
        await eventually(lambda: "drain, and finish what runs" in _log(shared))
        assert hold.finish is None
        shared.api.drain = "preempt"
        await eventually(lambda: hold.finish)
        late = await shared.start(end="wait")  # as when it was claimed just before the wish
        await eventually(lambda: late.finish)
        shared.api.drain = None
        await eventually(lambda: "drain no longer" in _log(shared))
        other, deaf = await shared.start(), await shared.start(slot=1, end="wait", deaf=True)
        await eventually(lambda: other.finish and deaf.steps)
        shared.api.drain = "preempt"
        await eventually(lambda: deaf.finish)
    finally:
        shared.api.drain = None

    assert hold.finish == Finish(outcome=Outcome.PREEMPTED)
    assert hold.told[-2].kind == "checkpoint"
    assert late.finish.outcome is Outcome.PREEMPTED
    assert other.finish == Finish(outcome=Outcome.COMPLETED)
    assert (deaf.finish.outcome, deaf.finish.error.code) == (Outcome.PREEMPTED, "killed")


async def test_the_end_of_stdin_ends_an_agent_that_was_told_so(api, tmp_path):
    async with running_agent(api, tmp_path, "--exit-on-eof") as agent:
        await agent.ready()
        hold = await agent.start(end="wait")
        await eventually(lambda: hold.steps)

        agent.process.stdin.close()
        code = await agent.exit_code()

    assert code == 0
    assert hold.finish == Finish(outcome=Outcome.PREEMPTED)


async def test_two_agents_with_one_state_directory_do_not_disturb_each_other(api, tmp_path):
    async with running_agent(api, tmp_path) as first, running_agent(api, tmp_path) as second:
        await asyncio.gather(first.ready(), second.ready())

        holds = [await agent.start(reports=20, pause_s=0.002) for agent in (first, second)]
        await eventually(lambda: all(hold.finish for hold in holds))

        assert len(first.outboxes()) == 2
    assert [hold.steps for hold in holds] == [list(range(20))] * 2


# ---- trainers that do not start


async def test_a_slot_whose_trainers_die_before_they_are_ready_refuses_with_the_reason(api, tmp_path):
    broken = (
        "import sys\nif '--describe' in sys.argv: print('{\"workloads\": []}')\nelse: sys.exit('no module named torch')"
    )
    async with running_agent(api, tmp_path, command=[sys.executable, "-c", broken]) as agent:
        await agent.ready()
        log: Path = tmp_path / "agent.log"
        await eventually(lambda: "(3 times in a row)" in log.read_text())

        answer = await agent.post("/training/start", agent.order(api.claim(uuid4(), agent.incarnation)))

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "busy")
    assert "no module named torch" in answer.json()["error"]["message"]


def _trainer_reached(agent: AgentProcess, step: int) -> bool:
    """Whether a trainer has said that much, whoever has heard it."""
    return any(f"step {step}\n" in log.read_text() for log in (agent.state_dir / "logs").glob("*.log"))


def _log(agent: AgentProcess) -> str:
    return (agent.state_dir / "agent.log").read_text()


def _stored_output(agent: AgentProcess) -> bool:
    """In its write-ahead log: the database itself is locked."""
    return any(b'"kind":"log"' in path.read_bytes() for path in agent.state_dir.glob("outbox/*-wal"))


def _last_stored(agent: AgentProcess) -> int:
    """The highest sequence number in the outbox of a dead agent."""
    with contextlib.closing(sqlite3.connect(agent.outboxes()[0])) as database:
        return database.execute("SELECT max(seq) FROM reports").fetchone()[0]
