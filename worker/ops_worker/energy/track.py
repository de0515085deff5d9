"""What was read of one device, and what it says of an interval."""

import bisect
import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ops_contract.energy import DeviceState, Source
from ops_worker.energy.meters import Measured, Meter, MeterLost, Reading
from ops_worker.energy.nvml import THROTTLE_REASONS, Look

# Everything is kept this long, and then a point each COARSE_S for a day.
KEEP_S = 300.0
COARSE_S = 10.0
COARSE_KEPT = 8640
# A counter of hardware that has not moved for so long hangs: not even an idle device takes nothing.
STUCK_S = 5.0
STUCK = "counter_stuck"
# Beyond such a pause between two readings, what lies between them is not known: power is only known where it was read,
# and a package's counter begins again, perhaps more than once.
MAX_PAUSE_S = {Source.NVML_POWER: 2.0, Source.RAPL: 60.0}
# Reading may fail for this long before that counts.
PATIENCE_S = 3.0
LATEST = 256


@dataclass(frozen=True, slots=True)
class Point:
    """At `at_s` the meter was seen to stand at `energy_j`; until `still_s` it was seen to stand where it had before.

    `unknown`: why what lies between the point before and this one cannot be told.
    """

    still_s: float
    at_s: float
    energy_j: float
    unknown: str | None = None


@dataclass(frozen=True, slots=True)
class Edge:
    """The cumulative joules at a moment, and the most by which they may be wrong."""

    energy_j: float
    error_j: float


class Track:
    """The readings of one meter, all of them for `keep_s`."""

    def __init__(self, meter: Meter, keep_s: float = KEEP_S) -> None:
        self.meter = meter
        self._keep_s = keep_s
        self.lost: MeterLost | None = None
        self._lost_since_s = 0.0
        self._read_at_s: float | None = None  # the last reading
        self._points: deque[Point] = deque()
        self._coarse: deque[Point] = deque(maxlen=COARSE_KEPT)
        self._edges: dict[float, Edge] = {}

    def add(self, reading: Reading) -> None:
        last, before_s = (self._points[-1] if self._points else None), self._read_at_s
        self._read_at_s = reading.at_s
        unknown = self._unknown_before(reading, before_s)
        self.lost = None
        if last is None or before_s is None:
            self._points.append(Point(reading.at_s, reading.at_s, reading.energy_j))
        elif not self._in_ticks:
            self._points.append(Point(reading.at_s, reading.at_s, reading.energy_j, unknown))
        elif unknown or reading.energy_j != last.energy_j:
            # What it shows when it moves again may be of the time in which it did not.
            stuck = last.unknown if last.unknown == STUCK else None
            self._points.append(Point(before_s, reading.at_s, reading.energy_j, unknown or stuck))
        elif reading.at_s - last.at_s >= STUCK_S:
            self._points.append(Point(reading.at_s, reading.at_s, reading.energy_j, STUCK))
        self._thin(reading.at_s)

    def fail(self, loss: MeterLost, at_s: float) -> bool:
        """The meter did not answer; whether that is news. What it says first stands until it answers again."""
        if self.lost is not None and self.lost.reason != "read_failed":
            return False
        news = self.lost is None or self.lost.reason != loss.reason
        if self.lost is None:
            self._lost_since_s = at_s
        self.lost = loss
        return news

    def between(self, since_s: float, until_s: float, now_s: float) -> Measured | None:
        if self._read_at_s is None or self._read_at_s < until_s or not self._passed(until_s):
            return self._not_coming(until_s, now_s)
        first = self._coarse[0] if self._coarse else self._points[0]
        if since_s < first.still_s:
            return Measured(None, reason="not_sampled")
        points = self._around(since_s, until_s)
        if reason := next((p.unknown for p in points[1:] if p.unknown), None):
            return Measured(None, reason=reason)
        since, until = self._edge(since_s), self._edge(until_s)
        return Measured(max(0.0, until.energy_j - since.energy_j), error_j=since.error_j + until.error_j)

    def at(self, at_s: float) -> float | None:
        """The cumulative joules at a moment that is kept, and has passed."""
        first = self._coarse[0] if self._coarse else self._points[0] if self._points else None
        if first is None or at_s < first.still_s or not self._passed(at_s):
            return None
        return self._edge(at_s).energy_j

    def ticks(self, since_s: float, until_s: float) -> int | None:
        """How often it was seen to move in an interval that is kept in full; None where it does not move in ticks."""
        if not self._in_ticks:
            return None
        pairs = itertools.pairwise(self._points)
        return sum(since_s < new.at_s <= until_s and new.energy_j != old.energy_j for old, new in pairs)

    @property
    def last(self) -> Point | None:
        return self._points[-1] if self._points else None

    @property
    def power_w(self) -> float | None:
        """Between its last two points."""
        if len(self._points) < 2 or self.lost is not None or self._points[-1].unknown:
            return None
        before, last = self._points[-2], self._points[-1]
        return (last.energy_j - before.energy_j) / (last.at_s - before.at_s) if last.at_s > before.at_s else None

    @property
    def _in_ticks(self) -> bool:
        return self.meter.source in (Source.NVML_COUNTER, Source.RAPL)

    def _unknown_before(self, reading: Reading, before_s: float | None) -> str | None:
        if before_s is None:
            return None
        if self.lost is not None and not (self.lost.reason == "read_failed" and self._in_ticks):
            return self.lost.reason
        pause_s = MAX_PAUSE_S.get(self.meter.source)
        return "not_sampled" if pause_s is not None and reading.at_s - before_s > pause_s else None

    def _passed(self, at_s: float) -> bool:
        """Whether a point is known on each side: a counter that moves in ticks shows what it was by its next one."""
        return bool(self._points) and self._points[-1].still_s >= at_s

    def _not_coming(self, until_s: float, now_s: float) -> Measured | None:
        """None: it may still come."""
        if self.lost is not None:
            lost_for_s = now_s - self._lost_since_s
            if self.lost.reason != "read_failed" or lost_for_s > PATIENCE_S:
                return Measured(None, reason=self.lost.reason)
        # A call that does not return: nothing else is read either.
        if now_s - max(until_s, self._read_at_s or until_s) > 2 * STUCK_S:
            return Measured(None, reason="meter_hangs")
        return None

    def _around(self, since_s: float, until_s: float) -> list[Point]:
        """From the last point that is not after `since_s` to the first that is not before `until_s`."""
        points = self._since(since_s)
        begin = max(0, bisect.bisect_right(points, since_s, key=lambda p: p.at_s) - 1)
        end = bisect.bisect_left(points, until_s, key=lambda p: p.at_s)
        return points[begin : end + 1]

    def _since(self, at_s: float) -> list[Point]:
        """All that are kept of the time from there on, and some of before."""
        is_coarse = bool(self._coarse) and at_s < self._points[0].at_s
        return [*self._coarse, *self._points] if is_coarse else list(self._points)

    def _edge(self, at_s: float) -> Edge:
        """Kept: what ends one window begins the next, and must be the same though points were dropped meanwhile."""
        edge = self._edges.get(at_s)
        if edge is None:
            edge = self._edges[at_s] = self._interpolated(at_s)
            if len(self._edges) > LATEST:
                del self._edges[next(iter(self._edges))]
        return edge

    def _interpolated(self, at_s: float) -> Edge:
        """On the line between the moments at which the meter was seen to have moved.

        The truth lies between the figure last seen and that of the first tick which is known to be later.
        """
        points = self._since(at_s)
        after = bisect.bisect_left(points, at_s, key=lambda p: p.at_s)
        bound = points[min(bisect.bisect_left(points, at_s, key=lambda p: p.still_s), len(points) - 1)]
        right = points[min(after, len(points) - 1)]
        left = points[max(after - 1, 0)] if right.at_s > at_s else right
        if right.at_s <= left.at_s:
            return Edge(left.energy_j, max(0.0, bound.energy_j - left.energy_j))
        part = (at_s - left.at_s) / (right.at_s - left.at_s)
        moved_j = right.energy_j - left.energy_j
        return Edge(left.energy_j + part * moved_j, max(abs(moved_j), bound.energy_j - left.energy_j))

    def _thin(self, now_s: float) -> None:
        while len(self._points) > 2 and self._points[1].at_s < now_s - self._keep_s:
            old = self._points.popleft()
            if not self._coarse or old.unknown or old.at_s - self._coarse[-1].at_s >= COARSE_S:
                self._coarse.append(old)


@dataclass(slots=True)
class Span:
    """How a GPU was from `since_s` to `until_s`: maxima, means over the time, and how long each reason slowed it."""

    since_s: float
    until_s: float
    look: Look
    throttled_s: dict[int, float]
    shared: bool

    @classmethod
    def of(cls, since_s: float, until_s: float, look: Look, shared: bool) -> "Span":
        bits = look.throttle or 0
        throttled_s = {bit: until_s - since_s for bit in THROTTLE_REASONS if bits & bit} if bits else _NOTHING
        return cls(since_s, until_s, look, throttled_s, shared)


_NOTHING: dict[int, float] = {}


@dataclass(frozen=True, slots=True)
class Slowed:
    """A GPU was slowed from `since_s` to `until_s`, for all of the `reasons`: bits of NVML."""

    since_s: float
    until_s: float
    reasons: int


class States:
    """How one GPU was, over time; every change for `keep_s`."""

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._keep_s = keep_s
        self._spans: deque[Span] = deque()
        self._coarse: deque[Span] = deque(maxlen=COARSE_KEPT)
        self._old: list[Span] = []

    def add(self, span: Span) -> None:
        last = self._spans[-1] if self._spans else None
        if (
            last is not None
            and (last.look, last.shared, last.until_s) == (span.look, span.shared, span.since_s)
            and span.until_s - last.since_s < COARSE_S
        ):
            self._spans[-1] = Span.of(last.since_s, span.until_s, span.look, span.shared)
            return
        self._spans.append(span)
        while self._spans[0].until_s < span.until_s - self._keep_s:
            self._old.append(self._spans.popleft())
            if self._old[-1].until_s - self._old[0].since_s >= COARSE_S:
                self._coarse.append(_merged(self._old))
                self._old = []

    def between(self, since_s: float, until_s: float) -> Span | None:
        """None where nothing was seen in it."""
        found: list[Span] = []
        for spans in (reversed(self._spans), reversed(self._old), reversed(self._coarse)):
            for span in spans:
                if span.until_s <= since_s:
                    break
                if span.since_s < until_s:
                    found.append(_clipped(span, since_s, until_s))
        return _merged(found) if found else None

    def slowed(self, since_s: float, until_s: float) -> list[Slowed] | None:
        """When it was slowed in an interval that is kept in full; None where it does not say."""
        inside = [span for span in self._spans if span.since_s < until_s and span.until_s > since_s]
        if all(span.look.throttle is None for span in inside):
            return None
        return [
            Slowed(max(span.since_s, since_s), min(span.until_s, until_s), span.look.throttle)
            for span in inside
            if span.look.throttle
        ]


def state_of(span: Span) -> DeviceState:
    look = span.look
    says = look.throttle is not None
    return DeviceState(
        power_max_w=look.power_w,
        temperature_max_c=look.temperature_c,
        sm_clock_mean_mhz=look.sm_clock_mhz,
        utilization_mean_percent=look.utilization_percent,
        memory_used_max_bytes=look.memory_used_bytes,
        throttled_s={THROTTLE_REASONS[bit]: s for bit, s in sorted(span.throttled_s.items())} if says else {},
    )


def _clipped(span: Span, since_s: float, until_s: float) -> Span:
    since, until = max(span.since_s, since_s), min(span.until_s, until_s)
    part = (until - since) / (span.until_s - span.since_s)
    if part >= 1:
        return span
    return Span(since, until, span.look, {bit: s * part for bit, s in span.throttled_s.items()}, span.shared)


def _merged(spans: list[Span]) -> Span:
    throttled_s: dict[int, float] = {}
    for span in spans:
        for bit, seconds in span.throttled_s.items():
            throttled_s[bit] = throttled_s.get(bit, 0.0) + seconds
    looks, bits = [span.look for span in spans], [s.look.throttle for s in spans if s.look.throttle is not None]
    memory = _max(look.memory_used_bytes for look in looks)
    return Span(
        min(span.since_s for span in spans),
        max(span.until_s for span in spans),
        Look(
            _max(look.power_w for look in looks),
            _max(look.temperature_c for look in looks),
            _mean((look.sm_clock_mhz, span) for look, span in zip(looks, spans, strict=True)),
            _mean((look.utilization_percent, span) for look, span in zip(looks, spans, strict=True)),
            None if memory is None else int(memory),
            bits[-1] if bits else None,
        ),
        throttled_s,
        any(span.shared for span in spans),
    )


def _max(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _mean(values: Iterable[tuple[float | None, Span]]) -> float | None:
    """Over the time."""
    known = [(value, span.until_s - span.since_s) for value, span in values if value is not None]
    total_s = sum(seconds for _, seconds in known)
    return sum(value * seconds for value, seconds in known) / total_s if total_s > 0 else None
