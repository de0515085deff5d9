"""The API as agents meet it, over real HTTP, with the fencing rules of the store in memory and faults on demand."""

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Self
from uuid import UUID

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ops_contract.agents import (
    CancelOrder,
    Heartbeat,
    HeartbeatAnswer,
    HoldRef,
    ReportBatch,
    ReportsAccepted,
    WorkerRegistered,
    WorkerRegistration,
)
from ops_contract.energy import DeviceNow, EnergyBatch, EnergyWindow
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Drain
from ops_contract.reports import Finish, LogChunk, Metrics, Progress, Report, Started
from ops_contract.wire import API_PREFIX

TOKEN = "token-of-the-tests"


@dataclass
class FakeHold:
    """One hold as the API knows it, and what goes wrong with it."""

    ref: HoldRef
    incarnation: UUID
    ended: bool = False
    cancelling: CancelOrder | None = None
    accepted: list[Report] = field(default_factory=list)
    progress: Progress | None = None
    trainer_gone_at_finish: bool | None = None
    beats: int = 0
    unavailable: bool = False
    lose_answers: int = 0
    most_per_batch: int = 1000
    refuses: Callable[[Report], bool] = lambda report: False
    windows: dict[tuple[str, int], EnergyWindow] = field(default_factory=dict)
    refuses_window: Callable[[EnergyWindow], bool] = lambda window: False

    @property
    def finish(self) -> Finish | None:
        last = self.accepted[-1] if self.accepted else None
        return last if isinstance(last, Finish) else None

    @property
    def told(self) -> list[Report]:
        """All but output, which comes when it comes."""
        return [report for report in self.accepted if not isinstance(report, LogChunk)]

    @property
    def output(self) -> bytes:
        return b"".join(report.content() for report in self.accepted if isinstance(report, LogChunk))

    @property
    def started(self) -> Started | None:
        return next((r for r in self.accepted if isinstance(r, Started)), None)

    @property
    def steps(self) -> list[int]:
        return [step for r in self.accepted if isinstance(r, Metrics) for s in r.series for step in s.steps]


class FakeApi:
    def __init__(self, cancel_grace_s: float = 1.0) -> None:
        self.terms = WorkerRegistered(lease_s=10, heartbeat_s=0.05, cancel_grace_s=cancel_grace_s)
        self.holds: dict[tuple[HoldRef, UUID], FakeHold] = {}
        self.registrations: list[WorkerRegistration] = []
        self.known: set[UUID] = set()
        self.shut_out: set[UUID] = set()
        self.draining: set[UUID] = set()
        self.drain: Drain | None = None
        self.beats_fail = False
        self.beats = 0
        self.devices: list[DeviceNow] = []  # of the last beat
        self.snapshots: dict[str, bytes] = {}
        self.fetched = 0
        self.garble = 0  # so many answers with a snapshot are not whole
        self._app = self._routes()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def claim(self, operation_id: UUID, incarnation: UUID, attempt: int = 1) -> FakeHold:
        ref = HoldRef(operation_id=operation_id, attempt=attempt)
        return self.holds.setdefault((ref, incarnation), FakeHold(ref, incarnation))

    def keep(self, archive: bytes) -> str:
        """Its SHA-256, as if somebody had uploaded it."""
        sha256 = hashlib.sha256(archive).hexdigest()
        self.snapshots[sha256] = archive
        return sha256

    async def __aenter__(self) -> Self:
        await self.up()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()

    async def up(self) -> None:
        if self._listener.fileno() == -1:
            self._listener = socket.create_server(("127.0.0.1", self._port))
        self._server = QuietServer(uvicorn.Config(self._app, lifespan="off", ws="none", log_config=None))
        self._serving = asyncio.create_task(self._server.serve([self._listener]))

    async def down(self) -> None:
        """Connections are refused from here on."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving
            self._serving = None
        self._listener.close()

    def _routes(self) -> FastAPI:
        app = FastAPI()
        app.post(f"{API_PREFIX}/workers", status_code=201)(self._register)
        app.post(f"{API_PREFIX}/workers/{{incarnation}}/heartbeat")(self._heartbeat)
        app.post(f"{API_PREFIX}/operations/{{id}}/attempts/{{attempt}}/reports")(self._reports)
        app.post(f"{API_PREFIX}/operations/{{id}}/attempts/{{attempt}}/energy")(self._energy)
        app.get(f"{API_PREFIX}/snapshots/{{sha256}}")(self._snapshot)
        app.add_exception_handler(OpsError, _answer)
        return app

    def registration(self, incarnation: UUID) -> WorkerRegistration:
        return next(worker for worker in self.registrations if worker.incarnation == incarnation)

    def _check(self, request: Request, incarnation: UUID) -> None:
        """That this worker says it itself. Who was registered stays known when the database forgets the worker."""
        shown = request.headers["Authorization"].removeprefix("Bearer ")
        if incarnation in self.shut_out:
            raise OpsError(ErrorCode.UNAUTHENTICATED, "its token was revoked")
        if shown != self.registration(incarnation).credential:
            raise OpsError(ErrorCode.FORBIDDEN, "another's credential")

    async def _snapshot(self, sha256: str) -> Response:
        self.fetched += 1
        if sha256 not in self.snapshots:
            raise OpsError(ErrorCode.NOT_FOUND, "no such snapshot")
        self.garble -= 1
        return Response(self.snapshots[sha256][: -1 if self.garble >= 0 else None])

    async def _register(self, worker: WorkerRegistration, request: Request) -> WorkerRegistered:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        if worker.incarnation in self.shut_out:
            raise OpsError(ErrorCode.UNAUTHENTICATED, "this token was revoked")
        self.registrations.append(worker)
        self.known.add(worker.incarnation)
        return self.terms

    async def _heartbeat(self, incarnation: UUID, beat: Heartbeat, request: Request) -> HeartbeatAnswer:
        self._check(request, incarnation)
        if self.beats_fail:
            raise OpsError(ErrorCode.UNAVAILABLE, "away")
        if incarnation not in self.known:
            raise OpsError(ErrorCode.NOT_FOUND, "register again")
        if beat.draining:
            self.draining.add(incarnation)
        self.beats, self.devices = self.beats + 1, beat.devices
        alive = [h for ref in beat.holds if (h := self.holds.get((ref, incarnation))) and not h.ended]
        for hold in alive:
            hold.beats += 1
        refs = {hold.ref for hold in alive}
        return HeartbeatAnswer(
            ended=[ref for ref in beat.holds if ref not in refs],
            cancelling=[hold.cancelling for hold in alive if hold.cancelling],
            drain=self.drain,
        )

    async def _energy(self, id: UUID, attempt: int, batch: EnergyBatch, request: Request) -> Response:
        self._check(request, batch.incarnation)
        hold = self.holds.get((HoldRef(operation_id=id, attempt=attempt), batch.incarnation))
        if hold is None:
            raise OpsError(ErrorCode.NOT_FOUND, "never held")
        if hold.unavailable:
            raise OpsError(ErrorCode.UNAVAILABLE, "away")
        if any(hold.refuses_window(window) for window in batch.windows):
            raise OpsError(ErrorCode.INVALID, "a value that the database cannot hold")
        for window in batch.windows:
            hold.windows.setdefault((window.device, window.index), window)
        return JSONResponse({})

    async def _reports(self, id: UUID, attempt: int, batch: ReportBatch, request: Request) -> Response:
        self._check(request, batch.incarnation)
        hold = self.holds.get((HoldRef(operation_id=id, attempt=attempt), batch.incarnation))
        if hold is None:
            raise OpsError(ErrorCode.NOT_FOUND, "never held")
        if hold.unavailable:
            raise OpsError(ErrorCode.UNAVAILABLE, "away")
        if len(batch.reports) > hold.most_per_batch:
            return Response("too large, says the proxy", 413)
        if any(hold.refuses(report) for report in batch.reports):
            raise OpsError(ErrorCode.INVALID, "a value that the database cannot hold")
        had, last_seq = len(hold.accepted), batch.first_seq + len(batch.reports) - 1
        if last_seq > had:
            self._accept(hold, batch, had)
        if hold.lose_answers > 0:
            hold.lose_answers -= 1
            return StreamingResponse(_cut_short())
        return JSONResponse(ReportsAccepted(last_seq=last_seq).model_dump())

    def _accept(self, hold: FakeHold, batch: ReportBatch, had: int) -> None:
        if hold.ended:
            raise OpsError(ErrorCode.FENCED, "ended", last_seq=had)
        if batch.first_seq > had + 1:
            raise OpsError(ErrorCode.OUT_OF_ORDER, "a gap", last_seq=had)
        hold.accepted += batch.reports[had - batch.first_seq + 1 :]
        hold.progress = batch.progress or hold.progress
        if hold.finish is not None:
            hold.ended = True
            pid = hold.started.trainer_pid if hold.started else 0
            hold.trainer_gone_at_finish = not os.path.exists(f"/proc/{pid}") if pid else None


class QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are pytest's."""
        yield


async def _answer(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OpsError)
    return JSONResponse(error.body().model_dump(mode="json"), error.http_status)


async def _cut_short() -> AsyncIterator[bytes]:
    yield b'{"last_'
    raise ConnectionResetError("as when the connection breaks after the commit")
