"""The samples of a window, as Parquet."""

from collections.abc import Sequence
from pathlib import Path

from ops_worker.energy.sampler import Sample


def write_series(path: Path, samples: Sequence[Sample], begin_s: float) -> None:
    """`at_s` counts from the window's begin; `energy_j` is cumulative, only its differences mean something.

    `throttle` has the bits of NVML. Raises ImportError where pyarrow is not installed, and OSError.
    """
    import pyarrow
    from pyarrow import parquet

    columns = {
        "at_s": (pyarrow.float64(), [sample.at_s - begin_s for sample in samples]),
        "device": (pyarrow.string(), [sample.device for sample in samples]),
        "power_w": (pyarrow.float64(), [sample.power_w for sample in samples]),
        "energy_j": (pyarrow.float64(), [sample.energy_j for sample in samples]),
        "temperature_c": (pyarrow.float64(), [sample.look.temperature_c for sample in samples]),
        "sm_clock_mhz": (pyarrow.float64(), [sample.look.sm_clock_mhz for sample in samples]),
        "utilization_percent": (pyarrow.float64(), [sample.look.utilization_percent for sample in samples]),
        "memory_used_bytes": (pyarrow.int64(), [sample.look.memory_used_bytes for sample in samples]),
        "throttle": (pyarrow.int64(), [sample.look.throttle for sample in samples]),
    }
    table = {name: pyarrow.array(values, kind) for name, (kind, values) in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(table), path)
