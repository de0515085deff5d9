"""What a training's time goes to, for the joules: the agent measures, but only the training knows what it did."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ops_contract.energy import Use
from ops_contract.lifecycle import Phase
from ops_contract.pipe import Mark
from relight.training.reporting import Sink
from relight.training.state import Cursor


class Marks:
    """Called by the training thread, where it flushes, and where it begins with something else.

    `epoch` is that of the steps that run, once there are any.
    """

    def __init__(self, sink: Sink, device: torch.device) -> None:
        self.epoch: int | None = None
        self._sink = sink
        self._device = device
        self._use = Use.STARTUP
        self._units = 0

    def add(self, units: int) -> None:
        """Samples or tokens that were trained on."""
        self._units += units

    def mark(self, cursor: Cursor, then: Use | None = None, edge: bool = False) -> None:
        """Until now it was what it was; from here on it is `then`, or goes on. Before a checkpoint's report, `edge`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what was asked of it is done only then
        use, self._use = self._use, then or self._use
        units, self._units = self._units, 0
        # In phase EVALUATE the cursor's step is updated already: what is next to train is the one after it.
        step = cursor.step + (cursor.phase is Phase.EVALUATE)
        self._sink.mark(
            Mark(
                at_s=time.monotonic(),
                use=use,
                then=self._use,
                step=step,
                epoch=self.epoch,
                units=units,
                edge=edge,
            )
        )

    @contextmanager
    def doing(self, use: Use, cursor: Cursor, then: Use | None = None, edge: bool = False) -> Iterator[None]:
        """For what comes between, however it ends; after it what was before, or `then`."""
        then = then or self._use
        self.mark(cursor, then=use, edge=edge)
        try:
            yield
        finally:
            self.mark(cursor, then=then)
