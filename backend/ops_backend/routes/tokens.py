"""Who may do what."""

from uuid import UUID

from fastapi import Response

from ops_backend.dependencies import AdminDep, AuditDep, IdentitiesDep, SessionDep
from ops_backend.routes.errors import refusals
from ops_backend.routes.routers import api_router
from ops_backend.store import tokens
from ops_contract.audit import Action
from ops_contract.tokens import TokenCreated, TokenRequest, Tokens

router = api_router("tokens", "/tokens")


@router.post("", status_code=201, responses=refusals(409))
async def create_token(
    wish: TokenRequest, session: SessionDep, user: AdminDep, audit: AuditDep, response: Response
) -> TokenCreated:
    """A token of one scope for one person, program or group of workers. It is in this answer only."""
    response.headers["Cache-Control"] = "no-store"
    made = await tokens.add(session, wish, user.name)
    await audit.note(session, Action.CREATE_TOKEN, made.id, name=made.name, scope=made.scope)
    return made


@router.get("")
async def list_tokens(session: SessionDep, _: AdminDep) -> Tokens:
    """All that were ever made, the oldest first, and when each was last used."""
    return await tokens.list_all(session)


@router.delete("/{id}", status_code=204, response_class=Response, responses=refusals(404))
async def revoke_token(id: UUID, session: SessionDep, _: AdminDep, audit: AuditDep, identities: IdentitiesDep) -> None:
    """It opens nothing any more: here at once, at other API processes within seconds.

    The browsers that it logged in and the workers that it registered are shut out with it.
    """
    await audit.note(session, Action.REVOKE_TOKEN, id, name=await tokens.revoke(session, id))
    identities.forget()
