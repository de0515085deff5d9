"""The memory that a model needs where it runs, and what there is of it."""

from typing import Any

import torch

from ops_contract.measurements import MeasurementConfig
from ops_worker.energy.preflight import memory_available
from ops_worker.measurement.flops import windows


def needed_bytes(config: MeasurementConfig, model_config: Any, params: int) -> int:
    """Of weights, keys and values, and prompts: activations come on top, so that it is the least."""
    size: int = getattr(torch, config.precision).itemsize
    task = config.task
    prompts = 2 * 8 * task.n_prompts * task.input_tokens  # tokens and mask, as int64
    return size * (params + config.batch_size * _cached(model_config, task.input_tokens + task.output_tokens)) + prompts


def _cached(model_config: Any, length: int) -> int:
    """Numbers that the cache keeps of one sequence."""
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return sum(2 * kept * width * min(length, window or length) for window in windows(model_config))


def free_bytes(device: str) -> int | None:
    """Null: the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    return memory_available()
