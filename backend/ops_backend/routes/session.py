"""Browsers: how they log in and out."""

import secrets

from fastapi import Request, Response

from ops_backend.addresses import address_of
from ops_backend.browsers import cookie_name, cookie_of, digest, from_our_page
from ops_backend.dependencies import AuditDep, CallerDep, IdentitiesDep, ReaderDep, SessionDep, SettingsDep
from ops_backend.routes.routers import api_router
from ops_backend.store import logins
from ops_backend.store.identities import FIND_LOGIN, of_secret
from ops_contract.audit import Action
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.logins import BrowserSession, Login, LoginLink
from ops_contract.tokens import Scope

router = api_router("session", "/session")


@router.post("/links", status_code=201)
async def make_link(
    session: SessionDep, user: ReaderDep, settings: SettingsDep, audit: AuditDep, response: Response
) -> LoginLink:
    """A code that logs one browser in, once, within an hour: the dashboard at `/#login=<code>` takes it."""
    code = secrets.token_urlsafe(24)
    response.headers["Cache-Control"] = "no-store"
    await audit.note(session, Action.LINK)
    return LoginLink(code=code, expires_at=await logins.add_link(session, digest(settings, code), user))


@router.post("", status_code=204, response_class=Response)
async def log_in(
    wish: Login,
    request: Request,
    session: SessionDep,
    settings: SettingsDep,
    identities: IdentitiesDep,
    audit: AuditDep,
    response: Response,
) -> None:
    """A link's code or a token becomes a cookie, good for thirty days and for this server's own pages."""
    if not _may_log_in(request):
        raise OpsError(ErrorCode.UNAUTHENTICATED, "log in on this server's own page")
    secret = secrets.token_urlsafe(32)
    if wish.code is not None:
        await identities.trade(session, wish.code, secret, address_of(request))
    else:
        user = await identities.of_token(wish.token or "", address_of(request))
        if user is None or Scope.READ not in user.scope.allows:
            raise OpsError(ErrorCode.UNAUTHENTICATED, "no token of a user here; `ops up` keeps one in DIR/token")
        await logins.add_session(session, digest(settings, secret), user)
    # There is none of a code that is no good.
    if (by := await of_secret(session, FIND_LOGIN, digest(settings, secret))) is None:
        raise OpsError(ErrorCode.UNAUTHENTICATED, "this link was used or is too old; `ops dashboard` makes another")
    await audit.note(session, Action.LOG_IN, by=by, with_link=wish.code is not None or None)
    response.headers["Cache-Control"] = "no-store"
    response.set_cookie(
        cookie_name(settings),
        secret,
        max_age=int(logins.SESSION_S),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


@router.get("")
async def get_session(user: CallerDep) -> BrowserSession:
    """Who asks, and what they may do."""
    return BrowserSession(user=user.name, scope=user.scope, expires_at=user.expires_at)


@router.delete("", status_code=204, response_class=Response)
async def log_out(
    request: Request,
    session: SessionDep,
    _: CallerDep,
    settings: SettingsDep,
    identities: IdentitiesDep,
    audit: AuditDep,
    response: Response,
) -> None:
    """The cookie is worth nothing from now on."""
    if secret := cookie_of(request, settings):
        await logins.end(session, digest(settings, secret))
        await audit.note(session, Action.LOG_OUT)
        identities.forget()
    response.delete_cookie(cookie_name(settings), httponly=True, samesite="strict")


def _may_log_in(request: Request) -> bool:
    """A program's request names no origin; another site's must not log a browser in as somebody else."""
    return from_our_page(request) or not {"origin", "sec-fetch-site"} & set(request.headers.keys())
