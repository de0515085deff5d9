"""How a browser logs in: a one-time code, or a token, becomes a cookie."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import StringConstraints, model_validator

from ops_contract.tokens import Scope
from ops_contract.wire import Wire

_Secret = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class Login(Wire):
    """One of them."""

    code: _Secret | None = None
    token: _Secret | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.code is None) == (self.token is None):
            raise ValueError("give either the code of a link or a token")
        return self


class LoginLink(Wire):
    """For one browser, once: `<address of the server>/#login=<code>`."""

    code: str
    expires_at: datetime


class BrowserSession(Wire):
    """Who is logged in, and what that is good for; null: without end."""

    user: str
    scope: Scope
    expires_at: datetime | None
