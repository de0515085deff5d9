"""The Python client of a Relight server."""

import builtins
import math
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from pydantic import ValidationError

from ops_contract.audit import Action, AuditEntry, AuditPage
from ops_contract.cleanup import Cleanup, CleanupItem, CleanupRequest
from ops_contract.errors import ErrorBody, ErrorCode, OpsError
from ops_contract.history import (
    Artifacts,
    ArtifactView,
    Attempts,
    AttemptView,
    Checkpoints,
    CheckpointView,
    Events,
    EventView,
    MetricNames,
    MetricPoints,
    MetricSummary,
)
from ops_contract.history import Results as ResultsAnswer
from ops_contract.jobs import Code, Job, JobSpec
from ops_contract.ledger import BookedWindow, EnergyLedger, EnergyWindows
from ops_contract.lifecycle import TERMINAL, Kind, Status
from ops_contract.logins import LoginLink
from ops_contract.operations import (
    CancelRequest,
    Children,
    ForkRequest,
    Operation,
    OperationPage,
    OperationSummary,
    ReplayRequest,
    ResumeAccepted,
    ResumeRequest,
    StudyPreview,
)
from ops_contract.plans import ChildResult
from ops_contract.problems import offer
from ops_contract.reports import Exactness, ResultContent
from ops_contract.tokens import TokenCreated, TokenRequest, Tokens, TokenView
from ops_contract.webhooks import (
    Deliveries,
    DeliveryView,
    WebhookAnswer,
    WebhookCreated,
    WebhookFormat,
    WebhookRequest,
    Webhooks,
    WebhookView,
)
from ops_contract.wire import API_PREFIX, LOG_COMPLETE, LOG_END, LOG_OFFSET, Wire
from ops_contract.workers import DrainRequest, Workers, WorkerView, Workloads, WorkloadView
from relight import download
from relight.download import Part, Progress
from relight.following import Bar, Changes, LogPart, Output
from relight.settings import Server, find_server

if TYPE_CHECKING:
    from relight.packing import Packed

W = TypeVar("W", bound=Wire)

ExportFormat = Literal["csv", "tensorboard"]

TRIES = 4
BACKOFF_S = 0.2
RETRY_AFTER_LIMIT_S = 5.0
PAGE = 100
EXPORT_TIMEOUT_S = 600.0
SHORTEST_PREFIX = 4
CANDIDATES_SHOWN = 5


class Unreachable(OpsError):
    """No Relight server answered, or it cannot reach its database; the message says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, message)


@dataclass(frozen=True)
class Results:
    """`metrics` are the last value of each. `exactness` null: it has not begun.

    `content`: of a training how much it was trained on what, of a measurement its figures, of a study its rows, fits
    and statistics; null until then.
    """

    operation: Operation
    content: ResultContent | None
    metrics: Mapping[str, float]
    artifacts: Sequence[ArtifactView]
    exactness: Exactness | None


class Client:
    """Talks to one server. Safe to share between threads; close it, or use it as a context manager.

    Every call raises OpsError when the server refuses (its `code` says why); Unreachable is the one of them to be
    tried again later. A call is retried, a few times, while no connection comes about or the server says 503. One
    whose answer got lost is retried only where a repetition changes nothing: reads, and what makes an operation, with
    its key.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout_s: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Without arguments: the server of OPS_API_URL, of the config file, or of the last `ops up`."""
        server = find_server(url, token)
        if server is None:
            raise Unreachable("No server is known. Start one with `ops up`, or name one by --url or OPS_API_URL.")
        self.server: Server = server
        self._sleep = sleep
        local = is_loopback(server.url)
        # Of http on this machine there is nothing to verify, and reading all authorities takes longer than most calls.
        plain = local and server.url.startswith("http://")
        self._http = httpx.Client(
            base_url=server.url,
            headers={"Authorization": f"Bearer {server.token}"} if server.token else {},
            timeout=timeout_s,
            transport=transport,
            verify=False if plain else httpx.create_ssl_context(),  # heeds SSL_CERT_FILE
            trust_env=not local,  # a proxy for the Internet knows nothing of this machine
        )
        self._seen: dict[UUID, tuple[str, Operation]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, spec: JobSpec | Mapping[str, Any], idempotency_key: str | None = None) -> Operation:
        """The same key and spec again give the same operation. Raises ValidationError for a malformed spec."""
        job = spec if isinstance(spec, JobSpec) else JobSpec.model_validate(spec)
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._parse(self._post("/operations", job, headers=headers, repeatable=True), Operation)

    def upload(self, packed: "Packed") -> Code:
        """For a job's `code`; see `relight.packing.pack`. What the server has already is not sent again.

        It stays while an operation refers to it, and for a day before the first one does.
        """
        path = f"/snapshots/{packed.sha256}"
        # A refusal of this one has no body that could say why: the next one's has.
        if not self._call("HEAD", path, repeatable=True, checked=False).is_success:
            headers = {"Content-Type": "application/octet-stream"}
            self._call("PUT", path, content=packed.archive, headers=headers, repeatable=True)
        return packed.code

    def snapshot(self, sha256: str) -> bytes:
        """The archive of a snapshot, whole; `relight.archive` reads and unpacks it."""
        archive = self._call("GET", f"/snapshots/{sha256}", repeatable=True).content
        if sha256_of(archive).hexdigest() != sha256:
            raise Unreachable(f"the snapshot {sha256} was changed on its way here; try again")
        return archive

    def dry_run(self, spec: JobSpec | Mapping[str, Any]) -> Job:
        """What a submit would run, defaults and all, after every check of a submit; nothing is stored."""
        job = spec if isinstance(spec, JobSpec) else JobSpec.model_validate(spec)
        if job.study is not None:
            return self.preview(job).job
        return self._parse(self._post("/operations?dry_run=true", job, repeatable=True), Job)

    def preview(self, spec: JobSpec | Mapping[str, Any]) -> StudyPreview:
        """What a study would run and take, after every check of a submit; nothing is stored."""
        job = spec if isinstance(spec, JobSpec) else JobSpec.model_validate(spec)
        return self._parse(self._post("/operations?dry_run=true", job, repeatable=True), StudyPreview)

    def get(self, operation_id: UUID | str) -> Operation:
        """Polling is cheap: what has not changed is not sent again."""
        operation_id = UUID(str(operation_id))
        etag, seen = self._seen.get(operation_id, ("", None))
        headers = {"If-None-Match": etag} if seen else {}
        response = self._call("GET", f"/operations/{operation_id}", headers=headers, repeatable=True)
        if response.status_code == 304 and seen:
            return seen
        return self._remember(self._parse(response, Operation), response.headers.get("ETag"))

    def list(
        self,
        *,
        status: Status | str | None = None,
        kind: Kind | str | None = None,
        workload: str | None = None,
        label: str | None = None,
        q: str | None = None,
        parent_id: UUID | str | None = None,
        limit: int | None = None,
    ) -> Iterator[OperationSummary]:
        """Newest first, page by page, at most `limit`.

        `status`: one, or several joined by commas. `label`: `key` or `key=value`. `q`: part of a name, or the
        beginning of an id. `parent_id`: the children of this study; "none": what is no study's child.
        """
        wanted: dict[str, Any] = {"status": status, "kind": kind, "workload": workload, "label": label, "q": q}
        wanted["parent_id"] = str(parent_id) if parent_id else None
        left = limit
        while left is None or left > 0:
            wanted["limit"] = min(PAGE, left or PAGE)
            page = self._get("/operations", OperationPage, wanted)
            yield from page.items
            left = None if left is None else left - len(page.items)
            if page.next_cursor is None:
                return
            wanted["cursor"] = page.next_cursor

    def cancel(self, operation_id: UUID | str, reason: str = "", force: bool = False) -> Operation:
        """Asks it to checkpoint and stop; `force` kills its trainer at once. Returns before it has stopped."""
        request = CancelRequest(reason=reason, force=force)
        return self._parse(self._post(f"/operations/{operation_id}/cancel", request), Operation)

    def resume(
        self, operation_id: UUID | str, from_checkpoint: UUID | str | None = None, accept_changes: bool = False
    ) -> ResumeAccepted:
        """From its newest checkpoint, or from the one named.

        `accept_changes`: with other code or data than the checkpoint's too, which is refused otherwise.
        """
        chosen = UUID(str(from_checkpoint)) if from_checkpoint else None
        request = ResumeRequest(from_checkpoint=chosen, accept_changes=accept_changes)
        return self._parse(self._post(f"/operations/{operation_id}/resume", request), ResumeAccepted)

    def fork(
        self,
        operation_id: UUID | str,
        from_checkpoint: UUID | str | None = None,
        overrides: Mapping[str, Any] | None = None,
        name: str | None = None,
        idempotency_key: str | None = None,
        accept_changes: bool = False,
    ) -> Operation:
        """A new operation that begins at a checkpoint of this one, by default the newest.

        `overrides`: what differs in its job, such as `{"execution": {"max_epochs": 20}}`. The same key and wish again
        give the same operation.
        """
        given = {"from_checkpoint": from_checkpoint, "overrides": overrides, "name": name}
        wish = _fork(**given, accept_changes=accept_changes or None)
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._parse(
            self._post(f"/operations/{operation_id}/fork", wish, headers=headers, repeatable=True), Operation
        )

    def dry_run_fork(
        self,
        operation_id: UUID | str,
        from_checkpoint: UUID | str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Job:
        """What such a fork would run, after every check of a fork; nothing is stored."""
        wish = _fork(from_checkpoint=from_checkpoint, overrides=overrides)
        return self._parse(self._post(f"/operations/{operation_id}/fork?dry_run=true", wish, repeatable=True), Job)

    def replay(
        self,
        operation_id: UUID | str,
        from_checkpoint: UUID | str | None = None,
        steps: int | None = None,
        idempotency_key: str | None = None,
    ) -> Operation:
        """A new operation that redoes what this one reported after a checkpoint, by default the newest that has some.

        Wait for its end; then the sum of its attempts' `replay` says how many values differ. At most `steps` steps are
        redone. The same key and wish again give the same operation.
        """
        given = {"from_checkpoint": from_checkpoint, "steps": steps}
        wish = ReplayRequest.model_validate({key: value for key, value in given.items() if value is not None})
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._parse(
            self._post(f"/operations/{operation_id}/replay", wish, headers=headers, repeatable=True), Operation
        )

    def attempts(self, operation_id: UUID | str) -> Sequence[AttemptView]:
        return self._get(f"/operations/{operation_id}/attempts", Attempts).items

    def events(self, operation_id: UUID | str) -> Sequence[EventView]:
        """The whole history, oldest first."""
        items: builtins.list[EventView] = []
        while page := self._get(
            f"/operations/{operation_id}/events", Events, {"after_seq": items[-1].seq if items else 0}
        ).items:
            items += page
        return items

    def checkpoints(self, operation_id: UUID | str) -> Sequence[CheckpointView]:
        return self._get(f"/operations/{operation_id}/checkpoints", Checkpoints).items

    def delete_checkpoint(self, operation_id: UUID | str, checkpoint_id: UUID | str) -> None:
        """It can no longer be used; its files go soon after. Refused with `checkpoint_in_use` while it is needed."""
        self._call("DELETE", f"/operations/{operation_id}/checkpoints/{checkpoint_id}")

    def delete(self, operation_id: UUID | str) -> None:
        """An operation that has ended, for good; its files go soon after. Refused with `not_deletable` else."""
        self._call("DELETE", f"/operations/{operation_id}")
        self._seen.pop(UUID(str(operation_id)), None)

    def cleanup(
        self,
        older_than_s: float,
        *,
        status: Iterable[Status | str] = TERMINAL,
        label: str | None = None,
        keep_model: bool = False,
        dry_run: bool = True,
    ) -> builtins.list[CleanupItem]:
        """Delete what ended so long ago; with `dry_run` say what would go, and why the rest stays.

        `label`: `key` or `key=value`. `keep_model`: of operations that left a model only the checkpoints go.
        """
        wish = CleanupRequest.model_validate(
            {
                "older_than_s": older_than_s,
                "status": set(status),
                "label": label,
                "keep_model": keep_model,
                "dry_run": dry_run,
            }
        )
        done: builtins.list[CleanupItem] = []
        while True:
            turn = self._parse(self._post("/cleanup", wish, repeatable=True), Cleanup)
            gone = [item for item in turn.items if item.goes != "nothing"]
            if dry_run or not (turn.more and gone):
                return done + list(turn.items)
            done += gone

    def artifacts(self, operation_id: UUID | str) -> Sequence[ArtifactView]:
        """The files it left: the final model of a completed one, and `files/…` of every attempt."""
        return self._get(f"/operations/{operation_id}/artifacts", Artifacts).items

    def download(
        self,
        operation_id: UUID | str,
        to: Path | str,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Sequence[Path]:
        """Put its files, or those named, below `to`; `files/out/a.pt` becomes `out/a.pt` there.

        Each appears whole, after its SHA-256 was compared. One that was interrupted goes on where it was, and one that
        is there already is not sent again. Raises DownloadFailed, OSError for what the disk refuses.
        """
        path = f"{API_PREFIX}/operations/{operation_id}/artifacts"
        return [
            download.fetch(each, Path(to), partial(self._fill, f"{path}/{each.id}", each, progress))
            for each in download.newest(self.artifacts(operation_id), names)
        ]

    def export(self, operation_id: UUID | str, format: ExportFormat = "csv", to: Path | str = ".") -> Path:
        """Put every metric into a file, along the lineage and every bit kept; of a running operation so far.

        `to`: a directory, where it is `<name>-<id>.csv`, or below `<name>-<id>/` for `tensorboard --logdir TO`; or the
        file itself, when that ends in .csv. It appears whole, in the place of what was there. Raises OSError for what
        the disk refuses.
        """
        fill = partial(self._fill_export, operation_id, format)
        if format == "csv" and Path(to).suffix == ".csv":
            return download.replace(Path(to), fill)
        operation = self.get(operation_id)
        run = Path(to) / run_name(operation)
        if format == "csv":
            return download.replace(run.with_name(f"{run.name}.csv"), fill)
        began_at = operation.started_at or operation.created_at  # as the server names it in logs/
        return download.replace(run / f"events.out.tfevents.{int(began_at.timestamp())}.relight", fill)

    def export_pieces(self, operation_id: UUID | str, format: ExportFormat = "csv") -> Iterator[bytes]:
        """The bytes of such a file. What it raises may come after some."""
        url, wanted = f"{API_PREFIX}/operations/{operation_id}/export", {"format": format}
        try:
            # It is made whole before the first byte comes.
            with self._http.stream("GET", url, params=wanted, timeout=EXPORT_TIMEOUT_S) as response:
                if not response.is_success:
                    response.read()
                    self._checked(response)
                yield from response.iter_bytes()
        except httpx.TransportError as error:
            raise self._unreachable(error, True) from error

    def metric_names(self, operation_id: UUID | str) -> Sequence[str]:
        return self._get(f"/operations/{operation_id}/metrics", MetricNames).names

    def metric_summaries(self, operation_id: UUID | str) -> Sequence[MetricSummary]:
        """The first and the last point of each, which costs no reading of the points between."""
        return self._get(f"/operations/{operation_id}/metrics", MetricNames).metrics

    def metrics(
        self,
        operation_id: UUID | str,
        name: str,
        after_step: int | None = None,
        max_points: int | None = None,
        cursor: str | None = None,
    ) -> MetricPoints:
        """Every bit as it was reported, along the lineage; with `max_points` few of the points, every spike among them.

        `cursor`, that of an earlier answer: what has come since. If `replaces_from` is not None, forget first what you
        have from that step on.
        """
        wanted = {"name": name, "after_step": after_step, "max_points": max_points}
        points: builtins.list[tuple[int, float]] = []
        replaces_from: int | None = None
        while True:
            page = self._get(f"/operations/{operation_id}/metrics", MetricPoints, wanted | {"cursor": cursor})
            if (start := page.replaces_from) is not None:
                points = [point for point in points if point[0] < start]
                replaces_from = start if replaces_from is None else min(replaces_from, start)
            points += page.points
            if not page.more:
                return page.model_copy(update={"points": points, "replaces_from": replaces_from})
            cursor = page.cursor

    def energy(self, operation_id: UUID | str) -> EnergyLedger:
        """What it cost in joules: useful, lost, overhead; by attempt, epoch and device. Unknown is None, and why."""
        return self._get(f"/operations/{operation_id}/energy", EnergyLedger)

    def energy_windows(self, operation_id: UUID | str) -> builtins.list[BookedWindow]:
        """What the ledger adds up: of each attempt and device, one after another in time."""
        items: builtins.list[BookedWindow] = []
        cursor: str | None = None
        while True:
            page = self._get(f"/operations/{operation_id}/energy/windows", EnergyWindows, {"cursor": cursor})
            items += page.items
            if (cursor := page.next_cursor) is None:
                return items

    def columns(self, operation_id: UUID | str, names: Iterable[str] | None = None) -> dict[str, builtins.list[Any]]:
        """`step` and a column for each metric, NaN where it has no value: `pandas.DataFrame(client.columns(id))`."""
        names = self.metric_names(operation_id) if names is None else names
        curves = {name: dict(self.metrics(operation_id, name).points) for name in names}
        steps = sorted(set().union(*curves.values()))
        return {"step": steps} | {name: [curve.get(step, math.nan) for step in steps] for name, curve in curves.items()}

    def results(self, operation_id: UUID | str) -> Results:
        """What has come of it, or has so far: the last value of every metric, its files, its exactness."""
        operation = self.get(operation_id)
        metrics = {each.name: each.last[1] for each in self.metric_summaries(operation_id) if each.last}
        items = self._get(f"/operations/{operation_id}/results", ResultsAnswer).items
        content = items[0].content if items else None
        return Results(operation, content, metrics, self.artifacts(operation_id), operation.exactness)

    def children(self, operation_id: UUID | str) -> Sequence[ChildResult]:
        """Of a study, in the order of its plan, each with what it has given so far."""
        items: builtins.list[ChildResult] = []
        wanted: dict[str, Any] = {}
        while True:
            page = self._get(f"/operations/{operation_id}/children", Children, wanted)
            items += page.items
            if page.next_cursor is None:
                return items
            wanted["cursor"] = page.next_cursor

    def log_part(self, operation_id: UUID | str, offset: int = 0, max_bytes: int | None = None) -> LogPart:
        """What its attempts wrote to stdout and stderr, from the first byte there is at or after `offset`.

        A negative one counts from the end. The next part begins at `start + len(data)`.
        """
        wanted = {"offset": offset} | ({"max_bytes": max_bytes} if max_bytes else {})
        response = self._call("GET", f"/operations/{operation_id}/logs", params=wanted, repeatable=True)
        try:
            start, end = (int(response.headers[name]) for name in (LOG_OFFSET, LOG_END))
        except (KeyError, ValueError) as error:
            raise self._not_relight(response) from error
        return LogPart(start, response.content, end, response.headers.get(LOG_COMPLETE) == "true")

    def logs(
        self,
        operation_id: UUID | str,
        *,
        offset: int = 0,
        follow: bool = False,
        poll_s: float = 1.0,
        patience_s: float = 300.0,
        away: Callable[[str], None] | None = None,
    ) -> Iterator[bytes]:
        """Its output piece by piece; bytes, for what programs print need not be UTF-8.

        Where some was left out, a line says so.
        `follow`: until the operation has ended. A server away for up to `patience_s` does not end that; `away` is told.
        """
        output = self._output(operation_id, offset, follow, poll_s, patience_s, away)
        while not output.ended:
            if piece := output.poll():
                yield piece
            elif not output.ended:
                self._sleep(poll_s)

    def workers(self) -> Sequence[WorkerView]:
        return self._get("/workers", Workers).items

    def find_worker(self, name_or_id: str) -> WorkerView:
        """By its name or the beginning of its id; a live one before those that are gone.

        Raises OpsError `not_found`, or `invalid` with `candidates` when there are several.
        """
        workers = self.workers()
        found = [w for w in workers if w.name == name_or_id or _begins(w.id, name_or_id)]
        matches = [worker for worker in found if worker.live] or found
        if not matches:
            names = sorted({worker.name for worker in workers if worker.live})
            hint = offer(name_or_id, names) if names else "see `ops workers`"
            raise OpsError(ErrorCode.NOT_FOUND, f"no worker {name_or_id!r}; {hint}")
        if len(matches) > 1:
            ids = [str(worker.id) for worker in matches]
            message = f"{len(ids)} workers are called {name_or_id!r}: name one by its id, of {', '.join(ids)}"
            raise OpsError(ErrorCode.INVALID, message, candidates=ids)
        return matches[0]

    def drain(self, worker_id: UUID | str, preempt: bool = False) -> WorkerView:
        """Gives it no more work. What runs there finishes; with `preempt` it checkpoints and goes on elsewhere.

        Until `undrain`, or until the worker is restarted: that makes it another one.
        """
        wish = DrainRequest(preempt=preempt)
        return self._parse(self._post(f"/workers/{worker_id}/drain", wish, repeatable=True), WorkerView)

    def undrain(self, worker_id: UUID | str) -> WorkerView:
        return self._parse(self._call("POST", f"/workers/{worker_id}/undrain", repeatable=True), WorkerView)

    def workloads(self) -> Sequence[WorkloadView]:
        return self._get("/workloads", Workloads).items

    def dashboard_link(self) -> str:
        """Logs one browser in, once, within an hour."""
        link = self._parse(self._call("POST", "/session/links", repeatable=True), LoginLink)
        return f"{self.server.url.rstrip('/')}/#login={link.code}"

    def create_token(self, wish: TokenRequest) -> TokenCreated:
        """Keep the `token` of the answer: it is not shown again. Needs one of scope admin."""
        return self._parse(self._post("/tokens", wish), TokenCreated)

    def tokens(self) -> Sequence[TokenView]:
        """Revoked ones too."""
        return self._get("/tokens", Tokens).items

    def revoke_token(self, token_id: UUID | str) -> None:
        self._call("DELETE", f"/tokens/{token_id}")

    def audit(
        self,
        *,
        who: str | None = None,
        action: Action | str | None = None,
        target: UUID | str | None = None,
        since: datetime | None = None,
        limit: int = PAGE,
    ) -> Sequence[AuditEntry]:
        """Who did what, and from where: the newest `limit`. Needs a token of scope admin.

        `target`: an id, or its beginning. `since` has its time zone.
        """
        wanted: dict[str, Any] = {"who": who, "action": action, "target": target and str(target)}
        wanted["since"] = since and since.isoformat()
        items: builtins.list[AuditEntry] = []
        while True:
            wanted["limit"] = min(PAGE, limit - len(items))
            page = self._get("/audit", AuditPage, wanted)
            items += page.items
            wanted["cursor"] = page.next_cursor
            if page.next_cursor is None or len(items) >= limit:
                return items

    def add_webhook(
        self,
        url: str,
        *,
        format: WebhookFormat | str = WebhookFormat.JSON,
        statuses: Iterable[Status | str] = TERMINAL,
        label: str | None = None,
        description: str = "",
    ) -> WebhookCreated:
        """Have `url` told when operations end. Keep the `secret` of the answer: it is not shown again.

        `format`: json, slack or discord. `label`: `key` or `key=value`. Raises ValidationError for a malformed wish.
        """
        given = {"url": url, "format": format, "statuses": set(statuses), "label": label, "description": description}
        return self._parse(self._post("/webhooks", WebhookRequest.model_validate(given)), WebhookCreated)

    def webhooks(self) -> Sequence[WebhookView]:
        return self._get("/webhooks", Webhooks).items

    def deliveries(self, webhook_id: UUID | str) -> Sequence[DeliveryView]:
        """The newest hundred."""
        return self._get(f"/webhooks/{webhook_id}/deliveries", Deliveries).items

    def test_webhook(self, webhook_id: UUID | str) -> WebhookAnswer:
        """What its receiver answers to a made-up end, sent now."""
        return self._parse(self._call("POST", f"/webhooks/{webhook_id}/test"), WebhookAnswer)

    def remove_webhook(self, webhook_id: UUID | str) -> None:
        """With what is still due to it."""
        self._call("DELETE", f"/webhooks/{webhook_id}")

    def stream(
        self, operation_id: UUID | str, *, poll_s: float = 1.0, patience_s: float = 300.0
    ) -> Iterator[Operation]:
        """The operation at every change, until it is completed, failed or cancelled.

        A server away for up to `patience_s` does not end it.
        """
        changes = self._changes(operation_id, poll_s, patience_s)
        while not changes.ended:
            if (operation := changes.poll()) is not None:
                yield operation
            if not changes.ended:
                self._sleep(poll_s)

    def wait(
        self, operation_id: UUID | str, *, poll_s: float = 1.0, patience_s: float = 300.0, progress: bool = False
    ) -> Operation:
        """The operation once it is completed, failed or cancelled; as `stream`.

        `progress` shows a bar in a terminal or a notebook.
        """
        with Bar(progress) as bar:
            for operation in self.stream(operation_id, poll_s=poll_s, patience_s=patience_s):
                bar.show(operation)
        return operation

    def resolve(self, prefix: str) -> UUID:
        """The id that begins so. Raises OpsError `not_found`, or `invalid` with `candidates` when there are several."""
        try:
            return UUID(prefix)
        except ValueError:
            pass
        if len(prefix) < SHORTEST_PREFIX:
            raise OpsError(
                ErrorCode.INVALID, f"{prefix!r} is too short for an id; give at least {SHORTEST_PREFIX} characters"
            )
        prefix = prefix.lower()
        # What can be no id is looked for in the names, to say what may have been meant.
        can_be_id = re.fullmatch("[0-9a-f-]+", prefix) is not None
        found = list(self.list(q=prefix, limit=None if can_be_id else CANDIDATES_SHOWN + 1))
        matches = [each for each in found if str(each.id).startswith(prefix)]
        if len(matches) == 1:
            return matches[0].id
        if matches:
            message = f"{prefix!r} begins {len(matches)} ids, give more characters:{_told(matches)}"
            raise OpsError(ErrorCode.INVALID, message, candidates=[str(each.id) for each in matches])
        hint = f", but there is a name with it:{_told(found)}" if found else "; see `ops list`"
        raise OpsError(ErrorCode.NOT_FOUND, f"no operation has an id that begins with {prefix!r}{hint}")

    def _changes(self, operation_id: UUID | str, poll_s: float, patience_s: float) -> Changes:
        return Changes(partial(self.get, operation_id), Unreachable, poll_s, patience_s)

    def _output(
        self,
        operation_id: UUID | str,
        offset: int,
        follow: bool,
        poll_s: float,
        patience_s: float,
        away: Callable[[str], None] | None,
    ) -> Output:
        look = partial(self.log_part, operation_id)
        return Output(look, Unreachable, offset, follow, poll_s, patience_s, away)

    def _fill(self, url: str, artifact: ArtifactView, progress: Progress | None, part: Part) -> None:
        """Tries again from where it is, a few times since it last got on."""
        tries = TRIES
        while True:
            had_bytes = part.size_bytes
            try:
                return self._go_on(url, artifact, progress, part)
            except Unreachable:
                tries = TRIES if part.size_bytes > had_bytes else tries - 1
                if not tries:
                    raise
            self._sleep(BACKOFF_S * 2 ** (TRIES - tries))

    def _go_on(self, url: str, artifact: ArtifactView, progress: Progress | None, part: Part) -> None:
        headers = {"Accept-Encoding": "identity"}
        if 0 < part.size_bytes < artifact.size_bytes:
            headers |= {"Range": f"bytes={part.size_bytes}-", "If-Range": f'"{artifact.sha256}"'}
        try:
            with self._http.stream("GET", url, headers=headers) as response:
                if not response.is_success:
                    response.read()
                    self._checked(response)
                if response.status_code != 206:
                    part.restart()
                for chunk in response.iter_bytes():
                    part.write(chunk)
                    if progress is not None:
                        progress(artifact, part.size_bytes)
        except httpx.TransportError as error:
            raise self._unreachable(error, True) from error

    def _fill_export(self, operation_id: UUID | str, format: ExportFormat, part: Part) -> None:
        for retry_in_s in (*(BACKOFF_S * 2**n for n in range(TRIES - 1)), None):
            part.restart()
            try:
                for piece in self.export_pieces(operation_id, format):
                    part.write(piece)
                return
            except Unreachable:
                if retry_in_s is None:
                    raise
                self._sleep(retry_in_s)

    def _remember(self, operation: Operation, etag: str | None) -> Operation:
        if etag and operation.status not in TERMINAL:
            self._seen[operation.id] = (etag, operation)
        else:
            self._seen.pop(operation.id, None)
        return operation

    def _get(self, path: str, model: type[W], query: Mapping[str, Any] | None = None) -> W:
        given = {key: value for key, value in (query or {}).items() if value is not None}
        return self._parse(self._call("GET", path, params=given, repeatable=True), model)

    def _post(
        self, path: str, body: Wire, headers: Mapping[str, str] | None = None, repeatable: bool = False
    ) -> httpx.Response:
        # Only what was given: the server's defaults count, not this client's.
        content = body.model_dump_json(exclude_unset=True)
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self._call("POST", path, content=content, headers=headers, repeatable=repeatable)

    def _call(
        self, method: str, path: str, *, repeatable: bool = False, checked: bool = True, **request: Any
    ) -> httpx.Response:
        for retry_in_s in (*(BACKOFF_S * 2**n for n in range(TRIES - 1)), None):
            try:
                response = self._http.request(method, API_PREFIX + path, **request)
            except httpx.TransportError as error:
                unsent = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
                if retry_in_s is None or not (unsent or repeatable):
                    raise self._unreachable(error, unsent or method == "GET") from error
            else:
                if response.status_code != 503 or retry_in_s is None:
                    return self._checked(response) if checked else response
                retry_in_s = _retry_after_s(response) or retry_in_s
            self._sleep(retry_in_s * random.uniform(0.8, 1.2))
        raise AssertionError("the last try returns or raises")

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_success or response.status_code == 304:
            return response
        try:
            error = ErrorBody.model_validate_json(response.content).error
        except ValidationError:
            raise self._not_relight(response) from None
        if error.code is ErrorCode.UNAVAILABLE:
            raise Unreachable(error.message)
        raise OpsError(error.code, error.message, **error.details)

    def _parse(self, response: httpx.Response, model: type[W]) -> W:
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise self._not_relight(response) from error

    def _unreachable(self, error: httpx.TransportError, harmless: bool) -> Unreachable:
        problem = str(error) or type(error).__name__
        where = f"No server answers at {self.server.url} ({self.server.origin}): {problem}."
        if harmless:
            return Unreachable(f"{where} Start it with `ops up`, or name another by --url or OPS_API_URL.")
        return Unreachable(f"{where} The request may have been carried out: look with `ops list` before repeating it.")

    def _not_relight(self, response: httpx.Response) -> Unreachable:
        return Unreachable(
            f"{self.server.url} ({self.server.origin}) answered HTTP {response.status_code} in a way this client does"
            " not understand: it is no Relight server, or one of another version. Check --url and `ops --version`."
        )


def run_name(operation: Operation) -> str:
    """For a file or directory; the beginning of the id, which a name of ours ends in, tells those of one name apart."""
    short = str(operation.id)[:8]
    name = re.sub(r"[^0-9A-Za-z_.-]+", "-", operation.name.removesuffix(f"-{short}"))
    return f"{name[:80].lstrip('.-')}-{short}".lstrip("-")


def _fork(**given: Any) -> ForkRequest:
    return ForkRequest.model_validate({key: value for key, value in given.items() if value is not None})


def _begins(id: UUID, prefix: str) -> bool:
    return len(prefix) >= SHORTEST_PREFIX and str(id).startswith(prefix.lower())


def _told(candidates: Sequence[OperationSummary]) -> str:
    """A line each; the newest ones."""
    lines = [f"  {each.id}  {each.name}, {each.status}" for each in candidates[:CANDIDATES_SHOWN]]
    more = ["  …"] if len(candidates) > CANDIDATES_SHOWN else []
    return "\n".join(["", *lines, *more])


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        return min(max(float(response.headers["Retry-After"]), 0.0), RETRY_AFTER_LIMIT_S)
    except (KeyError, ValueError):
        return None


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
