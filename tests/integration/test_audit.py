"""Who did what, from where: a note for every change that was accepted, in its transaction, and none without one."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from helpers.store import Store, credential_of, losses, saved, started
from integration.test_api import TOKEN, refusal, serving
from integration.test_logins import browser
from integration.test_scopes import ROUTES, paths
from integration.test_tokens import bearer, create
from ops_backend.audit import OTHERS, TOLD_APART, Auditor, Refusals, Refused
from ops_backend.database import Sessions
from ops_backend.store.audit import FORGOTTEN_AT_ONCE, Caller
from ops_contract.audit import Action, AuditEntry, AuditPage
from ops_contract.lifecycle import Outcome
from ops_contract.tokens import Scope

__all__ = ["paths"]  # a fixture

MISSING = "00000000-0000-0000-0000-000000000000"
ARCHIVE = b"a tar file"
INCARNATION = uuid4()
WORKER = {
    "incarnation": str(INCARNATION),
    "credential": credential_of(INCARNATION),
    "secret": "s" * 43,
    "name": "w2",
    "host": "h",
    "url": "http://127.0.0.1:1",
    "slots": [{"index": 0, "device": "cpu", "cores": 1}],
    "workloads": [],
}


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url) as client:
        yield client


async def entries(api: httpx.AsyncClient, **wanted: Any) -> list[AuditEntry]:
    answer = await api.get("/audit", params=wanted)
    assert answer.status_code == 200, answer.text
    return AuditPage.model_validate_json(answer.content).items


# ---- every route that changes anything


@dataclass
class Change:
    """How a route is called so that it changes something, and what is noted then. `of`: whose id is in its path."""

    action: Action
    of: str = ""
    body: Any = None
    content: bytes | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    target: Callable[[httpx.Response, str], str | None] = lambda _answer, id: id or None


def made(answer: httpx.Response, _: str) -> str:
    return str(answer.json()["id"])


CHANGES = {
    "POST /operations": Change(Action.SUBMIT, "", {"workload": "toy", "name": "n"}, detail={"name": "n"}, target=made),
    "POST /operations/{id}/cancel": Change(
        Action.CANCEL, "pending", {"reason": "late", "force": True}, detail={"reason": "late", "force": True}
    ),
    "POST /operations/{id}/resume": Change(Action.RESUME, "cancelled"),
    "POST /operations/{id}/fork": Change(
        Action.FORK, "completed", {"overrides": {"execution": {"max_epochs": 3}}}, target=made
    ),
    "POST /operations/{id}/replay": Change(Action.REPLAY, "completed", target=made),
    "DELETE /operations/{id}": Change(Action.DELETE, "ended"),
    "DELETE /operations/{id}/checkpoints/{checkpoint_id}": Change(
        Action.DELETE_CHECKPOINT, "completed", target=lambda answer, _: answer.request.url.path.rpartition("/")[2]
    ),
    "POST /cleanup": Change(
        Action.CLEAN_UP, "ended", {"older_than_s": 0, "label": "old", "dry_run": False}, detail={"goes": "all"}
    ),
    "PUT /snapshots/{sha256}": Change(
        Action.UPLOAD,
        content=ARCHIVE,
        detail={"size_bytes": len(ARCHIVE)},
        target=lambda _answer, _id: hashlib.sha256(ARCHIVE).hexdigest(),
    ),
    "POST /workers": Change(
        Action.REGISTER,
        body=WORKER,
        detail={"name": "w2", "host": "h"},
        target=lambda _answer, _id: str(INCARNATION),
    ),
    "POST /workers/{id}/drain": Change(Action.DRAIN, "worker", {"preempt": True}, detail={"preempt": True}),
    "POST /workers/{id}/undrain": Change(Action.UNDRAIN, "worker"),
    "POST /webhooks": Change(
        Action.ADD_WEBHOOK, body={"url": "http://127.0.0.1:9/secret"}, detail={"host": "127.0.0.1"}, target=made
    ),
    "POST /webhooks/{id}/test": Change(Action.TEST_WEBHOOK, "webhook"),
    "DELETE /webhooks/{id}": Change(Action.REMOVE_WEBHOOK, "webhook"),
    "POST /tokens": Change(
        Action.CREATE_TOKEN, body={"name": "b", "scope": "read"}, detail={"name": "b", "scope": "read"}, target=made
    ),
    "DELETE /tokens/{id}": Change(Action.REVOKE_TOKEN, "token", detail={"name": "ana"}),
    "POST /session/links": Change(Action.LINK),
    "POST /session": Change(Action.LOG_IN, body={"token": TOKEN}),
    "DELETE /session": Change(Action.LOG_OUT),
}
NOT_NOTED = {
    "POST /workers/{incarnation}/heartbeat": "every few seconds; what a worker does is in the events of operations",
    "POST /operations/{id}/attempts/{attempt}/reports": "what an attempt did is in the operation's events",
    "POST /operations/{id}/attempts/{attempt}/energy": "measurements",
}


async def ended(store: Store, outcome: Outcome, **spec: Any) -> dict[str, str]:
    await store.execute("UPDATE operations SET not_before = now() + interval '1 h' WHERE status = 'pending'")
    run = await store.running(**spec)
    points = [saved(run, 0), saved(run, 10, epoch=1), saved(run, 20, epoch=1)]
    run = await store.report(run, started(), losses(*((step, 1.0) for step in range(20))), *points)
    await store.finish(run, outcome)
    return {"id": str(run.operation_id), "checkpoint_id": str(points[0].checkpoint_id)}


async def there(api: httpx.AsyncClient, store: Store, of: str) -> dict[str, str]:
    """The ids of a path, of what has just been made."""
    match of:
        case "pending":
            return {"id": str(await store.submit())}
        case "cancelled":
            return await ended(store, Outcome.FAILED, max_retries=0)
        case "completed":
            return await ended(store, Outcome.COMPLETED, execution={"max_epochs": 2})
        case "ended":
            return await ended(store, Outcome.COMPLETED, labels={"old": "yes"})
        case "worker":
            return {"id": str(await store.worker(host="other"))}
        case "webhook":
            return {"id": (await api.post("/webhooks", json={"url": f"http://127.0.0.1:9/{uuid4()}"})).json()["id"]}
        case "token":
            return {"id": str((await create(api)).id)}
    return {}


def test_every_route_that_changes_something_is_noted_or_says_why_not(paths: dict[str, str]) -> None:
    changing = {row for row in paths if row.partition(" ")[0] not in ("GET", "HEAD")}

    assert changing == {*CHANGES, *NOT_NOTED}
    assert changing < set(ROUTES)
    assert {change.action for change in CHANGES.values()} == set(Action) - {Action.UNAUTHENTICATED, Action.FORBIDDEN}


async def test_every_change_leaves_one_note_of_who_and_from_where(
    paths: dict[str, str], api: httpx.AsyncClient, store: Store
) -> None:
    await store.worker(slots=50)
    for row, change in CHANGES.items():
        method, _, _ = row.partition(" ")
        ids = await there(api, store, change.of)
        await store.execute("DELETE FROM audit")
        api.headers["User-Agent"] = f"tests of {row}"
        path = paths[row].format(**{"sha256": hashlib.sha256(ARCHIVE).hexdigest(), **ids})
        async with browser(api) as page:
            user = api
            if row == "DELETE /session":
                await page.post("/session", json={"token": TOKEN})
                await store.execute("DELETE FROM audit")
                user, page.headers["User-Agent"] = page, f"tests of {row}"
            body = {"content": change.content} if change.content else {"json": change.body} if change.body else {}
            answer = await user.request(method, f"http://test{path}", **body)
            assert answer.is_success, (row, answer.text)
        [entry] = await entries(api)
        detail = {"of": ids["id"]} if change.action in (Action.FORK, Action.REPLAY, Action.DELETE_CHECKPOINT) else {}
        assert (entry.action, entry.target) == (change.action, change.target(answer, ids.get("id", ""))), row
        assert entry.detail == change.detail | detail, row
        assert (entry.who, entry.address, entry.user_agent, entry.count) == (
            "operator",
            "127.0.0.1",
            f"tests of {row}",
            1,
        )


async def test_a_note_names_the_token_and_outlives_it_and_what_it_tells_of(
    api: httpx.AsyncClient, store: Store
) -> None:
    await store.worker()
    ana = await create(api)
    id = await store.submit()
    for method, path in (("POST", f"/operations/{id}/cancel"), ("DELETE", f"/operations/{id}")):
        await api.request(method, path, headers=bearer(ana.token))
    await api.delete(f"/tokens/{ana.id}")

    found = await entries(api, target=str(id)[:8])
    assert [(entry.who, entry.token_id, entry.action) for entry in found] == [
        ("ana", ana.id, Action.DELETE),
        ("ana", ana.id, Action.CANCEL),
    ]


async def test_a_browser_is_noted_as_whom_its_link_or_token_made_it(api: httpx.AsyncClient) -> None:
    ana = await create(api, scope=Scope.READ)
    link = (await api.post("/session/links", headers=bearer(ana.token))).json()["code"]
    async with browser(api) as page:
        await page.post("/session", json={"code": link})
        await page.delete("/session")

    found = [(entry.action, entry.who, entry.detail) for entry in await entries(api, who="ana")]
    assert found == [
        (Action.LOG_OUT, "ana", {}),
        (Action.LOG_IN, "ana", {"with_link": True}),
        (Action.LINK, "ana", {}),
    ]


# ---- exactly when there is a change


async def test_what_changes_nothing_leaves_no_note(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    job, key = {"workload": "toy"}, {"Idempotency-Key": "k"}
    first = await api.post("/operations", json=job, headers=key)
    digest = hashlib.sha256(ARCHIVE).hexdigest()
    assert (await api.put(f"/snapshots/{digest}", content=ARCHIVE)).status_code == 201
    had = len(await entries(api))

    assert (await api.post("/operations", json=job, headers=key)).json()["id"] == first.json()["id"]
    assert (await api.put(f"/snapshots/{digest}", content=ARCHIVE)).status_code == 200
    for path, params, body in [
        ("/operations", {"dry_run": True}, job),
        ("/operations", {}, {"workload": "absent"}),
        (f"/operations/{MISSING}/cancel", {}, {}),
        (f"/operations/{first.json()['id']}/resume", {}, {}),
        (f"/workers/{MISSING}/drain", {}, {}),
        (f"/webhooks/{MISSING}/test", {}, {}),
        ("/tokens", {}, {"name": "operator", "scope": "read"}),
        ("/cleanup", {}, {"older_than_s": 0}),
    ]:
        await api.post(path, params=params, json=body)
    await api.delete(f"/operations/{first.json()['id']}")  # it has not ended
    await api.delete("/session")  # with a token: there is no cookie to end

    assert len(await entries(api)) == had


async def test_of_many_that_cancel_at_once_the_one_that_did_is_noted(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    id = await store.submit()

    answers = await asyncio.gather(*(api.post(f"/operations/{id}/cancel") for _ in range(8)))

    assert sorted(answer.status_code for answer in answers) == [202] + [409] * 7
    assert len(await entries(api, target=str(id))) == 1


async def test_without_its_note_a_change_is_not_made(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    id = await store.submit()
    await store.execute("ALTER TABLE audit ADD CONSTRAINT full_disk CHECK (false) NOT VALID")

    changes = {"/operations": {"workload": "toy"}, "/tokens": {"name": "a", "scope": "read"}}
    for path, body in {**changes, f"/operations/{id}/cancel": {}, "/session/links": None}.items():
        assert not (await api.post(path, json=body)).is_success

    assert [item["status"] for item in (await api.get("/operations")).json()["items"]] == ["pending"]
    assert (await api.get("/tokens")).json()["items"] == []
    assert await store.fetch("SELECT kind FROM logins") == []


# ---- who was refused


async def test_refusals_are_counted_by_caller_and_minute(api: httpx.AsyncClient, store: Store) -> None:
    reader = await create(api, "reader", Scope.READ)
    for _ in range(3):
        assert (await api.get("/operations", headers=bearer("rlt_guessed"))).status_code == 401
        assert (await api.get(f"/operations/{MISSING}", headers=bearer("rlt_guessed"))).status_code == 401  # a poll
        assert (await api.post("/tokens", json={}, headers=bearer(reader.token))).status_code == 403
    async with browser(api) as page:
        assert (await page.get("/session")).status_code == 401  # it asks before it logs in
        assert (await page.post("/session", json={"code": "guessed"})).status_code == 401

    async with asyncio.timeout(20):
        while sum(entry.count for entry in await refused(api)) < 10:  # noqa: ASYNC110 - a loop of the API writes them
            await asyncio.sleep(0.05)
    by_action = {action: [e for e in await refused(api) if e.action is action] for action in REFUSALS}
    forbidden = by_action[Action.FORBIDDEN]
    assert {(e.who, e.token_id) for e in forbidden} == {("reader", reader.id)}
    assert forbidden[0].detail == {"call": "POST /api/v1/tokens"} or forbidden[0].detail == {"call": "POST /tokens"}
    assert {(e.who, e.address) for e in by_action[Action.UNAUTHENTICATED]} == {(None, "127.0.0.1")}
    assert sum(e.count for e in by_action[Action.UNAUTHENTICATED]) == 7
    assert len(await refused(api)) <= 4  # two, should no minute have begun between
    assert "guessed" not in str(await refused(api))


REFUSALS = (Action.UNAUTHENTICATED, Action.FORBIDDEN)


async def refused(api: httpx.AsyncClient) -> list[AuditEntry]:
    return [entry for action in REFUSALS for entry in await entries(api, action=action)]


def guess(address: str, agent: str = "a") -> Refused:
    return Refused(Caller(None, None, address, agent), Action.UNAUTHENTICATED, "GET /operations")


def test_a_flood_of_addresses_costs_a_few_rows_a_minute() -> None:
    now_s = 0.0
    refusals = Refusals(lambda: now_s)
    written: list[Refused] = []
    for second in range(60):
        now_s = float(second)
        for number in range(100):
            refusals.add(guess(f"10.0.{second}.{number}", f"agent {number}"))
        written += refusals.take()

    assert len({each.caller.address for each in written}) == TOLD_APART + 1
    assert sum(each.count for each in written) == 6000
    assert written[-1].caller == Caller(None, None, OTHERS, None)
    now_s = 60.0
    refusals.add(guess("10.1.1.1"))
    assert [each.caller.address for each in refusals.take()] == ["10.1.1.1"]


async def test_what_two_processes_count_is_one_row_and_what_the_database_missed_comes_later(
    store: Store, api: httpx.AsyncClient
) -> None:
    here, there = Refusals(), Refusals()
    away = Sessions("postgresql+asyncpg://nobody@127.0.0.1:1/none", 1)
    here.add(guess("10.0.0.1"))
    with pytest.raises(OSError):  # noqa: PT011 # whichever the driver says
        await Auditor(away, here, 400, 1.0).tick()
    here.add(guess("10.0.0.1"))
    there.add(guess("10.0.0.1"))

    await asyncio.gather(*(Auditor(store.sessions, each, 400, 1.0).tick() for each in (here, there)))
    await away.dispose()

    found = await entries(api)
    assert sum(entry.count for entry in found) == 3
    assert len(found) <= 2  # one, should no minute have begun between


# ---- the list


async def test_the_list_is_newest_first_in_pages_and_narrowed(api: httpx.AsyncClient, store: Store) -> None:
    for name in "abcde":
        await create(api, name)
    await store.execute("UPDATE audit SET at = '2026-01-01T00:00:00Z' WHERE detail->>'name' IN ('b', 'c')")

    names, cursor = [], None
    while True:
        page = AuditPage.model_validate_json(
            (await api.get("/audit", params={"limit": 2} | ({"cursor": cursor} if cursor else {}))).content
        )
        names += [entry.detail["name"] for entry in page.items]
        if (cursor := page.next_cursor) is None:
            break

    assert names[:3] == ["e", "d", "a"]
    assert sorted(names) == list("abcde")
    since = datetime.now(UTC) - timedelta(hours=1)
    assert [e.detail["name"] for e in await entries(api, since=since.isoformat())] == ["e", "d", "a"]
    assert await entries(api, who="nobody") == await entries(api, action="worker.drain") == []
    for wrong in ({"since": "2026-01-01"}, {"since": "yesterday"}, {"action": "cook"}, {"cursor": "x"}, {"limit": 0}):
        assert refusal(await api.get("/audit", params=wrong)) == (422, "invalid"), wrong


async def test_a_user_agent_is_a_line_of_text(api: httpx.AsyncClient) -> None:
    await create(api)
    await api.post("/session/links", headers={"User-Agent": b"\x9b31mred\x85" + b"x" * 5000})  # as header bytes

    entry = (await entries(api))[0]
    assert entry.user_agent is not None
    assert entry.user_agent.startswith("\ufffd31mred\ufffdxxx")
    assert len(entry.user_agent) <= 300


async def test_what_is_too_old_is_forgotten_a_part_at_a_time_by_any_number_of_processes(store: Store) -> None:
    insert = """
        INSERT INTO audit (id, at, action, address, detail)
        SELECT gen_random_uuid(), now() - make_interval(days => d), 'worker.drain', 'a', '{}'
          FROM generate_series(1, :n) AS n, (VALUES (399), (401)) AS days (d)
    """
    await store.execute(insert, n=FORGOTTEN_AT_ONCE + 1)
    auditor = Auditor(store.sessions, Refusals(), 400, 1.0)

    await auditor.tick()
    [(left,)] = await store.fetch("SELECT count(*) FROM audit WHERE at < now() - interval '400 days'")
    assert left == 1
    await asyncio.gather(*(auditor.tick() for _ in range(4)))

    [(kept,)] = await store.fetch("SELECT count(*) FROM audit")
    assert kept == FORGOTTEN_AT_ONCE + 1
