"""What Prometheus reads: what this process counts, and what the database says at the moment of the scrape."""

from collections import Counter
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Histogram, Info, disable_created_metrics
from prometheus_client import Counter as Total
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ops_backend.store.energy import Booked
from ops_backend.store.gauges import Gauges
from ops_contract.lifecycle import TERMINAL, Status
from ops_contract.reports import Metrics, Report
from ops_contract.wire import API_PREFIX

DISPATCH_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
ANSWER_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
OUTCOMES = ("accepted", "refused", "unanswered")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
NO_ROUTE = "none"
# Of what workers told with their last heartbeat.
GPU_GAUGES = (
    ("power_watts", "What it draws.", "power_w"),
    ("power_limit_watts", "What it may draw.", "power_limit_w"),
    ("temperature_celsius", "Of the GPU itself.", "temperature_c"),
    ("utilization_percent", "Of the time in which a kernel ran.", "utilization_percent"),
    ("memory_used_bytes", "By whatever uses it.", "memory_used_bytes"),
    ("memory_total_bytes", "What it has.", "memory_total_bytes"),
)


class Telemetry:
    """One an app. No label names an operation: what it can say is bounded by routes and workers."""

    def __init__(self, version: str) -> None:
        # A second series for every one of ours, which Prometheus makes no use of; the library has one switch for all.
        disable_created_metrics()  # type: ignore[no-untyped-call] # as the library has it
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("relight_build", "The version that runs.", registry=registry).info({"version": version})
        self._dispatch = Histogram(
            "relight_dispatch_seconds",
            "From the moment an operation was due to a worker's answer to it.",
            ["outcome"],
            buckets=DISPATCH_S,
            registry=registry,
        )
        self._ended = Total(
            "relight_operations_ended",
            "Operations that this process saw completed, failed or cancelled.",
            ["status"],
            registry=registry,
        )
        self._expiries = Total(
            "relight_lease_expiries", "Attempts ended because their worker fell silent.", registry=registry
        )
        self._reports = Total(
            "relight_reports", "Reports of workers, accepted for the first time.", ["kind"], registry=registry
        )
        self._points = Total("relight_metric_points", "Points of metrics in accepted reports.", registry=registry)
        self._requests = Total(
            "relight_http_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self._answers = Histogram(
            "relight_http_request_duration_seconds",
            "From a request to the beginning of its answer.",
            ["method", "route"],
            buckets=ANSWER_S,
            registry=registry,
        )
        self._joules = Total(
            "relight_energy_joules",
            "What devices used for operations, as workers booked it; upper bounds are no part of a sum.",
            ["worker", "device", "quality", "use"],
            registry=registry,
        )
        self._answered: dict[tuple[str, str, int], tuple[Total, Histogram]] = {}
        self._begin_at_zero()

    def dispatched(self, outcome: str, seconds: float) -> None:
        self._dispatch.labels(outcome).observe(max(0.0, seconds))

    def moved(self, status: Status | None) -> None:
        """After the commit of what may have ended an operation."""
        if status in TERMINAL:
            self._ended.labels(status).inc()

    def lost(self, status: Status) -> None:
        self._expiries.inc()
        self.moved(status)

    def accepted(self, reports: Iterable[Report]) -> None:
        for report in reports:
            self._reports.labels(report.kind).inc()
            if isinstance(report, Metrics):
                self._points.inc(sum(len(series.steps) for series in report.series))

    def booked(self, windows: Iterable[Booked]) -> None:
        for new in windows:
            self._joules.labels(new.worker, new.device, new.quality, new.use).inc(new.energy_j)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """`route` without the prefix, and never the path: that has ids."""
        key = method, route, status
        if (series := self._answered.get(key)) is None:
            series = self._answered[key] = self._requests.labels(*key), self._answers.labels(method, route)
        series[0].inc()
        series[1].observe(seconds)

    def render(self, accept: str, found: Gauges | None) -> tuple[bytes, str]:
        """Body and content type; without what the database would have said where it is away."""
        encode, content_type = choose_encoder(accept)
        return encode(_Scrape(self._registry, found)), content_type

    def _begin_at_zero(self) -> None:
        """A series that appears with its first event hides that event from rate()."""
        for outcome in OUTCOMES:
            self._dispatch.labels(outcome)
        for status in TERMINAL:
            self._ended.labels(status)
        for model in get_args(get_args(Report)[0]):
            self._reports.labels(model.model_fields["kind"].default)


class CountRequests:
    """Plain ASGI: every poll of a status goes through it."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began_s, begun = perf_counter(), False

        async def watch(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._count(scope, message["status"], perf_counter() - began_s)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            if not begun:  # it becomes a 500 further out
                self._count(scope, 500, perf_counter() - began_s)
            raise

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", NO_ROUTE).removeprefix(API_PREFIX)
        self._telemetry.answered(scope["method"] if scope["method"] in METHODS else "other", route, status, seconds)


class _Scrape(Collector):
    def __init__(self, registry: CollectorRegistry, found: Gauges | None) -> None:
        self._registry = registry
        self._found = found

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield _gauge("relight_database_up", "Whether the database answered this scrape.", [(self._found is not None,)])
        if self._found is not None:
            yield from _gauges(self._found)


def _gauges(found: Gauges) -> Iterator[Metric]:
    """One entry a metric. What nobody has measured has no series: unknown is not 0."""
    operations, queue, workers, slots = found.operations.items(), found.queue_oldest_s, found.workers, found.slots
    by_state = Counter[tuple[str, str, str]]()
    for slot in slots:
        by_state[slot.name, slot.device, "busy"] += slot.busy
        by_state[slot.name, slot.device, "free"] += slot.free
    states = ((*key, number) for key, number in by_state.items())
    live = ((w.name, w.live) for w in workers)
    draining = ((w.name, w.draining) for w in workers)
    seen = ((w.name, w.last_seen_s) for w in workers)
    gpus = ((s.name, s.device, s.device_uuid, s.busy > 0) for s in slots if s.device_uuid)
    yield _gauge("relight_operations", "Operations that have not ended.", operations, "status")
    yield _gauge("relight_queue_oldest_seconds", "How long the oldest due operation has waited.", [(queue,)])
    yield _gauge("relight_worker_live", "Whether it renews its lease.", live, "worker")
    yield _gauge("relight_worker_draining", "Whether it takes no more work.", draining, "worker")
    yield _gauge("relight_worker_last_seen_seconds", "Since its last heartbeat.", seen, "worker")
    yield _gauge("relight_worker_slots", "Slots of live workers.", states, "worker", "device", "state")
    yield _gauge("relight_gpu_busy", "Whether an operation has it.", gpus, "worker", "device", "device_uuid")
    for name, text, column in GPU_GAUGES:
        told = ((d.name, d.device, value) for d in found.devices if (value := getattr(d, column)) is not None)
        yield _gauge(f"relight_gpu_{name}", text, told, "worker", "device_uuid")
    slowed = ((d.name, d.device, reason, 1) for d in found.devices for reason in set(d.throttle or ()))
    yield _gauge(
        "relight_gpu_throttled", "1 for each reason that slows it now.", slowed, "worker", "device_uuid", "reason"
    )


def _gauge(name: str, text: str, rows: Iterable[tuple[Any, ...]], *labels: str) -> Metric:
    """A row is the labels' values and the gauge's."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for *key, value in rows:
        family.add_metric(key, float(value))
    return family
