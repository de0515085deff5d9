"""What runs a model, as a measurement sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ops_contract.measurements import FlopsRecord


@dataclass(frozen=True, slots=True)
class Generated:
    """What one batch came to; without padding, and without what follows an end of sequence."""

    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Checked:
    failures: Sequence[str] = ()
    warnings: Sequence[str] = ()


class Engine(Protocol):
    """Called by one thread, in this order; any exception of its own fails the measurement."""

    def check(self) -> Checked:
        """Whether it can be imported, its model reached, held in memory, and run as it is configured."""

    def environment(self) -> dict[str, Any]:
        """Versions, the model's config in short, the types and the attention that are really used; before `load`."""

    def load(self) -> None:
        """Weights and tokenised prompts on the device, and the compilation set up."""

    @property
    def batches(self) -> int:
        """Of the window; after `load`."""

    def prompts(self, batch: int) -> int:
        """How many batch number `batch` has."""

    def generate(self, batch: int) -> Generated:
        """Run batch number `batch` mod `batches` to its end, and wait for the device."""

    def first_token(self, batch: int) -> None:
        """The same batch, one new token only; waits for the device."""

    def reset_peak_memory(self) -> None: ...

    def peak_memory_bytes(self) -> int | None:
        """Of the device since the reset; on the CPU the process's, or None."""

    def flops(self, generated: Sequence[Generated]) -> FlopsRecord:
        """Of the window's batches. After the window, and may run the model."""

    def peak_flops_per_s(self) -> tuple[float | None, str]:
        """Of the device at this precision, with the source; None with why it is not known."""

    def close(self) -> None: ...
