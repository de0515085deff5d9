"""`ops` as it is typed, against a small API that answers what a test has put into it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import jsonschema
import pytest
import uvicorn
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from helpers.answers import metric_names, metric_points, operation, summary
from ops_backend.store.ledger_views import Account, Rates, whole
from ops_cli.exits import ExitCode
from ops_cli.main import main
from ops_cli.stack import Stack, StackSettings
from ops_contract.audit import AuditEntry, AuditPage
from ops_contract.cleanup import Cleanup, CleanupItem, CleanupRequest
from ops_contract.doctor import Health, clock
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import (
    Artifacts,
    ArtifactView,
    Attempts,
    AttemptView,
    Checkpoints,
    CheckpointView,
    Difference,
    Events,
    EventView,
    MemberView,
    ReplayCheck,
    Results,
    ResultView,
)
from ops_contract.jobs import CheckpointEvery, Code, Execution, Job, JobSpec, Resources
from ops_contract.ledger import BookedWindow, EnergyLedger, EnergyWindows
from ops_contract.lifecycle import CheckpointType, Kind, Phase, Status
from ops_contract.operations import (
    CancelRequest,
    Children,
    ForkedFrom,
    Operation,
    OperationPage,
    ProgressView,
    ResumeAccepted,
    ResumedFrom,
    StudyPreview,
)
from ops_contract.plans import ChildResult, Plan
from ops_contract.reports import Fault
from ops_contract.tokens import TokenCreated, Tokens, TokenView
from ops_contract.webhooks import Deliveries, WebhookAnswer, WebhookCreated, Webhooks, WebhookView
from ops_contract.wire import API_PREFIX, Wire
from ops_contract.workers import DrainRequest, SlotView, Workers, WorkerView, Workloads, WorkloadView
from relight.manifest import FileEntry, Manifest
from relight.settings import UpState, write_up_state

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


def test_train_sends_what_was_typed_and_no_default(api: Api, ops: Ops) -> None:
    ran = ops(
        *("train", "digits", "--set", "config.width=64", "--set", "config.name=wide", "--set", "execution.seed=7"),
        *("--max-epochs", 3, "--checkpoint-every", "20steps", "--label", "team=a", "--learning-rate", "1e-2"),
    )

    assert ran.code == ExitCode.DONE
    assert "ops watch" in ran.out
    assert api.submitted == [
        {
            "workload": "digits",
            "config": {"width": 64, "name": "wide"},
            "execution": {"seed": 7, "max_epochs": 3, "checkpoint_every": {"steps": 20}, "learning_rate": 0.01},
            "labels": {"team": "a"},
        }
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "width=64"], "config.NAME=VALUE"),
        (["--set", "config.width"], "config.NAME=VALUE"),
        (["--set", "execution.max_epochs=0"], "execution.max_epochs"),
        (["--max-epochs", "3", "--set", "execution.max_epochs=4"], "twice"),
        (["--checkpoint-every", "20"], "200steps"),
        (["--checkpoint-every", "sometimes"], "auto"),
        (["--set", "execution.checkpoint_every=sometimes"], "execution.checkpoint_every"),
        (["--label", "team"], "KEY=VALUE"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_a_mistyped_job_is_a_usage_error_that_says_how(api: Api, ops: Ops, arguments: list[str], words: str) -> None:
    ran = ops("train", "digits", *arguments)

    assert ran.code == ExitCode.USAGE
    assert words in ran.err
    assert not api.submitted


@pytest.mark.parametrize(
    ("period", "sent"), [("auto", "auto"), ("30seconds", {"seconds": 30}), ("1epoch", {"epochs": 1})]
)
def test_a_period_is_a_number_of_something_or_auto(api: Api, ops: Ops, period: str, sent: Any) -> None:
    assert ops("train", "digits", "--checkpoint-every", period, "--set", "execution.precision=16").code == ExitCode.DONE

    assert JobSpec.model_validate(api.submitted[0]).execution.precision == "16"
    assert api.submitted[0]["execution"]["checkpoint_every"] == sent


@pytest.mark.parametrize(
    "text",
    [
        '{"workload": "digits", "config": {"rate": 1e-3}, "execution": {"checkpoint_every": {"epochs": 1}}}',
        "workload: digits\nconfig: {rate: 1e-3}\nexecution:\n  checkpoint_every: {epochs: 1}\n",
    ],
)
def test_a_file_is_yaml_or_json(api: Api, ops: Ops, tmp_path: Path, text: str) -> None:
    (tmp_path / "job").write_text(text)

    assert ops("submit", tmp_path / "job").code == ExitCode.DONE

    [sent] = api.submitted
    assert sent["config"] == {"rate": 0.001}
    assert JobSpec.model_validate(sent).execution.checkpoint_every == CheckpointEvery(epochs=1)


def test_fork_sends_what_differs_and_says_where_it_begins(api: Api, ops: Ops) -> None:
    parent, point = api.holds(operation(status=Status.COMPLETED)), saved_as(uuid4())
    api.checkpoints = [point]

    ran = ops(
        *("fork", parent, "--set", "execution.max_epochs=20", "--label", "team=a", "--name", "longer"),
        *("--from-checkpoint", str(point.id)[:6]),
    )

    assert ran.code == ExitCode.DONE
    assert f"from step 144 of {str(parent)[:8]}" in ran.out
    assert api.forked == [
        {
            "from_checkpoint": str(point.id),
            "overrides": {"execution": {"max_epochs": 20}, "labels": {"team": "a"}},
            "name": "longer",
        }
    ]
    assert ops("fork", parent, "--set", "max_epochs=20").code == ExitCode.USAGE


DIFFERENT = ReplayCheck(
    compared=100,
    differing=2,
    first_difference=Difference(
        name="loss", step=112, earlier_attempt=1, was=0.3, now=float("nan"), was_bits="3fd3", now_bits="7ff8"
    ),
    largest_difference=float("nan"),
)


def attempted(number: int, check: ReplayCheck | None) -> AttemptView:
    known = {"number": number, "worker_id": uuid4(), "worker": "w", "host": "h", "start_step": 0, "replay": check}
    unknown = dict.fromkeys(AttemptView.model_fields.keys() - known.keys() - {"world_size", "members"})
    return AttemptView.model_validate({**unknown, **known, "claimed_at": "2026-01-01T00:00:00Z"})


def test_replay_waits_and_says_whether_every_value_is_equal_over_all_attempts(api: Api, ops: Ops) -> None:
    parent = api.holds(operation(status=Status.COMPLETED))
    api.replays = [ReplayCheck(compared=100), None, ReplayCheck(compared=140)]

    ran = ops("replay", parent, "--steps", 61)

    assert (ran.code, ran.out.splitlines()[-1]) == (0, "steps 100 to 160: all 240 values equal bit for bit")
    assert api.replayed == [{"steps": 61}]
    table = ops("attempts", next(id for id in api.states if id != parent)).out
    assert ("140 equal" in table, "–" in table) == (True, True)


def test_replay_says_the_first_difference_and_fails(api: Api, ops: Ops) -> None:
    parent = api.holds(operation(status=Status.COMPLETED))
    api.replays = [ReplayCheck(compared=140), DIFFERENT]

    ran, told = ops("replay", parent), ops("replay", parent, "--json")

    assert (ran.code, told.code) == (ExitCode.FAILED, ExitCode.FAILED)
    assert ran.out.splitlines()[-1] == (
        "steps 100 to 160: 2 of 240 values differ, first loss at step 112, which was 0.3 (3fd3) and is nan (7ff8); "
        "largest difference nan"
    )
    found = json.loads(told.out)
    assert (found["compared"], found["differing"], found["first_difference"]["now"]) == (240, 2, "NaN")
    assert (found["replay_of"], found["status"]) == (str(parent), "completed")


@pytest.mark.parametrize(("status", "checks"), [(Status.FAILED, [ReplayCheck(compared=9)]), (Status.COMPLETED, [None])])
def test_a_replay_that_failed_or_compared_nothing_is_no_proof(
    api: Api, ops: Ops, status: Status, checks: list[ReplayCheck | None]
) -> None:
    parent = api.holds(operation(status=Status.COMPLETED))
    api.replays, api.replay_ends = checks, status

    assert ops("replay", parent).code == ops("replay", parent, "--json").code == ExitCode.FAILED


def test_replay_may_be_left_alone(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = api.holds(operation(status=Status.COMPLETED))

    started, told = ops("replay", parent, "--no-wait"), ops("replay", parent, "--no-wait", "--json")
    monkeypatch.setattr("ops_cli.replay.follow", interrupt)
    detached = ops("replay", parent)

    made = [str(id) for id in api.states if id != parent]
    assert (started.code, told.code, detached.code) == (ExitCode.DONE, ExitCode.DONE, ExitCode.DETACHED)
    assert made[0] in started.out
    assert json.loads(told.out)["id"] == made[1]
    assert f"{made[2][:8]} goes on" in detached.err
    assert api.cancelled == []


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


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


def written(root: Path, name: str, content: bytes) -> CheckpointView:
    """A checkpoint of one file as a trainer publishes it."""
    entry = FileEntry(size_bytes=len(content), sha256=[sha256(content).hexdigest()])
    made = Manifest(
        operation_id=uuid4(),
        attempt=1,
        step=3,
        epoch=0,
        phase=Phase.UPDATE,
        workload="digits",
        code_digest=None,
        data_digest=None,
        numerics={},
        files={"state": entry},
    )
    raw = made.model_dump_json().encode()
    (root / name).mkdir(parents=True)
    (root / name / "state").write_bytes(content)
    (root / name / "manifest.json").write_bytes(raw)
    return saved_as(uuid4(), path=name, manifest_sha256=sha256(raw).hexdigest())


def test_verify_says_which_checkpoints_are_not_what_was_committed(api: Api, ops: Ops, tmp_path: Path) -> None:
    known = api.holds(operation())
    good, flipped, gone = (written(tmp_path, f"run/1-{n}", bytes(100)) for n in range(3))
    api.checkpoints = [good, flipped, gone, saved_as(uuid4(), status="deleting")]
    at = ("--storage-root", tmp_path)

    assert ops("checkpoints", "verify", known, *at, "--json").code == ExitCode.DONE
    (tmp_path / "run/1-1/state").write_bytes(bytes(99) + b"x")
    (tmp_path / "run/1-2/manifest.json").unlink()
    ran = ops("checkpoints", "verify", known, *at, "--json")

    found = {verdict["id"]: verdict for verdict in json.loads(ran.out)}
    assert ran.code == ExitCode.FAILED
    assert {id: verdict["good"] for id, verdict in found.items()} == {
        str(good.id): True,
        str(flipped.id): False,
        str(gone.id): False,
    }
    assert "state differs from what was written" in found[str(flipped.id)]["problem"]
    assert "never published" in found[str(gone.id)]["problem"]
    assert ops("checkpoints", "verify", known, str(good.id)[:8], *at).code == ExitCode.DONE
    told = ops("checkpoints", "verify", known, str(flipped.id)[:8], *at)
    assert (told.code, "corrupt" in told.out) == (ExitCode.FAILED, True)


def test_verify_looks_where_the_last_up_or_the_environment_says(
    api: Api, ops: Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = api.holds(operation())
    api.checkpoints = [written(tmp_path / "data/storage", "run/1-1", b"x")]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("OPS_STORAGE_ROOT", raising=False)

    assert ops("checkpoints", "verify", known).code == ExitCode.USAGE
    write_up_state(UpState(api.url, "t", str(tmp_path / "data"), os.getpid()))
    assert ops("checkpoints", "verify", known).code == ExitCode.DONE
    monkeypatch.setenv("OPS_STORAGE_ROOT", str(tmp_path))
    assert ops("checkpoints", "verify", known).code == ExitCode.FAILED


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "neither YAML"), ("- a", "workload: NAME"), ("workload: 3", "workload:")]
)
def test_a_file_that_is_no_job_is_refused(api: Api, ops: Ops, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "job.yaml").write_text(text)

    ran = ops("submit", tmp_path / "job.yaml")

    assert ran.code == ExitCode.USAGE
    assert words in ran.err


def test_exit_codes_say_why_a_command_was_refused(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    known = api.holds(operation())

    assert ops("status", uuid4()).code == ExitCode.NOT_FOUND
    assert ops("status", "abcd").code == ExitCode.NOT_FOUND
    api.refusal = OpsError(ErrorCode.NOT_RESUMABLE, "it runs; cancel it first")
    ran = ops("resume", known)
    assert (ran.code, "cancel it first" in ran.err) == (ExitCode.CONFLICT, True)
    api.refusal = OpsError(ErrorCode.UNAUTHENTICATED, "send a token")
    assert ops("list").code == ExitCode.FAILED
    ran = ops("list", "--url", "http://127.0.0.1:1")
    assert (ran.code, "ops up" in ran.err) == (ExitCode.UNREACHABLE, True)


def test_an_ambiguous_prefix_names_its_candidates(api: Api, ops: Ops) -> None:
    one, other = (api.holds(operation(id=UUID(f"abcd{n}000-0000-4000-8000-000000000000"))) for n in (1, 2))

    ran = ops("status", "abcd")

    assert ran.code == ExitCode.USAGE
    assert str(one) in ran.err
    assert str(other) in ran.err


def test_the_list_is_readable_at_80_columns(api: Api, ops: Ops) -> None:
    progress = ProgressView(percent=100 / 3, step=123_456, steps_total=1_000_000, loss=float("nan"))
    api.holds(operation(name="a-[long]-name-" * 9, status=Status.CANCELLING, progress=progress))

    ran = ops("list")

    header, row = ran.out.splitlines()
    assert max(len(header), len(row)) <= 80
    assert "a-[long]-" in row
    for shown in ("cancelling", "33%", "123456/1000000", "nan"):
        assert shown in row


def test_json_is_all_that_stdout_has(api: Api, ops: Ops) -> None:
    known = api.holds(operation(progress=ProgressView(step=1, loss=float("inf"))))
    api.curves = {"loss": [(0, 0.1 + 0.2), (1, float("nan"))]}

    listed, shown, curves = ops("list", "--json"), ops("status", known, "--json"), ops("metrics", known, "--json")

    assert json.loads(listed.out)[0]["progress"]["loss"] == "Infinity"
    assert Operation.model_validate_json(shown.out).id == known
    assert json.loads(curves.out)[0]["points"] == [[0, 0.1 + 0.2], [1, "NaN"]]


def test_metrics_shows_the_ends_of_all_and_the_last_points_of_one_without_reading_the_rest(api: Api, ops: Ops) -> None:
    known = api.holds(operation())
    api.curves = {"loss": [(n, float(n)) for n in range(100_000)], "val_loss": [(n * 999, 0.5) for n in range(101)]}

    ends, loss, sparse, unknown = (ops("metrics", known, *name) for name in ((), ("loss",), ("val_loss",), ("los",)))

    assert ends.out.splitlines()[1].split() == ["loss", "0", "0", "99999", "99,999"]
    assert [line.split()[0] for line in loss.out.splitlines()[1:]] == [str(n) for n in range(99_980, 100_000)]
    assert [line.split()[0] for line in sparse.out.splitlines()[1:]] == [str(n * 999) for n in range(81, 101)]
    assert (unknown.code, unknown.out) == (ExitCode.NOT_FOUND, "")
    assert "did you mean loss?" in unknown.err
    assert max(api.points_sent) < 1000


def test_status_says_what_is_not_measured_and_what_to_do_next(api: Api, ops: Ops) -> None:
    fault = Fault(code="trainer_killed", message="SIGKILL (out of memory?)")
    known = api.holds(operation(status=Status.FAILED, error=fault, resumed_from=RESUMED_FROM))

    ran = ops("status", str(known)[:8])

    assert "not measured" in ran.out
    assert "0.0" not in ran.out
    assert "out of memory?" in ran.out
    assert f"ops resume {str(known)[:8]}" in ran.out


def test_resume_says_from_where_and_what_to_do_next(api: Api, ops: Ops) -> None:
    known = api.holds(operation(status=Status.CANCELLED))

    ran = ops("resume", known)

    assert "epoch 2, step 130" in ran.out
    assert f"ops watch {str(known)[:8]}" in ran.out


@pytest.mark.parametrize(("flags", "sent"), [((), False), (("--accept-changes",), True)])
def test_changed_code_or_data_is_accepted_only_when_asked(
    api: Api, ops: Ops, flags: tuple[str, ...], sent: bool
) -> None:
    known = api.holds(operation(status=Status.FAILED))

    assert ops("resume", known, *flags).code == ExitCode.DONE
    assert ops("fork", known, *flags).code == ExitCode.DONE

    assert [wish.get("accept_changes", False) for wish in api.resumed + api.forked] == [sent, sent]


def test_cancel_passes_reason_and_force_on(api: Api, ops: Ops) -> None:
    known = api.holds(operation(status=Status.CANCELLING))

    assert ops("cancel", known, "--reason", "too slow", "--force").code == ExitCode.DONE

    assert api.cancelled == [CancelRequest(reason="too slow", force=True)]


@pytest.mark.parametrize(
    ("ended", "code"),
    [(Status.COMPLETED, ExitCode.DONE), (Status.FAILED, ExitCode.FAILED), (Status.CANCELLED, ExitCode.FAILED)],
)
def test_watch_leaves_with_the_outcome(
    api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch, ended: Status, code: int
) -> None:
    first = operation()
    half_way = first.model_copy(update={"progress": ProgressView(percent=50, step=5, steps_total=10, loss=1.25)})
    known = api.holds(first, half_way, first.model_copy(update={"status": ended}))

    ran = ops("watch", known)

    assert ran.code == code
    assert "5/10" in ran.out
    assert str(ended) in ran.out.splitlines()[-2]
    assert (f"ops logs {str(known)[:8]}" in ran.out.splitlines()[-1]) == (ended is Status.FAILED)


def test_ctrl_c_on_watch_detaches_and_cancels_nothing(api: Api) -> None:
    known = api.holds(operation())
    command = [sys.executable, "-c", "from ops_cli.main import main; main()", "watch", str(known)]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as watch:
        assert watch.stdout is not None
        assert "running" in watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate()

    assert watch.returncode == ExitCode.DETACHED
    assert f"ops watch {str(known)[:8]}" in err
    assert not api.cancelled


def test_events_are_sentences(api: Api, ops: Ops) -> None:
    known = api.holds(operation())
    message = "attempt 2 began on worker-1 at step 120, from checkpoint 3f2a0000"
    facts = {"at": "2026-01-01T00:00:00Z", "attempt": 2, "from_status": "pending", "to_status": "running", "detail": {}}
    api.events = [EventView(seq=3, name="claim", message=message, **facts)]

    assert "from checkpoint 3f2a0000" in " ".join(ops("events", known).out.split())
    assert json.loads(ops("events", known, "--json").out)[0]["message"] == message


def test_delete_goes_from_the_newest_and_says_what_stays(api: Api, ops: Ops) -> None:
    ended = {"status": Status.FAILED}
    old = api.holds(operation(**ended))
    new = api.holds(operation(**ended, created_at="2026-01-02T00:00:00Z"))
    live = api.holds(operation(created_at="2026-01-03T00:00:00Z"))

    assert "--yes" in ops("delete", old).err
    assert not api.deleted
    ran = ops("delete", old, new, live, "--yes")

    assert api.deleted == [new, old]
    assert ran.code == ExitCode.CONFLICT
    assert str(live)[:8] in ran.err
    assert "cancel it first" in ran.err
    assert ops("delete", uuid4(), "--yes").code == ExitCode.NOT_FOUND


def test_cleanup_only_shows_unless_it_is_told_to(api: Api, ops: Ops) -> None:
    for asked in (("--older-than", "30d"), ("--older-than", "30d", "--yes", "--dry-run")):
        shown = ops("cleanup", *asked)
        assert "Would go: 2 of 3, 4 MB" in shown.out
        assert api.cleanups.pop().dry_run
    assert "a fork needs it" in " ".join(shown.out.split())

    done = ops("cleanup", "--older-than", "30d", "--status", "failed", "--label", "a=b", "--keep-model", "--yes")

    assert "Gone: 2 of 3" in done.out
    assert [wish.dry_run for wish in api.cleanups] == [False, False], "until there is no more"
    wish = api.cleanups[0]
    assert (wish.older_than_s, wish.status, wish.label, wish.keep_model) == (2_592_000, {"failed"}, "a=b", True)


@pytest.mark.parametrize("wrong", [("--older-than", "soon"), ("--older-than", "1d", "--status", "running"), ()])
def test_a_cleanup_of_what_is_not_clear_is_refused(api: Api, ops: Ops, wrong: tuple[str, ...]) -> None:
    assert ops("cleanup", *wrong, "--yes").code == ExitCode.USAGE
    assert not api.cleanups


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No service is known on this host."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OPS_DATABASE_URL", "OPS_STORAGE_ROOT", "OPS_API_URL", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


def states(ran: Ran) -> dict[str, str]:
    return {finding["check"]: finding["state"] for finding in json.loads(ran.out)}


@pytest.mark.usefixtures("alone")
def test_the_doctor_looks_at_api_and_workers(api: Api, ops: Ops) -> None:
    api.workers = [
        worker(name="good", url=api.url, versions={"relight": api.version}),
        worker(name="old", versions={"relight": "0.0.1"}),
        worker(name="gone", live=False),
    ]

    ran = ops("doctor", "--json", "--url", api.url)
    found = states(ran)
    assert (ran.code, found["API"], found["clock of the API"]) == (ExitCode.DONE, "ok", "ok")
    assert (found["worker good"], found["clock of worker good"], found["worker old"]) == ("ok", "ok", "warn")
    assert "worker gone" not in found

    api.version = "0.0.1"
    assert states(ops("doctor", "--json", "--url", api.url))["API"] == "warn"


@pytest.mark.usefixtures("alone")
def test_gpus_are_in_the_list_of_workers_and_the_doctor_sees_a_torch_that_cannot_use_them(api: Api, ops: Ops) -> None:
    gpu = SlotView(index=0, device="cuda", device_uuid="GPU-12345678-90ab", cores=4, operation_id=None, attempt=None)
    cpu = gpu.model_copy(update={"index": 1, "device": "cpu", "device_uuid": None})
    versions = {"relight": api.version, "torch": "2.13.0+cu126"}
    api.workers = [
        worker(name="able", slots=[gpu, cpu], versions=versions),
        worker(name="unable", slots=[gpu], versions=versions | {"torch": "2.13.0+cpu"}),
    ]

    assert "cuda GPU-12345678, 4 cores: free" in ops("workers").out
    ran = ops("doctor", "--json", "--url", api.url)
    assert (states(ran)["GPUs of worker able"], states(ran)["GPUs of worker unable"]) == ("ok", "warn")
    assert "1 cuda and 1 cpu slots" in ran.out
    assert "OPS_GPUS=none" in ran.out


@pytest.mark.usefixtures("alone")
def test_the_doctor_says_what_it_can_with_the_service_down(
    ops: Ops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert ops("doctor").code == ExitCode.DONE, "a host without a service is in order"

    monkeypatch.setenv("OPS_STORAGE_ROOT", str(tmp_path))
    monkeypatch.setenv("OPS_DATABASE_URL", "postgresql://u:p@127.0.0.1:9/none")
    ran = ops("doctor", "--json", "--url", "http://127.0.0.1:9")

    found = states(ran)
    assert (ran.code, found["API"], found["database"], found["storage"]) == (ExitCode.FAILED, "fail", "fail", "ok")
    assert all(item["advice"] for item in json.loads(ran.out) if item["state"] != "ok")


@pytest.mark.parametrize(("ahead_s", "state"), [(0.4, "ok"), (-2.0, "ok"), (10.0, "warn"), (-4000.0, "warn")])
def test_a_clock_that_is_off_is_said(ahead_s: float, state: str) -> None:
    assert clock("clock", ahead_s).state == state


def test_help_waits_for_no_heavy_import() -> None:
    heavy = "{'httpx', 'pydantic', 'torch', 'numpy', 'matplotlib', 'fastapi'}"
    program = f"import sys, ops_cli.main; sys.exit(str(sorted({heavy} & sys.modules.keys()) or ''))"

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert ran.stderr.strip() == ""


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("ops_backend.__main__", ["sqlalchemy", "fastapi", "alembic"]),  # as the process of Postgres begins
        ("ops_backend.serving", ["alembic"]),
        ("ops_cli.stack", ["httpx"]),
        ("ops_worker.ptycho.workload, ops_worker.ptycho.reconstruction", ["scipy"]),  # what is asked for its schema
    ],
)
def test_what_a_start_waits_for_imports_no_more_than_it_needs(module: str, heavy: list[str]) -> None:
    program = f"import sys, {module}; sys.exit(str(sorted(set({heavy}) & sys.modules.keys()) or ''))"

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert ran.stderr.strip() == ""


def worker(**changes: Any) -> WorkerView:
    slot = SlotView(index=0, device="cpu", device_uuid=None, cores=1, operation_id=changes.pop("runs", None), attempt=1)
    plain = {"id": uuid4(), "name": "w", "host": "h", "url": "http://h", "live": True, "draining": False, "drain": None}
    times = dict.fromkeys(("registered_at", "last_seen_at"), "2026-01-01T00:00:00Z")
    return WorkerView.model_validate(plain | times | {"versions": {}, "slots": [slot]} | changes)


@pytest.mark.parametrize(
    ("workers", "accelerator", "said"),
    [
        ([], "auto", "waits for a worker: none is live"),
        ([worker(live=False), worker(draining=True)], "auto", "waits for a worker: none is live"),
        ([worker(draining=True, drain="finish")], "auto", "waits for a drained worker: w; `ops workers undrain"),
        ([worker()], "cuda", "waits for a GPU: no live worker offers one"),
        ([worker(runs=uuid4())], "auto", "waits for a free slot: 1 of 1 taken"),
    ],
)
def test_status_says_what_a_pending_operation_waits_for(
    api: Api, ops: Ops, workers: list[WorkerView], accelerator: str, said: str
) -> None:
    job = operation().job.model_copy(update={"execution": Execution(accelerator=accelerator)})
    id = api.holds(operation(status=Status.PENDING, job=job))
    api.workers = workers
    assert said in " ".join(ops("status", id).out.split())


@pytest.mark.parametrize(
    ("taken", "devices", "nodes", "said"),
    [
        (1, 2, None, "waits for 2 free slots at once: 1 of 2 taken"),
        (2, 2, 2, "waits for 2 free slots at once on 2 hosts: 2 of 2 taken"),
        (0, 4, None, "waits for 4 slots at once: live workers have 2"),
    ],
)
def test_status_says_what_a_gang_waits_for(
    api: Api, ops: Ops, taken: int, devices: int, nodes: int | None, said: str
) -> None:
    wish = {"execution": Execution(devices=devices), "resources": Resources(nodes=nodes)}
    id = api.holds(operation(status=Status.PENDING, job=operation().job.model_copy(update=wish)))
    api.workers = [worker(runs=uuid4() if n < taken else None) for n in range(2)]
    assert said in " ".join(ops("status", id).out.split())


def test_attempts_say_where_a_gang_ran(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    api.replays = [None]
    id = api.holds(operation())
    assert "ranks" not in ops("attempts", id).out
    api.members = [MemberView(worker_id=uuid4(), worker=name, host="h", first_rank=2 * n, ranks=2) for n, name in AB]
    assert "4 ranks: w +1" in ops("attempts", id).out
    api.members = api.members[:1]
    assert "2 ranks: w " in ops("attempts", id).out


def test_run_submits_the_command_as_it_was_typed_with_all_that_it_asks_for(
    api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_SHELL", "a=b")
    options = ("--env", "A=1=2", "--env", "FROM_SHELL", "--secret", "HF_TOKEN", "--artifact", "out/**", "--cores", "2")
    more = ("--workdir", "sub", "--name", "n", "--label", "a=b", "--priority", "5", "--max-retries", "0", "--no-code")

    assert ops("run", *options, *more, "--", "python", "train.py", "--lr", "3e-4", "--name", "x").code == ExitCode.DONE
    assert ops("run", "--no-code", "sh", "-c", "exit 1", "--watch").code == ExitCode.DONE

    full, bare = api.submitted
    assert full == {
        "command": ["python", "train.py", "--lr", "3e-4", "--name", "x"],
        "kind": "command",
        "env": {"A": "1=2", "FROM_SHELL": "a=b"},
        "secrets": ["HF_TOKEN"],
        "artifacts": ["out/**"],
        "workdir": "sub",
        "resources": {"cores": 2},
        "name": "n",
        "labels": {"a": "b"},
        "priority": 5,
        "max_retries": 0,
    }
    assert bare == {"command": ["sh", "-c", "exit 1", "--watch"], "kind": "command"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--env", "NOT_IN_THIS_SHELL", "true"), "this shell has no such variable"),
        (("--env", "OPS_API_TOKEN=x", "true"), "names that begin with OPS_ or RELIGHT_"),
        (("--env", "A=1", "--secret", "A", "true"), "env and secrets both name A"),
        (("--artifact", "../x", "true"), "give a relative path"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused_before_anything_is_sent(
    api: Api, ops: Ops, arguments: tuple[str, ...], says: str
) -> None:
    ran = ops("run", *arguments)

    assert ran.code == ExitCode.USAGE
    assert says in " ".join((ran.err + ran.out).split())
    assert api.submitted == []


def test_status_and_cancel_of_a_command_speak_of_no_epoch_and_no_checkpoint(api: Api, ops: Ops) -> None:
    job = operation().job.model_copy(
        update={"kind": Kind.COMMAND, "workload": "command", "command": ["sh", "-c", "a b"]}
    )
    progress = ProgressView(step=12, loss=0.5)
    made = operation(kind=Kind.COMMAND, workload="command", job=job, progress=progress, status=Status.CANCELLING)
    id = api.holds(made)

    status, cancel = ops("status", id).out, ops("cancel", id).out

    assert "sh -c 'a b'" in status
    assert "step 12, loss 0.5" in status
    assert "epoch" not in status
    assert "it may save first" in cancel
    assert "checkpoint" not in cancel


@pytest.mark.parametrize(
    ("workers", "cores", "said"),
    [
        ([worker()], None, "waits for a worker that runs its users' code: start one with OPS_USER_CODE=1"),
        ([worker(user_code=True)], 2, "waits for a slot of 2 cores: no live worker offers one"),
        ([worker(), worker(user_code=True, runs=uuid4())], 1, "waits for a free slot: 1 of 1 taken"),
    ],
)
def test_status_says_what_a_pending_command_waits_for(
    api: Api, ops: Ops, workers: list[WorkerView], cores: int | None, said: str
) -> None:
    own = {"kind": Kind.COMMAND, "workload": "command", "command": ["true"]}
    job = operation().job.model_copy(update=own | {"resources": Resources(cores=cores)})
    id = api.holds(operation(kind=Kind.COMMAND, workload="command", status=Status.PENDING, job=job))
    api.workers = workers
    assert said in " ".join(ops("status", id).out.split())


def test_drain_finds_the_live_worker_by_name_or_id_and_says_what_becomes_of_its_work(api: Api, ops: Ops) -> None:
    gone, live, idle = worker(name="a", live=False), worker(name="a", runs=uuid4()), worker(name="b")
    api.workers = [gone, live, idle]

    said = [
        ops("workers", *words).out
        for words in (
            ("drain", "a"),
            ("drain", "a", "--hand-back"),
            ("drain", str(idle.id)[:8]),
            ("undrain", "b"),
            ("drain", gone.id),
        )
    ]

    assert api.drained == [
        (live.id, "finish"),
        (live.id, "preempt"),
        (idle.id, "finish"),
        (idle.id, None),
        (gone.id, "finish"),
    ]
    assert "1 running there: finished first (--hand-back" in said[0]
    assert "1 running there: handed back" in said[1]
    assert said[2:4] == ["b is drained: nothing runs there\n", "b takes work again\n"]
    assert "a is gone" in said[4]
    assert json.loads(ops("workers", "drain", "b", "--json").out)["id"] == str(idle.id)


def test_drain_refuses_what_is_no_worker_or_several_and_says_which(api: Api, ops: Ops) -> None:
    api.workers = [worker(name="a"), worker(name="a")]

    unknown, several = ops("workers", "drain", "c"), ops("workers", "drain", "a")

    assert (unknown.code, several.code, api.drained) == (ExitCode.NOT_FOUND, ExitCode.USAGE, [])
    assert "no worker 'c'" in unknown.err
    assert str(api.workers[1].id) in several.err
    misplaced = ops("workers", "--json", "drain", "a")
    assert misplaced.code == ExitCode.USAGE
    assert "put options after drain" in misplaced.err


def test_workers_tells_draining_from_drained(api: Api, ops: Ops) -> None:
    api.workers = [worker(name="a", draining=True, runs=uuid4()), worker(name="b", draining=True), worker(name="c")]
    rows = ops("workers").out.splitlines()[-3:]
    assert [row.split()[2] for row in rows] == ["draining", "drained", "live"]
    assert [row.split()[1] for row in rows] == [str(each.id)[:8] for each in api.workers]


def test_delete_takes_several_and_tells_what_is_refused(api: Api, ops: Ops) -> None:
    known = api.holds(operation())
    first, second, third = api.checkpoints = [saved_as(uuid4()) for _ in range(3)]

    ran = ops("checkpoints", "delete", known, first.id, second.id, first.id)

    assert (ran.code, api.deleted) == (ExitCode.DONE, [first.id, second.id])
    assert ran.out.count("Deleted") == 2
    assert ops("checkpoints", "delete", known, second.id, "0bad").code == ExitCode.NOT_FOUND
    api.refusal, api.deleted = None, []
    api.refusal = OpsError(ErrorCode.CHECKPOINT_IN_USE, "a fork begins at it")
    assert ops("checkpoints", "delete", known, third.id, "--yes").code == ExitCode.CONFLICT
    assert api.deleted == []


@pytest.mark.parametrize(
    ("answer", "arguments", "code", "goes"),
    [
        (None, [], ExitCode.USAGE, False),
        (None, ["--yes"], ExitCode.DONE, True),
        ("y", [], ExitCode.DONE, True),
        ("n", [], ExitCode.FAILED, False),
    ],
)
def test_deleting_the_last_one_to_go_on_from_asks_first(
    api: Api,
    ops: Ops,
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    arguments: list[str],
    code: ExitCode,
    goes: bool,
) -> None:
    known = api.holds(operation())
    last = saved_as(uuid4())
    api.checkpoints = [last, saved_as(uuid4(), in_lineage=False)]
    terminal = StringIO(f"{answer}\n")
    monkeypatch.setattr(terminal, "isatty", lambda: answer is not None)
    monkeypatch.setattr(sys, "stdin", terminal)

    ran = ops("checkpoints", "delete", known, last.id, *arguments)

    assert (ran.code, api.deleted) == (code, [last.id] if goes else [])
    assert ("neither be resumed nor forked" in ran.out + ran.err) == (not arguments)


def test_artifacts_lists_what_an_operation_left(api: Api, ops: Ops) -> None:
    known = api.holds(operation())
    assert "when it completes" in ops("artifacts", known).out
    place = f"{known}/2-144-model/model.safetensors"
    made = ArtifactView(
        id=uuid4(),
        operation_id=known,
        attempt=2,
        name="model.safetensors",
        step=144,
        path=place,
        size_bytes=12_000,
        sha256="a" * 64,
        created_at="2026-01-01T00:00:00Z",
    )
    api.artifacts = [made]

    assert json.loads(ops("artifacts", known, "--json").out) == [made.model_dump(mode="json")]
    shown = ops("artifacts", known).out
    assert "model.safetensors" in shown
    assert "12 kB" in shown


def test_secrets_of_jobs_reach_the_workers_of_a_stack_and_no_other_part(tmp_path: Path) -> None:
    environ = {"OPS_SECRET_HF_TOKEN": "x", "OPS_SECRETS_DIR": "/run/secrets", "HOME": "/"}
    stack = Stack(StackSettings(data_dir=tmp_path, token="t", port=1, database_url="postgresql://", environ=environ))

    server, worker = stack._environ("server"), stack._environ("worker-1")

    assert not [name for name in server if name.startswith("OPS_SECRET")]
    assert (worker["OPS_SECRET_HF_TOKEN"], worker["OPS_SECRETS_DIR"]) == ("x", "/run/secrets")
    assert server["HOME"] == worker["HOME"] == "/"


def test_the_workers_of_a_stack_divide_the_gpus(tmp_path: Path) -> None:
    stack = Stack(StackSettings(data_dir=tmp_path, token="t", port=1, workers=2, environ={"OPS_GPU_SHARE": "7/9"}))

    assert [stack._environ(f"worker-{n}")["OPS_GPU_SHARE"] for n in (1, 2)] == ["1/2", "2/2"]


def test_set_goes_over_the_file_and_keeps_texts_as_texts(api: Api, ops: Ops, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("workload: digits\nexecution: {checkpoint_every: {epochs: 1}, seed: 1}\n")
    settings = ('execution.checkpoint_every={"steps": 5}', "env.PORT=8080", "labels.run.no=7", "name=3")

    assert ops("submit", tmp_path / "job.yaml", *(f"--set={each}" for each in settings)).code == ExitCode.DONE

    assert api.submitted == [
        {
            "workload": "digits",
            "execution": {"checkpoint_every": {"steps": 5}, "seed": 1},
            "env": {"PORT": "8080"},
            "labels": {"run.no": "7"},
            "name": "3",
        }
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workload: digits\nexecution: {learning_rat: 1}\n", "did you mean learning_rate?"),
        ("workload: digits\nmax_epochs: 3\n", "did you mean execution.max_epochs?"),
        ("workload: digits\nresources: {cors: 3}\n", "did you mean cores?"),
        ("workload: digits\nxyzzy: 3\n", "there are command, code"),
    ],
)
def test_an_unknown_field_names_the_one_that_was_meant(
    api: Api, ops: Ops, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "job.yaml").write_text(text)

    ran = ops("submit", tmp_path / "job.yaml")

    assert (ran.code, api.submitted) == (ExitCode.USAGE, [])
    assert words in ran.err


def test_a_wrong_override_of_a_fork_is_refused_before_it_is_sent(api: Api, ops: Ops) -> None:
    ran = ops("fork", api.holds(operation()), "--set", "workdir=x")

    assert (ran.code, api.forked) == (ExitCode.USAGE, [])
    assert "workdir: no such field" in ran.err


def test_a_dry_run_prints_the_resolved_job_and_stores_nothing(api: Api, ops: Ops, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("workload: digits\n")
    parent = api.holds(operation())

    for command in (("submit", tmp_path / "job.yaml"), ("train", "digits"), ("fork", parent)):
        ran = ops(*command, "--dry-run")
        assert ran.code == ExitCode.DONE
        assert Job.model_validate(yaml.safe_load(ran.out)) == operation().job
    assert (api.submitted, api.forked) == ([], [])


def test_the_schema_of_a_job_file_takes_what_the_job_takes(ops: Ops) -> None:
    schema = json.loads(ops("schema").out)
    valid = jsonschema.Draft202012Validator(schema).is_valid

    assert valid({"workload": "digits", "execution": {"precision": 16, "checkpoint_every": {"steps": 2}}})
    assert valid({"command": ["python", "train.py"], "env": {"A": "1"}, "secrets": ["B"]})
    assert not valid({"workload": "digits", "max_epochs": 3})
    assert not valid({"name": "nothing to run"})


def test_plot_draws_the_metric_of_each(api: Api, ops: Ops, tmp_path: Path) -> None:
    ids = [api.holds(operation(name=name)) for name in ("one", "two")]
    api.curves["loss"] = [(0, 2.0), (1, 1.0), (2, float("nan")), (3, 0.5)]

    ran = ops("plot", *ids, "--to", tmp_path / "new" / "loss.svg")

    assert ran.code == ExitCode.DONE
    drawn = (tmp_path / "new" / "loss.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "loss" in ran.out


def test_plot_says_what_it_lacks(api: Api, ops: Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    id = api.holds(operation())
    api.curves["loss"] = [(0, 2.0)]

    assert "did you mean loss?" in ops("plot", id, "--metric", "los", "--to", tmp_path / "a.png").err
    assert ops("plot", id, "--to", tmp_path / "a.txt").code == ExitCode.USAGE
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "relight[plots]" in ops("plot", id, "--to", tmp_path / "a.png").err
    assert not list(tmp_path.iterdir())


def test_download_puts_the_files_where_it_is_told(api: Api, ops: Ops, tmp_path: Path) -> None:
    id = api.holds(operation())
    api.artifacts.append(left_by(id, "files/out/a.pt", b"weights"))

    ran = ops("download", id, "--to", tmp_path)

    assert (ran.code, ran.out) == (ExitCode.DONE, f"{tmp_path / 'out' / 'a.pt'}\n")
    assert (tmp_path / "out" / "a.pt").read_bytes() == b"weights"
    assert ops("download", id, "b.pt", "--to", tmp_path).code == ExitCode.NOT_FOUND
    (tmp_path / "file").write_text("")
    assert "choose another --to" in ops("download", id, "--to", tmp_path / "file" / "below").err


def test_plot_fetches_the_pictures_of_one_operation_and_says_where(api: Api, ops: Ops, tmp_path: Path) -> None:
    id, bare = api.holds(operation()), api.holds(operation())
    for name in ("files/phase.png", "files/out/error.PNG", "files/reconstruction.npz", "model.safetensors"):
        api.artifacts.append(left_by(id, name, b"weights"))

    ran = ops("plot", id, "--pictures", "--to", tmp_path / "new")

    assert (ran.code, ran.err) == (ExitCode.DONE, "")
    assert ran.out.splitlines() == [str(tmp_path / "new" / name) for name in ("out/error.PNG", "phase.png")]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["error.PNG", "phase.png"]
    for more in ([bare], ["--metric", "loss"], ["--log"], ["--smooth", "0.9"]):
        refused = ops("plot", id, *more, "--pictures")
        assert (refused.code, refused.out) == (ExitCode.USAGE, "")
        assert "--pictures" in refused.err

    api.artifacts = [left_by(bare, "files/reconstruction.npz", b"weights")]
    none = ops("plot", bare, "--pictures")
    assert (none.code, none.out) == (ExitCode.NOT_FOUND, "")
    assert "no PNG" in none.err


def test_metrics_shows_long_names_of_final_scores_whole(api: Api, ops: Ops) -> None:
    known = api.holds(operation(status=Status.COMPLETED))
    names = ("final/train_phase_pearson", "final/epie_train_amplitude_pearson")
    api.curves = {name: [(1_000, 0.80123)] for name in names}

    ran = ops("metrics", known)

    for line, name in zip(ran.out.splitlines()[1:], names, strict=True):
        assert line.split() == [name, "1000", "0.8012", "1000", "0.8012"]


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


def test_the_failure_that_ends_an_operation_uses_no_retry(api: Api, ops: Ops) -> None:
    ran = ops("status", api.holds(operation(status=Status.FAILED, attempt=3, failures=3, max_retries=2)))
    assert "3, 2 of 2 retries used" in ran.out


def test_status_of_a_command_says_the_command_and_its_code(api: Api, ops: Ops) -> None:
    code = Code(sha256="ab" * 32, commit="c" * 40, dirty=True)
    command = ["python", "train.py", "--note", "two words"]
    job = Job(kind="command", workload="command", config={}, execution=Execution(), command=command, code=code)

    ran = ops("status", api.holds(operation(kind="command", workload="command", job=job)))

    assert "python train.py --note 'two words'" in ran.out
    assert "snapshot abababababab, commit cccccccccccc, with changes" in ran.out
    assert "workload" not in ran.out
