"""Which meters a measurement has, and what its preflight says of them and of the device."""

from pathlib import Path
from typing import Any

import pytest

from helpers.fake_nvml import FakeClock
from helpers.measuring import Rig, config, on_gpus
from ops_contract.energy import Quality
from ops_worker.measurement.instruments import find_instruments, open_instruments
from ops_worker.measurement.run import PreFlightError

NOT_SUPPORTED = 3
NO_COUNTER = f"fail GetTotalEnergyConsumption {NOT_SUPPORTED} 0"
NO_POWER = f"fail GetPowerUsage {NOT_SUPPORTED} 0\nfail PowerInstant {NOT_SUPPORTED} 0"


def package(directory: Path, counter_uj: int) -> Path:
    zone = directory / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text(f"{counter_uj}\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    return zone


@pytest.mark.parametrize(
    ("meter", "found"),
    [
        ("auto", [("GPU-a", "nvml_counter"), ("cpu0", "rapl")]),
        ("nvml_counter", [("GPU-a", "nvml_counter")]),
        ("nvml_power", [("GPU-a", "nvml_power")]),
        ("rapl", [("cpu0", "rapl")]),
        ("estimate", [("cpu", "estimate")]),
    ],
)
def test_a_named_meter_is_the_only_one(
    fake_driver: Any, fake_clock: FakeClock, tmp_path: Path, meter: str, found: list[tuple[str, str]]
) -> None:
    package(tmp_path, 0)
    opened = fake_driver("device GPU-a\npower 0 300")

    instruments = find_instruments(opened, "GPU-a", meter, 15.0, 2, fake_clock, tmp_path / "powercap")

    assert [(meter.device, str(meter.source)) for meter in instruments.meters] == found
    assert instruments.failures == []
    assert bool(instruments.warnings) == (meter in ("rapl", "estimate")), "the GPU's joules are not among them"


def test_a_named_meter_that_is_not_there_fails_the_preflight(
    fake_driver: Any, fake_clock: FakeClock, tmp_path: Path
) -> None:
    opened = fake_driver(f"device GPU-a\npower 0 300\n{NO_COUNTER}")
    found = find_instruments(opened, "GPU-a", "nvml_counter", None, 2, fake_clock, tmp_path / "powercap")

    with pytest.raises(PreFlightError, match="no meter nvml_counter here"):
        Rig(fake_clock, found, tmp_path).measure()


def test_the_preflight_warns_of_others_and_of_persistence(
    fake_driver: Any, fake_clock: FakeClock, tmp_path: Path
) -> None:
    opened = fake_driver("device GPU-a\npower 0 300\nprocess 0 1 3 0\npersistence 0")
    result = on_gpus(opened, fake_clock, tmp_path).measure()

    assert any("others compute on GPU-a (processes 1)" in warning for warning in result.warnings)
    assert any("persistence mode is off" in warning for warning in result.warnings)


def test_an_instance_has_the_whole_gpus_joules_as_an_upper_bound(
    fake_driver: Any, fake_clock: FakeClock, tmp_path: Path
) -> None:
    opened = fake_driver("device GPU-a\npower 0 300\nmig MIG-1 4000")
    found = find_instruments(opened, "MIG-1", "auto", None, 2, fake_clock, tmp_path / "powercap")

    result = Rig(fake_clock, found, tmp_path).measure()

    [use] = result.devices
    assert (use.device, use.quality) == ("GPU-a", Quality.UPPER_BOUND)
    assert result.figures["energy_j"].value is None


def test_a_package_that_is_shared_is_in_no_sum(fake_clock: FakeClock, tmp_path: Path) -> None:
    package(tmp_path, 0)

    shared = find_instruments(None, None, "auto", None, 0, fake_clock, tmp_path / "powercap")
    alone = find_instruments(None, None, "auto", None, 10_000, fake_clock, tmp_path / "powercap")

    assert [meter.quality for meter in shared.meters] == [Quality.UPPER_BOUND]
    assert [meter.quality for meter in alone.meters] == [Quality.MEASURED]


def test_instruments_read_by_themselves_while_they_are_open() -> None:
    with open_instruments(None, "estimate", 15.0, 2) as instruments:
        thread = instruments.sampler._thread
        assert thread is not None
        assert thread.is_alive()
    assert not thread.is_alive()


def test_how_a_gpu_was_is_waited_for_to_the_windows_end_though_it_has_no_meter(
    fake_driver: Any, fake_clock: FakeClock, tmp_path: Path
) -> None:
    opened = fake_driver(f"device GPU-a\n{NO_COUNTER}\n{NO_POWER}\nthrottle 0 4")
    rig = on_gpus(opened, fake_clock, tmp_path, offset_s=0.06)

    # Nothing that takes time comes after the window.
    result = rig.measure(config(first_token_prompts=0), fails="flops")

    assert result.thermal_throttle.reasons == {"sw_power_cap": pytest.approx(10.0, abs=1e-9)}


def test_a_gpu_without_a_meter_leaves_no_sum_of_what_else_is_measured(
    fake_driver: Any, fake_clock: FakeClock, tmp_path: Path
) -> None:
    opened = fake_driver(f"device GPU-a\n{NO_COUNTER}\n{NO_POWER}")
    package(tmp_path, 0)
    found = find_instruments(opened, "GPU-a", "auto", 15.0, 10_000, fake_clock, tmp_path / "powercap")

    result = Rig(fake_clock, found, tmp_path).measure()

    assert [use.device for use in result.devices] == ["cpu0"]
    assert result.figures["energy_j"].reason == "no_meter: GPU-a shows neither energy nor power"
