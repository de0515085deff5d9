"""The ledger of an operation as its readers see it, from what `store.energy` has read. Pure."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row

from ops_backend.store.ledger import (
    IN_SUMS,
    MICRO,
    UNMEASURED,
    Entry,
    Sum,
    account,
    is_provisional,
    of_attempt,
    of_operation,
)
from ops_contract.energy import Use
from ops_contract.ledger import (
    AboveIdle,
    AttemptEnergy,
    Carbon,
    Cost,
    DeviceEnergy,
    EnergyLedger,
    EpochEnergy,
    PerWork,
    Shares,
    Throttling,
    Unknown,
)

EPOCHS: Final = 1000
J_PER_KWH: Final = 3.6e6

Figures = Sequence[Mapping[Any, Any]]
Slowed = Sequence[Row[Any]]


@dataclass(frozen=True)
class Account:
    """An operation, the outcomes of its attempts, and its entries by their whole key."""

    id: UUID
    status: str
    outcomes: Sequence[str]
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Rates:
    """As configured; None where nobody did."""

    carbon_g_per_kwh: float | None = None
    price_per_kwh: float | None = None
    currency: str | None = None


@dataclass(frozen=True)
class Work:
    """What was trained, each step counted once however many devices measured it."""

    steps: int
    lost_steps: int
    units: int


def whole(of: Account, devices: Figures, throttled: Slowed, epochs: Figures, rates: Rates) -> EnergyLedger:
    shares = of_operation(of.entries, of.outcomes)
    return EnergyLedger(
        **dict(shares),
        operation_id=of.id,
        provisional=is_provisional(of.status),
        per_work=_per_work(shares, work(of.entries)),
        above_idle=_above_idle(shares, devices),
        carbon=_carbon(shares, rates),
        cost=_cost(shares, rates),
        thermal_throttle=_throttling(devices, throttled),
        attempts=[_attempt(of.entries, number, outcome) for number, outcome in enumerate(of.outcomes, 1)],
        epochs=_epochs(of.entries, epochs),
        epochs_left_out=max(0, epochs[-1]["epoch"] + 1 - EPOCHS) if epochs else 0,
        devices=[_device(row, throttled) for row in devices],
    )


def work(entries: Iterable[Entry]) -> Work:
    """All devices of an attempt measure the same steps and units, also those of a gang's other members."""
    trained = [entry for entry in entries if entry["use"] == Use.TRAIN]

    def total(of: Callable[[Entry], int]) -> int:
        """Over the attempts, of each the most that one device has."""
        on_device = defaultdict[tuple[int, str, str], int](int)
        for entry in trained:
            on_device[_place(entry)] += of(entry)
        most = defaultdict[int, int](int)
        for (attempt, _, _), value in on_device.items():
            most[attempt] = max(most[attempt], value)
        return sum(most.values())

    return Work(
        steps=total(lambda e: e["steps"] - e["lost_steps"]),
        lost_steps=total(lambda e: int(e["lost_steps"])),
        units=total(lambda e: e["units"] - e["lost_units"]),
    )


def _per_work(shares: Shares, done: Work) -> PerWork:
    nothing = None if done.units else Unknown.NO_UNITS if done.steps else Unknown.NO_STEPS
    return PerWork(
        steps=done.steps,
        units=done.units,
        per_step_j=_by(shares.useful.energy_j, done.steps),
        per_unit_j=_by(shares.useful.energy_j, done.units),
        reason=shares.useful.reason or nothing,
    )


def _above_idle(shares: Shares, devices: Figures) -> AboveIdle:
    in_sums = [row for row in devices if row["quality"] in IN_SUMS]
    reason = shares.total.reason
    if reason is None and any(row["without_baseline"] for row in in_sums):
        reason = Unknown.NO_BASELINE
    if reason is not None or shares.total.energy_j is None:
        return AboveIdle(energy_j=None, idle_j=None, reason=reason)
    idle_j = sum(row["baseline_uj"] or 0 for row in in_sums) / MICRO
    return AboveIdle(energy_j=shares.total.energy_j - idle_j, idle_j=idle_j, reason=None)


def _carbon(shares: Shares, rates: Rates) -> Carbon:
    per_kwh = rates.carbon_g_per_kwh
    co2_g, reason = _times(shares, per_kwh)
    return Carbon(co2_g=co2_g, g_per_kwh=per_kwh, reason=reason)


def _cost(shares: Shares, rates: Rates) -> Cost:
    amount, reason = _times(shares, rates.price_per_kwh)
    return Cost(amount=amount, currency=rates.currency, price_per_kwh=rates.price_per_kwh, reason=reason)


def _times(shares: Shares, per_kwh: float | None) -> tuple[float | None, str | None]:
    if per_kwh is None:
        return None, Unknown.NOT_CONFIGURED
    if shares.total.energy_j is None:
        return None, shares.total.reason
    return shares.total.energy_j / J_PER_KWH * per_kwh, None


def _throttling(devices: Figures, throttled: Slowed) -> Throttling:
    if not any(row["has_state"] for row in devices):
        return Throttling(throttled_s=None, reason=Unknown.NOT_TOLD)
    longest_us = defaultdict[str, int](int)
    for row in throttled:
        longest_us[row.reason] += int(row.longest_us)
    return Throttling(throttled_s={reason: us / MICRO for reason, us in sorted(longest_us.items())}, reason=None)


def _attempt(entries: Sequence[Entry], number: int, outcome: str) -> AttemptEnergy:
    mine = [entry for entry in entries if entry["attempt"] == number]
    done = work(mine)
    return AttemptEnergy(
        **dict(of_attempt(entries, number, outcome)),
        number=number,
        duration_s=_longest_us(mine) / MICRO if mine else None,
        steps=done.steps,
        lost_steps=done.lost_steps,
        units=done.units,
    )


def _epochs(entries: Sequence[Entry], rows: Figures) -> list[EpochEnergy]:
    shared = {_place(entry) for entry in entries if entry["partly_shared"]}
    return [
        _epoch(epoch, [dict(row) | {"partly_shared": _place(row) in shared} for row in its])
        for epoch, its in groupby(rows, key=lambda row: int(row["epoch"]))
    ]


def _epoch(epoch: int, entries: Sequence[Entry]) -> EpochEnergy:
    measured = any(entry["quality"] in IN_SUMS for entry in entries)
    reasons = {entry["reason"] or Unknown.SHARED_DEVICE for entry in entries}
    shares, done = account(entries, () if measured else reasons), work(entries)
    return EpochEnergy(
        epoch=epoch,
        total_j=shares.total.energy_j,
        known_j=shares.total.known_j,
        useful_j=shares.useful.energy_j,
        lost_j=shares.lost.energy_j,
        overhead_j=shares.overhead.energy_j,
        reason=shares.total.reason,
        duration_s=sum(_longest_us(its) for its in _by_attempt(entries)) / MICRO,
        steps=done.steps,
        units=done.units,
        per_step_j=_by(shares.useful.energy_j, done.steps),
        per_unit_j=_by(shares.useful.energy_j, done.units),
    )


def _device(row: Mapping[Any, Any], throttled: Slowed) -> DeviceEnergy:
    key = (row["device"], row["incarnation"], row["source"], row["quality"])
    mine = (t for t in throttled if (t.device, t.incarnation, t.source, t.quality) == key)
    energy = Sum(
        energy_uj=row["energy_uj"],
        error_uj=row["error_uj"],
        known=row["windows"] - row["unknown"],
        unknown=row["unknown"],
        without_error=row["without_error"],
        reason=row["reason"],
    )
    return DeviceEnergy(
        device=row["device"],
        worker=row["worker"],
        worker_id=row["incarnation"],
        source=None if row["source"] == UNMEASURED else row["source"],
        quality=None if row["quality"] == UNMEASURED else row["quality"],
        energy=energy.joules(),
        duration_s=row["duration_us"] / MICRO,
        power_mean_w=row["energy_uj"] / row["known_us"] if row["known_us"] else None,
        baseline_w=row["baseline_w"],
        throttled_s={t.reason: t.throttled_us / MICRO for t in mine} if row["has_state"] else None,
        power_max_w=row["power_max_w"],
        temperature_max_c=row["temperature_max_c"],
        sm_clock_mean_mhz=row["sm_clock_mean_mhz"],
        utilization_mean_percent=row["utilization_mean_percent"],
        memory_used_max_bytes=row["memory_used_max_bytes"],
    )


def _place(entry: Entry) -> tuple[int, str, str]:
    return entry["attempt"], str(entry["incarnation"]), entry["device"]


def _longest_us(entries: Iterable[Entry]) -> int:
    """Of an attempt: all its devices measure the same time."""
    on_device = defaultdict[tuple[int, str, str], int](int)
    for entry in entries:
        on_device[_place(entry)] += entry["duration_us"]
    return max(on_device.values(), default=0)


def _by_attempt(entries: Iterable[Entry]) -> list[list[Entry]]:
    return [list(its) for _, its in groupby(entries, key=lambda entry: int(entry["attempt"]))]


def _by(useful_j: float | None, number: int) -> float | None:
    return None if useful_j is None or not number else useful_j / number
