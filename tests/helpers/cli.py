"""A small API that answers what a test has put into it, and `ops` as it is typed."""

import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from typing import Any
from uuid import UUID, uuid4

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from helpers.answers import metric_names, metric_points, operation, summary
from ops_backend.store.ledger_views import Account, Rates, whole
from ops_cli.main import main
from ops_contract.audit import AuditEntry, AuditPage
from ops_contract.cleanup import Cleanup, CleanupItem, CleanupRequest
from ops_contract.doctor import Health
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import (
    Artifacts,
    ArtifactView,
    Attempts,
    AttemptView,
    Checkpoints,
    CheckpointView,
    Events,
    EventView,
    MemberView,
    ReplayCheck,
    Results,
    ResultView,
)
from ops_contract.jobs import Job, JobSpec
from ops_contract.ledger import BookedWindow, EnergyLedger, EnergyWindows
from ops_contract.lifecycle import CheckpointType, Status
from ops_contract.operations import (
    CancelRequest,
    Children,
    ForkedFrom,
    Operation,
    OperationPage,
    ResumeAccepted,
    ResumedFrom,
    StudyPreview,
)
from ops_contract.plans import ChildResult, Plan
from ops_contract.tokens import TokenCreated, Tokens, TokenView
from ops_contract.webhooks import Deliveries, WebhookAnswer, WebhookCreated, Webhooks, WebhookView
from ops_contract.wire import API_PREFIX, Wire
from ops_contract.workers import DrainRequest, SlotView, Workers, WorkerView, Workloads, WorkloadView

AB = [(0, "a"), (1, "b")]


RESUMED_FROM = ResumedFrom(
    checkpoint_id=uuid4(), checkpoint_type=CheckpointType.CANCEL, created_at="2026-01-01T00:00:00Z", epoch=2, step=130
)


@dataclass
class Api:
    """Operations by id; each `get` gives the next of its states, the last one for ever."""

    url: str = ""
    states: dict[UUID, list[Operation]] = field(default_factory=dict)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    cancelled: list[CancelRequest] = field(default_factory=list)
    forked: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[dict[str, Any]] = field(default_factory=list)
    replayed: list[dict[str, Any]] = field(default_factory=list)
    replays: list[ReplayCheck | None] = field(default_factory=list)
    members: list[MemberView] = field(default_factory=list)
    replay_ends: Status = Status.COMPLETED
    checkpoints: list[CheckpointView] = field(default_factory=list)
    artifacts: list[ArtifactView] = field(default_factory=list)
    deleted: list[UUID] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    points_sent: list[int] = field(default_factory=list)
    table: str | None = None
    workers: list[WorkerView] = field(default_factory=list)
    drained: list[tuple[UUID, str | None]] = field(default_factory=list)
    events: list[EventView] = field(default_factory=list)
    ledger: EnergyLedger | None = None
    windows: list[BookedWindow] = field(default_factory=list)
    webhooks: list[WebhookView] = field(default_factory=list)
    tokens: list[TokenView] = field(default_factory=list)
    audit: list[AuditEntry] = field(default_factory=list)
    audit_asked: list[dict[str, str]] = field(default_factory=list)
    children: list[ChildResult] = field(default_factory=list)
    results: list[ResultView] = field(default_factory=list)
    plan: Plan | None = None
    asked_for: list[dict[str, str]] = field(default_factory=list)
    snapshot: bytes = b""
    asked: list[str] = field(default_factory=list)
    cleanups: list[CleanupRequest] = field(default_factory=list)
    version: str = version("relight")
    refusal: OpsError | None = None

    def holds(self, *states: Operation) -> UUID:
        self.states[states[0].id] = list(states)
        return states[0].id

    def now(self, id: UUID) -> Operation:
        if id not in self.states:
            raise OpsError(ErrorCode.NOT_FOUND, "no such operation; see `ops list`")
        states = self.states[id]
        return states.pop(0) if len(states) > 1 else states[0]


def app_of(api: Api) -> FastAPI:
    app = FastAPI()

    @app.exception_handler(OpsError)
    async def refuse(_: Request, error: OpsError) -> JSONResponse:
        return JSONResponse(error.body().model_dump(mode="json"), error.http_status)

    @app.middleware("http")
    async def note(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        api.asked.append(f"{request.method} {request.url.path.removeprefix(API_PREFIX)}")
        return await call_next(request)

    def answer(body: Wire, status: int = 200) -> Response:
        if api.refusal:
            raise api.refusal
        return Response(body.model_dump_json(), status, media_type="application/json")

    @app.post(f"{API_PREFIX}/operations")
    async def submit(request: Request) -> Response:
        spec = JobSpec.model_validate_json(await request.body())
        if "dry_run" in request.query_params and spec.study:
            job = Job(kind=spec.kind, workload="digits", config={}, execution=spec.execution, study=spec.study)
            reason = "no training of digits has completed here yet to go by"
            return answer(StudyPreview(job=job, plan=api.plan, slots=2, reason=reason))
        if "dry_run" in request.query_params:
            return answer(operation().job)
        api.submitted.append(await request.json())
        made = operation(name=spec.name or "digits-1")
        api.holds(made)
        return answer(made, 201)

    @app.get(f"{API_PREFIX}/operations")
    async def find(request: Request, q: str = "", status: str = "", limit: int = 50) -> Response:
        api.asked_for.append(dict(request.query_params))
        known = [summary(states[0]) for states in api.states.values()]
        items = [each for each in known if (str(each.id).startswith(q) or q in each.name)]
        items = [each for each in items if not status or each.status in status.split(",")]
        return answer(OperationPage(items=items[:limit], next_cursor=None))

    @app.get(f"{API_PREFIX}/operations/{{id}}")
    async def get(id: UUID) -> Response:
        return answer(api.now(id))

    @app.post(f"{API_PREFIX}/operations/{{id}}/cancel")
    async def cancel(id: UUID, wish: CancelRequest) -> Response:
        api.cancelled.append(wish)
        return answer(api.now(id), 202)

    @app.post(f"{API_PREFIX}/operations/{{id}}/resume")
    async def resume(id: UUID, request: Request) -> Response:
        api.resumed.append(await request.json())
        return answer(ResumeAccepted(operation_id=id, status=Status.PENDING, resumed_from=RESUMED_FROM), 202)

    @app.post(f"{API_PREFIX}/operations/{{id}}/fork")
    async def fork(id: UUID, request: Request) -> Response:
        if "dry_run" in request.query_params:
            return answer(operation().job)
        api.forked.append(await request.json())
        made = operation(name="longer", forked_from=ForkedFrom(operation_id=id, checkpoint_id=uuid4(), step=144))
        return answer(api.now(api.holds(made)), 201)

    @app.post(f"{API_PREFIX}/operations/{{id}}/replay")
    async def replay(id: UUID, request: Request) -> Response:
        api.replayed.append(await request.json())
        point = ForkedFrom(operation_id=id, checkpoint_id=uuid4(), step=100)
        made = operation(replay_of=id, forked_from=point)
        made = made.model_copy(update={"job": made.job.model_copy(update={"until_step": 161})})
        api.holds(made.model_copy(update={"status": api.replay_ends}))
        return answer(made, 201)

    @app.get(f"{API_PREFIX}/operations/{{id}}/attempts")
    async def attempts(id: UUID) -> Response:
        gang = {"members": api.members, "world_size": sum(m.ranks for m in api.members) or 1}
        tried = [attempted(n, check).model_copy(update=gang) for n, check in enumerate(api.replays, 1)]
        return answer(Attempts(items=tried))

    @app.get(f"{API_PREFIX}/operations/{{id}}/checkpoints")
    async def checkpoints(id: UUID) -> Response:
        return answer(Checkpoints(items=api.checkpoints))

    @app.delete(f"{API_PREFIX}/operations/{{id}}/checkpoints/{{checkpoint_id}}")
    async def delete_checkpoint(id: UUID, checkpoint_id: UUID) -> Response:
        if api.refusal:
            raise api.refusal
        api.deleted.append(checkpoint_id)
        return Response(status_code=204)

    @app.delete(f"{API_PREFIX}/operations/{{id}}")
    async def delete_operation(id: UUID) -> Response:
        if api.now(id).status == Status.RUNNING:
            raise OpsError(ErrorCode.NOT_DELETABLE, "operation is running: cancel it first")
        api.deleted.append(id)
        return Response(status_code=204)

    @app.get(f"{API_PREFIX}/operations/{{id}}/children")
    async def children(id: UUID) -> Response:
        api.now(id)
        return answer(Children(items=api.children, next_cursor=None))

    @app.get(f"{API_PREFIX}/operations/{{id}}/results")
    async def results(id: UUID) -> Response:
        api.now(id)
        return answer(Results(items=api.results))

    @app.get(f"{API_PREFIX}/operations/{{id}}/events")
    async def events(id: UUID, after_seq: int = 0) -> Response:
        return answer(Events(items=[event for event in api.events if event.seq > after_seq]))

    @app.get(f"{API_PREFIX}/operations/{{id}}/energy")
    async def energy(id: UUID) -> Response:
        api.now(id)
        return answer(api.ledger or whole(Account(id, "pending", [], []), [], [], [], Rates()))

    @app.get(f"{API_PREFIX}/operations/{{id}}/energy/windows")
    async def energy_windows(id: UUID, cursor: int = 0) -> Response:
        """Two a page."""
        more = str(cursor + 2) if len(api.windows) > cursor + 2 else None
        return answer(EnergyWindows(items=api.windows[cursor : cursor + 2], next_cursor=more))

    @app.post(f"{API_PREFIX}/cleanup")
    async def cleanup(wish: CleanupRequest) -> Response:
        """Two that go, one a call, and one that stays."""
        api.cleanups.append(wish)
        facts = {"name": "old", "status": "failed", "ended_at": "2026-01-01T00:00:00Z"}
        goes = [CleanupItem(id=uuid4(), goes="all", size_bytes=2_000_000, **facts) for _ in range(1 + wish.dry_run)]
        stays = CleanupItem(id=uuid4(), goes="nothing", size_bytes=0, reason="a fork needs it", **facts)
        more = not wish.dry_run and len(api.cleanups) == 1
        return answer(Cleanup(items=[*goes, stays], size_bytes=0, more=more))

    @app.get("/health/ready")
    async def ready() -> Response:
        return answer(Health(status="ok", version=api.version))

    @app.get(f"{API_PREFIX}/operations/{{id}}/artifacts")
    async def artifacts(id: UUID) -> Response:
        return answer(Artifacts(items=api.artifacts))

    @app.get(f"{API_PREFIX}/operations/{{id}}/artifacts/{{artifact_id}}")
    async def artifact(id: UUID, artifact_id: UUID) -> Response:
        return Response(b"weights")

    @app.get(f"{API_PREFIX}/operations/{{id}}/metrics")
    async def metrics(id: UUID, name: str | None = None, after_step: int = -1) -> Response:
        if name is None:
            return answer(metric_names(api.curves))
        points = [point for point in api.curves.get(name, []) if point[0] > after_step]
        api.points_sent.append(len(points))
        return answer(metric_points(name, points, attempt_starts=[(0, 1), (2, 2)]))

    @app.get(f"{API_PREFIX}/operations/{{id}}/export")
    async def export(id: UUID, format: str) -> Response:
        if api.refusal:
            raise api.refusal
        return Response(f"{format} of {api.now(id).name}\n" if api.table is None else api.table)

    @app.get(f"{API_PREFIX}/workloads")
    async def workloads() -> Response:
        offered = {"name": "digits", "title": "Digits", "config_schema": {}, "reports": {"val_accuracy": "max"}}
        return answer(Workloads(items=[WorkloadView.model_validate(offered)]))

    @app.get(f"{API_PREFIX}/webhooks")
    async def webhooks() -> Response:
        return answer(Webhooks(items=api.webhooks))

    @app.post(f"{API_PREFIX}/webhooks")
    async def add_webhook() -> Response:
        return answer(WebhookCreated(id=uuid4(), secret="whsec_"), 201)

    @app.get(f"{API_PREFIX}/webhooks/{{id}}/deliveries")
    async def deliveries(id: UUID) -> Response:
        return answer(Deliveries(items=[]))

    @app.post(f"{API_PREFIX}/webhooks/{{id}}/test")
    async def test_webhook(id: UUID) -> Response:
        return answer(WebhookAnswer(delivered=True, http_status=204, answer=""))

    @app.get(f"{API_PREFIX}/audit")
    async def audit(request: Request, limit: int, cursor: int = 0) -> Response:
        api.audit_asked.append(dict(request.query_params))
        end = cursor + limit
        return answer(AuditPage(items=api.audit[cursor:end], next_cursor=str(end) if end < len(api.audit) else None))

    @app.get(f"{API_PREFIX}/tokens")
    async def tokens() -> Response:
        return answer(Tokens(items=api.tokens))

    @app.post(f"{API_PREFIX}/tokens")
    async def create_token() -> Response:
        return answer(TokenCreated(**api.tokens[0].model_dump(), token="rlt_"), 201)

    @app.delete(f"{API_PREFIX}/tokens/{{id}}")
    @app.delete(f"{API_PREFIX}/webhooks/{{id}}")
    @app.post(f"{API_PREFIX}/session/links")
    @app.get(f"{API_PREFIX}/operations/{{id}}/logs")
    @app.head(f"{API_PREFIX}/snapshots/{{id}}")
    async def refused(id: str = "") -> Response:
        return answer(Workers(items=[]))

    @app.get(f"{API_PREFIX}/snapshots/{{id}}")
    async def snapshot(id: str) -> Response:
        return Response(api.snapshot)

    @app.get(f"{API_PREFIX}/workers")
    async def workers() -> Response:
        return answer(Workers(items=api.workers))

    @app.post(f"{API_PREFIX}/workers/{{id}}/drain")
    async def drain(id: UUID, wish: DrainRequest) -> Response:
        api.drained.append((id, "preempt" if wish.preempt else "finish"))
        return answer(next(worker for worker in api.workers if worker.id == id))

    @app.post(f"{API_PREFIX}/workers/{{id}}/undrain")
    async def undrain(id: UUID) -> Response:
        api.drained.append((id, None))
        return answer(next(worker for worker in api.workers if worker.id == id))

    return app


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    api = Api()
    server = uvicorn.Server(uvicorn.Config(app_of(api), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the API did not start"
    api.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    monkeypatch.setenv("OPS_API_URL", api.url)
    monkeypatch.setenv("COLUMNS", "80")
    yield api
    server.should_exit = True
    thread.join()


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Ops = Callable[..., Ran]


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ops:
    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["ops", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        code = left.value.code
        return Ran(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


def attempted(number: int, check: ReplayCheck | None) -> AttemptView:
    known = {"number": number, "worker_id": uuid4(), "worker": "w", "host": "h", "start_step": 0, "replay": check}
    unknown = dict.fromkeys(AttemptView.model_fields.keys() - known.keys() - {"world_size", "members"})
    return AttemptView.model_validate({**unknown, **known, "claimed_at": "2026-01-01T00:00:00Z"})


def saved_as(id: UUID, **changes: Any) -> CheckpointView:
    plain = {
        "id": id,
        "operation_id": uuid4(),
        "attempt": 1,
        "checkpoint_type": CheckpointType.PERIODIC,
        "status": "committed",
        "step": 3,
        "epoch": 0,
        "phase": "update",
        "path": "nowhere/1-3",
        "size_bytes": 10,
        "manifest_sha256": "0" * 64,
        "monitored": None,
        "in_lineage": True,
        "created_at": "2026-01-01T00:00:00Z",
    }
    return CheckpointView.model_validate(plain | changes)


def worker(**changes: Any) -> WorkerView:
    slot = SlotView(index=0, device="cpu", device_uuid=None, cores=1, operation_id=changes.pop("runs", None), attempt=1)
    plain = {"id": uuid4(), "name": "w", "host": "h", "url": "http://h", "live": True, "draining": False, "drain": None}
    times = dict.fromkeys(("registered_at", "last_seen_at"), "2026-01-01T00:00:00Z")
    return WorkerView.model_validate(plain | times | {"versions": {}, "slots": [slot]} | changes)


def left_by(id: UUID, name: str, content: bytes) -> ArtifactView:
    return ArtifactView(
        id=uuid4(),
        operation_id=id,
        attempt=1,
        name=name,
        step=3,
        path=f"{id}/1-3-{name}",
        size_bytes=len(content),
        sha256=sha256(content).hexdigest(),
        created_at="2026-01-01T00:00:00Z",
    )
