"""Whether a measurement tells the tokens per second that one gets: its figure over that of a plain model.generate.

Both have a model of the same architecture with random weights, in the same process, turn by turn, each first every
other time, so that what else the machine does meets both. The measurement's sampler is at work, on an estimate where
there is no meter. A busy machine makes the pairs differ; what of a window was not within generate is told beside it,
which no load disturbs.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ops_contract.measurements import BaselinePolicy, MeasurementConfig, RandomModel, Task, Warmup
from ops_worker.measurement.instruments import open_instruments
from ops_worker.measurement.pytorch import PytorchEngine
from ops_worker.measurement.run import Measurement

GOAL = 0.02
VOCABULARY = 4096
SPECIAL = {"bos_token_id": None, "eos_token_id": None}
MODEL = {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128, **SPECIAL}
CORE_POWER_W = 10.0


def config(prompts: int) -> MeasurementConfig:
    return MeasurementConfig(
        model=RandomModel(model_type="gpt2", config=MODEL),
        task=Task(n_prompts=prompts, input_tokens=32, output_tokens=32),
        batch_size=4,
        warmup=Warmup(batches=2, cv=None),
        thermal_floor_s=0,
        baseline=BaselinePolicy(strategy="none"),
        first_token_prompts=0,
    )


class Timed(PytorchEngine):
    """With the time that transformers' generate took in the window, which lies between two looks at memory."""

    _generating_s = 0.0
    of_the_window_s = 0.0

    def reset_peak_memory(self) -> None:
        super().reset_peak_memory()
        self._generating_s = 0.0

    def peak_memory_bytes(self) -> int | None:
        self.of_the_window_s = self._generating_s
        return super().peak_memory_bytes()

    def load(self) -> None:
        super().load()
        self._model.generate = self._timing(self._model.generate)

    def _timing(self, generate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timed(**asked: Any) -> torch.Tensor:
            began_s = time.perf_counter()
            tokens = generate(**asked)
            self._generating_s += time.perf_counter() - began_s
            return tokens

        return timed


def measured(asked: MeasurementConfig, directory: Path) -> tuple[float, float]:
    """Tokens per second, as the result has them, and the share of the window that was not within generate."""
    with open_instruments(None, "auto", CORE_POWER_W, torch.get_num_threads()) as instruments:
        engine = Timed(asked, "cpu")
        measurement = Measurement(
            asked, engine, instruments, baselines=directory / "baselines.json", series=directory / "series.parquet"
        )
        figures = measurement.run().figures
    tokens_per_s, window_s = figures["tokens_per_s"].value, figures["window_s"].value
    assert tokens_per_s is not None
    assert window_s is not None
    return tokens_per_s, 1 - engine.of_the_window_s / window_s


class Plain:
    """What one writes without us."""

    def __init__(self, asked: MeasurementConfig) -> None:
        from transformers import AutoModelForCausalLM, GPT2Config

        self._task, self._batch_size = asked.task, asked.batch_size
        self._model = AutoModelForCausalLM.from_config(GPT2Config(**MODEL), attn_implementation="sdpa").eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def tokens_per_s(self) -> float:
        shape = (self._task.n_prompts, self._task.input_tokens)
        batches = torch.randint(VOCABULARY, shape).split(self._batch_size)
        for batch in batches[:2]:
            self._generate(batch)
        began_s = time.perf_counter()
        tokens = sum(self._generate(batch) for batch in batches)
        return tokens / (time.perf_counter() - began_s)

    def _generate(self, batch: torch.Tensor) -> int:
        mask, new = torch.ones_like(batch), self._task.output_tokens
        return self._model.generate(batch, attention_mask=mask, max_new_tokens=new, do_sample=False).shape[0] * new


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cores = f"{os.cpu_count()} cores, {given.threads} in use, load {os.getloadavg()[0]:.1f}"
    print(f"{platform.machine()}, {cores}, GPT-2 of 4 layers and width 128, {given.prompts} prompts a turn")
    asked = config(given.prompts)
    plain, pairs, shares = Plain(asked), [], []
    with tempfile.TemporaryDirectory() as directory:
        measured(asked, Path(directory))  # what the first one loads and imports
        until_s = time.monotonic() + given.seconds
        while time.monotonic() < until_s:
            theirs = plain.tokens_per_s() if len(pairs) % 2 else None
            ours, share = measured(asked, Path(directory))
            pairs.append((ours, theirs or plain.tokens_per_s()))
            shares.append(share)
    for name, found in zip(("measured", "plainly"), zip(*pairs, strict=True), strict=True):
        print(f"{name:>8} | {statistics.median(found):.0f} tokens/s ({min(found):.0f} to {max(found):.0f})")
    ratios = [ours / theirs for ours, theirs in pairs]
    median = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"   ratio | {median:.3f} (half of {len(ratios)} pairs from {low:.3f} to {high:.3f})")
    beyond = f"{statistics.median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%})"
    print(f"  beyond | {beyond} of a window was not within generate")
    print(f"goal of 1 within {GOAL:.0%}: {'reached' if abs(median - 1) <= GOAL else 'NOT reached'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
