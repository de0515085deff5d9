"""What a measurement asks of the engine that runs the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ops_contract.measurements import FlopsRecord


@dataclass(frozen=True)
class Generated:
    """What one batch came to; without padding, and without what follows an end of sequence."""

    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Checked:
    failures: Sequence[str]
    warnings: Sequence[str]


class Engine(Protocol):
    def check(self) -> Checked: ...

    def environment(self) -> dict[str, Any]: ...

    def load(self) -> None: ...

    @property
    def batches(self) -> int: ...

    def prompts(self, batch: int) -> int: ...

    def generate(self, batch: int) -> Generated: ...

    def first_token(self, batch: int) -> None: ...

    def reset_peak_memory(self) -> None: ...

    def peak_memory_bytes(self) -> int | None: ...

    def flops(self, generated: Sequence[Generated]) -> FlopsRecord: ...

    def peak_flops_per_s(self) -> tuple[float | None, str]: ...

    def close(self) -> None: ...
