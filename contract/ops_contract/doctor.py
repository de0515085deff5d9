"""Whether all is well: the answer of `/health`, and what `ops doctor` finds."""

from typing import Literal

from ops_contract.wire import Wire


class Health(Wire):
    """`version` of Relight."""

    status: Literal["ok"]
    version: str


class Finding(Wire):
    """`message` says what is the case, `advice` what to do where that is not well."""

    check: str
    state: Literal["ok", "warn", "fail"]
    message: str
    advice: str | None = None


class Findings(Wire):
    items: list[Finding]


# Of two HTTP dates; they have whole seconds.
SKEW_S = 3.0


def ok(check: str, message: str) -> Finding:
    return Finding(check=check, state="ok", message=message)


def warn(check: str, message: str, advice: str) -> Finding:
    return Finding(check=check, state="warn", message=message, advice=advice)


def fail(check: str, message: str, advice: str) -> Finding:
    return Finding(check=check, state="fail", message=message, advice=advice)


def clock(check: str, ahead_s: float) -> Finding:
    """Of another clock than this host's."""
    found = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this host's"
    if abs(ahead_s) > SKEW_S:
        return warn(check, found, "let NTP set both; leases do not depend on it, the times in logs do")
    return ok(check, "as this host's")
