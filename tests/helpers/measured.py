"""Results of measurements, made by hand: one of a GPU with all its figures, one of a CPU without a meter, a study."""

from typing import Any
from uuid import UUID

from ops_contract.energy import Quality, Source
from ops_contract.lifecycle import Status
from ops_contract.measurements import (
    BaselineRecord,
    DeviceUse,
    Figure,
    FigureName,
    FlopsRecord,
    MeasurementPhase,
    MeasurementProgress,
    MeasurementResult,
    ThermalThrottle,
    WarmupRecord,
)
from ops_contract.plans import Skipped
from ops_contract.study_results import GridGroup, GridResult, GridRow, Statistic

NO_METER = "no meter: this machine has no GPU, no readable RAPL, and OPS_CPU_POWER_W is not set"
WINDOW_S, TOKENS_OUT = 12.5, 4096
PHASES_S = dict(zip(MeasurementPhase, (0.4, 30.0, 5.0, 3.25, 11.5, 60.2, WINDOW_S, 1.1, 0.9), strict=True))
DONE = MeasurementProgress(
    phase=MeasurementPhase.WINDOW, done=32, total=64, unit="prompts", power_w=311.5, temperature_c=64
)


def measurement_result(with_meter: bool = True) -> MeasurementResult:
    """64 prompts of 128 tokens, 64 generated of each, in a window of 12.5 s."""
    figures: dict[FigureName, Figure] = {
        "tokens_per_s": Figure(value=TOKENS_OUT / WINDOW_S, unit="token/s", source="count, clock", uncertainty=0.03),
        "window_s": Figure(value=WINDOW_S, unit="s", source="clock", uncertainty=0.001),
        "latency_p50_s": Figure(value=1.5625, unit="s", source="clock"),
        "first_token_p50_s": Figure(value=0.042, unit="s", source="clock"),
        "flops": Figure(value=3.1e12, unit="FLOP", source="modules"),
        "mfu": Figure(value=0.21, unit="1", source="modules, clock")
        if with_meter
        else Figure(value=None, unit="1", source="peak of the device", reason="the peak of this CPU is not known"),
        "peak_memory_bytes": Figure(value=1.2e9, unit="B", source="allocator"),
        "energy_j": _joules("J", 3840.0, 12.0) if with_meter else _unknown("J"),
        "energy_adjusted_j": _joules("J", 3090.0, 15.0) if with_meter else _unknown("J"),
        "j_per_output_token": _joules("J/token", 0.9375, 0.003) if with_meter else _unknown("J/token"),
        "j_per_output_token_adjusted": _joules("J/token", 0.7544, 0.004) if with_meter else _unknown("J/token"),
    }
    slowed = {"sw_power_cap": 1.25} if with_meter else {}
    return MeasurementResult(
        config_hash="ab" * 32,
        methodology={
            "energy": "The meter's cumulative joules at the two ends of the window, interpolated between the readings.",
            "latency": "Of a batch, from its submission until the device is done.",
        },
        n_prompts=64,
        tokens_in=64 * 128,
        tokens_out=TOKENS_OUT,
        figures=figures,
        devices=[_gpu()] if with_meter else [],
        thermal_throttle=ThermalThrottle(
            throttled=True if with_meter else None, duration_s=1.25 if with_meter else None, reasons=slowed
        ),
        baseline=BaselineRecord(
            strategy="validated", origin="cache", power_w={"GPU-7": 60.0}, duration_s=30.0, age_s=1800.0, drift=0.02
        )
        if with_meter
        else BaselineRecord(strategy="validated", origin="none", reason=NO_METER),
        warmup=WarmupRecord(
            batches=7, latencies_s=[1.9, 1.6, 1.57, 1.56, 1.56], cv=0.021, converged=True, thermal_floor_s=60.0
        ),
        flops=FlopsRecord(
            prefill=2.0e12, decode=1.1e12, parts={"linear": 2.6e12, "attention": 5e11}, params=124_439_808
        ),
        phases_s=PHASES_S,
        environment={"torch": "2.9.1", "transformers": "5.24.0", "gpu": {"persistence_mode": True}},
        series="files/series.parquet" if with_meter else None,
        warnings=["random weights: what it costs is real, what it says is noise"],
    )


def measurement_study() -> GridResult:
    """Two batch sizes in two precisions, three cycles of each: two are on the front. One failed and ended it."""
    known = {
        (1, "float32"): (80.0, 3.2),
        (1, "bfloat16"): (110.0, 2.1),
        (8, "float32"): (330.0, 1.4),
        (8, "bfloat16"): (520.0, 1.6),
    }
    rows, groups = [], []
    for (batch, precision), (speed, joules) in known.items():
        point: dict[str, Any] = {"config.batch_size": batch, "config.precision": precision}
        for cycle in range(3):
            final = {"tokens_per_s": speed + cycle - 1, "j_per_output_token": joules + (cycle - 1) / 100}
            rows.append(_row(point, cycle, Status.COMPLETED, final | {"first_token_p50_s": 0.04, "mfu": speed / 2000}))
        groups.append(_group(point, speed, joules))
    point = {"config.batch_size": 64, "config.precision": "float32"}
    rows.append(_row(point, 0, Status.FAILED, {}, error_message="backend: out of memory, 4.1 GB wanted"))
    rows += [_row(point, cycle, Status.CANCELLED, {}) for cycle in (1, 2)]
    groups.append(GridGroup(point=point))
    return GridResult(
        rows=rows,
        groups=groups,
        skipped=[Skipped(what="precision=int3", reason="config.precision: there is no such one")],
        warnings=["the study ended early: 1 run in a row failed"],
    )


def without_joules(result: GridResult) -> GridResult:
    """As a machine without a meter gives it."""
    groups = [each.model_copy(update={"metrics": _less(each.metrics)}) for each in result.groups]
    return result.model_copy(
        update={
            "groups": groups,
            "rows": [each.model_copy(update={"final": _less(each.final)}) for each in result.rows],
        }
    )


def _less(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith("j_per")}


def _row(point: dict[str, Any], cycle: int, status: Status, final: dict[str, float], **known: Any) -> GridRow:
    name = " ".join(f"{field.rpartition('.')[2]}={value}" for field, value in point.items()) + f" · cycle {cycle}"
    id = UUID(int=abs(hash(name)) % 2**64)
    return GridRow(operation_id=id, name=name, point=point, cycle=cycle, status=status, final=final, **known)


def _group(point: dict[str, Any], speed: float, joules: float) -> GridGroup:
    metrics = {
        "tokens_per_s": Statistic(n=3, mean=speed, sd=1.0, low=speed - 2.5, high=speed + 2.5),
        "j_per_output_token": Statistic(n=3, mean=joules, sd=0.01, low=joules - 0.025, high=joules + 0.025),
        "first_token_p50_s": Statistic(n=3, mean=0.04, sd=0.0, low=0.04, high=0.04),
        "mfu": Statistic(n=3, mean=speed / 2000),
    }
    return GridGroup(point=point, metrics=metrics)


def _joules(unit: str, value: float, uncertainty: float) -> Figure:
    return Figure(value=value, unit=unit, source="nvml_counter", uncertainty=uncertainty)


def _unknown(unit: str) -> Figure:
    return Figure(value=None, unit=unit, source="none", reason=NO_METER)


def _gpu() -> DeviceUse:
    return DeviceUse(
        device="GPU-7",
        name="NVIDIA A100-SXM4-40GB",
        source=Source.NVML_COUNTER,
        quality=Quality.MEASURED,
        energy_j=3840.0,
        error_j=12.0,
        baseline_w=60.0,
        energy_adjusted_j=3090.0,
        ticks=125,
        power_max_w=341.0,
        temperature_begin_c=58,
        temperature_max_c=66,
        throttled_s={"sw_power_cap": 1.25},
    )
