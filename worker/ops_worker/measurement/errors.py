"""How a measurement fails."""

from collections.abc import Sequence

from ops_contract.measurements import MeasurementPhase


class PreFlightError(Exception):
    """What keeps it from starting: all of it, so that it is mended at once."""

    def __init__(self, failures: Sequence[str], warnings: Sequence[str] = ()) -> None:
        super().__init__("; ".join(failures))
        self.failures = list(failures)
        self.warnings = list(warnings)


class BackendError(Exception):
    """The engine failed, in `phase`; `cause` is what it raised."""

    def __init__(self, phase: MeasurementPhase, cause: Exception) -> None:
        super().__init__(f"the engine failed in phase {phase}: {type(cause).__name__}: {cause}")
        self.phase = phase
        self.cause = cause
