"""Workers speak for themselves alone, and are called where they call from."""

import re
import socket
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from helpers.store import Held, Store, credential_of, shown_by, window
from helpers.store import started as first_report
from integration.test_api import TOKEN, refusal, serving
from ops_backend.addresses import Names, Refused, allowed, worker_url
from ops_contract.agents import ReportBatch
from ops_contract.errors import ErrorCode
from ops_contract.tokens import Scope, workers_token

URL = "http://127.0.0.1:1"
OF_IT = ("operations", "attempts", "holds", "events", "metrics", "energy_windows")


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url) as client:
        yield client


def registration(incarnation: UUID, **changes: Any) -> dict[str, Any]:
    own = {"incarnation": str(incarnation), "credential": credential_of(incarnation), "secret": "s" * 43}
    slots = [{"index": 0, "device": "cpu", "cores": 1}]
    return own | {"name": "w", "host": "h", "url": URL, "slots": slots, "workloads": []} | changes


def started(run: Held) -> dict[str, Any]:
    return ReportBatch(incarnation=run.incarnation, first_seq=1, reports=[first_report()]).model_dump(mode="json")


async def rows(store: Store, *tables: str) -> list[str]:
    return [str(row.row) for table in tables for row in await store.fetch(f"SELECT t::text AS row FROM {table} t")]


async def test_a_worker_reports_beats_and_books_for_its_own_holds_alone(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker("owner")
    run = await store.running()
    thief = await store.worker("thief")
    of = f"/operations/{run.operation_id}/attempts/{run.attempt}"
    hold = {"operation_id": str(run.operation_id), "attempt": run.attempt}
    calls: list[tuple[str, dict[str, Any]]] = [
        (f"/workers/{run.incarnation}/heartbeat", {"holds": [hold]}),
        (f"{of}/reports", started(run)),
        (f"{of}/energy", {"incarnation": str(run.incarnation), "windows": [window(1).model_dump(mode="json")]}),
    ]
    before = await rows(store, *OF_IT)

    strangers = [shown_by(thief), {"Authorization": f"Bearer {TOKEN}"}, shown_by(uuid4()), {"Authorization": ""}]
    answers = [[await api.post(path, json=body, headers=who) for path, body in calls] for who in strangers]

    assert [{refusal(answer) for answer in each} for each in answers] == [
        {(403, ErrorCode.FORBIDDEN)},
        {(403, ErrorCode.FORBIDDEN)},
        {(401, ErrorCode.UNAUTHENTICATED)},
        {(401, ErrorCode.UNAUTHENTICATED)},
    ]
    # In its own name it has no such hold: what it lists is not its, what it says of it is not taken.
    beaten = await api.post(f"/workers/{thief}/heartbeat", json={"holds": [hold]}, headers=shown_by(thief))
    assert beaten.json()["ended"] == [hold]
    mine = started(run) | {"incarnation": str(thief)}
    assert (await api.post(f"{of}/reports", json=mine, headers=shown_by(thief))).status_code in (404, 409)
    assert await rows(store, *OF_IT) == before
    assert (await api.post(f"{of}/reports", json=started(run), headers=shown_by(run.incarnation))).status_code == 200


async def test_a_stolen_registration_is_worth_nothing(api: httpx.AsyncClient, store: Store) -> None:
    """Everybody can read an incarnation; a token that registers is not enough to take it over."""
    victim = await store.worker()
    run = await store.running()
    before = await rows(store, "workers", "slots")

    stolen = registration(victim, credential=credential_of(uuid4()), secret="t" * 43, url="http://127.0.0.1:2")
    taken = await api.post("/workers", json=stolen)
    by_worker = await api.post("/workers", json=registration(uuid4()), headers=shown_by(victim))
    again = await api.post("/workers", json=registration(uuid4(), credential=credential_of(victim)))
    changes: list[dict[str, Any]] = [
        {"name": "another"},
        {"host": "another"},
        {"slots": [{"index": 0, "device": "cpu", "cores": 64}]},
        {"slots": [{"index": i, "device": "cpu", "cores": 1} for i in range(2)]},
    ]
    other_than_it_was = [await api.post("/workers", json=registration(victim, **change)) for change in changes]

    assert refusal(taken) == (409, ErrorCode.INCARNATION_TAKEN)
    assert refusal(by_worker) == (403, ErrorCode.FORBIDDEN)
    assert again.status_code == 422
    assert {refusal(answer) for answer in other_than_it_was} == {(409, ErrorCode.INCARNATION_TAKEN)}
    assert await rows(store, "workers", "slots") == before
    beat = await api.post(f"/workers/{run.incarnation}/heartbeat", json={}, headers=shown_by(run.incarnation))
    assert beat.status_code == 200


async def test_a_worker_ends_with_the_token_that_registered_it_and_another_does_not(api: httpx.AsyncClient) -> None:
    tokens = [
        (await api.post("/tokens", json={"name": name, "scope": Scope.WORKER})).json() for name in ("rack-1", "rack-2")
    ]
    ids = [uuid4(), uuid4(), uuid4()]
    for id, token in zip(ids, [*(made["token"] for made in tokens), workers_token(TOKEN)], strict=True):
        who = {"Authorization": f"Bearer {token}"}
        assert (await api.post("/workers", json=registration(id), headers=who)).status_code == 201

    assert (await api.delete(f"/tokens/{tokens[0]['id']}")).status_code == 204

    beats = [(await api.post(f"/workers/{id}/heartbeat", json={}, headers=shown_by(id))).status_code for id in ids]
    assert beats == [401, 200, 200]
    # With a new token it is the same worker again: what it had not said yet is not lost.
    assert (await api.post("/workers", json=registration(ids[0]))).status_code == 201
    assert (await api.post(f"/workers/{ids[0]}/heartbeat", json={}, headers=shown_by(ids[0]))).status_code == 200


# ---- where it is called


class Book(Names):
    """Names as an attacker's server might say them."""

    async def addresses(self, name: str) -> list[str]:
        known = {
            "meta.example": ["169.254.169.254"],
            "inner.example": ["10.0.0.5"],
            "worker": ["10.1.2.3"],
            "worker.": ["10.1.2.3"],
            "replicas": ["10.1.2.9", "10.1.2.3"],
            "half.example": ["10.1.2.3", "169.254.169.254"],
        }
        look_up = super().addresses
        return [found for each in known.get(name, [name]) for found in await look_up(each)]


@pytest.mark.parametrize(
    ("url", "peer"),
    [
        ("http://169.254.169.254/latest/meta-data", "10.1.2.3"),
        ("http://169.254.169.254", "169.254.169.254"),
        ("http://[fe80::1]", "fe80::1"),
        ("http://[::ffff:169.254.169.254]", "10.1.2.3"),
        ("http://2852039166", "10.1.2.3"),  # 169.254.169.254
        ("http://0xa9fea9fe", "10.1.2.3"),
        ("http://0251.0376.0251.0376", "10.1.2.3"),
        ("http://[fd00:ec2::254]", "fd00:ec2::254"),
        ("http://[64:ff9b::a9fe:a9fe]", "64:ff9b::a9fe:a9fe"),  # 169.254.169.254 behind gateways
        ("http://[2002:a9fe:a9fe::1]", "2002:a9fe:a9fe::1"),
        ("http://[::169.254.169.254]", "::169.254.169.254"),
        ("http://100.100.100.200", "100.100.100.200"),
        ("http://meta.example", "10.1.2.3"),
        ("http://half.example", "10.1.2.3"),
        ("http://inner.example", "10.1.2.3"),
        ("http://inner.example.", "10.1.2.3"),
        ("https://replicas", "10.1.2.3"),
        ("http://10.0.0.5:5432", "10.1.2.3"),
        ("http://127.0.0.1:5432", "10.1.2.3"),
        ("http://127.1:5432", "10.1.2.3"),
        ("http://2130706433:5432", "10.1.2.3"),
        ("http://localhost:5432", "10.1.2.3"),
        ("http://[::1]:5432", "10.1.2.3"),
        ("http://0.0.0.0:5432", "127.0.0.1"),
        ("http://[::]:5432", "127.0.0.1"),
        ("http://224.0.0.1", "224.0.0.1"),
        ("http://10.1.2.3@10.0.0.5", "10.1.2.3"),
        ("http://10.0.0.5#@10.1.2.3", "10.1.2.3"),
        ("http://10.1.2.3?x=http://10.0.0.5", "10.1.2.3"),
        ("http://10.1.2.3\\@10.0.0.5", "10.1.2.3"),
        ("http://nobody.invalid", "10.1.2.3"),
        ("https://10.0.0.5", "10.1.2.3"),
        ("file:///etc/passwd", "127.0.0.1"),
        ("gopher://127.0.0.1:25", "127.0.0.1"),
        ("http://", "127.0.0.1"),
        ("http:///training", "127.0.0.1"),
        ("http://10.1.2.3", ""),
    ],
)
async def test_a_worker_is_called_nowhere_else(url: str, peer: str) -> None:
    with pytest.raises(Refused):
        await worker_url(Book(), url, peer, allowed(""))


@pytest.mark.parametrize(
    ("url", "peer", "allow", "called"),
    [
        ("http://10.1.2.3:8471", "10.1.2.3", "", "http://10.1.2.3:8471"),
        ("http://10.1.2.3:8471/", "::ffff:10.1.2.3", "", "http://10.1.2.3:8471"),
        ("http://worker:8471", "10.1.2.3", "", "http://10.1.2.3:8471"),  # the name is never looked up again
        ("http://worker.:8471", "10.1.2.3", "", "http://10.1.2.3:8471"),
        ("http://replicas:8471", "10.1.2.3", "", "http://10.1.2.3:8471"),
        ("https://worker:8471/w", "10.1.2.3", "", "https://worker:8471/w"),
        ("http://127.0.0.1:8471", "127.0.0.1", "", "http://127.0.0.1:8471"),
        ("http://[::1]:8471", "127.0.0.1", "", "http://[::1]:8471"),
        ("http://10.0.0.5:8471", "10.1.2.3", "10.0.0.0/16", "http://10.0.0.5:8471"),
        ("http://10.0.0.5:8471", "10.1.2.3", "192.168.0.1, 10.0.0.5", "http://10.0.0.5:8471"),
        ("http://Inner.example:8471", "10.1.2.3", "inner.example", "http://10.0.0.5:8471"),
    ],
)
async def test_it_is_called_at_its_own_address_or_at_one_that_is_allowed(
    url: str, peer: str, allow: str, called: str
) -> None:
    assert await worker_url(Book(), url, peer, allowed(allow)) == called


@pytest.mark.parametrize("text", ["10.1.0.1/16", "10.1.0/16", "10.1.0.300", "*", "http://worker", "::g", "a b"])
def test_an_allow_list_with_a_slip_in_it_is_refused_rather_than_never_met(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        allowed(f"worker, {text}")


async def test_a_host_that_may_bind_any_address_still_tells_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """net.ipv4.ip_nonlocal_bind, as beside a failover address."""
    monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
    with pytest.raises(Refused):
        await worker_url(Book(), "http://10.0.0.5", "10.1.2.3", allowed(""))


async def test_a_url_elsewhere_is_refused_and_says_what_to_do(api: httpx.AsyncClient, store: Store) -> None:
    answer = await api.post("/workers", json=registration(uuid4(), url="http://10.0.0.5:8471"))

    assert refusal(answer) == (422, ErrorCode.INVALID)
    assert "OPS_WORKER_ALLOW" in answer.text
    assert (await api.get("/workers")).json() == {"items": []}
