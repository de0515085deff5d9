"""What a browser's cookie is worth, and for which requests it counts."""

import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.requests import Request

from ops_backend.settings import Settings

SAFE = ("GET", "HEAD")


def digest(settings: Settings, secret: str) -> bytes:
    """By which the database knows it: no copy of the database logs anybody in, and another token ends all of them."""
    return hmac.digest(settings.api_token.encode(), secret.encode(), "sha256")


def cookie_name(settings: Settings) -> str:
    """Browsers do not tell the ports of a host apart: each service has a name of its own."""
    return f"relight-{hashlib.sha256(digest(settings, 'cookie')).hexdigest()[:8]}"


def cookie_of(request: Request, settings: Settings) -> str | None:
    """The cookie's secret, where the request comes from a page of ours."""
    secret = request.cookies.get(cookie_name(settings))
    return secret if secret and from_our_page(request) else None


def from_our_page(request: Request) -> bool:
    """SameSite keeps other sites' requests without the cookie, but not those of another port of this host.

    Browsers tell a request's origin by Sec-Fetch-Site (https and loopback only) and by Origin (all but plain reads).
    """
    if site := request.headers.get("sec-fetch-site"):
        return site == "same-origin" or (site == "none" and request.method in SAFE)
    if origin := request.headers.get("origin"):
        return urlsplit(origin).netloc == request.headers.get("host")
    return request.method in SAFE
