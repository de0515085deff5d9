"""What sums of windows mean: useful, lost, overhead, and what stands beside them. Pure; whole microjoules throughout.

An entry is a row of `store.energy.entries`: what was summed of one quality and use, and what of it was done again.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ops_contract.energy import OVERHEAD, Quality, Use
from ops_contract.ledger import Joules, Shares, Unknown
from ops_contract.lifecycle import Outcome, Status
from ops_contract.operations import EnergyView

Entry = Mapping[str, Any]

MICRO: Final = 1e6
IN_SUMS: Final = (Quality.MEASURED, Quality.ESTIMATED)
# In the order in which they happen. A lost evaluation is lost, one that counts is overhead.
OVERHEAD_USES: Final = tuple(use for use in Use if use in OVERHEAD or use is Use.EVALUATE)
# Source and quality of what no meter measured: a key has no null.
UNMEASURED: Final = "none"
LIVE: Final = "live"
# Of an attempt that has used nothing, or not yet: the others' sum stands.
_NOTHING_YET: Final = (Unknown.NOT_STARTED, Unknown.NOT_YET)


@dataclass(frozen=True)
class Sum:
    """`known` and `unknown` count windows; a gap of an attempt counts as one that is unknown."""

    energy_uj: int = 0
    error_uj: int = 0
    known: int = 0
    unknown: int = 0
    without_error: int = 0
    reason: str | None = None

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(
            self.energy_uj + other.energy_uj,
            self.error_uj + other.error_uj,
            self.known + other.known,
            self.unknown + other.unknown,
            self.without_error + other.without_error,
            min((r for r in (self.reason, other.reason) if r is not None), default=None),
        )

    def joules(self) -> Joules:
        nothing_known = self.unknown > 0 and self.known == 0
        return Joules(
            energy_j=None if self.unknown else self.energy_uj / MICRO,
            known_j=None if nothing_known else self.energy_uj / MICRO,
            error_j=None if self.without_error or nothing_known else self.error_uj / MICRO,
            reason=self.reason if self.unknown else None,
        )


@dataclass
class Parts:
    """Entries put where they belong."""

    useful: Sum = field(default_factory=Sum)
    lost: Sum = field(default_factory=Sum)
    overhead: dict[Use, Sum] = field(default_factory=lambda: defaultdict(Sum))
    unattributed: Sum = field(default_factory=Sum)
    upper_bound: Sum = field(default_factory=Sum)
    qualities: set[str] = field(default_factory=set)

    def add(self, entry: Entry) -> None:
        kept, lost = kept_of(entry), lost_of(entry)
        if entry["quality"] == Quality.UPPER_BOUND:
            self.upper_bound += kept + lost
            if not entry["partly_shared"]:
                return
            # The sums have this device at other times: what it used at these is missing there.
            kept, lost = (_unknown(part, Unknown.SHARED_DEVICE) for part in (kept, lost))
        elif entry["quality"] in IN_SUMS:
            self.qualities.add(entry["quality"])
        if entry["use"] == Use.UNATTRIBUTED:
            self.unattributed += kept
            return
        self.lost += lost
        if entry["use"] == Use.TRAIN:
            self.useful += kept
        else:
            self.overhead[Use(entry["use"])] += kept

    def add_gap(self, reason: str) -> None:
        """Of an attempt nothing that belongs into the sums is known."""
        gap = Sum(unknown=1, reason=reason)
        self.useful += gap
        self.lost += gap
        for use in OVERHEAD_USES:
            self.overhead[use] += gap

    def shares(self) -> Shares:
        overhead = sum(self.overhead.values(), Sum())
        total = self.useful + self.lost + overhead
        nothing = Sum(unknown=1, reason=total.reason) if total.unknown and not total.known else None
        # Where nothing is known, a part without windows is no zero either.
        return Shares(
            quality=self._quality(),
            total=(nothing or total).joules(),
            useful=(nothing or self.useful).joules(),
            lost=(nothing or self.lost).joules(),
            overhead=(nothing or overhead).joules(),
            overhead_by_use={use: (nothing or self.overhead[use]).joules() for use in OVERHEAD_USES},
            unattributed=_beside(self.unattributed),
            upper_bound=_beside(self.upper_bound),
        )

    def _quality(self) -> Quality | None:
        """The worst in the sums; without any, that of what stands beside them."""
        if self.qualities:
            return Quality.ESTIMATED if Quality.ESTIMATED in self.qualities else Quality.MEASURED
        return Quality.UPPER_BOUND if self.upper_bound.known else None


def of_operation(entries: Sequence[Entry], outcomes: Sequence[str]) -> Shares:
    """`outcomes` of its attempts, LIVE for one that has not ended."""
    gaps = {gap for n, outcome in enumerate(outcomes, 1) if (gap := _gap(_of(entries, n), outcome))}
    missing = gaps.difference(_NOTHING_YET)
    if not missing and not any(_in_sums(entry) for entry in entries):
        missing = {Unknown.NOT_YET if Unknown.NOT_YET in gaps else Unknown.NOT_STARTED}
    return account(entries, missing)


def of_attempt(entries: Sequence[Entry], number: int, outcome: str) -> Shares:
    mine = _of(entries, number)
    gap = _gap(mine, outcome)
    return account(mine, {gap} if gap else ())


def account(entries: Iterable[Entry], gaps: Iterable[str] = ()) -> Shares:
    made = Parts()
    for entry in entries:
        made.add(entry)
    for gap in gaps:
        made.add_gap(gap)
    return made.shares()


def view(entries: Sequence[Entry], outcomes: Sequence[str], status: str) -> EnergyView:
    """The status of an operation has the figures alone."""
    shares = of_operation(entries, outcomes)
    return EnergyView(
        total_j=shares.total.energy_j,
        known_j=shares.total.known_j,
        error_j=shares.total.error_j,
        useful_j=shares.useful.energy_j,
        lost_j=shares.lost.energy_j,
        overhead_j=shares.overhead.energy_j,
        unattributed_j=shares.unattributed.known_j if shares.unattributed else None,
        upper_bound_j=shares.upper_bound.known_j if shares.upper_bound else None,
        quality=shares.quality,
        provisional=is_provisional(status),
        reason=shares.total.reason,
    )


def is_provisional(status: str) -> bool:
    return status != Status.COMPLETED


def joules(energy_uj: int | None) -> float | None:
    return None if energy_uj is None else energy_uj / MICRO


def kept_of(entry: Entry) -> Sum:
    unknown = entry["unknown"] - entry["lost_unknown"] + entry["split_unknown"]
    windows = entry["windows"] - entry["lost_windows"] + entry["split_windows"]
    return Sum(
        energy_uj=entry["energy_uj"] - entry["lost_energy_uj"],
        error_uj=entry["error_uj"] - entry["lost_error_uj"] + entry["split_error_uj"],
        known=windows - unknown,
        unknown=unknown,
        without_error=entry["without_error"] - entry["lost_without_error"],
        reason=entry["reason"] if unknown else None,
    )


def lost_of(entry: Entry) -> Sum:
    return Sum(
        energy_uj=entry["lost_energy_uj"],
        error_uj=entry["lost_error_uj"] + entry["split_error_uj"],
        known=entry["lost_windows"] - entry["lost_unknown"],
        unknown=entry["lost_unknown"],
        without_error=entry["lost_without_error"],
        reason=entry["reason"] if entry["lost_unknown"] else None,
    )


def _unknown(part: Sum, reason: str) -> Sum:
    windows = part.known + part.unknown
    return Sum(unknown=windows, reason=reason) if windows else Sum()


def _beside(part: Sum) -> Joules | None:
    return part.joules() if part.known or part.unknown else None


def _in_sums(entry: Entry) -> bool:
    return entry["quality"] in IN_SUMS and entry["use"] != Use.UNATTRIBUTED


def _of(entries: Iterable[Entry], number: int) -> list[Entry]:
    return [entry for entry in entries if entry["attempt"] == number]


def _gap(entries: Sequence[Entry], outcome: str) -> str | None:
    """Why nothing of an attempt is in the sums; None when something is."""
    if any(_in_sums(entry) for entry in entries):
        return None
    if any(entry["quality"] == Quality.UPPER_BOUND for entry in entries):
        return Unknown.SHARED_DEVICE
    if reasons := [entry["reason"] for entry in entries if entry["reason"]]:
        return str(min(reasons))
    return {LIVE: Unknown.NOT_YET, Outcome.REFUSED: Unknown.NOT_STARTED}.get(outcome, Unknown.NOT_MEASURED)
