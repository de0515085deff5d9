"""A worker's part in a gang: several trainer processes in one hold, which begin, report and end together."""

import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from helpers.agents import FAKE_TRAINER, AgentProcess, eventually, running_agent
from helpers.counting_meter import POWER_W
from helpers.fake_api import FakeApi, FakeHold
from helpers.processes import alive
from ops_contract.agents import CancelOrder, Gang
from ops_contract.energy import Use
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Outcome
from ops_contract.pipe import Rank
from ops_contract.reports import Finish

METERED = "import helpers.counting_meter; helpers.counting_meter.install()"
IMPATIENT = "import ops_worker.ranks; ops_worker.ranks.CAUSE_S = 0.3"
# A job whose trainers cannot be the warm ones.
COLD = {"OMP_DYNAMIC": "false"}


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with FakeApi() as api:
        yield api


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentProcess]:
    """One agent with two slots, for tests that leave it alive."""
    path, environ = tmp_path_factory.mktemp("shared"), {"OPS_USER_CODE": "1"}
    async with (
        FakeApi(cancel_grace_s=3) as api,
        running_agent(api, path, slots=2, first=IMPATIENT, environ=environ) as agent,
    ):
        yield await agent.ready()


def gang_at(agent: AgentProcess, first_rank: int = 0, world_size: int = 4, slot: int = 0) -> Gang:
    """Rank 0 is in that slot of this agent."""
    port = agent.api.registration(agent.incarnation).slots[slot].port
    return Gang(world_size=world_size, first_rank=first_rank, host="127.0.0.1", port=port)


async def begin(agent: AgentProcess, gang: Gang, hold: FakeHold | None = None, **how: Any) -> FakeHold:
    """Both slots of an agent, of a gang."""
    hold = hold or agent.api.claim(uuid4(), agent.incarnation)
    order = agent.order(hold, slots=[0, 1], gang=gang, **how)
    answer = await agent.post("/training/start", order)
    assert answer.status_code == 202, answer.text
    return hold


def logs_of(agent: AgentProcess, hold: FakeHold) -> dict[int, str]:
    """What its ranks have printed, by rank."""
    texts = [path.read_text() for path in (agent.state_dir / "logs").glob("*.log")]
    own = [text for text in texts if text.startswith("hello") and f"{hold.ref.operation_id}" in text]
    return {Rank.model_validate_json(text.splitlines()[1].split(" in ")[0]).rank: text for text in own}


def pid_of(agent: AgentProcess, hold: FakeHold, rank: int) -> int:
    return int(logs_of(agent, hold)[rank].splitlines()[1].rpartition(" pid ")[2])


async def running(agent: AgentProcess, hold: FakeHold, *ranks: int) -> dict[int, int]:
    """The pids of these ranks, once they run."""
    await eventually(lambda: set(ranks) <= set(logs_of(agent, hold)))
    return {rank: pid_of(agent, hold, rank) for rank in ranks}


# ---- the start


async def test_four_ranks_on_two_workers_meet_at_the_socket_of_rank_0_which_alone_reports(api, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    async with running_agent(api, first, slots=2) as leader, running_agent(api, second, slots=2) as other:
        await leader.ready()
        await other.ready()
        operation_id = uuid4()
        holds = [api.claim(operation_id, agent.incarnation) for agent in (leader, other)]
        await begin(other, gang_at(leader, first_rank=2), holds[1], meet=True)
        await begin(leader, gang_at(leader), holds[0], meet=True)

        await eventually(lambda: all(hold.finish for hold in holds))
        printed = logs_of(leader, holds[0]) | logs_of(other, holds[1])

    assert holds[0].started.environment["met"] == [1, 2, 3]
    assert holds[0].steps == [0, 1, 2]
    assert holds[0].output.decode() == printed[0]
    assert holds[1].accepted == [Finish(outcome=Outcome.COMPLETED)]
    assert holds[1].progress is None
    assert holds[0].finish == Finish(outcome=Outcome.COMPLETED)
    said = {rank: text.splitlines()[1].split(", pid")[0].split(" in ") for rank, text in printed.items()}
    ranks = [Rank.model_validate_json(said[rank][0]) for rank in range(4)]
    assert [(each.rank, each.local_rank, each.world_size) for each in ranks] == [
        (0, 0, 4),
        (1, 1, 4),
        (2, 0, 4),
        (3, 1, 4),
    ]
    assert {each.port for each in ranks} == {api.registration(leader.incarnation).slots[0].port}
    assert said[0][1] == said[1][1] != said[2][1] == said[3][1]


@pytest.mark.slow
async def test_trainers_of_a_jobs_own_environment_listen_too_and_a_command_does_not(shared):
    hold = shared.api.claim(uuid4(), shared.incarnation)
    order = shared.order(hold, slots=[0, 1], gang=gang_at(shared, world_size=2), meet=True)
    await shared.post("/training/start", order.model_copy(update={"job": order.job.model_copy(update={"env": COLD})}))
    command = shared.api.claim(uuid4(), shared.incarnation)
    program = ["python", "-c", "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(1000)"]
    job = Job(kind=Kind.COMMAND, workload="command", config={}, execution=Execution(), command=program)

    await eventually(lambda: hold.finish)
    await shared.post("/command/start", shared.order(command).model_copy(update={"job": job}))
    await eventually(lambda: command.output.endswith(b"\n"))

    assert hold.started.environment["met"] == [1]
    await eventually(lambda: [listens(pid) for pid in shared.children()].count(True) == 2)
    assert not any(listens(int(pid)) for pid in command.output.split())
    await shared.cancel(command, force=True)
    await eventually(lambda: command.finish)


def listens(pid: int) -> bool:
    """Whether it has a listening socket."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {f"socket:[{line[9]}]" for line in lines if line[3] == "0A"}
    return any(_link(pid, fd) in listening for fd in os.listdir(f"/proc/{pid}/fd"))


def _link(pid: int, fd: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    except FileNotFoundError:
        return ""


async def test_each_slot_has_a_port_of_its_own_on_which_nobody_answers_before_rank_0(shared):
    ports = [slot.port for slot in shared.api.registration(shared.incarnation).slots]

    assert len(set(ports)) == 2
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as early:
            early.setblocking(False)
            with pytest.raises(BlockingIOError):
                early.recv(1)


async def test_a_start_where_one_slot_is_busy_is_refused_and_nothing_begins(shared):
    busy = await shared.start(slot=1, end="wait")
    hold = shared.api.claim(uuid4(), shared.incarnation)

    answer = await shared.post("/training/start", shared.order(hold, slots=[0, 1], gang=gang_at(shared)))
    free = await shared.start(slot=0)

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "busy")
    await eventually(lambda: free.finish)
    await shared.cancel(busy)
    await eventually(lambda: busy.finish)
    assert (hold.accepted, hold.beats) == ([], 0)


@pytest.mark.parametrize(
    ("slots", "gang", "says"),
    [
        ([0, 0], Gang(world_size=2, first_rank=0, host="h", port=1), "given twice"),
        ([0, 1], None, "no gang"),
        ([0, 1], Gang(world_size=4, first_rank=3, host="h", port=1), "no rank 4 among 4"),
        ([0, 2], Gang(world_size=2, first_rank=0, host="h", port=1), "no slot 2"),
    ],
)
async def test_a_start_that_contradicts_itself_is_refused(shared, slots, gang, says):
    hold = shared.api.claim(uuid4(), shared.incarnation)

    answer = await shared.post("/training/start", shared.order(hold, slots=slots, gang=gang))

    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid")
    assert says in answer.json()["error"]["message"]
    assert hold.beats == 0


@pytest.mark.slow
async def test_a_hold_waits_for_all_its_trainers_and_is_handed_back_when_one_fails_for_ever(api, tmp_path):
    broken = tmp_path / "broken"
    code = (
        "import os, runpy, sys\n"
        f"if '-1-' in os.path.basename(os.readlink('/proc/self/fd/1'))[36:] and os.path.exists({str(broken)!r}):\n"
        "    sys.exit('no module named torch')\n"
        f"runpy.run_path({FAKE_TRAINER[1]!r}, run_name='__main__')"
    )
    async with running_agent(api, tmp_path, slots=2, command=[FAKE_TRAINER[0], "-c", code]) as agent:
        await agent.ready()
        await eventually(lambda: len(agent.children()) == 2)
        broken.touch()
        (warm,) = [pid for pid in agent.children() if "-1-" in Path(_link(pid, "1")).name[36:]]
        os.kill(warm, signal.SIGKILL)
        await eventually(lambda: not alive(warm) and "(1 times in a row)" in (tmp_path / "agent.log").read_text())
        hold = await begin(agent, gang_at(agent, world_size=2))

        await eventually(lambda: hold.finish)
        other = await agent.start(slot=0)
        await eventually(lambda: other.finish)

    assert (hold.finish.outcome, hold.finish.error.code) == (Outcome.PREEMPTED, "trainer_not_ready")
    assert "slot 1" in hold.finish.error.message
    assert "no module named torch" in hold.finish.error.message
    assert hold.told == [hold.finish]
    assert other.finish == Finish(outcome=Outcome.COMPLETED)


# ---- ends in order


async def test_the_finish_waits_for_the_last_rank(shared):
    hold = await begin(shared, gang_at(shared), ranks={"1": {"end": "wait"}})
    pids = await running(shared, hold, 0, 1)
    await eventually(lambda: not alive(pids[0]))
    beats = hold.beats

    await eventually(lambda: hold.beats > beats + 3)
    assert hold.finish is None
    assert alive(pids[1])
    os.kill(pids[1], signal.SIGKILL)
    await eventually(lambda: hold.finish)


@pytest.mark.parametrize("first_rank", [0, 2], ids=["leader", "another member"])
async def test_a_cancel_reaches_every_rank_and_one_finish_follows(shared, first_rank):
    hold = await begin(shared, gang_at(shared, first_rank), end="wait")
    await running(shared, hold, first_rank, first_rank + 1)

    await shared.cancel(hold)
    await eventually(lambda: hold.finish)

    assert hold.finish == Finish(outcome=Outcome.CANCELLED)
    assert [report.kind for report in hold.told].count("checkpoint") == (1 if first_rank == 0 else 0)


async def test_a_cancel_that_came_before_the_ranks_stops_them_all(shared):
    hold = shared.api.claim(uuid4(), shared.incarnation)
    hold.cancelling = CancelOrder(operation_id=hold.ref.operation_id, attempt=1)

    await begin(shared, gang_at(shared), hold, end="wait")
    await eventually(lambda: hold.finish)

    assert hold.finish == Finish(outcome=Outcome.CANCELLED)


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True], ids=["after the grace", "at once with force"])
async def test_ranks_that_do_not_stop_are_all_killed(shared, force):
    hold = await begin(shared, gang_at(shared), end="wait", deaf=True)
    pids = await running(shared, hold, 0, 1)

    await shared.cancel(hold, force=force)
    await eventually(lambda: hold.finish)

    assert (hold.finish.outcome, hold.finish.error.code) == (Outcome.CANCELLED, "killed")
    assert not any(map(alive, pids.values()))


async def test_a_fence_kills_every_rank_and_says_nothing(shared):
    hold = await begin(shared, gang_at(shared, first_rank=2), end="wait", deaf=True)
    pids = await running(shared, hold, 2, 3)

    hold.ended = True
    await eventually(lambda: not any(map(alive, pids.values())))
    other = await shared.start()
    await eventually(lambda: other.finish)

    assert hold.accepted == []


async def test_sigterm_hands_a_gang_back_when_all_its_ranks_have_stopped(api, tmp_path):
    async with running_agent(api, tmp_path, slots=2) as agent:
        await agent.ready()
        hold = await begin(agent, gang_at(agent, first_rank=2), end="wait")
        pids = await running(agent, hold, 2, 3)

        agent.process.send_signal(signal.SIGTERM)
        code = await agent.exit_code()

    assert code == 0
    assert hold.accepted == [Finish(outcome=Outcome.PREEMPTED)]
    assert not any(map(alive, pids.values()))


async def test_ranks_that_end_differently_are_said_to_disagree(shared):
    hold = await begin(shared, gang_at(shared), ranks={"1": {"end": "stopped"}})

    await eventually(lambda: hold.finish)

    assert (hold.finish.outcome, hold.finish.error.code) == (Outcome.FAILED, "ranks_disagree")
    assert hold.finish.error.details["outcomes"] == {"0": "completed", "1": "preempted"}
    assert "0 completed, 1 preempted" in hold.finish.error.message


# ---- bad ends


@pytest.mark.parametrize("first_rank", [0, 2], ids=["leader", "another member"])
@pytest.mark.parametrize("local_rank", [0, 1])
async def test_a_rank_that_is_killed_takes_the_others_along_and_is_the_cause(shared, first_rank, local_rank):
    hold = await begin(shared, gang_at(shared, first_rank), end="wait", deaf=True)
    pids = await running(shared, hold, first_rank, first_rank + 1)

    os.kill(pids[first_rank + local_rank], signal.SIGKILL)
    await eventually(lambda: hold.finish)

    assert (hold.finish.outcome, hold.finish.error.code) == (Outcome.FAILED, "trainer_killed")
    assert hold.finish.error.details["rank"] == first_rank + local_rank
    assert f"trainer of rank {first_rank + local_rank} " in hold.finish.error.message
    assert f'"rank":{first_rank + local_rank},' in hold.finish.error.details["log_tail"]
    assert not any(map(alive, pids.values()))
    assert first_rank == 0 or hold.accepted == [hold.finish]


@pytest.mark.slow
async def test_a_rank_that_hangs_is_the_cause_though_the_others_get_on(shared):
    silent = Execution(stall_timeout_s=1)
    ranks = {"0": {"reports": 10**6, "pause_s": 0.01}, "1": {"reports": 0}}
    hold = await begin(shared, gang_at(shared), end="wait", execution=silent, ranks=ranks)
    pids = await running(shared, hold, 0, 1)

    await eventually(lambda: hold.finish)

    assert (hold.finish.error.code, hold.finish.error.details["rank"]) == ("stalled", 1)
    assert "in end\n" in hold.finish.error.details["log_tail"]
    assert "silent_ranks" not in hold.finish.error.details
    assert not any(map(alive, pids.values()))


@pytest.mark.slow
async def test_ranks_that_wait_for_a_hung_one_are_said_to_be_silent_too(shared):
    hold = await begin(shared, gang_at(shared, 2), reports=1, end="wait", execution=Execution(stall_timeout_s=1))
    await eventually(lambda: hold.finish)

    assert hold.finish.error.code == "stalled"
    assert hold.finish.error.details["silent_ranks"] == [2, 3]
    assert "Silent were ranks 2, 3" in hold.finish.error.message


# ---- a peer is gone


async def test_the_rank_that_failed_is_the_cause_though_one_that_lost_it_says_so_first(api, tmp_path):
    async with running_agent(api, tmp_path, slots=2) as agent:
        await agent.ready()
        ranks = {"0": {"end": "peer_lost"}, "1": {"end": "wait"}}
        hold = await begin(agent, gang_at(agent), ranks=ranks)
        pids = await running(agent, hold, 0, 1)
        await eventually(lambda: not alive(pids[0]))
        beats = hold.beats
        await eventually(lambda: hold.beats > beats + 10)  # the agent has seen it
        os.kill(pids[1], signal.SIGSEGV)
        await eventually(lambda: hold.finish)

    assert (hold.finish.outcome, hold.finish.error.code) == (Outcome.FAILED, "trainer_killed")
    assert hold.finish.error.details["rank"] == 1


@pytest.mark.parametrize("first_rank", [0, 2], ids=["leader", "another member"])
async def test_a_lost_peer_is_left_to_the_other_member_to_say(shared, first_rank):
    """Also where a rank of ours has not noticed: it is killed, and no cause."""
    gang = gang_at(shared, first_rank)
    ranks = {str(first_rank): {"end": "peer_lost"}, str(first_rank + 1): {"end": "wait", "deaf": True}}
    hold = await begin(shared, gang, ranks=ranks)
    pids = await running(shared, hold, first_rank, first_rank + 1)
    await eventually(lambda: not any(map(alive, pids.values())))
    beats = hold.beats

    await eventually(lambda: hold.beats > beats + 10)
    assert hold.finish is None
    hold.ended = True
    free = await begin(shared, gang_at(shared))
    await eventually(lambda: free.finish)

    assert hold.finish is None


@pytest.mark.slow
async def test_a_lost_peer_is_said_after_two_leases_when_no_other_member_has_ended_the_attempt(tmp_path):
    api = FakeApi()
    api.terms = api.terms.model_copy(update={"lease_s": 0.5})
    async with api, running_agent(api, tmp_path, slots=2) as agent:
        await agent.ready()
        hold = await begin(agent, gang_at(agent, first_rank=2), end="peer_lost")
        await eventually(lambda: hold.finish)

    assert (hold.finish.outcome, hold.finish.error.code) == (Outcome.PREEMPTED, "peer_lost")
    assert hold.finish.error.details["rank"] in (2, 3)


@pytest.mark.slow
async def test_a_lost_peer_is_said_at_once_when_all_ranks_are_here_or_the_worker_ends(tmp_path):
    api = FakeApi()
    api.terms = api.terms.model_copy(update={"lease_s": 600})
    async with api, running_agent(api, tmp_path, slots=2) as agent:
        await agent.ready()
        alone = await begin(agent, gang_at(agent, world_size=2), end="peer_lost")
        await eventually(lambda: alone.finish)
        hold = await begin(agent, gang_at(agent, first_rank=2), end="peer_lost")
        pids = await running(agent, hold, 2, 3)
        await eventually(lambda: not any(map(alive, pids.values())))
        agent.process.send_signal(signal.SIGTERM)
        code = await agent.exit_code()

    assert alone.finish.error.code == "peer_lost"
    assert code == 0
    assert hold.finish.error.code == "peer_lost"


# ---- joules


@pytest.mark.slow
async def test_the_joules_of_two_slots_with_one_meter_are_booked_once(api, tmp_path):
    async with running_agent(api, tmp_path, slots=2, first=METERED) as agent:
        await agent.ready()
        for gang in (gang_at(agent), gang_at(agent, first_rank=2)):
            hold = await begin(agent, gang, reports=3, pause_s=0.05)
            await eventually(lambda hold=hold: hold.finish and any(w.use is Use.FINISH for w in hold.windows.values()))

            found = [hold.windows[key] for key in sorted(hold.windows)]
            assert [w.use for w in found] == ["startup", "train", "finish"]
            assert [(w.first_step, w.until_step, w.units) for w in found] == [(0, 0, 0), (0, 3, 12), (3, 3, 0)]
            assert {w.device for w in found} == {"GPU-0"}
            for w in found:
                assert w.energy_j == pytest.approx(POWER_W * w.duration_s, abs=1e-6)


@pytest.mark.slow
async def test_a_successor_books_what_a_killed_agent_had_not_for_every_meter_of_its_slots(api, tmp_path):
    async with running_agent(api, tmp_path, slots=2, first=f"{METERED}; helpers.counting_meter.each_slot()") as agent:
        await agent.ready()
        hold = await begin(agent, gang_at(agent), reports=10_000, pause_s=0.02, edges=True)
        await eventually(lambda: {w.device for w in hold.windows.values() if w.use is Use.TRAIN} == {"GPU-0", "GPU-1"})
        agent.process.kill()
        await agent.process.wait()
    async with running_agent(
        api, tmp_path, slots=2, first=f"{METERED}; helpers.counting_meter.each_slot()"
    ) as successor:
        await successor.ready()
        await eventually(lambda: len(successor.outboxes()) == 1)  # its own

    for device in ("GPU-0", "GPU-1"):
        found = [w for key, w in sorted(hold.windows.items()) if key[0] == device]
        assert [w.use for w in found].count(Use.UNATTRIBUTED) == 1
        assert found[-1].use is Use.UNATTRIBUTED
        assert found[-1].energy_j == pytest.approx(POWER_W * found[-1].duration_s, abs=POWER_W * 0.5)
        assert [w.index for w in found] == list(range(1, len(found) + 1))


# ---- an idle worker


@pytest.mark.slow
async def test_an_idle_worker_leaves_in_order_but_not_while_it_has_work(api, tmp_path):
    async with running_agent(api, tmp_path, environ={"OPS_WORKER_IDLE_EXIT_S": "5.0"}) as agent:
        await agent.ready()
        hold = await agent.start(end="wait")
        await eventually(lambda: hold.beats > 120)  # of 50 ms: it was idle for longer, had it been
        assert agent.process.returncode is None
        assert agent.incarnation not in api.draining
        await agent.cancel(hold)
        code = await agent.exit_code()

    assert code == 0
    assert hold.finish == Finish(outcome=Outcome.CANCELLED)
    assert agent.incarnation in api.draining
    assert "OPS_WORKER_IDLE_EXIT_S" in (tmp_path / "agent.log").read_text()


@pytest.mark.slow
async def test_a_worker_that_checks_a_start_is_not_idle(api, tmp_path):
    slowly = (
        "import asyncio; from ops_worker.agent import Agent; "
        "Agent._check_checkpoint = lambda self, order: asyncio.sleep(1.5)"
    )
    environ = {"OPS_WORKER_IDLE_EXIT_S": "0.7"}
    async with running_agent(api, tmp_path, environ=environ, first=slowly) as agent:
        await agent.ready()
        hold = await agent.start()
        await eventually(lambda: hold.finish)
        assert await agent.exit_code() == 0

    assert hold.finish == Finish(outcome=Outcome.COMPLETED)


@pytest.mark.slow
async def test_an_idle_worker_that_never_had_work_leaves_too(api, tmp_path):
    async with running_agent(api, tmp_path, environ={"OPS_WORKER_IDLE_EXIT_S": "0.3"}) as agent:
        await agent.ready()
        assert await agent.exit_code() == 0
    assert agent.incarnation in api.draining
