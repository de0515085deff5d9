"""Where the idle power comes from: a rest, or what an earlier one left in a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ops_contract.energy import Quality, Source
from ops_contract.measurements import BaselinePolicy
from ops_worker.energy.meters import Measured, Reading
from ops_worker.measurement.baseline import Baseline, Baselines, IdlePower


class Idle:
    """A device that takes `power_w` when idle, and how long it was asked to rest."""

    quality = Quality.MEASURED

    def __init__(self, power_w: float | None, device: str = "GPU-a", source: Source = Source.NVML_COUNTER) -> None:
        self.power_w = power_w
        self.device = device
        self.source = source
        self.rests_s: list[float] = []

    def read(self) -> Reading:
        raise NotImplementedError

    def counter(self) -> float | None:
        return None

    def rest(self, duration_s: float) -> dict[str, IdlePower]:
        self.rests_s.append(duration_s)
        reason = "counter_fell" if self.power_w is None else None
        return {self.device: IdlePower(self.power_w, error_w=0.5 if reason is None else None, reason=reason)}


Take = Callable[..., Baseline]


@pytest.fixture
def take(tmp_path: Path) -> Take:
    def taken(device: Idle, strategy: str, at_s: float = 0.0, **policy: Any) -> Baseline:
        given = BaselinePolicy.model_validate({"strategy": strategy, "duration_s": 30, "look_s": 5, **policy})
        return Baselines(given, [device], tmp_path, device.rest, lambda: 1.7e9 + at_s).take()

    return taken


def kept(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "GPU-a.json").read_text())
    return found


def test_a_fresh_one_is_measured_each_time(take: Take) -> None:
    device = Idle(50.0)
    take(device, "fresh")
    device.power_w = 60.0

    record = take(device, "fresh", at_s=1).record

    assert device.rests_s == [30, 30]
    assert (record.origin, record.power_w, record.duration_s) == ("measured", {"GPU-a": 60.0}, 30)


def test_a_cached_one_is_used_without_a_rest_and_says_its_age(take: Take) -> None:
    device = Idle(50.0)
    take(device, "fresh")
    device.power_w = 60.0

    baseline = take(device, "cached", at_s=100)

    assert device.rests_s == [30]
    record = baseline.record
    assert (record.origin, record.power_w, record.age_s, record.duration_s) == ("cache", {"GPU-a": 50.0}, 100, None)
    assert baseline.idle == {"GPU-a": IdlePower(50.0, error_w=None)}, "nobody has looked since"


@pytest.mark.parametrize("at_s", [101, -1])
def test_one_that_expired_or_is_of_the_future_is_measured_afresh(take: Take, at_s: float) -> None:
    device = Idle(50.0)
    take(device, "cached", ttl_s=100)
    device.power_w = 60.0

    record = take(device, "cached", at_s=at_s, ttl_s=100).record

    assert (record.origin, record.power_w) == ("measured", {"GPU-a": 60.0})
    assert take(device, "cached", at_s=at_s + 1, ttl_s=100).record.age_s == 1


def test_a_validated_one_holds_while_a_short_look_agrees(take: Take) -> None:
    device = Idle(50.0)
    take(device, "validated")
    device.power_w = 54.0

    baseline = take(device, "validated", at_s=60)

    assert device.rests_s == [30, 5]
    assert (baseline.record.origin, baseline.record.power_w) == ("cache", {"GPU-a": 50.0})
    assert baseline.record.drift == pytest.approx(0.08)
    assert baseline.idle["GPU-a"].error_w == pytest.approx(0.5 + 4), "as it was measured, and what it drifted"
    assert not baseline.warnings


@pytest.mark.parametrize("drifted_w", [56.0, 44.0])
def test_a_drift_is_recorded_warned_of_and_measured_afresh(take: Take, tmp_path: Path, drifted_w: float) -> None:
    device = Idle(50.0)
    take(device, "validated")
    device.power_w = drifted_w

    baseline = take(device, "validated", at_s=60)

    assert device.rests_s == [30, 5, 30]
    assert (baseline.record.origin, baseline.record.power_w) == ("measured", {"GPU-a": drifted_w})
    assert baseline.record.drift == pytest.approx(0.12)
    assert any("off by 12%" in warning for warning in baseline.warnings)
    assert kept(tmp_path)["power_w"] == drifted_w


def test_another_meter_of_the_same_device_has_its_own(take: Take) -> None:
    take(Idle(50.0), "fresh")
    by_power = Idle(70.0, source=Source.NVML_POWER)

    assert take(by_power, "cached", at_s=1).record.power_w == {"GPU-a": 70.0}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"power_w": 50}', "\xff", "null"]
    + [
        json.dumps({"device": "GPU-a", "source": "nvml_counter", "power_w": power_w, "error_w": 0, "measured_at_s": at})
        for power_w, at in [
            (-1, 1.7e9),
            (0, 1.7e9),
            ("50", 1.7e9),
            (float("nan"), 1.7e9),
            (float("inf"), 1.7e9),
            (50, "x"),
        ]
    ],
)
def test_a_corrupt_file_is_a_warning_and_measured_afresh(take: Take, tmp_path: Path, content: str) -> None:
    (tmp_path / "GPU-a.json").write_bytes(content.encode("latin-1"))

    baseline = take(Idle(50.0), "cached")

    assert (baseline.record.origin, baseline.record.power_w) == ("measured", {"GPU-a": 50.0})
    assert any("GPU-a.json cannot be used" in warning for warning in baseline.warnings)
    assert kept(tmp_path)["power_w"] == 50.0


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    device = Idle(50.0)

    baseline = Baselines(BaselinePolicy(), [device], tmp_path / "file", device.rest, lambda: 0.0).take()

    assert baseline.record.power_w == {"GPU-a": 50.0}
    assert any("cannot be kept" in warning for warning in baseline.warnings)


def test_nothing_but_whole_files_is_left(take: Take, tmp_path: Path) -> None:
    take(Idle(50.0), "fresh")

    assert [path.name for path in tmp_path.iterdir()] == ["GPU-a.json"]


def test_what_is_not_known_is_not_kept_and_says_why(take: Take, tmp_path: Path) -> None:
    baseline = take(Idle(None), "validated")

    assert (baseline.record.power_w, baseline.record.reason) == ({"GPU-a": None}, "GPU-a: counter_fell")
    assert not (tmp_path / "GPU-a.json").exists()


def test_a_cpu_is_known_by_its_host_too(take: Take, tmp_path: Path) -> None:
    take(Idle(9.0, device="cpu0", source=Source.RAPL), "fresh")

    [path] = tmp_path.iterdir()
    assert path.name != "cpu0.json"
    assert path.name.endswith("-cpu0.json")


@pytest.mark.parametrize(
    ("device", "strategy"), [(Idle(50.0), "none"), (Idle(50.0, "cpu", Source.ESTIMATE), "validated")]
)
def test_where_none_is_wanted_or_can_be_had_nobody_waits(take: Take, device: Idle, strategy: str) -> None:
    record = take(device, strategy).record

    assert device.rests_s == []
    assert (record.origin, record.power_w) == ("none", {})
    assert record.reason


def test_what_is_no_idle_power_is_not_taken_for_one() -> None:
    assert IdlePower.of(Measured(500.0, error_j=5.0), 10.0) == IdlePower(50.0, error_w=0.5)
    assert IdlePower.of(Measured(None, reason="device_lost"), 10.0).reason == "device_lost"
    assert IdlePower.of(Measured(500.0, error_j=5.0, shared=True), 10.0).reason == "others_use_it"
    assert IdlePower.of(Measured(0.0, error_j=5.0), 10.0).reason == "counter_did_not_move"
