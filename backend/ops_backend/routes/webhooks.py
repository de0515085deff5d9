"""Who is told when operations end."""

from datetime import UTC, datetime
from uuid import UUID, uuid4

from fastapi import Response

from ops_backend.addresses import Refused
from ops_backend.bodies import sample_body
from ops_backend.dependencies import AdminDep, AuditDep, SessionDep, SessionsDep, WebhookSenderDep
from ops_backend.routes.errors import refusals
from ops_backend.routes.routers import api_router
from ops_backend.store import webhooks
from ops_backend.store.submit import invalid
from ops_backend.webhooks import new_secret
from ops_contract.audit import Action
from ops_contract.webhooks import Deliveries, WebhookAnswer, WebhookCreated, WebhookRequest, Webhooks

router = api_router("webhooks", "/webhooks")


@router.post("", status_code=201, responses=refusals(409))
async def add_webhook(
    wish: WebhookRequest, sessions: SessionsDep, _: AdminDep, audit: AuditDep, sender: WebhookSenderDep
) -> WebhookCreated:
    """Have ends of operations told to a URL. The secret that the requests are signed with is in this answer only."""
    try:
        await sender.check(str(wish.url))
    except Refused as error:
        raise invalid([("url", str(error))]) from error
    async with sessions.begin() as session:
        made = await webhooks.add(session, wish, new_secret())
        await audit.note(session, Action.ADD_WEBHOOK, made.id, host=wish.url.host)
    return made


@router.get("")
async def list_webhooks(session: SessionDep, _: AdminDep) -> Webhooks:
    """All of them, without their secrets, and how the last delivery of each went."""
    return await webhooks.list_all(session)


@router.get("/{id}/deliveries", responses=refusals(404))
async def list_deliveries(id: UUID, session: SessionDep, _: AdminDep) -> Deliveries:
    """What was sent to it, what it answered, what is tried again: the newest hundred."""
    return await webhooks.deliveries(session, id)


@router.delete("/{id}", status_code=204, response_class=Response, responses=refusals(404))
async def remove_webhook(id: UUID, session: SessionDep, _: AdminDep, audit: AuditDep) -> None:
    """Tell it no more. What is still due to it goes too."""
    await webhooks.remove(session, id)
    await audit.note(session, Action.REMOVE_WEBHOOK, id)


@router.post("/{id}/test", responses=refusals(404))
async def send_sample(
    id: UUID, sessions: SessionsDep, _: AdminDep, audit: AuditDep, sender: WebhookSenderDep
) -> WebhookAnswer:
    """Send a made-up end, once and now, and say what the receiver answered. It is no delivery."""
    async with sessions.begin() as session:
        hook = await webhooks.find(session, id)
        await audit.note(session, Action.TEST_WEBHOOK, id)
    answer, _after_s = await sender.send(hook, uuid4(), datetime.now(UTC), sample_body(hook.format))
    return answer
