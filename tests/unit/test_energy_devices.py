"""Which GPUs are slots, what their trainers see, what measures them, and what keeps a job from starting there."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest

from helpers.fake_nvml import FakeClock, environ, load
from ops_contract.agents import CheckpointRef, SlotOffer
from ops_contract.energy import Quality, Source
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Phase
from ops_worker.energy import devices as devices_module
from ops_worker.energy import sampler as sampler_module
from ops_worker.energy.devices import Devices, open_devices
from ops_worker.energy.meters import SlotMeter
from ops_worker.energy.preflight import preflight
from ops_worker.settings import Settings, SettingsError

THREE = "\n".join(f"device GPU-{letter}{letter}\npower 0 100" for letter in "abc")
MIG = "device GPU-aa\npower 0 100\nmig MIG-1 4000\nmig MIG-2 4000\ndevice GPU-bb\npower 0 100\nmigmode"
Host = Callable[..., Devices]


@pytest.fixture
def host(fake_nvml: Path, fake_clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """What a worker with these settings finds; torch is one with CUDA."""
    load(fake_nvml)
    monkeypatch.setattr(devices_module, "versions_of", lambda name: {name: "2.13.0+cu126"})
    with ExitStack() as opened:

        def worker(script: str, visible: str | None = None, **settings: str) -> Devices:
            (tmp_path / "script").write_text(f"epoch {fake_clock()}\n{script}")
            for name, value in environ(fake_nvml, tmp_path / "script", fake_clock).items():
                monkeypatch.setenv(name, value)
            given = {
                "OPS_API_URL": "http://127.0.0.1:1",
                "OPS_API_TOKEN": "t",
                "OPS_STORAGE_ROOT": str(tmp_path),
                "HOME": str(tmp_path),
                "OPS_CPU_CORES": "8",
            }
            has = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
            found = open_devices(Settings.from_env(given | settings), has, tmp_path / "powercap")
            return opened.enter_context(found)

        yield worker


def uuids(devices: Devices) -> list[str | None]:
    return [offer.device_uuid for offer in devices.offers() if offer.device == "cuda"]


# ---- slots


def test_gpu_slots_come_first_and_the_cores_are_divided_among_all(host: Host) -> None:
    assert host(THREE).offers() == [
        *(SlotOffer(index=i, device="cuda", device_uuid=f"GPU-{u}", cores=2) for i, u in enumerate(["aa", "bb", "cc"])),
        SlotOffer(index=3, device="cpu", cores=2),
    ]


def test_without_a_driver_there_are_cpu_slots_alone_and_nothing_is_hidden_or_read(host: Host) -> None:
    devices = host("no_driver", OPS_CPU_SLOTS="2")

    assert devices.offers() == [SlotOffer(index=index, device="cpu", cores=4) for index in range(2)]
    assert (devices.environ(0), devices.meters(0), devices.sampler.now()) == ({}, (), [])
    assert devices.sampler._thread is None


@pytest.mark.parametrize(
    ("visible", "wanted", "found"),
    [
        (None, None, ["aa", "bb", "cc"]),
        ("2,0", None, ["cc", "aa"]),
        ("GPU-b,GPU-a", None, ["bb", "aa"]),
        ("1,7,0", None, ["bb"]),
        ("-1", None, []),
        ("", None, []),
        ("2,0", "all", ["cc", "aa"]),
        ("2,0", "1", ["aa"]),
        (None, "GPU-cc, 0", ["cc", "aa"]),
        (None, "none", []),
    ],
)
def test_what_the_worker_sees_and_is_told_to_use(
    host: Host, visible: str | None, wanted: str | None, found: list[str]
) -> None:
    settings = {"OPS_GPUS": wanted} if wanted else {}

    assert uuids(host(THREE, visible, **settings)) == [f"GPU-{each}" for each in found]


@pytest.mark.parametrize("wanted", ["3", "GPU-", "GPU-x"])
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(host: Host, wanted: str) -> None:
    with pytest.raises(SettingsError, match=r"OPS_GPUS.*0: GPU-aa, 1: GPU-bb, 2: GPU-cc"):
        host(THREE, OPS_GPUS=wanted)


def test_workers_of_a_stack_divide_the_gpus_and_none_is_offered_twice(host: Host) -> None:
    shares = [uuids(host(THREE, OPS_GPU_SHARE=f"{k}/2")) for k in (1, 2)]

    assert shares == [["GPU-aa", "GPU-cc"], ["GPU-bb"]]


def test_a_trainer_sees_its_own_gpu_and_one_on_the_cpu_none(host: Host) -> None:
    devices = host(THREE, OPS_GPU_SHARE="2/4")

    assert devices.environ(0) == {"CUDA_VISIBLE_DEVICES": "GPU-bb"}
    assert devices.environ(1) == {"CUDA_VISIBLE_DEVICES": ""}
    assert host(THREE, OPS_GPU_SHARE="4/4").environ(0) == {"CUDA_VISIBLE_DEVICES": ""}, "they are others' slots"
    assert host(THREE, OPS_GPUS="none").environ(0) == {}


def test_mig_instances_are_slots_under_the_meter_of_the_whole(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    devices = host(MIG)

    assert uuids(devices) == ["MIG-1", "MIG-2"]
    assert devices.environ(1) == {"CUDA_VISIBLE_DEVICES": "MIG-2"}
    assert devices.meters(0) == devices.meters(1)
    assert devices.meters(0) == (SlotMeter("GPU-aa", Source.NVML_COUNTER, Quality.UPPER_BOUND),)
    assert "GPU-bb is in MIG mode without an instance" in caplog.text


def test_a_torch_without_cuda_is_given_no_gpu_unless_it_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices_module, "versions_of", lambda name: {name: "2.13.0+cpu"})

    assert uuids(host(THREE)) == []
    assert uuids(host(THREE, OPS_GPUS="all")) == ["GPU-aa", "GPU-bb", "GPU-cc"]


def test_a_gpu_that_does_not_answer_is_left_out(host: Host) -> None:
    assert uuids(host("device GPU-aa\nfail * 15 0\ndevice GPU-bb\npower 0 100")) == ["GPU-bb"]


def test_a_driver_that_hangs_leaves_the_cpu(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices_module, "DRIVER_S", 0.01)

    assert uuids(host("device GPU-aa\npower 0 9\nhang GetUUID 0")) == []
    assert "the driver does not answer" in caplog.text


# ---- meters


@pytest.fixture
def package(tmp_path: Path) -> None:
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in {"name": "package-0", "energy_uj": "5", "max_energy_range_uj": "1000"}.items():
        (zone / name).write_text(text)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("slots", "cores", "quality"),
    [("1", str(os.cpu_count()), "measured"), ("2", str(2 * (os.cpu_count() or 1)), "upper_bound"), ("1", "1", None)],
)
def test_a_package_is_measured_for_who_has_all_its_cores_alone(
    host: Host, slots: str, cores: str, quality: str | None
) -> None:
    if quality is None:
        quality = "measured" if os.cpu_count() == 1 else "upper_bound"
    devices = host("no_driver", OPS_CPU_SLOTS=slots, OPS_CPU_CORES=cores)

    assert devices.meters(0) == (SlotMeter("cpu0", Source.RAPL, Quality(quality)),)


@pytest.mark.usefixtures("package")
def test_beside_a_gpu_a_package_is_an_upper_bound(host: Host) -> None:
    gpu, cpu = (host(THREE, OPS_GPUS="0", OPS_CPU_CORES=str(2 * (os.cpu_count() or 1))).meters(slot) for slot in (0, 1))

    package = SlotMeter("cpu0", Source.RAPL, Quality.UPPER_BOUND)
    assert gpu == (SlotMeter("GPU-aa", Source.NVML_COUNTER, Quality.MEASURED), package)
    assert cpu == (package,)


def test_an_estimate_is_for_cpu_slots_without_a_meter(host: Host) -> None:
    devices = host(THREE, OPS_GPUS="0", OPS_CPU_POWER_W="6.5")

    assert [meter.source for meter in devices.meters(0)] == [Source.NVML_COUNTER]
    assert devices.meters(1) == (SlotMeter("cpu", Source.ESTIMATE, Quality.ESTIMATED),)


@pytest.mark.usefixtures("package")
def test_no_estimate_where_the_package_is_readable(host: Host) -> None:
    assert [m.source for m in host("no_driver", OPS_CPU_POWER_W="6.5").meters(0)] == [Source.RAPL]


@pytest.mark.usefixtures("package")
def test_a_hold_on_several_slots_has_each_meter_once(host: Host) -> None:
    devices = host(THREE, OPS_GPUS="0,1")

    assert [meter.device for meter in devices.meters(1, 0)] == ["GPU-bb", "cpu0", "GPU-aa"]
    assert all(meter.times == 1 for meter in devices.meters(1, 0))
    assert len(devices.environment(1, 0)["energy_meters"]) == 3
    assert len(host(MIG).meters(0, 1)) == 2


def test_an_estimate_of_one_slot_is_charged_for_each_of_a_hold(host: Host) -> None:
    devices = host("no_driver", OPS_CPU_SLOTS="3", OPS_CPU_POWER_W="6.5")

    assert devices.meters(0, 2) == (SlotMeter("cpu", Source.ESTIMATE, Quality.ESTIMATED, times=2),)


# ---- before a start


def checkpoint(size_bytes: int) -> CheckpointRef:
    return CheckpointRef(
        checkpoint_id=uuid4(),
        path="x",
        step=1,
        epoch=0,
        phase=Phase.UPDATE,
        size_bytes=size_bytes,
        manifest_sha256="0" * 64,
    )


async def refusal(devices: Devices, reference: CheckpointRef | None = None) -> list[str]:
    with pytest.raises(OpsError) as raised:
        await devices.check([0], reference)
    assert (raised.value.code, raised.value.http_status) == (ErrorCode.DEVICE_NOT_READY, 409)
    failures: list[str] = raised.value.details["failures"]
    assert all(failure in raised.value.message for failure in failures)
    return failures


async def test_a_gpu_in_order_takes_a_job_and_says_what_to_mind(host: Host) -> None:
    assert await host(THREE).check([0], None) == []
    warnings = await host("device GPU-aa\npower 0 9\npersistence 0\nprocess 0 1").check([0], checkpoint(1000))

    assert len(warnings) == 2
    assert "processes 1" in warnings[0]
    assert "persistence mode" in warnings[1]


async def test_every_gpu_of_a_start_is_looked_at_and_all_that_is_wrong_said_once(host: Host) -> None:
    devices = host("device GPU-aa\npower 0 9\ndevice GPU-bb\npower 0 9\ntotal 1000\nused 0 950\npersistence 0")

    with pytest.raises(OpsError) as raised:
        await devices.check([0, 1], checkpoint(2**62))

    failures = raised.value.details["failures"]
    assert len([failure for failure in failures if "50 MiB of 1000 MiB" in failure]) == 1
    assert len(failures) == len(set(failures)) > 1
    assert raised.value.details["warnings"]


def test_all_that_is_wrong_is_in_one_answer(host: Host, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    4096 kB\n")
    gpu = host("device GPU-aa\npower 0 9\ntotal 1000\nused 0 950\nprocess 0 1\npersistence 0").gpu(0)
    assert gpu is not None

    found = preflight(gpu, "11.4", "2.13.0+cu126", checkpoint(2**62), tmp_path, tmp_path / "meminfo")

    memory, driver, disk, copy = found.failures
    assert "50 MiB of 1000 MiB" in memory
    assert "processes 1 are on it" in memory
    assert "needs CUDA 12, and the driver has 11.4" in driver
    assert "free, a checkpoint needs" in disk
    assert "4 MiB of memory available" in copy
    assert len(found.warnings) == 2


async def test_a_gpu_that_is_lost_takes_no_job(host: Host, fake_clock: FakeClock) -> None:
    devices = host("device GPU-aa\nname H100\npower 0 9\nfail * 15 5")
    assert await devices.check([0], None) == []
    fake_clock.advance(10)

    [failure] = await refusal(devices)

    assert "GPU-aa (H100) does not answer: GPU is lost" in failure


async def test_a_driver_that_hangs_refuses_in_time_and_is_asked_once(
    host: Host, fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices_module, "PREFLIGHT_S", 0.01)
    monkeypatch.setattr(sampler_module, "STOP_S", 0.01)
    devices = host("device GPU-aa\npower 0 9\nhang GetMemoryInfo 5")
    fake_clock.advance(10)
    before = threading.active_count()

    failures = [await refusal(devices) for _ in range(3)]

    assert all("does not answer" in failure for [failure] in failures)
    assert threading.active_count() <= before + 1


async def test_a_slot_of_the_cpu_is_not_looked_at(host: Host) -> None:
    assert await host("no_driver").check([0], checkpoint(2**62)) == []


def test_what_an_attempt_ran_on(host: Host) -> None:
    devices = host("driver 550.1\ncuda 12040\ndevice GPU-aa\nname H100\npower 0 9\nlimit 700\ntotal 80000")

    gpu, cpu = devices.environment(0), devices.environment(1)

    assert gpu.items() >= {"gpu": "H100", "gpu_uuid": "GPU-aa", "driver": "550.1", "driver_cuda": "12.4"}.items()
    assert (gpu["gpu_power_limit_w"], gpu["gpu_memory_bytes"]) == (700, 80000 * 2**20)
    assert gpu["energy_meters"] == ["GPU-aa: nvml_counter, measured"]
    assert {"host", "kernel"} < cpu.keys()
    assert "gpu" not in cpu
