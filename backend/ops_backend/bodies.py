"""What receivers of webhooks are sent: the operation for programs, a sentence for people."""

import json
import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

from ops_contract.history import EventView
from ops_contract.lifecycle import Kind, Status
from ops_contract.operations import OperationSummary
from ops_contract.webhooks import WebhookBody, WebhookFormat

STORY_CHARS = 500  # escaped at most twice as long for Discord, which takes 2000 with the rest
NEXT = {Status.COMPLETED: ("artifacts",), Status.FAILED: ("logs", "resume"), Status.CANCELLED: ("resume",)}
MENTION = "@\u200b"  # a space without width: Mattermost and others look for @all in plain text too


def ended_body(format: WebhookFormat, operation: OperationSummary, event: EventView) -> bytes:
    if format is WebhookFormat.JSON:
        return _json(WebhookBody(type=f"operation.{operation.status}", timestamp=event.at, data=operation))
    commands = ", ".join(f"`ops {verb} {str(operation.id)[:8]}`" for verb in NEXT[operation.status])
    return _message(format, _sentence(operation, event), f" Next: {commands}")


def sample_body(format: WebhookFormat) -> bytes:
    if format is not WebhookFormat.JSON:
        return _message(format, "This is a test: Relight can reach you.", "")
    now = datetime.now(UTC)
    operation = OperationSummary(
        id=UUID(int=0),
        name="a test",
        status=Status.COMPLETED,
        kind=Kind.TRAINING,
        workload="none",
        labels={},
        submitted_by="a test",
        priority=0,
        attempt=1,
        progress=None,
        error=None,
        created_at=now,
        started_at=now,
        ended_at=now,
    )
    return _json(WebhookBody(type="webhook.test", timestamp=now, data=operation))


def _json(body: WebhookBody) -> bytes:
    return body.model_dump_json().encode()


def _message(format: WebhookFormat, sentence: str, commands: str) -> bytes:
    sentence = sentence.replace("@", MENTION)
    if format is WebhookFormat.SLACK:
        sentence = sentence.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return json.dumps({"text": sentence + commands}).encode()
    sentence = re.sub(r"([\\`*_~|<>\[\]])", r"\\\1", sentence)
    return json.dumps({"content": sentence + commands, "allowed_mentions": {"parse": []}}).encode()


def _sentence(operation: OperationSummary, event: EventView) -> str:
    """`digits (1f6e2a3b) failed after 0:01:20 at step 120/576, loss 0.431: attempt 2 failed: …; no retry is left.`"""
    parts = [f"{operation.name} ({str(operation.id)[:8]}) {operation.status}"]
    if operation.started_at and operation.ended_at:
        parts.append(f"after {timedelta(seconds=round((operation.ended_at - operation.started_at).total_seconds()))}")
    progress = operation.progress
    if progress and progress.step is not None:
        parts.append(f"at step {progress.step}" + (f"/{progress.steps_total}" if progress.steps_total else ""))
    loss = f", loss {progress.loss:.4g}" if progress and progress.loss is not None else ""
    return " ".join(parts) + loss + ("." if operation.status is Status.COMPLETED else f": {_cut(event.message)}.")


def _cut(story: str) -> str:
    return story if len(story) <= STORY_CHARS else story[: STORY_CHARS - 1] + "…"
