"""Events are told in sentences."""

from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from ops_backend.store.story import tell
from ops_contract.lifecycle import TRANSITIONS, Event

CHECKPOINT = UUID("3f2a0000-0000-0000-0000-000000000000")
FAULT = {"code": "trainer_killed", "message": "the trainer was killed by SIGKILL"}
DETAIL: dict[Event, dict[str, Any]] = {
    Event.RESUME: {"checkpoint_id": str(CHECKPOINT), "step": 120, "accept_changes": False},
    Event.NOTE: {"message": "early stop"},
    Event.REPLAY_DIVERGED: {"name": "loss", "step": 3, "earlier_attempt": 1, "was": "0.5", "now": "0.25"},
}


def said(event: Event, source: str | None, target: str, attempt: int = 2, **detail: Any) -> str:
    facts = {"submitted_by": "ada", "worker": "worker-1", "start_step": 120, "checkpoint_id": CHECKPOINT}
    row = SimpleNamespace(name=event, from_status=source, to_status=target, attempt=attempt, detail=detail, **facts)
    return tell(row)  # type: ignore[arg-type]


@pytest.mark.parametrize("event", list(Event))
def test_every_event_has_a_sentence_with_and_without_a_fault(event: Event) -> None:
    moves = [(t.source, t.target) for t in TRANSITIONS if t.event is event] or [("running", "running")]
    for source, target in moves:
        plain = said(event, source, target, **DETAIL.get(event, {}))
        faulty = said(event, source, target, **DETAIL.get(event, {}), error=FAULT)
        for sentence in (plain, faulty):
            assert len(sentence) > 10
            assert "None" not in sentence
            assert "{" not in sentence


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (said(Event.CLAIM, "pending", "running"), "attempt 2 began on worker-1 at step 120, from checkpoint 3f2a0000"),
        (
            said(Event.RETRY, "running", "pending", error=FAULT, failures=1, max_retries=3, retry_in_s=2.3),
            "attempt 2 failed: the trainer was killed by SIGKILL (trainer_killed); tried again in 2.3 s (1 of 3)",
        ),
        (
            said(Event.FAIL, "running", "failed", error=FAULT, failures=4, max_retries=3, permanent=False),
            "attempt 2 failed: the trainer was killed by SIGKILL (trainer_killed); no retry is left",
        ),
        (
            said(Event.FAIL, "running", "failed", failures=1, max_retries=3, permanent=True),
            "attempt 2 failed; not tried again: it would fail the same way",
        ),
        (said(Event.CANCEL, "pending", "cancelled", attempt=0, force=False), "cancelled while it waited"),
        (
            said(Event.CANCEL, "running", "cancelling", force=False, reason="wrong data"),
            "asked to save and stop: wrong data",
        ),
        (said(Event.CANCEL, "running", "cancelling", force=True), "told to stop at once"),
        (said(Event.SUBMIT, None, "pending", replay_of=str(CHECKPOINT)), "submitted by ada, a replay of 3f2a0000 from"),
    ],
)
def test_a_sentence_says_who_what_and_why(told: str, expected: str) -> None:
    assert told.startswith(expected)
