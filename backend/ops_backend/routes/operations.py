"""Operations: listed, cancelled, resumed, deleted."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import BackgroundTasks, Query, Response

from ops_backend.dependencies import AuditDep, DispatcherDep, PageCursor, ReaderDep, SessionDep, TelemetryDep, UserDep
from ops_backend.routes.errors import refusals
from ops_backend.routes.routers import api_router
from ops_backend.store import deletion, lists, queries
from ops_backend.store.transitions import cancel_if_live, explain_cancel, explain_resume, resume_if_ended
from ops_backend.tags import UNCHANGED, IfNoneMatch, Tagged
from ops_contract.audit import Action
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.lifecycle import Kind, Status
from ops_contract.operations import CancelRequest, Operation, OperationPage, ResumeAccepted, ResumeRequest
from ops_contract.problems import offer

router = api_router("operations", "/operations")


@router.get("", response_model=OperationPage, responses=UNCHANGED)
async def list_operations(
    session: SessionDep,
    user: ReaderDep,
    status: Annotated[str | None, Query(description="one or several, joined by commas")] = None,
    kind: Annotated[Kind | None, Query(description="what it does")] = None,
    workload: Annotated[str | None, Query(description="its name, as `GET /workloads` has it")] = None,
    label: Annotated[str | None, Query(description="key or key=value")] = None,
    q: Annotated[str | None, Query(description="part of the name, or the beginning of the id")] = None,
    mine: Annotated[bool, Query(description="those that this token submitted")] = False,
    parent_id: Annotated[
        UUID | Literal["none"] | None, Query(description="a study's children; none: what is no study's child")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="so many a page")] = 50,
    cursor: PageCursor = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Operations, newest first, in pages: `next_cursor` is the `cursor` of the next one, null on the last.

    A page by `q` looks at 100,000 operations at most: it may be short, or empty, and not the last.
    """
    wanted = lists.Filter(_statuses(status), kind, workload, label, q, user.name if mine else None, parent_id)
    return Tagged(await lists.list_page(session, wanted, limit, cursor)).answer(if_none_match)


@router.delete("/{id}", status_code=204, response_class=Response, responses=refusals(404, 409))
async def delete_operation(id: UUID, session: SessionDep, _: UserDep, audit: AuditDep) -> None:
    """Delete an operation that has ended, for good. Its files, checkpoints and model included, go soon after."""
    if not await deletion.delete_if_ended(session, id):
        raise await deletion.explain_delete(session, id)
    await audit.note(session, Action.DELETE, id)


@router.post("/{id}/cancel", status_code=202, responses=refusals(404, 409))
async def cancel_operation(
    id: UUID,
    session: SessionDep,
    _: UserDep,
    dispatcher: DispatcherDep,
    telemetry: TelemetryDep,
    audit: AuditDep,
    after: BackgroundTasks,
    wish: CancelRequest | None = None,
) -> Operation:
    """Ask it to save a checkpoint and stop. It is `cancelling` until its process is gone; a pending one ends at once.

    `force` kills its trainer, also where a cancel is under way already.
    """
    wish = wish or CancelRequest()
    cancelled = await cancel_if_live(session, id, wish.reason, wish.force)
    if cancelled is None:
        raise await explain_cancel(session, id)
    await audit.note(session, Action.CANCEL, id, reason=wish.reason or None, force=wish.force or None)
    after.add_task(telemetry.moved, cancelled.status)
    for push in cancelled.pushes:
        after.add_task(dispatcher.push_cancel, id, push, wish.reason, wish.force)
    return await queries.get(session, id)


@router.post("/{id}/resume", status_code=202, responses=refusals(404, 409))
async def resume_operation(
    id: UUID,
    session: SessionDep,
    _: UserDep,
    dispatcher: DispatcherDep,
    audit: AuditDep,
    after: BackgroundTasks,
    wish: ResumeRequest | None = None,
) -> ResumeAccepted:
    """Go on with a failed or cancelled operation, from its newest checkpoint or the one that is named.

    A refused call changes nothing: 404 without a checkpoint, 409 while it runs or when it is completed.
    """
    wish = wish or ResumeRequest()
    resumed = await resume_if_ended(session, id, wish.from_checkpoint, wish.accept_changes)
    if resumed is None:
        raise await explain_resume(session, id, wish.from_checkpoint)
    await audit.note(session, Action.RESUME, id, accept_changes=wish.accept_changes or None)
    after.add_task(dispatcher.wake)
    return resumed


def _statuses(text: str | None) -> frozenset[Status]:
    """Raises 422 for a word that is none."""
    words = set((text or "").split(",")) - {""}
    for unknown in sorted(words - {*Status}):
        raise OpsError(ErrorCode.INVALID, f"status: no such status {unknown}; {offer(unknown, Status)}")
    return frozenset(map(Status, words))
