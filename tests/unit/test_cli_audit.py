"""`ops audit`, and what a terminal is shown of what others wrote."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from helpers.answers import operation
from helpers.cli import Api, Ops, api, ops
from ops_cli.exits import ExitCode
from ops_contract.audit import Action, AuditEntry

__all__ = ["api", "ops"]  # fixtures

ID = UUID("11111111-0000-4000-8000-000000000000")
HOSTILE = "\x1b]0;owned\x07\x9b31m\u202eevil [red]x[/]"


def entry(**changes: Any) -> AuditEntry:
    known = {"id": uuid4(), "at": datetime(2026, 11, 1, 12, tzinfo=UTC), "who": "ana", "token_id": None}
    known |= {"action": Action.CANCEL, "target": str(ID), "address": "10.0.0.7", "user_agent": "curl", "count": 1}
    return AuditEntry.model_validate(known | {"detail": {"reason": "late", "force": True}} | changes)


def test_the_audit_fits_80_columns_and_says_who_what_and_from_where(
    api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    api.audit = [
        entry(),
        entry(who=None, action=Action.UNAUTHENTICATED, target=None, count=12, detail={"call": "GET /operations"}),
        entry(who="n" * 200, address="2001:0db8:85a3:0000:0000:8a2e:0370:7334", action=Action.CLEAN_UP),
    ]

    ran = ops("audit")

    assert max(map(len, ran.out.splitlines())) <= 80
    heading, first, *_ = ran.out.splitlines()
    assert heading.split() == ["AT", "WHO", "FROM", "ACTION", "TARGET", "DETAIL"]
    assert {"ana", "operation.cancel", "11111111", "reason"} <= set(first.split())
    monkeypatch.setenv("COLUMNS", "200")
    wide = ops("audit").out
    assert "reason late, force" in wide
    assert "times 12, call GET /operations" in wide


def test_the_audit_is_narrowed_and_read_in_pages(api: Api, ops: Ops) -> None:
    api.audit = [entry() for _ in range(130)]

    ran = ops("audit", "--who", "ana", "--action", "operation.cancel", "--target", "1111", "--limit", "120", "--json")

    assert len(ran.out.splitlines()) == 120
    first, second = api.audit_asked
    assert first == {"who": "ana", "action": "operation.cancel", "target": "1111", "limit": "100"}
    assert (second["cursor"], second["limit"]) == ("100", "20")


@pytest.mark.parametrize("since", ["2d", "2026-11-24", "2026-11-24T12:00:00+01:00"])
def test_since_is_an_age_or_a_moment(api: Api, ops: Ops, since: str) -> None:
    assert ops("audit", "--since", since).code == ExitCode.DONE

    asked = datetime.fromisoformat(api.audit_asked[0]["since"])
    if since == "2d":
        assert abs(datetime.now(UTC) - asked - timedelta(days=2)) < timedelta(minutes=1)
    else:
        assert asked == datetime.fromisoformat(since).astimezone()


@pytest.mark.parametrize(("option", "said"), [("--since=yesterday", "12h"), ("--action=operation.cansel", "cancel")])
def test_a_wrong_option_says_what_it_takes(api: Api, ops: Ops, option: str, said: str) -> None:
    ran = ops("audit", option)

    assert (ran.code, api.audit_asked) == (ExitCode.USAGE, [])
    assert said in ran.err


def test_a_terminal_obeys_nothing_that_others_wrote(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    api.audit = [entry(who=HOSTILE, target=HOSTILE, address=HOSTILE, detail={"reason": HOSTILE})]
    api.holds(operation(id=ID, name=HOSTILE, cancel_reason=HOSTILE, submitted_by=HOSTILE, labels={HOSTILE: HOSTILE}))

    for command in (["audit"], ["list"], ["status", str(ID)]):
        out = ops(*command).out
        assert "evil [red]x[/]" in out
        assert [each for each in out if not each.isprintable() and each != "\n"] == [], command
