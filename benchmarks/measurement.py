"""Whether a measurement tells the tokens per second that one gets: its figure over that of a plain model.generate.

Both have a model of the same architecture with random weights, in the same process, turn by turn, each first every
other time, so that what else the machine does meets both. The measurement's sampler is at work, on an estimate where
there is no meter.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

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


def measured(asked: MeasurementConfig, directory: Path) -> float:
    """Tokens per second, as the result has them."""
    with open_instruments(None, "auto", CORE_POWER_W, torch.get_num_threads()) as instruments:
        engine = PytorchEngine(asked, "cpu")
        measurement = Measurement(
            asked, engine, instruments, baselines=directory / "baselines.json", series=directory / "series.parquet"
        )
        value = measurement.run().figures["tokens_per_s"].value
    assert value is not None
    return value


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
    plain, pairs = Plain(asked), []
    with tempfile.TemporaryDirectory() as directory:
        turns = {"measured": lambda: measured(asked, Path(directory)), "plainly": plain.tokens_per_s}
        turns["measured"]()  # what the first one loads and imports
        until_s = time.monotonic() + given.seconds
        while time.monotonic() < until_s:
            order = sorted(turns, reverse=bool(len(pairs) % 2))
            rates = {name: turns[name]() for name in order}
            pairs.append((rates["measured"], rates["plainly"]))
    for name, found in zip(("measured", "plainly"), zip(*pairs, strict=True), strict=True):
        print(f"{name:>8} | {statistics.median(found):.0f} tokens/s ({min(found):.0f} to {max(found):.0f})")
    ratios = [ours / theirs for ours, theirs in pairs]
    median = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"   ratio | {median:.3f} (half of {len(ratios)} pairs from {low:.3f} to {high:.3f})")
    best = max(ours for ours, _ in pairs) / max(theirs for _, theirs in pairs)
    print(f"   ratio | {best:.3f} of the best of each")
    print(f"goal of 1 within {GOAL:.0%}: {'reached' if abs(median - 1) <= GOAL else 'NOT reached'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
