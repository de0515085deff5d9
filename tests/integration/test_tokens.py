"""What a token is worth, to whom, and until when."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from helpers.store import Store
from integration.test_api import TOKEN, refusal, serving
from integration.test_logins import browser
from ops_backend.failed_logins import FAILURES, REFILL_S
from ops_backend.identities import KNOWN_S, Identities
from ops_backend.settings import Settings, SettingsError
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.tokens import OPERATOR, WORKERS, Scope, TokenCreated, workers_token

HERE = "127.0.0.1"
JOB = {"workload": "toy", "config": {}}


@pytest.fixture
async def api(database_url: str, store: Store) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url) as client:
        await store.worker()
        yield client


async def create(
    api: httpx.AsyncClient, name: str = "ana", scope: Scope = Scope.OPERATE, **more: object
) -> TokenCreated:
    answer = await api.post("/tokens", json={"name": name, "scope": scope, **more})
    assert answer.status_code == 201, answer.text
    return TokenCreated.model_validate_json(answer.content)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_a_token_is_shown_once_and_nowhere_stored(api: httpx.AsyncClient, store: Store) -> None:
    made = await create(api)

    assert made.token not in (await api.get("/tokens")).text
    async with store.sessions.begin() as session:
        rows = (await session.execute(text("SELECT t::text FROM tokens t"))).scalars().all()
    assert made.name in rows[0]
    assert made.token not in rows[0]
    assert made.token.encode().hex() not in rows[0]


async def test_what_is_submitted_with_it_bears_its_name_and_its_keys_are_its_own(api: httpx.AsyncClient) -> None:
    ana, ben = [bearer((await create(api, name)).token) for name in ("ana", "ben")]
    key = {"Idempotency-Key": "k"}

    answers = [await api.post("/operations", json=JOB, headers=who | key) for who in (ana, ben, ana)]

    assert [answer.status_code for answer in answers] == [201, 201, 200]
    assert [answer.json()["submitted_by"] for answer in answers] == ["ana", "ben", "ana"]
    mine = (await api.get("/operations", params={"mine": True}, headers=ben)).json()["items"]
    assert [item["id"] for item in mine] == [answers[1].json()["id"]]


async def test_a_revoked_token_opens_nothing_nor_do_the_browsers_that_it_logged_in(api: httpx.AsyncClient) -> None:
    made = await create(api)
    async with browser(api) as page:
        assert (await page.post("/session", json={"token": made.token})).status_code == 204
        assert (await page.get("/session")).json().items() >= {"user": "ana", "scope": "operate"}.items()
        link = (await api.post("/session/links", headers=bearer(made.token))).json()["code"]

        assert (await api.delete(f"/tokens/{made.id}")).status_code == 204

        assert (await page.get("/operations")).status_code == 401
    assert refusal(await api.get("/operations", headers=bearer(made.token))) == (401, ErrorCode.UNAUTHENTICATED)
    async with browser(api) as page:
        await page.post("/session", json={"code": link})
        assert (await page.get("/operations")).status_code == 401
    assert refusal(await api.delete(f"/tokens/{made.id}")) == (404, ErrorCode.NOT_FOUND)
    assert (await create(api)).id != made.id  # the name is free again


async def test_an_expired_token_opens_nothing_and_its_name_is_free(
    api: httpx.AsyncClient, store: Store, database_url: str
) -> None:
    made = await create(api, expires_s=3600)
    assert (await api.get("/operations", headers=bearer(made.token))).status_code == 200
    await _do(store, "UPDATE tokens SET expires_at = now()")

    async with serving(database_url) as other:  # which does not know it yet
        assert (await other.get("/operations", headers=bearer(made.token))).status_code == 401
        async with browser(other) as page:
            assert (await page.post("/session", json={"token": made.token})).status_code == 401
    assert (await create(api)).id != made.id


async def test_the_last_use_is_recorded_a_minute_behind_at_most(
    api: httpx.AsyncClient, store: Store, database_url: str
) -> None:
    made = await create(api)

    async def used() -> str | None:
        [item] = (await api.get("/tokens")).json()["items"]
        return item["last_used_at"]  # type: ignore[no-any-return]

    assert await used() is None
    await api.get("/operations", headers=bearer(made.token))
    first = await used()
    assert first is not None
    async with serving(database_url) as other:
        await other.get("/operations", headers=bearer(made.token))
        assert await used() == first  # no row a request
    await _do(store, "UPDATE tokens SET last_used_at = last_used_at - interval '61 s'")
    async with serving(database_url) as other:
        await other.get("/operations", headers=bearer(made.token))
    assert (await used() or "") >= first


async def test_of_two_that_make_the_same_name_at_once_one_is_refused(api: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(api.post("/tokens", json={"name": "ana", "scope": "read"}) for _ in range(5)))

    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
    assert refusal(next(a for a in answers if a.status_code == 409)) == (409, ErrorCode.TOKEN_EXISTS)


@pytest.mark.parametrize(
    "wish",
    [
        {"name": OPERATOR, "scope": "read"},
        {"name": WORKERS, "scope": "worker"},
        {"name": "", "scope": "read"},
        {"name": "a\nb", "scope": "read"},
        {"name": "a", "scope": "root"},
        {"name": "a"},
        {"name": "a", "scope": "read", "expires_s": 0},
        {"name": "a", "scope": "read", "expires_s": 1e300},
        {"name": "a", "scope": "read", "expires_s": "NaN"},
    ],
)
async def test_a_wrong_wish_is_refused_and_makes_nothing(api: httpx.AsyncClient, wish: dict[str, object]) -> None:
    assert refusal(await api.post("/tokens", json=wish)) == (422, ErrorCode.INVALID)
    assert (await api.get("/tokens")).json() == {"items": []}


async def test_a_workers_token_logs_no_browser_in(api: httpx.AsyncClient) -> None:
    made = await create(api, scope=Scope.WORKER)

    for token in (made.token, workers_token(TOKEN)):
        async with browser(api) as page:
            assert (await page.post("/session", json={"token": token})).status_code == 401


async def test_another_process_notices_a_revocation_when_what_it_knew_is_old(
    api: httpx.AsyncClient, store: Store, database_url: str, tmp_path: Path
) -> None:
    made, now_s = await create(api), 0.0
    settings = Settings(database_url=database_url, api_token=TOKEN, storage_root=tmp_path)
    other = Identities(settings, store.sessions, lambda: now_s)
    assert await other.of_token(made.token, HERE) is not None

    await api.delete(f"/tokens/{made.id}")

    now_s = KNOWN_S
    assert await other.of_token(made.token, HERE) is None


async def test_guesses_are_soon_refused_and_a_client_that_is_set_up_wrongly_shuts_out_nobody(
    api: httpx.AsyncClient, store: Store, database_url: str, tmp_path: Path
) -> None:
    made, late, now_s = await create(api), await create(api, "late"), 0.0
    settings = Settings(database_url=database_url, api_token=TOKEN, storage_root=tmp_path)
    identities = Identities(settings, store.sessions, lambda: now_s)
    assert await identities.of_token(made.token, HERE) is not None

    for _ in range(3 * FAILURES):
        assert await identities.of_token("the same old token", HERE) is None
    for n in range(FAILURES - 1):
        assert await identities.of_token(f"guess {n}", HERE) is None

    with pytest.raises(OpsError) as refused:
        await identities.of_token("one guess more", HERE)
    assert refused.value.code is ErrorCode.RATE_LIMITED
    now_s = KNOWN_S + 1
    assert await identities.of_token(made.token, HERE) is not None, "who was known before"
    assert await identities.of_token(TOKEN, HERE) is not None
    assert await identities.of_token(workers_token(TOKEN), HERE) is not None
    assert await identities.of_token("one guess more", "192.0.2.1") is None, "others have a bucket of their own"
    now_s += REFILL_S
    assert await identities.of_token(late.token, HERE) is not None


@pytest.mark.parametrize("kind", ["code", "token"])
async def test_guesses_at_the_login_are_told_when_to_come_again(api: httpx.AsyncClient, kind: str) -> None:
    async with browser(api) as page:
        answers = [await page.post("/session", json={kind: f"guess-{n}"}) for n in range(FAILURES + 1)]

    assert [answer.status_code for answer in answers] == [401] * FAILURES + [429]
    assert 0 < int(answers[-1].headers["retry-after"]) <= REFILL_S
    assert refusal(answers[-1]) == (429, ErrorCode.RATE_LIMITED)


@pytest.mark.parametrize("token", [{}, {"OPS_API_TOKEN": ""}, {"OPS_API_TOKEN": "short"}])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_no_api_starts_without_a_token_wherever_it_listens(host: str, token: dict[str, str], tmp_path: Path) -> None:
    environ = {"OPS_DATABASE_URL": "postgresql://h/d", "OPS_STORAGE_ROOT": str(tmp_path), "OPS_HOST": host}

    with pytest.raises(SettingsError, match="OPS_API_TOKEN"):
        Settings.from_env(environ | token)
    Settings.from_env(environ | {"OPS_API_TOKEN": TOKEN})


async def _do(store: Store, sql: str) -> None:
    async with store.sessions.begin() as session:
        await session.execute(text(sql))
