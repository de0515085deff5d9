"""Snapshots at the API: uploaded once, kept while an operation needs them, swept without a race with a submit."""

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from helpers.store import LEASE_S, Store
from integration.test_api import refusal, serving
from ops_backend.orphans import OrphanSweeper
from ops_backend.store import snapshots, submit
from ops_backend.store.submit import Fleet, Submission
from ops_contract.errors import OpsError
from ops_contract.jobs import SNAPSHOT_MAX_BYTES, JobSpec

ARCHIVE = b"the bytes of an archive"
SHA256 = sha256(ARCHIVE).hexdigest()
PATH = f"/snapshots/{SHA256}"
NEW = Submission("me", None, b"{}")
COMMAND = {"command": ["true"], "workload": None, "code": {"sha256": SHA256}}


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url) as client:
        yield client


@pytest.fixture
async def old(store: Store) -> None:
    """A snapshot that nobody has asked for since the day before yesterday."""
    async with store.sessions.begin() as session:
        await snapshots.keep(session, SHA256, ARCHIVE)
    await age(store)


async def age(store: Store) -> None:
    await store.execute("UPDATE snapshots SET created_at = now() - interval '2 days'")


async def sweep(store: Store) -> None:
    async with store.sessions.begin() as session:
        await snapshots.delete_unused(session)


async def kept(store: Store) -> bool:
    return bool(await store.fetch("SELECT sha256 FROM snapshots"))


async def run_command(store: Store) -> UUID:
    async with store.sessions.begin() as session:
        made = await submit.submit_if_new(session, JobSpec.model_validate(COMMAND), NEW, Fleet(LEASE_S))
    assert made is not None
    return made


async def test_what_was_uploaded_is_there_and_the_same_again_is_no_other(api: httpx.AsyncClient) -> None:
    before = await api.head(PATH)
    first = await api.put(PATH, content=ARCHIVE)
    again = await api.put(PATH, content=ARCHIVE)
    got = await api.get(PATH)

    assert [before.status_code, first.status_code, again.status_code] == [404, 201, 200]
    assert (await api.head(PATH)).status_code == 200
    assert (got.content, got.headers["content-type"]) == (ARCHIVE, "application/octet-stream")


async def test_twenty_uploads_at_once_all_succeed(api: httpx.AsyncClient, store: Store) -> None:
    answers = await asyncio.gather(*(api.put(PATH, content=ARCHIVE) for _ in range(20)))

    assert {answer.status_code for answer in answers} <= {200, 201}
    assert len(await store.fetch("SELECT sha256 FROM snapshots")) == 1


async def test_what_is_not_the_snapshot_is_refused_and_not_kept(api: httpx.AsyncClient, store: Store) -> None:
    assert refusal(await api.put(PATH, content=ARCHIVE[:-1])) == (422, "invalid")
    assert refusal(await api.put("/snapshots/abc", content=ARCHIVE)) == (422, "invalid")
    assert refusal(await api.get(PATH)) == (404, "not_found")
    assert not await kept(store)


async def test_the_largest_is_taken_and_one_byte_more_is_refused(api: httpx.AsyncClient) -> None:
    largest = bytes(SNAPSHOT_MAX_BYTES)

    taken = await api.put(f"/snapshots/{sha256(largest).hexdigest()}", content=largest)
    refused = await api.put(f"/snapshots/{sha256(largest + b'x').hexdigest()}", content=largest + b"x")

    assert taken.status_code == 201
    assert refusal(refused) == (413, "too_large")


async def test_a_body_without_an_end_is_refused_once_it_is_too_long(api: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(2**20)

    assert refusal(await api.put(PATH, content=endless())) == (413, "too_large")


@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD"])
async def test_code_is_for_those_who_have_a_token(api: httpx.AsyncClient, method: str) -> None:
    answer = await api.request(method, PATH, headers={"Authorization": "Bearer wrong"}, content=ARCHIVE)

    assert answer.status_code == 401


async def test_an_old_snapshot_that_no_operation_refers_to_is_swept(store: Store, old: None, tmp_path: Path) -> None:
    await OrphanSweeper(store.sessions, tmp_path, 1.0).sweep()

    assert not await kept(store)


async def test_a_snapshot_stays_as_long_as_an_operation_refers_to_it(api: httpx.AsyncClient, store: Store) -> None:
    await api.put(PATH, content=ARCHIVE)
    submitted = await api.post("/operations", json={"command": ["true"], "code": {"sha256": SHA256}})
    id = submitted.json()["id"]
    await api.post(f"/operations/{id}/cancel")
    await age(store)
    await sweep(store)
    assert await kept(store)

    assert (await api.delete(f"/operations/{id}")).status_code == 204
    await sweep(store)
    assert not await kept(store)


@pytest.mark.parametrize("method", ["PUT", "HEAD"])
async def test_who_has_asked_for_it_finds_it_for_a_day(
    api: httpx.AsyncClient, store: Store, old: None, method: str
) -> None:
    assert (await api.request(method, PATH, content=ARCHIVE)).status_code == 200
    await sweep(store)

    assert await kept(store)


async def test_a_sweep_passes_over_what_a_submit_holds(store: Store, old: None) -> None:
    spec = JobSpec.model_validate(COMMAND)
    async with store.sessions.begin() as session:
        await submit.submit_if_new(session, spec, NEW, Fleet(LEASE_S))
        await asyncio.wait_for(sweep(store), 10)  # it does not wait for the submit to be committed

    assert await kept(store)


async def test_a_submit_that_comes_while_its_snapshot_is_swept_is_told_to_upload_it(store: Store, old: None) -> None:
    async with store.sessions.begin() as session:
        await snapshots.delete_unused(session)
        late = asyncio.create_task(run_command(store))
        await somebody_waits(store)

    with pytest.raises(OpsError, match="upload it first"):
        await late


async def somebody_waits(store: Store) -> None:
    """Until a statement of this database waits for a lock."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    while not await store.fetch(waiting):
        pass
