"""The course of a measurement, on a clock that only the engine moves."""

import gc
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_nvml import FakeClock
from helpers.measuring import FakeEngine, Rig, config, on_cpu
from ops_contract.measurements import MeasurementPhase, MeasurementProgress, Task, Warmup
from ops_worker.measurement.engines import Checked
from ops_worker.measurement.instruments import find_instruments
from ops_worker.measurement.run import BackendError, PreFlightError

NO_BASELINE = {"strategy": "none"}


class Cancelled(Exception):
    pass


@pytest.fixture
def rig(fake_clock: FakeClock, tmp_path: Path) -> Rig:
    """Without any meter."""
    return on_cpu(fake_clock, tmp_path)


# ---- the window


def test_tokens_per_second_are_the_windows_tokens_over_the_window(rig: Rig) -> None:
    engine = FakeEngine(rig, config(), batch_s=[9.0] * 2 + [3.0] + [1.0, 0.5] * 5)

    result = rig.measurement(engine).run()

    assert (result.tokens_in, result.tokens_out, result.n_prompts) == (1000, 320, 20)
    assert (
        result.values().items()
        >= {"window_s": 7.5, "tokens_per_s": 320 / 7.5, "total_tokens_per_s": 1320 / 7.5}.items()
    )
    assert result.figures["tokens_per_s"].uncertainty is not None
    assert 0 < result.figures["tokens_per_s"].uncertainty < 1e-6


def test_latencies_are_of_the_windows_batches(rig: Rig) -> None:
    values = rig.measure(batch_s=[9.0] * 2 + [3.0] + [1.0] * 8 + [2.0, 3.0]).values()

    assert (values["latency_p50_s"], values["latency_p90_s"]) == (1.0, pytest.approx(2.1))
    assert values["latency_p99_s"] == pytest.approx(2.91)


def test_the_course_is_in_order_and_the_window_runs_each_batch_once(rig: Rig) -> None:
    engine = FakeEngine(rig, config())
    phases: list[MeasurementPhase] = []

    result = rig.measurement(engine, entered=phases.append).run()

    assert phases == list(MeasurementPhase)
    assert list(result.phases_s) == phases
    assert result.phases_s[MeasurementPhase.WINDOW] == 10.0
    assert result.phases_s[MeasurementPhase.THERMAL_FLOOR] == result.warmup.thermal_floor_s == 3.0
    warm = ["generate 0"] * 2 + [f"generate {batch}" for batch in range(3)]
    window = ["reset_peak_memory", *(f"generate {batch}" for batch in range(10)), "peak_memory_bytes"]
    first = ["first_token 0", "first_token 0", "first_token 1"]
    assert engine.calls == ["check", "load", *warm, *window, *first, "flops", "close"]


def test_the_first_token_is_timed_in_a_pass_of_its_own(rig: Rig) -> None:
    result = rig.measure()

    assert result.figures["first_token_p50_s"].value == (0.25 + 1.25) / 2
    assert result.figures["window_s"].value == 10.0
    none = rig.measure(config(first_token_prompts=0)).figures["first_token_p99_s"]
    assert (none.value, none.reason) == (None, "not asked for: first_token_prompts is 0")


def test_nothing_is_collected_in_the_window_and_after_it_as_before(rig: Rig) -> None:
    collecting: list[bool] = []
    engine = FakeEngine(rig, config(), before=lambda n: collecting.append(gc.isenabled()))

    rig.measurement(engine).run()

    assert collecting == [True] * 5 + [False] * 10
    assert gc.isenabled()


def test_utilization_of_the_peak_and_flops_come_from_the_engine(rig: Rig) -> None:
    result = rig.measure()

    assert (
        result.values().items()
        >= {"flops": 1e13, "flops_per_s": 1e12, "mfu": 0.25, "peak_memory_bytes": 5 * 2**30}.items()
    )
    assert result.figures["mfu"].source == "count of the modules, data sheet"
    assert result.config_hash == config().digest()
    assert result.environment["engine"] == {"attention": "sdpa"}


def test_flops_that_cannot_be_counted_lose_nothing_else(rig: Rig) -> None:
    result = rig.measure(fails="flops")

    assert result.values()["tokens_per_s"] == 32.0
    for name in ("flops", "flops_per_s", "mfu"):
        assert result.figures[name].value is None  # type: ignore[index]  # names of figures
        assert "no flops" in (result.figures[name].reason or "")  # type: ignore[index]
    assert any("FLOPs cannot be counted" in warning for warning in result.warnings)


# ---- warm-up


def test_warming_up_ends_when_the_time_of_a_batch_has_settled(rig: Rig) -> None:
    given = config(warmup=Warmup(batches=2, cv=0.05, last=3, most=20), thermal_floor_s=0)

    warmup = rig.measure(given, batch_s=[4.0, 2.0, 1.5, 1.0, 1.0, 1.0]).warmup

    assert (warmup.batches, warmup.converged, warmup.cv) == (6, True, 0.0)
    assert warmup.latencies_s == [4.0, 2.0, 1.5, 1.0, 1.0, 1.0]


@pytest.mark.slow
def test_warming_up_that_does_not_settle_goes_on_all_the_same_and_says_so(rig: Rig) -> None:
    given = config(warmup=Warmup(batches=2, cv=0.05, last=3, most=8), thermal_floor_s=0)

    result = rig.measure(given, batch_s=[1.0, 2.0] * 20)

    assert (result.warmup.batches, result.warmup.converged) == (8, False)
    assert result.warmup.cv == pytest.approx(0.346, abs=0.001)
    assert any("has not settled in 8 batches" in warning for warning in result.warnings)


@pytest.mark.slow
def test_as_many_batches_warm_up_as_are_asked_for_though_it_settles_before(rig: Rig) -> None:
    assert rig.measure(config(warmup=Warmup(batches=7, cv=0.05, last=2))).warmup.batches == 7
    assert rig.measure(config(warmup=Warmup(batches=4, cv=None))).warmup.converged is None


@pytest.mark.slow
def test_a_last_batch_of_another_size_has_run_before_the_window(rig: Rig) -> None:
    engine = FakeEngine(rig, config(task=Task(n_prompts=5), thermal_floor_s=0))

    rig.measurement(engine).run()

    assert engine.calls.index("generate 2") < engine.calls.index("reset_peak_memory")


# ---- what goes wrong


def test_the_preflight_says_all_that_is_wrong_at_once(fake_clock: FakeClock, tmp_path: Path) -> None:
    found = find_instruments(None, "GPU-x", "nvml_counter", None, 2, fake_clock, tmp_path / "powercap")
    rig = Rig(fake_clock, found, tmp_path)
    engine = FakeEngine(rig, config(), checked=Checked(["no such model", "no room"], ["random weights"]))

    with pytest.raises(PreFlightError) as caught:
        rig.measurement(engine).run()

    gpu, meter, *engines = caught.value.failures
    assert "GPU-x is not there" in gpu
    assert "no meter nvml_counter" in meter
    assert (engines, caught.value.warnings) == (["no such model", "no room"], ["random weights"])
    assert engine.calls == ["check"]


@pytest.mark.parametrize(
    ("call", "phase"),
    [
        ("check", MeasurementPhase.PREFLIGHT),
        ("load", MeasurementPhase.LOAD),
        ("generate 0", MeasurementPhase.WARMUP),
        ("generate 2", MeasurementPhase.THERMAL_FLOOR),
        ("generate 7", MeasurementPhase.WINDOW),
        ("first_token 1", MeasurementPhase.FIRST_TOKEN),
    ],
)
def test_the_engines_own_failure_says_its_phase_and_the_engine_is_closed(
    rig: Rig, call: str, phase: MeasurementPhase
) -> None:
    engine = FakeEngine(rig, config(), fails=call)

    with pytest.raises(BackendError, match=f"{phase}: RuntimeError: no {call}") as caught:
        rig.measurement(engine).run()

    assert (caught.value.phase, type(caught.value.cause)) == (phase, RuntimeError)
    assert ("close" in engine.calls) == ("load" in engine.calls)
    assert gc.isenabled()


def test_an_engine_that_cannot_be_closed_loses_nothing(rig: Rig) -> None:
    result = rig.measure(fails="close")

    assert result.values()["tokens_per_s"] == 32.0
    assert "the engine cannot be closed: no close" in result.warnings


def test_a_stop_in_the_window_stops_before_the_next_batch(rig: Rig) -> None:
    stops: list[bool] = []
    engine = FakeEngine(rig, config(), before=lambda n: stops.append(True) if n == 8 else None)

    def stop() -> None:
        if stops:
            raise Cancelled

    with pytest.raises(Cancelled):
        rig.measurement(engine, stop=stop).run()

    assert engine.calls[-3:] == ["generate 2", "generate 3", "close"]
    assert gc.isenabled()


def test_a_stop_while_the_device_rests_stops(fake_clock: FakeClock, tmp_path: Path) -> None:
    rig = on_cpu(fake_clock, tmp_path)
    began_s = fake_clock()

    def stop() -> None:
        if fake_clock() >= began_s + 5:
            raise Cancelled

    engine = FakeEngine(rig, config(gap_s=60))
    with pytest.raises(Cancelled):
        rig.measurement(engine, stop=stop).run()

    assert fake_clock() < began_s + 6
    assert engine.calls == ["check"]


# ---- progress


def test_progress_counts_what_is_done_and_beats_rise_with_it(fake_clock: FakeClock, tmp_path: Path) -> None:
    rig = on_cpu(fake_clock, tmp_path, cpu_power_w=15.0)
    told: list[tuple[MeasurementProgress, int]] = []
    engine = FakeEngine(rig, config(gap_s=5), before=lambda n: told.append((measurement.progress(), measurement.beats)))
    measurement: Any = rig.measurement(
        engine, entered=lambda phase: told.append((measurement.progress(), measurement.beats))
    )

    measurement.run()

    window = [now for now, _ in told if now.phase is MeasurementPhase.WINDOW]
    assert [(now.done, now.total, now.unit) for now in window[1:]] == [(2.0 * n, 20, "prompts") for n in range(10)]
    assert {now.power_w for now in window} == {30.0}
    floor = [now.done for now, _ in told if now.phase is MeasurementPhase.THERMAL_FLOOR]
    assert floor == [0, 0, 1, 2]
    beats = [beat for _, beat in told]
    assert beats == sorted(beats)
    assert beats[2] - beats[1] >= 50, "it beats while the device rests"
