"""Whether a measurement can be made here: all that stands against it, each with what to do."""

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from ops_contract.measurements import MeasurementConfig, RandomModel
from ops_worker.measurement import models, tasks
from ops_worker.measurement.engines import Checked
from ops_worker.measurement.flops import windows
from ops_worker.measurement.models import Unusable

GIB = 2**30


def check(config: MeasurementConfig, device: str, free_bytes: int | None) -> Checked:
    """`free_bytes` of the device's memory; null: the system does not say."""
    failures = [*_device(config, device), *_attention(config, device), *_compiler(config, device), *_prompts(config)]
    if importlib.util.find_spec("transformers") is None:
        failures.append("transformers is not installed: `pip install 'relight[llm]'`")
    else:
        failures += _model(config, device, free_bytes)
    return Checked(failures, _warnings(config, device))


def _device(config: MeasurementConfig, device: str) -> Iterator[str]:
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        yield f"torch {torch.__version__} finds no CUDA device here: measure on the CPU, or install a torch for it"
    elif config.precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield f"{torch.cuda.get_device_name(device)} has no bfloat16: take float16"


def _attention(config: MeasurementConfig, device: str) -> Iterator[str]:
    if config.attention != "flash_attention_2":
        return
    if importlib.util.find_spec("flash_attn") is None:
        yield "flash_attention_2 needs a package that is not installed: `pip install flash-attn`, or take sdpa"
    if not device.startswith("cuda"):
        yield f"flash_attention_2 runs on CUDA devices alone, not on {device}: take sdpa"
    if config.precision == "float32":
        yield "flash_attention_2 has no float32: take bfloat16 or float16"


def _compiler(config: MeasurementConfig, device: str) -> Iterator[str]:
    if not config.compile:
        return
    if device.startswith("cuda") and importlib.util.find_spec("triton") is None:
        yield "compile needs triton, which is not installed: `pip install triton`"
    if not device.startswith("cuda") and not (shutil.which("g++") or shutil.which("clang++")):
        yield "compile needs a C++ compiler on the CPU, and there is none: install g++"


def _prompts(config: MeasurementConfig) -> Iterator[str]:
    prompts_file = config.task.prompts_file
    if prompts_file is None:
        return
    if isinstance(config.model, RandomModel):
        yield "a prompts file needs the model's tokenizer, and random weights have none: leave `prompts_file` out"
    try:
        tasks.lines(prompts_file)
    except (OSError, ValueError) as error:
        yield f"the prompts file {prompts_file} cannot be read: {error}"


def _model(config: MeasurementConfig, device: str, free_bytes: int | None) -> Iterator[str]:
    models.quiet()
    try:
        model_config = models.read_config(config.model)
    except Unusable as problem:
        yield str(problem)
        return
    yield from _positions(config, model_config)
    if isinstance(config.model, str):
        yield from _files(config, config.model)
    yield from _size(config, model_config, device, free_bytes)


def _positions(config: MeasurementConfig, model_config: Any) -> Iterator[str]:
    limit, task = models.positions(model_config), config.task
    if limit is not None and task.input_tokens + task.output_tokens > limit:
        asked = f"input_tokens {task.input_tokens} and output_tokens {task.output_tokens} are"
        yield f"{asked} {task.input_tokens + task.output_tokens} positions, and the model has {limit}: ask for fewer"


def _files(config: MeasurementConfig, model: str) -> Iterator[str]:
    wanted = [models.find_weights, *([models.read_tokenizer] if config.task.prompts_file is not None else [])]
    for find in wanted:
        try:
            find(model)
        except Unusable as problem:
            yield str(problem)


def _size(config: MeasurementConfig, model_config: Any, device: str, free: int | None) -> Iterator[str]:
    # Flash attention has been judged above; whether the model can be built is another question.
    attention = "eager" if config.attention == "flash_attention_2" else config.attention
    try:
        params = sum(one.numel() for one in models.sketch(model_config, attention).parameters())
    except Unusable as problem:
        yield str(problem)
        return
    needed = _needed_bytes(config, model_config, params)
    if free is not None and needed > free:
        what = f"{params:,} parameters in {config.precision}, {config.batch_size} cached sequences and the prompts"
        room = f"{device} has {free / GIB:.1f} GiB free"
        yield f"{what} need {needed / GIB:.1f} GiB, and {room}: take a smaller model, batch_size or precision"


def _needed_bytes(config: MeasurementConfig, model_config: Any, params: int) -> int:
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


def _warnings(config: MeasurementConfig, device: str) -> list[str]:
    found = []
    if isinstance(config.model, RandomModel):
        length = "" if config.task.ignore_eos is False else ", and the length of the output is forced"
        found.append(f"the weights are random: what the model says is noise{length}")
    if config.precision == "float16" and not device.startswith("cuda"):
        found.append("float16 on a CPU is slow, since few have arithmetic for it: bfloat16 or float32 is what one runs")
    if config.compile and config.task.prompts_file is not None:
        found.append("prompts differ in length, so that torch.compile may compile again within the window")
    return found
