"""Joules from the marks of real trainer processes to an API that fails on demand, by a meter of 100 W."""

import math
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helpers.agents import AgentProcess, eventually, running_agent
from helpers.counting_meter import POWER_W
from helpers.fake_api import FakeApi, FakeHold
from ops_contract.energy import EnergyWindow, Quality, Source, Use
from ops_contract.lifecycle import Outcome

METERED = "import helpers.counting_meter; helpers.counting_meter.install()"
UNMETERED = "from ops_worker.energy.devices import Devices; Devices._of_the_cpu = lambda *_: []"


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with FakeApi() as api:
        yield api


@pytest.fixture(scope="module")
async def metered(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentProcess]:
    async with FakeApi() as api, running_agent(api, tmp_path_factory.mktemp("metered"), first=METERED) as agent:
        yield await agent.ready()


def has(hold: FakeHold, use: Use) -> bool:
    return any(w.use is use for w in hold.windows.values())


def windows(hold: FakeHold) -> list[EnergyWindow]:
    return [hold.windows[key] for key in sorted(hold.windows)]


async def test_the_joules_of_a_hold_arrive_by_what_they_went_to(metered):
    hold = await metered.start(reports=3, pause_s=0.05)

    await eventually(lambda: hold.finish and has(hold, Use.FINISH))

    found = windows(hold)
    assert [w.use for w in found] == ["startup", "train", "finish"]
    assert [(w.first_step, w.until_step, w.units) for w in found] == [(0, 0, 0), (0, 3, 12), (3, 3, 0)]
    assert {(w.device, w.source, w.quality) for w in found} == {("GPU-0", Source.NVML_COUNTER, Quality.MEASURED)}
    for w in found:
        assert w.energy_j == pytest.approx(POWER_W * w.duration_s, abs=1e-6)


async def test_what_a_killed_trainer_used_last_belongs_to_the_step_in_flight(metered):
    hold = await metered.start(reports=3, end="crash")

    await eventually(lambda: hold.finish and has(hold, Use.TRAIN))

    last = windows(hold)[-1]
    assert hold.finish.error.code == "trainer_killed"
    assert (last.use, last.first_step, last.until_step) == (Use.TRAIN, 0, 4)
    assert last.units == 12


async def test_a_fenced_hold_still_says_what_it_used(metered):
    hold = await metered.start(reports=3, end="wait")
    await eventually(lambda: hold.steps == [0, 1, 2])
    hold.ended = True

    await eventually(lambda: len(hold.windows) >= 2)

    assert [w.use for w in windows(hold)] == ["startup", "train"]
    assert hold.finish is None


@pytest.mark.slow
async def test_joules_wait_for_the_api_without_a_gap_and_come_once(metered):
    hold = await metered.start(reports=3, end="wait")
    await eventually(lambda: hold.steps == [0, 1, 2])
    hold.unavailable = True
    await metered.cancel(hold, force=True)
    await eventually(lambda: metered.outboxes())
    hold.unavailable = False

    await eventually(lambda: hold.finish and len(hold.windows) >= 2)

    assert hold.finish.outcome is Outcome.CANCELLED
    assert [key[1] for key in sorted(hold.windows)] == [1, 2]


@pytest.mark.slow
async def test_without_a_meter_the_api_is_told_that_there_is_none(api, tmp_path):
    async with running_agent(api, tmp_path, first=UNMETERED) as agent:
        await agent.ready()
        hold = await agent.start(reports=3)
        await eventually(lambda: hold.finish and hold.windows)

        agent.process.send_signal(signal.SIGTERM)
        assert await agent.exit_code() == 0

    (only,) = windows(hold)
    assert (only.energy_j, only.reason, only.source, only.until_step) == (None, "no_meter", None, 3)
    assert agent.outboxes() == []


async def test_a_successor_books_what_a_killed_agent_had_not_once(api, tmp_path: Path):
    async with running_agent(api, tmp_path, first=METERED) as agent:
        await agent.ready()
        hold = await agent.start(reports=10_000, pause_s=0.02, edges=True)
        await eventually(lambda: has(hold, Use.TRAIN))
        agent.process.kill()
        await agent.process.wait()
    async with running_agent(api, tmp_path, first=METERED) as successor:
        await successor.ready()
        await eventually(lambda: has(hold, Use.UNATTRIBUTED))
        await eventually(lambda: len(successor.outboxes()) == 1)  # its own
        successor.process.send_signal(signal.SIGTERM)
        await successor.exit_code()

    found = windows(hold)
    (gap,) = (w for w in found if w.use is Use.UNATTRIBUTED)
    assert gap is found[-1]
    assert [w.index for w in found] == list(range(1, len(found) + 1))
    assert gap.energy_j == pytest.approx(POWER_W * gap.duration_s, abs=POWER_W * 0.5)
    assert math.fsum(w.energy_j for w in found) == pytest.approx(
        POWER_W * math.fsum(w.duration_s for w in found), abs=POWER_W * 0.5
    )
    assert successor.outboxes() == []
