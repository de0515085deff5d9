"""An event as one sentence. All that show events to people show these."""

from typing import Any, assert_never

from sqlalchemy import Row

from ops_backend.store.transitions import MAX_LOST_WITHOUT_PROGRESS
from ops_contract.lifecycle import Event, Status

_QUEUED = "back in the queue, not charged"


def tell(event: Row[Any]) -> str:
    """`event` has besides its own columns submitted_by of the operation, and worker, start_step and checkpoint_id
    of the attempt; null where there is none. The worker is a gang's leader: where another member ended the attempt, the
    detail has that.
    """
    attempt, detail = f"attempt {event.attempt}", event.detail
    by = detail.get("member", event.worker)
    match Event(event.name):
        case Event.SUBMIT:
            return f"submitted by {event.submitted_by}{_origin(detail)}"
        case Event.CLAIM:
            came_from = f", from checkpoint {_short(event.checkpoint_id)}" if event.checkpoint_id else ""
            return f"{attempt} began on {_workers(event)} at step {event.start_step}{came_from}"
        case Event.REFUSE:
            return f"{by} did not take {attempt}{_fault(detail)}; {_QUEUED}"
        case Event.CHECKPOINT_CORRUPT:
            return f"{attempt} could not restore its checkpoint{_fault(detail)}; {_after_corrupt(event.to_status)}"
        case Event.COMPLETE:
            in_spite = ", before the cancel reached it" if event.from_status == Status.CANCELLING else ""
            return f"{attempt} completed{in_spite}"
        case Event.FAIL | Event.RETRY:
            return f"{attempt} failed{_fault(detail)}; {_after_failure(event)}"
        case Event.PREEMPT:
            return f"{attempt} was handed back by {by}{_fault(detail)}; {_QUEUED}"
        case Event.STOP:
            return f"{attempt} has ended{_fault(detail)}; cancelled" if event.attempt else "cancelled"
        case Event.LOST:
            return f"{by} was lost with {attempt}: it renewed its lease no more; {_after_loss(event)}"
        case Event.PLAN:
            return f"{attempt} planned its children, and waits for them"
        case Event.REDUCE:
            return "no child is live any more; in the queue to put their results together"
        case Event.REPLAN:
            return "planned again by its study, which goes on; in the queue"
        case Event.CANCEL:
            what = "cancelled while it waited" if event.to_status == Status.CANCELLED else "asked to save and stop"
            return ("told to stop at once" if detail.get("force") and event.attempt else what) + _reason(detail)
        case Event.FORCE:
            return "told to stop at once, without saving" + _reason(detail)
        case Event.RESUME:
            if "step" not in detail:
                return "resumed: it runs again"
            accepted = ", with other code or data if need be" if detail.get("accept_changes") else ""
            return f"resumed at step {detail['step']}, from checkpoint {_short(detail['checkpoint_id'])}{accepted}"
        case Event.NOTE:
            return detail["message"] if detail.get("engine") else f"{attempt}: {detail['message']}"
        case Event.REPLAY_DIVERGED:
            now_and_was = f"{detail['now']} instead of {detail['was']}"
            earlier = f"than attempt {detail['earlier_attempt']}"
            where = f"another {detail['name']} at step {detail['step']}"
            return f"{attempt} reported {where} {earlier}: {now_and_was}; its exactness is no longer promised"
        case never:
            assert_never(never)


def _origin(detail: dict[str, Any]) -> str:
    fork, parent = detail.get("forked_from"), detail.get("replay_of")
    if study := detail.get("study"):
        return f", a child of study {_short(study)}"
    at = f" at step {fork['step']}" if fork else " from the beginning"
    if parent:
        return f", a replay of {_short(parent)}{at}"
    return f", a fork of {_short(fork['operation_id'])}{at}" if fork else ""


def _workers(event: Row[Any]) -> str:
    """Of a gang all of them, with how many ranks they have."""
    members = event.detail.get("members")
    if not members:
        return str(event.worker)
    names = ", ".join(member["worker"] for member in members)
    where = f"{len(members)} workers" if len(members) > 1 else "one worker"
    return f"{where} ({names}) with {sum(member['ranks'] for member in members)} ranks"


def _after_corrupt(status: str) -> str:
    if status == Status.FAILED:
        return "failed: it was chosen by hand, or there is no other"
    return "tried again from the one before, not charged"


def _after_failure(event: Row[Any]) -> str:
    """Events of older versions do not say how often."""
    detail, is_last = event.detail, event.to_status == Status.FAILED
    count = f" ({detail['failures']} of {detail['max_retries']})" if "failures" in detail and not is_last else ""
    if is_last:
        return "not tried again: it would fail the same way" if detail.get("permanent") else "no retry is left"
    return f"tried again in {detail['retry_in_s']:g} s{count}" if count else "tried again"


def _after_loss(event: Row[Any]) -> str:
    if event.to_status == Status.CANCELLED:
        return "cancelled, and whether its process has ended is not known"
    if event.to_status == Status.FAILED:
        return f"failed: {MAX_LOST_WITHOUT_PROGRESS} attempts in a row were lost without progress"
    return _QUEUED


def _fault(detail: dict[str, Any]) -> str:
    fault = detail.get("error")
    return f": {fault['message']} ({fault['code']})" if fault else ""


def _reason(detail: dict[str, Any]) -> str:
    return f": {detail['reason']}" if detail.get("reason") else ""


def _short(id: object) -> str:
    return str(id)[:8]
