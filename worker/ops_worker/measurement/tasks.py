"""The prompts of a task, as batches of tokens: random ones, or the lines of a file."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops_contract.measurements import Task


@dataclass(frozen=True)
class Batch:
    """`input_ids` and `attention_mask` are (prompts, length), padded on the left; `tokens_in` counts no padding."""

    input_ids: Tensor
    attention_mask: Tensor
    tokens_in: int

    @property
    def prompts(self) -> int:
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]


def batches(prompts: Iterable[Tensor], size: int, pad: int, device: str) -> list[Batch]:
    waiting = iter(prompts)
    found = []
    while together := list(islice(waiting, size)):
        found.append(_batch(together, pad, device))
    return found


def _batch(prompts: Sequence[Tensor], pad: int, device: str) -> Batch:
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return Batch(input_ids.to(device), mask.to(device), sum(len(prompt) for prompt in prompts))


def random_prompts(task: Task, vocabulary: int, special: Collection[int]) -> Sequence[Tensor]:
    """Each of `input_tokens`; the same ones for the same seed, whatever else was drawn in this process."""
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    if not len(ordinary):
        raise ValueError(f"all {vocabulary} tokens of the vocabulary are special: there is none to ask with")
    own = torch.Generator().manual_seed(task.seed)
    drawn = torch.randint(len(ordinary), (task.n_prompts, task.input_tokens), generator=own)
    return ordinary[drawn].unbind()


def lines(prompts_file: str) -> list[str]:
    """Its prompts; raises OSError where it cannot be read, ValueError where it has none or is no UTF-8."""
    text = Path(prompts_file).expanduser().read_text(encoding="utf-8")
    if found := [line for line in text.split("\n") if line.strip()]:
        return found
    raise ValueError("it has no prompt: every line is empty")


def prompts_of_file(task: Task, prompts_file: str, tokenizer: Any) -> list[Tensor]:
    """As many as the task wants, repeated from the first; what a prompt has beyond `input_tokens` is cut off."""
    read = lines(prompts_file)[: task.n_prompts]
    tokens = [tokenizer(line, truncation=True, max_length=task.input_tokens)["input_ids"] for line in read]
    return list(islice(cycle(torch.tensor(prompt) for prompt in tokens), task.n_prompts))
