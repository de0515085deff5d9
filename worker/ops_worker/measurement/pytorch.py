"""The engine `pytorch`: transformers' generate, greedy."""

import gc
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops_contract.measurements import FlopsRecord, MeasurementConfig, RandomModel
from ops_worker.measurement import models, requirements, tasks
from ops_worker.measurement.engines import Checked, Generated
from ops_worker.measurement.flops import Ran, count
from ops_worker.measurement.peaks import peak_flops_per_s
from ops_worker.measurement.tasks import Batch
from relight.interpreter import versions_of
from relight.memory import available_bytes

PROCESS = Path("/proc/self")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "flash_attn")


class PytorchEngine:
    """`device` as torch names it. One thread uses it, in the order of a measurement: check, load, generate, close."""

    def __init__(self, config: MeasurementConfig, device: str) -> None:
        self._config = config
        self._device = device
        self._model: Any = None
        self._batches: list[Batch] = []
        self._ends: Tensor | None = None  # the tokens that end a sequence; null: none does
        self._lengths: dict[int, int] = {}  # what a batch generated, of its longest sequence
        self._peak_resets = False

    def check(self, gpu_free_bytes: int | None) -> Checked:
        free = gpu_free_bytes if self._on_cuda else available_bytes()
        return requirements.check(self._config, self._device, free)

    def environment(self) -> dict[str, Any]:
        models.quiet()
        config = models.read_config(self._config.model)
        sketch = models.sketch(config, self._config.attention)
        return {
            "engine": "pytorch",
            "device": torch.cuda.get_device_name(self._device) if self._on_cuda else self._device,
            "dtype": self._config.precision,
            "attention": sketch.config._attn_implementation,
            "compile": self._config.compile,
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cuda": torch.version.cuda,
            "packages": versions_of(*PACKAGES),
            "prompts_sha256": _sha256(self._config.task.prompts_file),
            "model": self._model_in_short(config, sketch),
        }

    def _model_in_short(self, config: Any, sketch: Any) -> dict[str, Any]:
        text = config.get_text_config()
        shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        return {
            "model_type": config.model_type,
            "weights": "random" if isinstance(self._config.model, RandomModel) else "safetensors",
            "revision": models.revision(self._config.model),
            "params": sum(parameter.numel() for parameter in sketch.parameters()),
            "positions": models.positions(config),
            **{name: getattr(text, name, None) for name in shape},
        }

    def load(self) -> None:
        models.quiet()
        config = models.read_config(self._config.model)
        tokenizer = self._tokenizer()
        built = models.build(self._config.model, config, self._config.precision, self._config.attention)
        self._model = built.to(self._device)
        self._settle_generation(config, tokenizer)
        self._batches = tasks.batches(
            self._prompts(config, tokenizer),
            self._config.batch_size,
            self._model.generation_config.pad_token_id,
            self._device,
        )
        if self._config.compile:
            self._compile()
        self._wait()

    def _tokenizer(self) -> Any | None:
        """Random tokens do without, as long as there is none."""
        if isinstance(self._config.model, RandomModel):
            return None
        try:
            return models.read_tokenizer(self._config.model)
        except models.Unusable:
            if self._config.task.prompts_file is not None:
                raise
            return None

    def _settle_generation(self, config: Any, tokenizer: Any | None) -> None:
        """In place of what the model brings along: its sampling, penalties and lengths are not part of the task."""
        from transformers import GenerationConfig

        ends = _ends(self._model.generation_config.eos_token_id)
        if self._forced:
            ends = []
        self._ends = torch.tensor(ends, device=self._device) if ends else None
        pad = tokenizer.pad_token_id if tokenizer else None
        self._model.generation_config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=pad if pad is not None else (ends or [0])[0],
        )

    def _compile(self) -> None:
        """Here and now, for every size that batches have: it takes minutes, and is not what is measured.

        Not by generate's own way, which compiles for a cache of fixed length and then attends to all of it, filled or
        not: other arithmetic than that of the same run without `compile`.
        """
        self._model.compile(dynamic=True)
        for size in {batch.prompts for batch in self._batches}:
            alike = sorted((one for one in self._batches if one.prompts == size), key=lambda one: one.length)
            for batch in (alike[0], alike[-1]):
                self._generate(batch, min(3, self._config.task.output_tokens))  # the prefill, and decode at two lengths

    @property
    def _forced(self) -> bool:
        """Whether no token ends a sequence, so that each has exactly `output_tokens`."""
        asked = self._config.task.ignore_eos
        return isinstance(self._config.model, RandomModel) if asked is None else asked

    def _prompts(self, config: Any, tokenizer: Any | None) -> Sequence[Tensor]:
        task = self._config.task
        if task.prompts_file is not None:
            return tasks.prompts_of_file(task, task.prompts_file, tokenizer)
        vocabulary = config.get_text_config().vocab_size
        # Models have rows for tokens that their tokenizer does not know, so that the number is a round one.
        known = min(vocabulary, len(tokenizer)) if tokenizer else vocabulary
        return tasks.random_prompts(task, known, models.special_tokens(config, tokenizer))

    @property
    def batches(self) -> int:
        return len(self._batches)

    def prompts(self, batch: int) -> int:
        return self._at(batch).prompts

    def _at(self, batch: int) -> Batch:
        return self._batches[batch % len(self._batches)]

    def generate(self, batch: int) -> Generated:
        asked = self._at(batch)
        new = self._generate(asked, self._config.task.output_tokens)
        self._wait()
        self._lengths[batch % len(self._batches)] = new.shape[1]
        return Generated(asked.tokens_in, new.numel() if self._ends is None else _until_end(new, self._ends))

    def first_token(self, batch: int) -> None:
        self._generate(self._at(batch), 1)
        self._wait()

    def _generate(self, batch: Batch, new_tokens: int) -> Tensor:
        """(prompts, tokens generated by the longest)."""
        tokens: Tensor = self._model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=new_tokens
        )
        return tokens[:, batch.length :]

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    def reset_peak_memory(self) -> None:
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._peak_resets = _reset_peak_rss()

    def peak_memory_bytes(self) -> int | None:
        """Of the device what torch allocated; on the CPU all that the process had resident."""
        if self._on_cuda:
            return torch.cuda.max_memory_allocated(self._device)
        return _peak_rss() if self._peak_resets else None

    def flops(self, generated: Sequence[Generated]) -> FlopsRecord:
        return count(self._model, [self._ran(batch) for batch in range(len(generated))])

    def _ran(self, batch: int) -> Ran:
        asked = self._at(batch)
        generated = self._lengths[batch % len(self._batches)]
        return Ran(asked.prompts, asked.length, generated)

    def peak_flops_per_s(self) -> tuple[float | None, str]:
        if not self._on_cuda:
            return None, "what a CPU can do at most is not known"
        if self._config.precision == "float32" and torch.get_float32_matmul_precision() != "highest":
            return None, "float32 products may run in TF32 here, whose peak is another"
        return peak_flops_per_s(torch.cuda.get_device_name(self._device), self._config.precision)

    def close(self) -> None:
        self._model, self._batches, self._ends = None, [], None
        gc.collect()
        if self._on_cuda:
            torch.cuda.empty_cache()

    @property
    def _on_cuda(self) -> bool:
        return self._device.startswith("cuda")


def _sha256(prompts_file: str | None) -> str | None:
    """The config names the file alone."""
    return hashlib.sha256(Path(prompts_file).expanduser().read_bytes()).hexdigest() if prompts_file else None


def _ends(eos_token_id: int | list[int] | None) -> list[int]:
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _until_end(new: Tensor, ends: Tensor) -> int:
    """Tokens up to the first end of each sequence, and that one too."""
    ended = torch.isin(new, ends).long()
    before = ended.cumsum(1) - ended
    return int((before == 0).sum())


def _reset_peak_rss() -> bool:
    """Whether the kernel does so: 5 resets the high-water mark (proc(5))."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_rss() -> int | None:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
