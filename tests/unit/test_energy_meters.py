"""The real pynvml over a fake driver, powercap as a tree of files, and no waiting: one clock for all of them."""

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_nvml import FakeClock, environ, load
from ops_contract.energy import Quality, Source
from ops_worker.energy.meters import Estimate, Measured, Meter, Reading
from ops_worker.energy.nvml import THROTTLE_REASONS, Driver, others
from ops_worker.energy.nvml import nvml_meter as meter_of
from ops_worker.energy.rapl import rapl_meters
from ops_worker.energy.sampler import Sampler

GONE, NOT_SUPPORTED, NO_FUNCTION, TIMEOUT = 15, 3, 13, 10
NO_COUNTER = f"fail GetTotalEnergyConsumption {NOT_SUPPORTED} 0"
OLD_DRIVER = f"{NO_COUNTER}\nfail GetFieldValues {NO_FUNCTION} 0"
BEGAN_S = 1000.0


class Bench:
    """A host whose driver plays a script; times in it count from here."""

    def __init__(self, driver: Driver, clock: FakeClock, interval_s: float) -> None:
        self.clock = clock
        self.gpus = driver.gpus()
        meters = [meter for gpu in self.gpus if (meter := meter_of(gpu, Quality.MEASURED, clock))]
        self.meters = {meter.device: meter for meter in meters}
        self.sampler = Sampler(meters, self.gpus, interval_s, clock)
        self._interval_s = interval_s

    def run(self, duration_s: float, pauses: Callable[[], float] | None = None) -> None:
        until_s = self.clock() + duration_s
        while self.clock() < until_s:
            self.sampler.sample()
            self.clock.advance(pauses() if pauses else self._interval_s)
        self.sampler.sample()

    def between(self, since_s: float, until_s: float, device: str = "GPU-a") -> Measured:
        measured = self.sampler.between(device, BEGAN_S + since_s, BEGAN_S + until_s)
        assert measured is not None, "a reading lies after it"
        return measured

    def joules(self, since_s: float, until_s: float, device: str = "GPU-a") -> float:
        measured = self.between(since_s, until_s, device)
        assert measured.energy_j is not None, measured.reason
        return measured.energy_j


@pytest.fixture
def bench(fake_nvml: Path, fake_clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    load(fake_nvml)
    opened: list[Driver] = []

    def host(script: str, interval_s: float = 0.1) -> Bench:
        (tmp_path / "script").write_text(f"epoch {BEGAN_S}\n{script}\n")
        for name, value in environ(fake_nvml, tmp_path / "script", fake_clock).items():
            monkeypatch.setenv(name, value)
        driver = Driver.open()
        assert driver is not None
        opened.append(driver)
        return Bench(driver, fake_clock, interval_s)

    yield host
    for driver in opened:
        driver.close()


# ---- joules


@pytest.mark.parametrize("how", ["tick 0.1 0.03", "tick 0.02 0.001", "", NO_COUNTER, OLD_DRIVER])
def test_300_watts_for_a_minute_are_18000_joules(bench: Any, how: str) -> None:
    host = bench(f"device GPU-a\npower 0 300\n{how}")
    host.run(65)

    assert host.joules(1, 61) == pytest.approx(18_000, rel=0.005)


@pytest.mark.parametrize(("how", "within_j"), [("tick 0.1 0.07", 10), (NO_COUNTER, 0.1)])
def test_a_ramp_from_100_to_300_watts_in_10_seconds_is_2000_joules(bench: Any, how: str, within_j: float) -> None:
    host = bench(f"device GPU-a\npower 2 100 12 300\n{how}")
    host.run(15)

    assert host.joules(2, 12) == pytest.approx(2_000, abs=within_j)


def test_late_and_early_samples_change_nothing(bench: Any) -> None:
    pauses = iter([0.02, 0.31, 0.1, 0.57, 0.05, 0.11] * 60)
    host = bench(f"device GPU-a\npower 0 100 10 300 20 50\ndevice GPU-b\npower 0 100 10 300 20 50\n{NO_COUNTER}")
    host.run(20, lambda: next(pauses))

    assert host.joules(1.03, 18.2) == pytest.approx(host.joules(1.03, 18.2, "GPU-b"), rel=0.01)


def test_two_gpus_are_told_apart(bench: Any) -> None:
    host = bench("device GPU-a\npower 0 300\ndevice GPU-b\npower 0 70\ntick 0.1 0")
    host.run(12)

    assert host.joules(1, 11) == pytest.approx(3_000, rel=0.005)
    assert host.joules(1, 11, "GPU-b") == pytest.approx(700, rel=0.005)


def test_the_power_of_an_old_driver_lags_and_the_log_says_which_it_is(
    bench: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host = bench(f"device GPU-a\npower 0 100\naverage 1\n{OLD_DRIVER}")

    assert host.meters["GPU-a"].source is Source.NVML_POWER
    assert "the driver has no other" in caplog.text


def test_a_counter_in_ticks_of_100_ms_is_wrong_by_no_more_than_it_says(bench: Any) -> None:
    host = bench("device GPU-a\npower 0 300\ntick 0.1 0.03\ndevice GPU-b\npower 0 300")
    host.run(5)

    for since_s, until_s in [(1.0, 1.01), (1.04, 1.09), (1.0, 2.0), (1.23, 3.77)]:
        measured = host.between(since_s, until_s)
        assert measured.energy_j is not None
        assert measured.error_j is not None
        assert abs(measured.energy_j - 300 * (until_s - since_s)) <= measured.error_j + 0.002
        assert measured.error_j <= 2 * 2 * 30 + 0.01, "two ticks of 30 J at each edge, at most"


def test_windows_side_by_side_add_up_to_the_window_over_them(bench: Any) -> None:
    host = bench("device GPU-a\npower 0 100 10 300 11 0.5\ntick 0.1 0.03")
    host.run(21)
    edges = [1.0, 1.01, 1.5, 7.77, 10.2, 15.5]

    parts = [host.joules(*pair) for pair in itertools.pairwise(edges)]

    assert sum(parts) == pytest.approx(host.joules(1.0, 15.5), abs=1e-6)


# ---- what is not known


def test_a_counter_that_falls_costs_what_lay_over_the_fall_and_is_never_negative(
    bench: Any, caplog: pytest.LogCaptureFixture
) -> None:
    host = bench("device GPU-a\npower 0 300\nbegan 5000000\nreload 10.05")
    host.run(20)

    assert host.joules(1, 9) == pytest.approx(2_400, rel=0.005)
    assert host.between(9, 11) == Measured(None, reason="counter_fell", state=host.between(9, 11).state)
    assert host.joules(11, 19) == pytest.approx(2_400, rel=0.005)
    assert caplog.text.count("its counter fell") == 1


def test_a_gpu_that_vanishes_leaves_what_was_measured_and_says_so_from_then_on(
    bench: Any, caplog: pytest.LogCaptureFixture
) -> None:
    host = bench(f"device GPU-a\npower 0 300\nfail * {GONE} 10\ndevice GPU-b\npower 0 100")
    host.run(15)

    assert host.joules(1, 9) == pytest.approx(2_400, rel=0.005)
    assert host.between(9, 11).energy_j is None
    assert host.between(9, 11).reason == host.between(12, 14).reason == "device_lost"
    assert host.joules(1, 14, "GPU-b") == pytest.approx(1_300, rel=0.005)
    assert [now.power_w for now in host.sampler.now()] == [None, 100.0]
    assert caplog.text.count("GPU-a is not measured") == 1


def test_a_counter_that_did_not_answer_for_a_while_lost_nothing(bench: Any) -> None:
    host = bench(f"device GPU-a\npower 0 300\nfail GetTotalEnergyConsumption {TIMEOUT} 5 10")
    host.run(6)
    assert host.sampler.between("GPU-a", BEGAN_S + 1, BEGAN_S + 5.5) is None, "it may come back"
    host.run(3)
    assert host.between(1, 5.5).reason == "read_failed", "nobody waits for ever"
    host.run(4)
    assert host.joules(4, 12) == pytest.approx(2_400, rel=0.005)


def test_a_counter_that_stands_still_is_not_zero_joules(bench: Any) -> None:
    host = bench("device GPU-a\npower 0 300\ntick 1000 0")
    host.run(30)

    assert host.between(1, 20) == Measured(None, reason="counter_stuck", state=host.between(1, 20).state)


def test_what_a_counter_shows_when_it_moves_again_is_not_the_last_moments(bench: Any) -> None:
    host = bench("device GPU-a\npower 0 300\ntick 20 0")
    host.run(41)

    assert host.between(19.5, 19.9).reason == "counter_stuck"


def test_power_that_was_not_read_for_a_while_is_not_guessed(bench: Any) -> None:
    host = bench(f"device GPU-a\npower 0 300\n{NO_COUNTER}")
    host.run(5)
    host.clock.advance(30)
    host.run(5)

    assert host.between(4, 36).reason == "not_sampled"
    assert host.joules(36, 39) == pytest.approx(900, rel=0.005)


def test_what_was_before_the_first_reading_is_not_known(bench: Any) -> None:
    host = bench("device GPU-a\npower 0 300")
    host.clock.advance(10)
    host.run(5)

    assert host.between(1, 12).reason == "not_sampled"


def test_nothing_is_said_before_a_reading_lies_behind_the_end(bench: Any) -> None:
    host = bench("device GPU-a\npower 0 300")
    host.run(5)

    assert host.sampler.between("GPU-a", BEGAN_S + 1, BEGAN_S + 5.2) is None
    host.clock.advance(20)
    hangs = host.sampler.between("GPU-a", BEGAN_S + 1, BEGAN_S + 5.2)
    assert hangs is not None
    assert hangs.reason == "meter_hangs"


def test_a_gpu_with_neither_energy_nor_power_has_no_meter(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    host = bench(f"device GPU-a\npower 0 300\n{OLD_DRIVER}\nfail GetPowerUsage {NOT_SUPPORTED} 0\ntemperature 0 60")

    assert host.meters == {}
    assert "GPU-a" in caplog.text
    host.sampler.sample()
    assert host.sampler.now()[0].temperature_c == 60
    assert host.sampler.now()[0].power_w is None


def test_what_a_driver_never_says_is_null_and_asked_once(bench: Any) -> None:
    unsupported = ["GetTemperature", "GetClockInfo", "GetUtilizationRates", "GetCurrentClocksThrottleReasons"]
    host = bench("device GPU-a\npower 0 300\n" + "\n".join(f"fail {name} {NOT_SUPPORTED} 0" for name in unsupported))
    host.run(3)

    state = host.between(1, 2).state
    assert (state.temperature_max_c, state.sm_clock_mean_mhz, state.utilization_mean_percent) == (None, None, None)
    assert state.power_max_w == 300
    assert {f"nvmlDevice{name}" for name in unsupported} == host.gpus[0]._unsupported - {"nvmlDeviceGetMigMode"}


@pytest.mark.parametrize("script", [None, "no_driver"])
def test_no_driver_is_no_error(
    fake_nvml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    load(fake_nvml)
    if script:
        (tmp_path / "script").write_text(script)
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "script"))

    assert Driver.open() is None


# ---- how the device was


@pytest.mark.parametrize(("bit", "name"), THROTTLE_REASONS.items())
def test_each_reason_of_a_slowdown_is_timed(bench: Any, bit: int, name: str) -> None:
    host = bench(f"device GPU-a\npower 0 300\nthrottle 0 0 2 {bit} 5 0")
    host.run(10)

    assert host.between(1, 9).state.throttled_s == {name: pytest.approx(3.0, abs=0.11)}
    assert host.between(3, 4).state.throttled_s == {name: pytest.approx(1.0, abs=1e-6)}
    assert host.between(6, 9).state.throttled_s == {}


def test_reasons_at_once_are_timed_each_and_idleness_is_none(bench: Any) -> None:
    host = bench(f"device GPU-a\npower 0 300\nthrottle 0 {0x001} 2 {0x004 | 0x020} 4 {0x020 | 0x002}")
    host.run(8)

    assert host.between(0.5, 7).state.throttled_s == {
        "sw_power_cap": pytest.approx(2, abs=0.11),
        "sw_thermal_slowdown": pytest.approx(5, abs=0.11),
    }


def test_the_state_of_a_window_has_maxima_and_means_over_its_time(bench: Any) -> None:
    course = "temperature 0 40 3 81 5 60\nclock 0 1000 4 2000\nutilization 0 0 4 100\nused 0 100 2 700 3 50"
    host = bench(f"device GPU-a\npower 0 100 4 100 4.05 380 4.5 380 4.6 200\n{course}")
    host.run(10)

    state = host.between(0.5, 7.5).state

    assert (state.power_max_w, state.temperature_max_c, state.memory_used_max_bytes) == (380, 81, 700 * 2**20)
    assert state.sm_clock_mean_mhz == pytest.approx(1500, rel=0.05)
    assert state.utilization_mean_percent == pytest.approx(50, abs=5)


def test_what_a_gpu_takes_when_idle_is_learnt_only_while_nobody_has_it(bench: Any) -> None:
    host = bench("device GPU-a\npower 0 300 30 300 31 40")
    host.sampler.note_busy("GPU-a")
    host.run(40)
    assert host.sampler.baseline_w("GPU-a") is None

    host.sampler.note_idle("GPU-a")
    host.run(30)

    assert host.sampler.baseline_w("GPU-a") == pytest.approx(40, rel=0.01)


def test_others_on_the_gpu_make_it_an_upper_bound_and_teach_no_baseline(bench: Any) -> None:
    host = bench("device GPU-a\npower 0 300\nprocess 0 0 10 1 40 0")
    host.run(39)

    assert not host.between(1, 9).shared
    assert host.between(20, 30).shared
    assert host.sampler.baseline_w("GPU-a") is None


def test_whose_processes_they_are() -> None:
    me, parent, unseen = os.getpid(), os.getppid(), 2**22 + 1

    assert others([me], agent=parent) == []
    assert others([me, 1], agent=parent) == [1]
    assert others([unseen], agent=parent) == [], "ours, by its number on the host"
    assert others([unseen, unseen + 1], agent=parent) == [unseen + 1]
    assert others([me, unseen], agent=parent) == [unseen]


def test_the_gpus_of_a_heartbeat(bench: Any) -> None:
    host = bench("device GPU-a\nname NVIDIA_H100\npower 0 300\nlimit 700\nthrottle 0 4\nused 0 10\ntotal 100")
    host.sampler.sample()

    [now] = host.sampler.now()

    assert (now.device, now.name, now.power_w, now.power_limit_w) == ("GPU-a", "NVIDIA H100", 300, 700)
    assert (now.memory_used_bytes, now.memory_total_bytes, now.throttle) == (10 * 2**20, 100 * 2**20, ["sw_power_cap"])
    host.clock.advance(60)
    assert host.sampler.now()[0].power_w is None, "it hangs: how it is nobody knows"


def test_while_a_meter_is_slow_only_what_was_before_is_seen(fake_clock: FakeClock) -> None:
    class Slow(Estimate):
        def read(self) -> Reading:
            fake_clock.advance(3)
            return super().read()

    sampler = sampled(fake_clock, [Slow(15.0, 1, fake_clock)])
    assert sampler.seen_s is None

    sampler.sample()

    assert (sampler.seen_s, fake_clock()) == (BEGAN_S, BEGAN_S + 3)


# ---- powercap


@pytest.fixture
def powercap(tmp_path: Path) -> Callable[..., Path]:
    def zone(name: str, label: str, counter_uj: int, range_uj: int = 262_143_328_850) -> Path:
        path = tmp_path / "powercap" / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "name").write_text(f"{label}\n")
        (path / "energy_uj").write_text(f"{counter_uj}\n")
        (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
        return path

    return zone


def sampled(clock: FakeClock, meters: list[Meter]) -> Sampler:
    return Sampler(meters, interval_s=0.1, clock=clock)


def test_a_package_is_measured_over_the_end_of_its_range(powercap: Any, fake_clock: FakeClock, tmp_path: Path) -> None:
    range_uj = 60_000_000
    zone = powercap("intel-rapl:0", "package-0", 59_000_000, range_uj)
    powercap("intel-rapl:0:0", "core", 5)
    powercap("intel-rapl:1", "psys", 5)
    [meter] = rapl_meters(Quality.MEASURED, tmp_path / "powercap", fake_clock)
    sampler = sampled(fake_clock, [meter])

    for tick in range(1, 121):
        (zone / "energy_uj").write_text(str((59_000_000 + tick * 1_000_000) % range_uj))
        sampler.sample()
        fake_clock.advance(0.1)

    measured = sampler.between("cpu0", BEGAN_S + 1, BEGAN_S + 11)
    assert measured is not None
    assert measured.energy_j == pytest.approx(100, rel=0.005)
    assert (meter.source, meter.counter()) == (Source.RAPL, None)


@pytest.mark.parametrize("broken", ["unreadable", "garbage", "absent"])
def test_a_package_that_cannot_be_read_is_left_out_with_the_reason(
    powercap: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    caplog.set_level(logging.INFO)
    energy = powercap("intel-rapl:0", "package-0", 5) / "energy_uj"
    if broken == "absent":
        energy.unlink()
    elif broken == "garbage":
        energy.write_text("x")
    else:
        energy.chmod(0)
        read = Path.read_text

        def refuse(path: Path) -> str:  # root may read what nobody may
            if path == energy:
                raise PermissionError(13, "Permission denied")
            return read(path)

        monkeypatch.setattr(Path, "read_text", refuse)

    assert rapl_meters(Quality.MEASURED, tmp_path / "powercap") == []
    assert "intel-rapl:0 is not measured" in caplog.text


def test_no_powercap_is_no_error(tmp_path: Path) -> None:
    assert rapl_meters(Quality.MEASURED, tmp_path / "none") == []


def test_an_estimate_is_watts_times_cores_times_time(fake_clock: FakeClock) -> None:
    sampler = sampled(fake_clock, [Estimate(core_power_w=5, cores=4, clock=fake_clock)])
    for _ in range(100):
        sampler.sample()
        fake_clock.advance(0.1)

    measured = sampler.between("cpu", BEGAN_S + 1, BEGAN_S + 6)

    assert measured is not None
    assert measured.energy_j == pytest.approx(100)
    assert sampler.baseline_w("cpu") is None
