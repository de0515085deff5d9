"""How browsers log in: links that work once, cookies that count for our own pages only."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text

from helpers.store import Store
from integration.test_api import TOKEN, refusal, serving
from ops_contract.errors import ErrorCode

OURS = {"Sec-Fetch-Site": "same-origin", "Origin": "http://test"}


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url) as client:
        yield client


@contextlib.asynccontextmanager
async def browser(api: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """One that knows no token."""
    transport = api._transport
    async with httpx.AsyncClient(transport=transport, base_url="http://test/api/v1", headers=OURS) as client:
        yield client


async def code(api: httpx.AsyncClient) -> str:
    return str((await api.post("/session/links")).json()["code"])


async def logged_in(api: httpx.AsyncClient, page: httpx.AsyncClient) -> None:
    answer = await page.post("/session", json={"code": await code(api)})
    assert answer.status_code == 204, answer.text


async def test_a_link_logs_one_browser_in_and_no_second_one(api: httpx.AsyncClient) -> None:
    link = await code(api)
    async with browser(api) as first, browser(api) as second:
        answers = await asyncio.gather(*(page.post("/session", json={"code": link}) for page in (first, second)))

        assert sorted(answer.status_code for answer in answers) == [204, 401]
        reads = await asyncio.gather(*(page.get("/operations") for page in (first, second)))
        assert sorted(read.status_code for read in reads) == [200, 401]


async def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites(api: httpx.AsyncClient) -> None:
    async with browser(api) as page:
        answer = await page.post("/session", json={"token": TOKEN})

    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie  # it would not come back over plain http
    assert answer.headers["cache-control"] == "no-store"


async def test_over_tls_the_cookie_never_travels_without_it(api: httpx.AsyncClient) -> None:
    async with httpx.AsyncClient(transport=api._transport, base_url="https://test/api/v1") as page:
        answer = await page.post("/session", json={"token": TOKEN}, headers={"Origin": "https://test"})

    assert "secure" in answer.headers["set-cookie"].lower()


@pytest.mark.parametrize("wish", [{"code": "guessed"}, {"token": "guessed"}])
async def test_a_guess_logs_nobody_in(api: httpx.AsyncClient, wish: dict[str, str]) -> None:
    async with browser(api) as page:
        answer = await page.post("/session", json=wish)

        assert refusal(answer) == (401, ErrorCode.UNAUTHENTICATED)
        assert (await page.get("/operations")).status_code == 401


@pytest.mark.parametrize("wish", [{}, {"code": "a", "token": "b"}, {"code": ""}, {"password": "a"}])
async def test_a_login_is_by_a_code_or_by_a_token(api: httpx.AsyncClient, wish: dict[str, str]) -> None:
    assert (await api.post("/session", json=wish)).status_code == 422


async def test_a_browser_says_until_when_it_is_logged_in_and_logs_out_for_good(api: httpx.AsyncClient) -> None:
    async with browser(api) as page:
        await logged_in(api, page)
        session = (await page.get("/session")).json()
        kept = dict(page.cookies)

        assert session["user"] == "operator"
        assert session["expires_at"]
        assert (await page.delete("/session")).status_code == 204
        assert not page.cookies
        page.cookies.update(kept)  # a copy of it is worth nothing either
        assert (await page.get("/session")).status_code == 401


async def test_a_bearer_of_the_token_has_no_end(api: httpx.AsyncClient) -> None:
    assert (await api.get("/session")).json() == {"user": "operator", "scope": "admin", "expires_at": None}


async def test_a_cookie_does_not_count_for_another_port_of_this_host(api: httpx.AsyncClient) -> None:
    async with browser(api) as page:
        await logged_in(api, page)
        other = {"Sec-Fetch-Site": "same-site", "Origin": "http://test:81"}

        assert refusal(await page.post("/session/links", headers=other)) == (401, ErrorCode.UNAUTHENTICATED)
        assert (await page.post("/session/links")).status_code == 201


async def test_another_site_cannot_log_a_browser_in(api: httpx.AsyncClient) -> None:
    async with browser(api) as page:
        answer = await page.post(
            "/session",
            json={"token": TOKEN},
            headers={"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
        )

    assert refusal(answer) == (401, ErrorCode.UNAUTHENTICATED)
    assert "set-cookie" not in answer.headers


async def test_a_wrong_token_is_not_saved_by_a_cookie(api: httpx.AsyncClient) -> None:
    async with browser(api) as page:
        await logged_in(api, page)
        answer = await page.get("/operations", headers={"Authorization": "Bearer guessed"})

    assert answer.status_code == 401


async def test_links_and_sessions_end(api: httpx.AsyncClient, store: Store) -> None:
    link = await code(api)
    async with browser(api) as page, browser(api) as late:
        await logged_in(api, page)
        async with store.sessions.begin() as session:
            await session.execute(text("UPDATE logins SET expires_at = now() - interval '1 second'"))

        assert (await page.get("/operations")).status_code == 401
        assert (await late.post("/session", json={"code": link})).status_code == 401
        await code(api)
        async with store.sessions.begin() as session:
            assert await session.scalar(text("SELECT count(*) FROM logins")) == 1  # the dead ones are gone


async def test_the_database_holds_nothing_that_logs_anybody_in(api: httpx.AsyncClient, store: Store) -> None:
    link = await code(api)
    async with browser(api) as page:
        await logged_in(api, page)
        secrets = [link, *page.cookies.values()]

    async with store.sessions.begin() as session:
        rows = (await session.execute(text("SELECT encode(digest, 'escape') || submitter FROM logins"))).scalars().all()
    assert len(rows) == 2
    assert not any(secret in row for secret in secrets for row in rows)


@pytest.mark.parametrize("path", ["", "/stream", "/metrics", "/artifacts"])
async def test_every_read_is_for_a_browser_too(api: httpx.AsyncClient, path: str) -> None:
    async with browser(api) as page:
        assert (await page.get(f"/operations/{uuid4()}{path}")).status_code == 401
        await logged_in(api, page)
        assert (await page.get(f"/operations/{uuid4()}{path}")).status_code == 404
