"""What an operator asks of a server: its workers, tokens, audit log and webhooks."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from ops_contract.audit import Action, AuditEntry, AuditPage
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import TERMINAL, Status
from ops_contract.logins import LoginLink
from ops_contract.problems import offer
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
from ops_contract.workers import DrainRequest, Workers, WorkerView, Workloads, WorkloadView
from relight.transport import PAGE, Transport

SHORTEST_PREFIX = 4


class Administration(Transport):
    """`relight.Client` has these calls."""

    def workers(self) -> Sequence[WorkerView]:
        return self._get("/workers", Workers).items

    def find_worker(self, name_or_id: str) -> WorkerView:
        """By its name or the beginning of its id; a live one before those that are gone or about to go.

        Raises OpsError `not_found`, or `invalid` with `candidates` when there are several.
        """
        workers = self.workers()
        may_be_id = len(name_or_id) >= SHORTEST_PREFIX
        found = [w for w in workers if w.name == name_or_id or (may_be_id and str(w.id).startswith(name_or_id.lower()))]
        live = [worker for worker in found if worker.live] or found
        ending = [worker for worker in live if worker.draining and worker.drain is None]
        matches = [worker for worker in live if worker not in ending] or live
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
        return list(self._items("/audit", AuditPage, wanted, limit))

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
