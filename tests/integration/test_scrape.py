"""What Prometheus reads is true: after a real history, in its own format, with the database away."""

import asyncio
import json
import re
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_client.samples import Sample

from helpers.loops import stop_loops
from helpers.postgres_proxy import postgres_proxy
from helpers.store import LEASE_S, Held, Store, losses, no_wake, shown_by, started, window
from ops_backend.app import create_app
from ops_backend.reaper import Reaper
from ops_backend.settings import Settings
from ops_backend.store import gauges
from ops_contract.agents import Heartbeat, ReportBatch
from ops_contract.energy import DeviceNow, EnergyBatch, EnergyWindow, Use
from ops_contract.lifecycle import Outcome
from ops_contract.reports import Finish, Report

TOKEN = "a token of the tests"
GPU = DeviceNow(
    device="GPU-1",
    name="A100",
    power_w=250.0,
    temperature_c=61.0,
    utilization_percent=97.0,
    memory_used_bytes=2_000_000_000,
    memory_total_bytes=80_000_000_000,
    throttle=["hw_thermal"],
)
DEPLOY = Path(__file__).parents[2] / "deploy"


class Scraped:
    """Samples by name."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.samples = list(samples)
        series = [(sample.name, *sorted(sample.labels.items())) for sample in self.samples]
        assert len(series) == len(set(series)), "Prometheus refuses a scrape that has a series twice"

    def value(self, name: str, **labels: str) -> float | None:
        """None when there is no such series."""
        found = [s.value for s in self.samples if s.name == name and s.labels.items() >= labels.items()]
        assert len(found) <= 1, f"{name} {labels} is {len(found)} series"
        return found[0] if found else None

    def values(self, name: str, label: str) -> dict[str, float]:
        return {s.labels[label]: s.value for s in self.samples if s.name == name}

    def labels(self, name: str) -> set[str]:
        return {label for s in self.samples if s.name == name for label in s.labels}


class Api:
    """The app without its loops: what they do, a test has them do."""

    def __init__(self, app: Any, client: httpx.AsyncClient) -> None:
        self.app = app
        self.client = client

    async def scrape(self) -> Scraped:
        answer = await self.client.get("/metrics")
        assert answer.status_code == 200, answer.text
        return Scraped(s for family in parse(answer.text) for s in family.samples)

    async def dispatch(self) -> None:
        """All that is due, to workers that take it."""
        dispatcher = self.app.state.dispatcher
        dispatcher._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(202)))
        await dispatcher._claim_all()
        await asyncio.gather(*dispatcher._deliveries)

    async def report(self, held: Held, *reports: Report) -> None:
        batch = ReportBatch(incarnation=held.incarnation, first_seq=held.seq, reports=list(reports))
        path = f"/api/v1/operations/{held.operation_id}/attempts/{held.attempt}/reports"
        answer = await self.client.post(path, content=batch.model_dump_json(), headers=shown_by(held.incarnation))
        assert answer.status_code == 200, answer.text

    async def book(self, held: Held, *windows: EnergyWindow) -> None:
        batch = EnergyBatch(incarnation=held.incarnation, windows=list(windows))
        path = f"/api/v1/operations/{held.operation_id}/attempts/{held.attempt}/energy"
        answer = await self.client.post(path, content=batch.model_dump_json(), headers=shown_by(held.incarnation))
        assert (answer.status_code, answer.json()) == (200, {})

    async def reap(self, store: Store) -> None:
        await store.execute("INSERT INTO service (id, last_tick_at) VALUES (1, now())")
        await Reaper(store.sessions, LEASE_S, 1.0, self.app.state.telemetry, no_wake).reap()


@asynccontextmanager
async def serving(database_url: str) -> AsyncIterator[Api]:
    app = create_app(Settings(database_url=database_url, api_token=TOKEN, storage_root=Path("/"), lease_s=LEASE_S))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    with pytest.MonkeyPatch.context() as patch:
        stop_loops(patch)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client,
        ):
            yield Api(app, client)


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    async with serving(database_url) as found:
        yield found


async def held_by_operation(store: Store) -> dict[UUID, Held]:
    rows = await store.fetch("SELECT operation_id, attempt, incarnation FROM holds WHERE ended_at IS NULL")
    return {row.operation_id: Held(*row) for row in rows}


async def test_a_scrape_tells_what_has_happened(api: Api, store: Store) -> None:
    """One completes, one is lost with its worker, one is cancelled while it waits."""
    await store.worker("gpu-box", device="cuda", slots=1, slot={"device_uuid": "GPU-1"})
    await store.worker("cpu-box", slots=1)
    done, lost = [await store.submit(execution={"accelerator": a}) for a in ("cuda", "cpu")]
    given_up = await store.submit()
    await api.dispatch()
    holds = await held_by_operation(store)
    for _ in range(2):  # the answer to the first was lost
        await api.report(holds[done], started(), losses((0, 1.0), (1, 0.5), (2, 0.25)))
    running = await api.scrape()
    await api.report(Held(done, 1, holds[done].incarnation, 3), Finish(outcome=Outcome.COMPLETED))
    await store.expire(holds[lost])
    await api.reap(store)
    await api.client.post(f"/api/v1/operations/{given_up}/cancel", json={})
    ended = await api.scrape()

    assert running.values("relight_operations", "status") == {"pending": 1, "running": 2, "waiting": 0, "cancelling": 0}
    assert running.value("relight_worker_slots", worker="cpu-box", state="busy") == 1
    assert running.value("relight_gpu_busy", worker="gpu-box", device="cuda", device_uuid="GPU-1") == 1
    assert running.value("relight_dispatch_seconds_count", outcome="accepted") == 2
    assert ended.values("relight_operations", "status") == {"pending": 1, "running": 0, "waiting": 0, "cancelling": 0}
    assert ended.value("relight_worker_slots", worker="cpu-box", state="busy") == 0
    assert ended.value("relight_worker_slots", worker="cpu-box", state="free") == 1
    ends = {"completed": 1, "cancelled": 1, "failed": 0}
    assert ended.values("relight_operations_ended_total", "status") == ends
    assert ended.value("relight_lease_expiries_total") == 1
    reports = ended.values("relight_reports_total", "kind")
    assert {kind: n for kind, n in reports.items() if n} == {"started": 1, "metrics": 1, "finish": 1}
    assert ended.value("relight_metric_points_total") == 3
    route = "/operations/{id}/attempts/{attempt}/reports"
    assert ended.value("relight_http_requests_total", method="POST", route=route, status="200") == 3
    assert ended.value("relight_http_request_duration_seconds_count", method="POST", route=route) == 3
    assert ended.value("relight_build_info") == ended.value("relight_database_up") == 1
    named = {value for sample in ended.samples for value in sample.labels.values()}
    assert not named & {str(id) for id in (done, lost, given_up)}


async def test_the_queue_is_as_old_as_what_has_been_due_longest(api: Api, store: Store) -> None:
    """A backoff is no waiting; after it, that counts which began with it, not with the submission."""
    await store.worker()
    assert (await api.scrape()).value("relight_queue_oldest_seconds") == 0
    backing_off, due = await store.submit(), await store.submit()
    await store.execute("UPDATE events SET at = now() - interval '10 h'")
    await store.execute("UPDATE operations SET created_at = now() - interval '10 h'")
    until = "UPDATE operations SET not_before = now() + CAST(:span AS interval) WHERE id = :id"
    await store.execute(until, id=backing_off, span=timedelta(hours=1))
    await store.execute(until, id=due, span=-timedelta(hours=2))

    oldest_s = (await api.scrape()).value("relight_queue_oldest_seconds")

    assert oldest_s is not None
    assert 7200 <= oldest_s < 7500


async def test_workers_are_known_by_name_and_for_an_hour(api: Api, store: Store) -> None:
    """Two incarnations of a name are one series."""
    for name in ("again", "again", "silent", "forgotten", "drained"):
        incarnation = await store.worker(name, slots=2)
    await store.drain(incarnation, "finish")
    silence = "UPDATE workers SET last_seen_at = now() - CAST(:span AS interval) WHERE name = :name"
    await store.execute(silence, name="silent", span=timedelta(minutes=10))
    await store.execute(silence, name="forgotten", span=timedelta(hours=2))

    scraped = await api.scrape()

    assert scraped.values("relight_worker_live", "worker") == {"again": 1, "silent": 0, "drained": 1}
    assert scraped.values("relight_worker_draining", "worker") == {"again": 0, "silent": 0, "drained": 1}
    silent_s = scraped.value("relight_worker_last_seen_seconds", worker="silent")
    assert silent_s is not None
    assert 600 <= silent_s < 900
    assert scraped.value("relight_worker_slots", worker="again", device="cpu", state="free") == 4
    assert scraped.value("relight_worker_slots", worker="silent", state="free") is None


async def test_joules_are_counted_when_they_are_accepted_for_the_first_time(api: Api, store: Store) -> None:
    await store.worker("gpu-box")
    held = await store.running()
    unknown = window(3, energy_j=None, error_j=None, reason="device_lost")
    for _ in range(2):
        await api.book(held, window(1), window(2, Use.SAVE), unknown, window(4, quality="upper_bound"))
    await store.finish(held, Outcome.COMPLETED)
    await api.book(held, window(1), window(5, energy_j=0.5))

    scraped = await api.scrape()

    measured = {"worker": "gpu-box", "device": "GPU-1", "quality": "measured"}
    assert scraped.value("relight_energy_joules_total", use="train", **measured) == 100.5
    assert scraped.value("relight_energy_joules_total", use="save", **measured) == 100.0
    assert scraped.value("relight_energy_joules_total", quality="upper_bound") == 100.0


async def test_gpus_are_as_the_last_heartbeat_of_a_live_worker_told(api: Api, store: Store) -> None:
    """What it does not say has no series; of two workers of a name the last counts."""
    for power_w in (200.0, 300.0):
        incarnation = await store.worker("gpu-box")
        told = GPU.model_copy(update={"power_w": power_w})
        await store.heartbeat(incarnation, devices=[told])
    gone = await store.worker("gone")
    await store.heartbeat(gone, devices=[GPU])
    await store.execute("UPDATE workers SET last_seen_at = now() - interval '10 min' WHERE name = 'gone'")

    scraped = await api.scrape()
    [seen, *_] = (await api.client.get("/api/v1/workers")).json()["items"]

    assert scraped.values("relight_gpu_power_watts", "worker") == {"gpu-box": 300.0}
    assert scraped.value("relight_gpu_memory_used_bytes", device_uuid="GPU-1") == 2e9
    assert scraped.values("relight_gpu_throttled", "reason") == {"hw_thermal": 1.0}
    assert scraped.value("relight_gpu_power_limit_watts") is None
    assert [device["device"] for device in seen["devices"]] == ["GPU-1"]


async def test_both_formats_are_whole_and_only_for_who_has_the_token(api: Api, store: Store) -> None:
    await api.scrape()  # the first one counts itself only in the second
    plain = await api.client.get("/metrics")
    accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    openmetrics = await api.client.get("/metrics", headers=accept)
    refused = await api.client.get("/metrics", headers={"Authorization": "Bearer wrong"})

    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    both = [list(parse(plain.text)), list(parse_openmetrics(openmetrics.text))]
    names, others = ({sample.name for family in families for sample in family.samples} for families in both)
    assert names == others
    assert {"process_resident_memory_bytes", "relight_reports_total"} <= names
    assert refused.status_code == 401


async def test_a_frozen_database_hides_its_gauges_and_nothing_else(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops_backend.app.SCRAPE_S", 0.2)
    with tempfile.TemporaryDirectory(prefix="pg") as directory:
        async with postgres_proxy(database_url, Path(directory)) as (proxy, url), serving(url) as api:
            proxy.running.clear()
            frozen = await api.scrape()
            proxy.running.set()
            thawed = await api.scrape()

    assert frozen.value("relight_database_up") == 0
    assert frozen.value("relight_operations", status="pending") is None
    assert frozen.value("relight_lease_expiries_total") == 0
    assert thawed.value("relight_database_up") == 1
    assert thawed.value("relight_operations", status="pending") == 0


async def test_requests_are_counted_by_route_whatever_is_asked_for(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text of a client's becomes a label."""
    monkeypatch.setattr("ops_backend.store.polls.rows", broken)
    for path in ("/api/v1/operations/1f6e", "/api/v1/nothing/1", "/api/v1/nothing/2"):
        await api.client.get(path)
    await api.client.get(f"/api/v1/operations/{UUID(int=0)}")
    await api.client.request("BREW", "/metrics")

    counted = {
        (s.labels["method"], s.labels["route"], s.labels["status"]): s.value
        for s in (await api.scrape()).samples
        if s.name == "relight_http_requests_total"
    }
    assert counted == {
        ("GET", "/operations/{id}", "422"): 1,
        ("GET", "none", "404"): 2,
        ("GET", "/operations/{id}", "500"): 1,
        ("other", "/metrics", "405"): 1,
    }


async def broken(*_: object) -> None:
    raise RuntimeError("on purpose")


async def test_a_scrape_reads_none_of_the_operations_that_have_ended(store: Store) -> None:
    await store.execute("""
        INSERT INTO operations (id, name, kind, workload, job, labels, priority, max_retries, submitted_by, status)
        SELECT gen_random_uuid(), 'n', 'training', 'toy', '{}', '{}', 0, 0, 'me', 'completed'
          FROM generate_series(1, 5000)
    """)
    await store.execute("ANALYZE operations, holds, events")

    plan = "\n".join(row[0] for row in await store.fetch(f"EXPLAIN {gauges.OPERATIONS.text}"))

    assert "ix_operations_queue" in plan
    assert "Seq Scan on operations" not in plan


async def test_dashboard_and_alerts_ask_for_nothing_that_is_not_there(api: Api, store: Store) -> None:
    """Every name is scraped, and every label that is matched, grouped by or shown is on all names of its expression."""
    incarnation = await store.worker(device="cuda", slot={"device_uuid": "GPU-1"})
    await api.client.post(
        f"/api/v1/workers/{incarnation}/heartbeat",
        content=Heartbeat(devices=[GPU]).model_dump_json(),
        headers=shown_by(incarnation),
    )
    await api.book(await store.running(execution={"accelerator": "cuda"}), window(1))
    await api.client.get("/api/v1/operations")
    scraped = await api.scrape()
    asked = {**dashboard_expressions(), **alert_expressions()}
    assert len(asked) > 30

    for expr, shown in asked.items():
        names = set(re.findall(r"\b(?:relight|process)_\w+", expr))
        assert names, expr
        grouped = re.findall(r"\b(?:by|on) \(([^)]+)\)", expr)
        grouped_by = {label.strip() for group in grouped for label in group.split(",")}
        for name in names:
            assert any(s.name == name for s in scraped.samples), f"{name} in {expr}"
            matched = re.findall(rf"{name}{{([^}}]*)}}", expr)
            wanted = grouped_by | shown | set(re.findall(r"(\w+)=~?\"", "".join(matched)))
            assert wanted - {"job", "instance"} <= scraped.labels(name), expr


def dashboard_expressions() -> dict[str, set[str]]:
    """With the labels that their legends show."""
    dashboard = json.loads((DEPLOY / "grafana" / "relight.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    return {t["expr"]: set(re.findall(r"{{(\w+)}}", t["legendFormat"])) for t in targets}


def alert_expressions() -> dict[str, set[str]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"] if not rule["expr"].startswith("up{")]
    return {rule["expr"]: set() for rule in rules}
