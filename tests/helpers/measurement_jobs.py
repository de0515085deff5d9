"""Measurements as the service has them, without a model."""

from typing import Any

from ops_contract.agents import WorkloadOffer
from ops_contract.measurements import (
    MEASUREMENT,
    BaselineRecord,
    Figure,
    MeasurementConfig,
    MeasurementResult,
    ThermalThrottle,
    WarmupRecord,
)

MEASURES = WorkloadOffer(name=MEASUREMENT, config_schema=MeasurementConfig.model_json_schema())
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "config": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0},
}
MEASURED: dict[str, Any] = {"workload": MEASUREMENT, "config": {"model": GPT2}}


def measured(**figures: float | None) -> MeasurementResult:
    """With these figures; null is one that is not known."""
    return MeasurementResult.model_validate(
        {
            "config_hash": "0" * 64,
            "methodology": {},
            "n_prompts": 4,
            "tokens_in": 8,
            "tokens_out": 16,
            "figures": {name: _figure(value) for name, value in figures.items()},
            "thermal_throttle": ThermalThrottle(throttled=None),
            "baseline": BaselineRecord(strategy="none", origin="none"),
            "warmup": WarmupRecord(batches=0),
        }
    )


def _figure(value: float | None) -> Figure:
    return Figure(value=value, unit="1", source="test", reason=None if value is not None else "no_meter")
