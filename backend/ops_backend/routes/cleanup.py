"""Deleting by age what nobody needs any more."""

from ops_backend.audit import Audit
from ops_backend.database import Sessions
from ops_backend.dependencies import AdminDep, AuditDep, SessionsDep
from ops_backend.routes.routers import api_router
from ops_backend.store.deletion import cleanup_plan, delete_if_ended, explain_delete, give_up_checkpoints
from ops_contract.audit import Action
from ops_contract.cleanup import Cleanup, CleanupItem, CleanupRequest
from ops_contract.errors import ErrorCode

router = api_router("operations")

DELETED_A_CALL = 200  # well within the patience of a client


@router.post("/cleanup")
async def cleanup(wanted: CleanupRequest, sessions: SessionsDep, _: AdminDep, audit: AuditDep) -> Cleanup:
    """Say what would go, or delete it: a bounded number a call, then `more` is true."""
    async with sessions.begin() as session:
        items, more = await cleanup_plan(session, wanted)
    if not wanted.dry_run:
        turn = [item for item in items if item.goes != "nothing"]
        more = more or len(turn) > DELETED_A_CALL
        kept = [item for item in items if item.goes == "nothing"]
        items = [done for item in turn[:DELETED_A_CALL] if (done := await _clean(sessions, item, audit))] + kept
    return Cleanup(items=items, size_bytes=sum(item.size_bytes for item in items), more=more)


async def _clean(sessions: Sessions, item: CleanupItem, audit: Audit) -> CleanupItem | None:
    """What became of it, in a transaction of its own; None when somebody else has deleted it meanwhile."""
    async with sessions.begin() as session:
        if item.goes == "checkpoints":
            await give_up_checkpoints(session, item.id)
        elif not await delete_if_ended(session, item.id):
            refusal = await explain_delete(session, item.id)
            if refusal.code is ErrorCode.NOT_FOUND:
                return None
            return item.model_copy(update={"goes": "nothing", "size_bytes": 0, "reason": refusal.message})
        await audit.note(session, Action.CLEAN_UP, item.id, goes=item.goes)
    return item
