"""Reads every meter on a thread of its own, and answers what a device used between two moments."""

from ops_contract.energy import DeviceNow
from ops_worker.energy.meters import Measured


class Sampler:
    """Reads every meter every `interval_s` on a thread of its own; keeps the readings of a bounded time."""

    def between(self, device: str, since_s: float, until_s: float) -> Measured | None:
        """What it used between two moments of CLOCK_MONOTONIC. None: not yet, no reading lies after `until_s`."""
        raise NotImplementedError

    def counter(self, device: str, at_s: float) -> float | None:
        """The hardware's own counter at that moment, in joules, for who comes after this process.

        None where there is none, or none that can be told after its wrap. It starts anew with the driver or the host.
        """
        raise NotImplementedError

    def baseline_w(self, device: str) -> float | None:
        """What it takes when nobody uses it; None until that was seen."""
        raise NotImplementedError

    def note_busy(self, device: str) -> None:
        """A hold has it: no baseline is learnt."""
        raise NotImplementedError

    def note_idle(self, device: str) -> None:
        """Nobody holds it any more."""
        raise NotImplementedError

    def now(self) -> list[DeviceNow]:
        """The GPUs, as last read; for the heartbeat."""
        raise NotImplementedError
