"""The joules of a measurement, by the real pynvml over a fake driver, on a clock that only the engine moves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from helpers.fake_nvml import FakeClock
from helpers.measuring import BEGAN_S, WINDOW_S, FakeEngine, Rig, config, on_cpu, on_gpus
from ops_contract.energy import Quality, Source
from ops_contract.measurements import DeviceUse, MeasurementPhase, MeasurementResult

GONE, NOT_SUPPORTED = 15, 3
NO_COUNTER = f"fail GetTotalEnergyConsumption {NOT_SUPPORTED} 0"
# 50 W when idle, 200 W while it loads and warms up, 300 W in the window, 100 W after it.
BEGIN_S, END_S = WINDOW_S
COURSE = "power 0 50 15 50 15.001 200 {0} 200 {0}001 300 {1} 300 {1}001 100"
STEPS = COURSE.format(BEGIN_S, END_S)
Host = Callable[..., Rig]


@pytest.fixture
def host(fake_driver: Any, fake_clock: FakeClock, tmp_path: Path) -> Host:
    def rig(script: str, offset_s: float = 0.0) -> Rig:
        return on_gpus(fake_driver(script), fake_clock, tmp_path, offset_s)

    return rig


def only(result: MeasurementResult) -> DeviceUse:
    [use] = result.devices
    return use


# ---- the window's joules


@pytest.mark.parametrize(
    "how",
    [
        STEPS,
        # What is sampled at the very edge is the power of the window: it steps between two samples.
        f"{COURSE.format(24.9, 35.1)}\n{NO_COUNTER}",
    ],
)
def test_the_joules_are_of_the_window_and_not_one_sample_more(host: Host, how: str) -> None:
    result = host(f"device GPU-a\n{how}").measure()

    assert result.figures["window_s"].value == 10.0
    assert result.figures["energy_j"].value == pytest.approx(3000, abs=0.01)
    assert result.figures["power_mean_w"].value == pytest.approx(300, abs=0.001)
    assert result.figures["j_per_output_token"].value == pytest.approx(3000 / 320, abs=0.0001)


@pytest.mark.slow
@pytest.mark.parametrize("offset_s", [0.02, 0.0625, 0.11])
@pytest.mark.parametrize("tick", ["", "tick 0.02 0.013", "tick 0.1 0.07"])
def test_a_step_of_power_at_an_edge_is_off_by_no_more_than_is_said(host: Host, tick: str, offset_s: float) -> None:
    result = host(f"device GPU-a\n{STEPS}\n{tick}", offset_s).measure()

    energy = result.figures["energy_j"]
    assert energy.value is not None
    assert energy.uncertainty is not None
    assert abs(energy.value - 3000) <= energy.uncertainty + 0.002
    assert energy.uncertainty <= 2 * 2 * 300 * 0.125, "two samples at each edge"
    assert only(result).error_j == energy.uncertainty


def test_the_idle_power_is_subtracted_and_its_error_is_in_the_uncertainty(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS}").measure()

    assert result.values()["energy_adjusted_j"] == pytest.approx(3000 - 50 * 10, abs=0.02)
    assert result.values()["j_per_output_token_adjusted"] == pytest.approx(2500 / 320, abs=0.001)
    energy, adjusted = result.figures["energy_j"].uncertainty, result.figures["energy_adjusted_j"].uncertainty
    assert energy is not None
    assert adjusted is not None
    assert adjusted > energy
    assert (only(result).baseline_w, only(result).source) == (pytest.approx(50, abs=0.01), Source.NVML_COUNTER)


def test_the_bound_of_sampled_power_is_not_known(host: Host) -> None:
    figure = host(f"device GPU-a\n{STEPS}\n{NO_COUNTER}").measure().figures["energy_j"]

    assert (figure.source, figure.uncertainty) == ("nvml_power", None)


def test_two_devices_are_summed_and_told_apart(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS}\ndevice GPU-b\npower 0 70").measure()

    assert [use.energy_j for use in result.devices] == [pytest.approx(3000, abs=0.01), pytest.approx(700, abs=0.01)]
    assert result.values()["energy_j"] == pytest.approx(3700, abs=0.02)
    assert result.values()["energy_adjusted_j"] == pytest.approx(2500, abs=0.04)


def test_few_ticks_of_the_counter_are_a_warning(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS}\ntick 0.25 0").measure()

    assert only(result).ticks == 40
    assert any("moving 40 times" in warning and "fewer than 100" in warning for warning in result.warnings)


def test_a_hundred_ticks_are_enough(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS}").measure(batch_s=[1.0] * 5 + [1.5])

    assert only(result).ticks == 120
    assert not any("fewer than" in warning for warning in result.warnings)


def test_a_window_of_many_minutes_is_kept_in_full(host: Host) -> None:
    result = host(f"device GPU-a\n{COURSE.format(BEGIN_S, 725.0)}\nthrottle 0 0 30.5 4 31 0").measure(
        config(batch_size=1), batch_s=[1.0] * 5 + [35.0]
    )

    assert result.figures["energy_j"].value == pytest.approx(210_000, abs=0.01)
    assert only(result).ticks == 700 * 8
    assert result.thermal_throttle.duration_s == pytest.approx(0.5, abs=1e-6)


# ---- what is not known


def test_a_counter_that_falls_in_the_window_costs_the_joules_alone(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS}\nbegan 5000000\nreload 30.05").measure()

    assert (only(result).energy_j, only(result).reason) == (None, "counter_fell")
    for name in ("energy_j", "energy_adjusted_j", "j_per_output_token", "power_mean_w"):
        assert (result.figures[name].value, result.figures[name].reason) == (None, "counter_fell: GPU-a")  # type: ignore[index]
    assert result.values()["tokens_per_s"] == 32.0
    assert "the energy of GPU-a is not known: counter_fell" in result.warnings


def test_a_gpu_that_vanishes_in_the_window_costs_the_joules_alone(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS}\nfail * {GONE} 30").measure()

    assert (only(result).energy_j, only(result).reason) == (None, "device_lost")
    assert result.figures["energy_j"].reason == "device_lost: GPU-a"
    assert result.values()["tokens_per_s"] == 32.0
    assert "the energy of GPU-a is not known: device_lost" in result.warnings


def test_one_device_that_is_not_known_leaves_no_sum(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS}\ndevice GPU-b\npower 0 70\nfail * {GONE} 30").measure()

    assert result.devices[0].energy_j == pytest.approx(3000, abs=0.01)
    assert result.figures["energy_j"].reason == "device_lost: GPU-b"


def test_a_meter_that_reads_nothing_more_is_not_waited_for_for_ever(fake_clock: FakeClock, host: Host) -> None:
    rig = host(f"device GPU-a\n{STEPS}")

    def hang(n: int) -> None:
        if n == 10:
            rig.instruments.sampler.sample = lambda: None  # type: ignore[method-assign]  # a call that never returns

    result = rig.measure(before=hang)

    assert result.figures["energy_j"].reason == "meter_hangs: GPU-a"


def test_others_on_the_device_leave_no_sum(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS}\nprocess 0 0 26 1 40 0").measure()

    assert (only(result).energy_j, only(result).quality) == (pytest.approx(3000, abs=0.01), Quality.UPPER_BOUND)
    assert result.figures["energy_j"].reason == "upper_bound: others may have used what was measured"
    assert any("others may use GPU-a too" in warning for warning in result.warnings)


def test_without_a_meter_energy_is_null_and_the_reason_says_what_to_set(fake_clock: FakeClock, tmp_path: Path) -> None:
    result = on_cpu(fake_clock, tmp_path).measure()

    energy = result.figures["energy_j"]
    assert energy.value is None
    assert energy.reason is not None
    assert energy.reason.startswith("no_meter")
    assert "OPS_CPU_POWER_W" in energy.reason
    assert energy.reason in result.warnings
    assert (result.devices, result.series, result.thermal_throttle.throttled) == ([], None, None)
    assert (result.baseline.origin, result.baseline.duration_s) == ("none", None)


def test_a_configured_wattage_is_an_estimate_and_its_idle_power_is_not_known(
    fake_clock: FakeClock, tmp_path: Path
) -> None:
    result = on_cpu(fake_clock, tmp_path, cpu_power_w=15.0).measure()

    energy, adjusted = result.figures["energy_j"], result.figures["energy_adjusted_j"]
    assert (energy.value, energy.source, energy.uncertainty) == (pytest.approx(15 * 2 * 10), "estimate", None)
    assert only(result).error_j is None
    assert (only(result).quality, only(result).ticks) == (Quality.ESTIMATED, None)
    assert adjusted.reason == "no_baseline: cpu: no meter here knows what an idle device takes"
    assert any("are an estimate" in warning for warning in result.warnings)


# ---- how the device was


def test_a_slowed_moment_counts_once_however_many_reasons_and_devices(host: Host) -> None:
    thermal, cap = 0x20, 0x04
    throttles = f"throttle 0 {cap} 26 {cap | thermal} 28 0", f"throttle 0 0 27 {thermal} 29.5 0"
    result = host(f"device GPU-a\n{STEPS}\n{throttles[0]}\ndevice GPU-b\npower 0 70\n{throttles[1]}").measure()

    throttle = result.thermal_throttle
    near = {"abs": 0.13}
    assert throttle.throttled is True
    assert throttle.duration_s == pytest.approx(4.5, **near), "from 25, where the window begins, to 29.5"
    assert throttle.reasons == {
        "sw_power_cap": pytest.approx(3.0, **near),
        "sw_thermal_slowdown": pytest.approx(3.5, **near),
    }
    assert any("was slowed for 4." in warning for warning in result.warnings)


def test_what_slowed_it_before_and_after_the_window_is_not_the_windows(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS}\nthrottle 0 4 24.5 0 35.1 4").measure()

    assert (result.thermal_throttle.throttled, result.thermal_throttle.duration_s) == (False, 0.0)
    silent = host(f"device GPU-a\n{STEPS}\nfail GetCurrentClocksThrottleReasons {NOT_SUPPORTED} 0").measure()
    assert silent.thermal_throttle.throttled is None


def test_the_state_is_of_the_window(host: Host) -> None:
    result = host(f"device GPU-a\nname H100\n{STEPS}\ntemperature 0 30 20 45 29 71 35.2 90\nused 0 700").measure()

    use = only(result)
    assert (use.name, use.temperature_begin_c, use.temperature_max_c) == ("H100", 45, 71)
    assert (use.power_max_w, use.memory_used_max_bytes) == (300, 700 * 2**20)


def test_the_engine_is_told_what_the_driver_says_is_free(host: Host) -> None:
    rig = host(f"device GPU-a\n{STEPS}\nused 0 700")
    engine = FakeEngine(rig, config())
    rig.measurement(engine).run()

    [gpu] = rig.instruments.gpus
    assert gpu.memory_total_bytes is not None
    assert engine.gpu_free_bytes == gpu.memory_total_bytes - 700 * 2**20


def test_progress_shows_watts_and_degrees_as_last_read(host: Host) -> None:
    rig = host(f"device GPU-a\n{STEPS}\ntemperature 0 30 20 45")
    seen: list[Any] = []
    engine = FakeEngine(rig, config(), before=lambda n: seen.append(measurement.progress()))
    measurement: Any = rig.measurement(engine)

    measurement.run()

    assert [(now.power_w, now.temperature_c) for now in seen[-2:]] == [(300.0, 45.0)] * 2


def test_the_series_has_the_windows_samples_and_no_other(host: Host, tmp_path: Path) -> None:
    result = host(f"device GPU-a\n{STEPS}\nthrottle 0 0 30 4\ntemperature 0 61\nclock 0 1410").measure()

    assert result.series == "series.parquet"
    rows = parquet.read_table(tmp_path / "series.parquet").to_pylist()
    assert [row["at_s"] for row in rows] == [n / 8 for n in range(1, 81)]
    assert {row["device"] for row in rows} == {"GPU-a"}
    assert rows[-1]["energy_j"] - rows[0]["energy_j"] == pytest.approx(300 * 9.875, abs=0.01)
    assert {row["power_w"] for row in rows} == {300.0}
    assert (rows[5]["temperature_c"], rows[5]["sm_clock_mhz"]) == (61, 1410)
    assert [row["throttle"] for row in rows] == [0] * 39 + [4] * 41


def test_a_sample_that_a_vanished_gpu_did_not_give_is_null_in_the_series(host: Host, tmp_path: Path) -> None:
    host(f"device GPU-a\n{STEPS}\nfail * {GONE} 30").measure()

    rows = parquet.read_table(tmp_path / "series.parquet").to_pylist()
    assert [row["energy_j"] is None for row in rows] == [row["at_s"] >= 5 for row in rows]
    assert [row["power_w"] is None for row in rows] == [row["at_s"] >= 5 for row in rows]


def test_without_pyarrow_there_is_no_series_and_a_warning(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)

    result = host(f"device GPU-a\n{STEPS}").measure()

    assert result.series is None
    assert any("pyarrow is not installed" in warning for warning in result.warnings)


# ---- the baseline


def test_a_cached_idle_power_is_subtracted_without_a_rest(host: Host, fake_clock: FakeClock) -> None:
    host(f"device GPU-a\n{STEPS}").measure()
    fake_clock.advance(BEGAN_S - fake_clock())
    rig = host(f"device GPU-a\n{STEPS}")
    rig.wall_s += 600

    result = rig.measure(config(baseline={"strategy": "cached"}))

    assert (result.baseline.origin, result.baseline.age_s) == ("cache", 600)
    assert result.phases_s[MeasurementPhase.BASELINE] == 0
    assert result.values()["energy_adjusted_j"] == pytest.approx(2500, abs=0.02)


@pytest.mark.slow
def test_an_idle_power_that_drifted_is_measured_afresh(host: Host, fake_clock: FakeClock) -> None:
    host(f"device GPU-a\n{STEPS}").measure()
    fake_clock.advance(BEGAN_S - fake_clock())

    result = host(f"device GPU-a\n{STEPS.replace('0 50 15 50', '0 80 15 80')}").measure(
        config(baseline={"strategy": "validated", "look_s": 2, "duration_s": 10})
    )

    assert result.baseline.drift == pytest.approx(0.6, abs=0.001)
    assert result.phases_s[MeasurementPhase.BASELINE] == pytest.approx(12, abs=0.5)
    assert result.values()["energy_adjusted_j"] == pytest.approx(3000 - 800, abs=0.02)
    assert any("off by 60%" in warning for warning in result.warnings)


def test_an_idle_power_above_the_windows_leaves_no_adjusted_joules(host: Host) -> None:
    result = host(f"device GPU-a\n{STEPS.replace('0 50 15 50', '0 350 15 350')}").measure()

    assert result.values()["energy_j"] == pytest.approx(3000, abs=0.01)
    assert only(result).energy_adjusted_j is None
    assert (result.figures["energy_adjusted_j"].reason or "").startswith("baseline_above_window: GPU-a")
    assert any("took less in the window than when idle" in warning for warning in result.warnings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "strategy", "why"),
    [
        ("", "none", "not asked for"),
        ("began 5000000\nreload 5.05", "fresh", "counter_fell"),
        ("process 0 1 15 0", "fresh", "others_use_it"),
    ],
)
def test_an_idle_power_that_is_not_known_is_not_subtracted(host: Host, script: str, strategy: str, why: str) -> None:
    given = config(baseline={"strategy": strategy, "duration_s": 10})
    result = host(f"device GPU-a\n{STEPS}\n{script}").measure(given)

    assert result.values()["energy_j"] == pytest.approx(3000, abs=0.01)
    assert result.figures["energy_adjusted_j"].reason == f"no_baseline: GPU-a: {why}"
    assert (only(result).baseline_w, only(result).energy_adjusted_j) == (None, None)
