"""The Python client of a Relight server."""

import builtins
import math
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from uuid import UUID

from ops_contract.cleanup import Cleanup, CleanupItem, CleanupRequest
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import (
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
from ops_contract.jobs import Job, JobSpec
from ops_contract.ledger import BookedWindow, EnergyLedger, EnergyWindows
from ops_contract.lifecycle import TERMINAL, Kind, Status
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
from ops_contract.reports import Exactness, ResultContent
from ops_contract.wire import LOG_COMPLETE, LOG_END, LOG_OFFSET, Wire
from relight.administration import SHORTEST_PREFIX, Administration
from relight.following import Bar, Changes, LogPart, Output
from relight.transfers import Transfers
from relight.transport import W

CANDIDATES_SHOWN = 5


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


class Client(Administration, Transfers):
    """Talks to one server. Safe to share between threads; close it, or use it as a context manager.

    Every call raises OpsError when the server refuses (its `code` says why); Unreachable is the one of them to be
    tried again later. A call is retried, a few times, while no connection comes about or the server says 503. One
    whose answer got lost is retried only where a repetition changes nothing: reads, and what makes an operation, with
    its key.
    """

    @cached_property
    def _seen(self) -> dict[UUID, tuple[str, Operation]]:
        """With their ETags, those that have not ended."""
        return {}

    def submit(self, spec: JobSpec | Mapping[str, Any], idempotency_key: str | None = None) -> Operation:
        """The same key and spec again give the same operation. Raises ValidationError for a malformed spec."""
        job = JobSpec.model_validate(spec)
        return self._made("/operations", job, idempotency_key)

    def dry_run(self, spec: JobSpec | Mapping[str, Any]) -> Job:
        """What a submit would run, defaults and all, after every check of a submit; nothing is stored."""
        job = JobSpec.model_validate(spec)
        if job.study is not None:
            return self.preview(job).job
        return self._parse(self._post("/operations?dry_run=true", job, repeatable=True), Job)

    def preview(self, spec: JobSpec | Mapping[str, Any]) -> StudyPreview:
        """What a study would run and take, after every check of a submit; nothing is stored."""
        job = JobSpec.model_validate(spec)
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
        return self._items("/operations", OperationPage, wanted, sys.maxsize if limit is None else limit)

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
        wish = _asked(
            ForkRequest,
            from_checkpoint=from_checkpoint,
            overrides=overrides,
            name=name,
            accept_changes=accept_changes or None,
        )
        return self._made(f"/operations/{operation_id}/fork", wish, idempotency_key)

    def dry_run_fork(
        self,
        operation_id: UUID | str,
        from_checkpoint: UUID | str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Job:
        """What such a fork would run, after every check of a fork; nothing is stored."""
        wish = _asked(ForkRequest, from_checkpoint=from_checkpoint, overrides=overrides)
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
        wish = _asked(ReplayRequest, from_checkpoint=from_checkpoint, steps=steps)
        return self._made(f"/operations/{operation_id}/replay", wish, idempotency_key)

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
        return [*self._items(f"/operations/{operation_id}/energy/windows", EnergyWindows)]

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
        return [*self._items(f"/operations/{operation_id}/children", Children)]

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
        output = Output(partial(self.log_part, operation_id), offset, follow, poll_s, patience_s, away)
        while not output.ended:
            if piece := output.poll():
                yield piece
            elif not output.ended:
                self._sleep(poll_s)

    def stream(
        self, operation_id: UUID | str, *, poll_s: float = 1.0, patience_s: float = 300.0
    ) -> Iterator[Operation]:
        """The operation at every change, until it is completed, failed or cancelled.

        A server away for up to `patience_s` does not end it.
        """
        changes = Changes(partial(self.get, operation_id), poll_s, patience_s)
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

    def _made(self, path: str, wish: Wire, idempotency_key: str | None) -> Operation:
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._parse(self._post(path, wish, headers=headers, repeatable=True), Operation)

    def _remember(self, operation: Operation, etag: str | None) -> Operation:
        if etag and operation.status not in TERMINAL:
            self._seen[operation.id] = (etag, operation)
        else:
            self._seen.pop(operation.id, None)
        return operation


def _asked(model: type[W], **given: Any) -> W:
    """Only what was given: the server's defaults count."""
    return model.model_validate({key: value for key, value in given.items() if value is not None})


def _told(candidates: Sequence[OperationSummary]) -> str:
    """A line each; the newest ones."""
    lines = [f"  {each.id}  {each.name}, {each.status}" for each in candidates[:CANDIDATES_SHOWN]]
    more = ["  …"] if len(candidates) > CANDIDATES_SHOWN else []
    return "\n".join(["", *lines, *more])
