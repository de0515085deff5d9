"""Real agents on a host with two GPUs, by a driver that plays a script."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from helpers.agents import eventually, running_agent
from helpers.fake_api import FakeApi
from helpers.fake_nvml import FakeClock, environ
from helpers.service import Service
from ops_contract.errors import ErrorBody
from ops_contract.lifecycle import Outcome

TWO = "driver 550.54\ndevice GPU-aa\nname H100\npower 0 300\nthrottle 0 4\ndevice GPU-bb\nname H100\npower 0 90"


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with FakeApi() as api:
        yield api


@pytest.fixture
def gpus(fake_nvml: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """For an agent on such a host; times in the script count from here."""

    def host(script: str, clock: FakeClock | None = None) -> dict[str, str]:
        now_s = clock() if clock else time.monotonic()
        (tmp_path / "script").write_text(f"epoch {now_s}\n{script}")
        return environ(fake_nvml, tmp_path / "script", clock) | {"OPS_GPUS": "all", "OPS_CPU_CORES": "6"}

    return host


async def test_each_gpu_is_a_slot_whose_trainer_sees_it_alone(api, tmp_path, gpus):
    async with running_agent(api, tmp_path, environ=gpus(TWO)) as agent:
        await agent.ready()

        assert [(s.index, s.device, s.device_uuid, s.cores) for s in api.registrations[0].slots] == [
            (0, "cuda", "GPU-aa", 2),
            (1, "cuda", "GPU-bb", 2),
            (2, "cpu", None, 2),
        ]
        holds = [await agent.start(slot=slot) for slot in range(3)]
        await eventually(lambda: all(hold.finish for hold in holds))

    environments = [hold.started.environment for hold in holds]
    assert [about["sees"] for about in environments] == ["GPU-aa", "GPU-bb", ""]
    assert [about.get("gpu_uuid") for about in environments] == ["GPU-aa", "GPU-bb", None]
    assert environments[0]["driver"] == "550.54"
    assert environments[0]["energy_meters"][0] == "GPU-aa: nvml_counter, measured"
    assert environments[0]["preflight"] == []


@pytest.mark.slow
async def test_a_job_cannot_take_anothers_gpu(api, tmp_path, gpus):
    async with running_agent(api, tmp_path, environ=gpus(TWO) | {"OPS_USER_CODE": "1"}) as agent:
        await agent.ready()
        hold = api.claim(uuid4(), agent.incarnation)
        order = agent.order(hold, slot=0)
        job = order.job.model_copy(update={"env": {"CUDA_VISIBLE_DEVICES": "GPU-bb", "PYTHONUTF8": "1"}})
        await agent.post("/training/start", order.model_copy(update={"job": job}))
        await eventually(lambda: hold.finish)

    assert hold.started.environment["sees"] == "GPU-aa"


async def test_heartbeats_say_how_the_gpus_are(api, tmp_path, gpus):
    async with running_agent(api, tmp_path, environ=gpus(TWO)) as agent:
        await agent.ready()
        await eventually(lambda: api.devices and api.devices[0].power_w)
        first, second = api.devices

    assert (first.device, first.name, first.power_w, first.throttle) == ("GPU-aa", "H100", 300, ["sw_power_cap"])
    assert (second.device, second.power_w, second.throttle) == ("GPU-bb", 90, [])


async def test_a_start_on_a_gpu_that_is_full_is_refused_with_all_that_is_wrong_and_the_others_run(api, tmp_path, gpus):
    full = f"{TWO}\ntotal 1000\nused 0 990\nprocess 0 1\npersistence 0"
    async with running_agent(api, tmp_path, environ=gpus(full)) as agent:
        await agent.ready()
        refused = await agent.post("/training/start", agent.order(api.claim(uuid4(), agent.incarnation), slot=1))
        hold = await agent.start(slot=0)
        await eventually(lambda: hold.finish)

    error = ErrorBody.model_validate(refused.json()).error
    assert (refused.status_code, error.code) == (409, "device_not_ready")
    assert len(error.details["failures"]) == 1
    assert len(error.details["warnings"]) == 2
    assert hold.finish.outcome is Outcome.COMPLETED


@pytest.mark.slow
async def test_warnings_are_kept_with_the_attempt(api, tmp_path, gpus):
    async with running_agent(api, tmp_path, environ=gpus("device GPU-aa\npower 0 9\npersistence 0")) as agent:
        await agent.ready()
        hold = await agent.start(slot=0)
        await eventually(lambda: hold.finish)

    [warning] = hold.started.environment["preflight"]
    assert "persistence mode" in warning


@pytest.mark.slow
async def test_a_driver_that_hangs_stops_neither_heartbeats_nor_the_cpu_nor_the_end(api, tmp_path, gpus, fake_clock):
    hanging = gpus(f"{TWO}\nhang * 5", fake_clock)
    async with running_agent(api, tmp_path, environ=hanging) as agent:
        await agent.ready()
        await eventually(lambda: api.devices)
        fake_clock.advance(10)
        hold = await agent.start(slot=2)
        await eventually(lambda: hold.finish)
        refused = await agent.post("/training/start", agent.order(api.claim(uuid4(), agent.incarnation), slot=1))
        beats = api.beats
        await eventually(lambda: api.beats > beats + 20)
        agent.process.terminate()

        assert await agent.exit_code() == 0
    assert ErrorBody.model_validate(refused.json()).error.code == "device_not_ready"


@pytest.mark.slow
async def test_a_gpu_that_is_not_there_ends_the_start_with_those_that_are(api, tmp_path, gpus):
    async with running_agent(api, tmp_path, environ=gpus(TWO) | {"OPS_GPUS": "GPU-cc"}) as agent:
        assert await agent.exit_code() == 2

    assert "OPS_GPUS: there is no GPU 'GPU-cc' here; there are 0: GPU-aa" in (tmp_path / "agent.log").read_text()


@pytest.fixture
def service(tmp_path: Path, database_url: str) -> Iterator[Service]:
    service = Service(tmp_path / "service", database_url)
    (tmp_path / "service" / "storage").mkdir(parents=True)
    service.start(workers=0)
    yield service
    service.stop()


async def test_a_gpu_has_one_owner_and_the_next_when_that_has_gone(service, tmp_path, gpus):
    """On the real API: the second agent waits, says what to do, and has them as soon as the first is gone."""
    mine = gpus(TWO) | {"OPS_API_TOKEN": service.token}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    async with running_agent(service, tmp_path / "first", environ=mine | {"OPS_WORKER_NAME": "first"}) as first:
        await first.ready()
        second_has = mine | {"OPS_WORKER_NAME": "second"}
        async with running_agent(service, tmp_path / "second", environ=second_has) as second:
            said = tmp_path / "second" / "agent.log"
            await eventually(lambda: "the live worker 'first' holds one of these devices; stop it" in said.read_text())
            first.process.terminate()
            assert await first.exit_code() == 0

            await second.ready()

            live = [worker for worker in service.client.workers() if not worker.draining]
    assert [(w.name, [slot.device_uuid for slot in w.slots]) for w in live] == [("second", ["GPU-aa", "GPU-bb", None])]
