"""Artifacts over HTTP: real rows, real files, and what must never be read."""

import asyncio
import hashlib
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import httpx
import pytest
import uvicorn
from pydantic import ValidationError

from helpers.store import Store
from ops_backend.app import create_app
from ops_backend.dispatcher import Dispatcher
from ops_backend.routes import files
from ops_backend.settings import Settings
from ops_contract.errors import ErrorBody
from ops_contract.lifecycle import Outcome
from ops_contract.reports import ArtifactSaved
from relight.client import Client

TOKEN = "a token of the tests"
CONTENT = bytes(range(256)) * 4
PNG = b"\x89PNG\r\n\x1a\n" + CONTENT


class Saved:
    """A completed operation with one file, which is where its row says."""

    def __init__(self, root: Path, operation_id: UUID, artifact: ArtifactSaved) -> None:
        self.operation_id, self.artifact = operation_id, artifact
        self.file = root / artifact.path
        self.url = f"/operations/{operation_id}/artifacts/{artifact.artifact_id}"


async def completed(store: Store, root: Path, content: bytes = CONTENT, name: str = "files/out/a b.pt") -> Saved:
    await store.worker()
    run = await store.running()
    artifact = ArtifactSaved(
        artifact_id=uuid4(),
        name=name,
        step=3,
        path=f"{run.operation_id}/1-3-files/{name.removeprefix('files/')}",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    made = Saved(root, run.operation_id, artifact)
    made.file.parent.mkdir(parents=True)
    made.file.write_bytes(content)
    await store.finish(await store.report(run, artifact), Outcome.COMPLETED)
    return made


async def test_an_artifact_is_sent_whole_or_in_part(api: httpx.AsyncClient, store: Store, tmp_path: Path) -> None:
    saved = await completed(store, tmp_path)
    tag = f'"{saved.artifact.sha256}"'

    whole, head = await api.get(saved.url), await api.head(saved.url)
    part = await api.get(saved.url, headers={"Range": "bytes=1000-", "If-Range": tag})
    stale = await api.get(saved.url, headers={"Range": "bytes=1000-", "If-Range": '"another"'})
    past = await api.get(saved.url, headers={"Range": "bytes=1024-"})

    assert (whole.status_code, whole.content, whole.headers["ETag"]) == (200, CONTENT, tag)
    assert whole.headers["Content-Disposition"] == "attachment; filename*=utf-8''a%20b.pt"
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(len(CONTENT)))
    assert (part.status_code, part.content) == (206, CONTENT[1000:])
    assert (stale.status_code, stale.content) == (200, CONTENT)
    assert past.status_code == 416


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ('a "b".pt', "utf-8''a%20_b_.pt"),
        ("..\\..\\evil.exe", '".._.._evil.exe"'),
        ("C:evil", '"C_evil"'),
        ("modèle é.pt", "utf-8''mod%C3%A8le%20%C3%A9.pt"),
        ("a\u202egpj.exe", '"a_gpj.exe"'),
        ("a\u2028b", '"a_b"'),
        ("con.txt", '"_con.txt"'),
        ("LPT1", '"_LPT1"'),
        ("a.pt. .", '"a.pt"'),
        ("...", '"file"'),
        ("a;b='c'.pt", "utf-8''a%3Bb%3D%27c%27.pt"),
    ],
)
async def test_a_file_is_saved_under_a_name_that_is_one_everywhere(
    api: httpx.AsyncClient, store: Store, tmp_path: Path, name: str, sent: str
) -> None:
    saved = await completed(store, tmp_path, name=f"files/{name}")

    answer = await api.get(saved.url)

    star = "*" if sent.startswith("utf-8") else ""
    assert answer.headers["Content-Disposition"] == f"attachment; filename{star}={sent}"
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("name", ["phase.png", "out/attachment é.PNG"])
async def test_a_png_may_be_shown_in_place(api: httpx.AsyncClient, store: Store, tmp_path: Path, name: str) -> None:
    saved = await completed(store, tmp_path, PNG, name=f"files/{name}")

    whole, head = await api.get(saved.url), await api.head(saved.url)
    part = await api.get(saved.url, headers={"Range": "bytes=8-"})

    for answer, content in ((whole, PNG), (head, b""), (part, CONTENT)):
        assert answer.content == content
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    sent = {"phase.png": 'filename="phase.png"', "out/attachment é.PNG": "filename*=utf-8''attachment%20%C3%A9.PNG"}
    assert whole.headers["Content-Disposition"] == f"inline; {sent[name]}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.html", PNG),
        ("picture.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"),
        ("page.png", b"<!doctype html><script>alert(1)</script>"),
        ("late.png", b" " + PNG),
        ("short.png", PNG[:7]),
        ("empty.png", b""),
        ("png", PNG),
    ],
)
async def test_nothing_else_is_shown_in_place(
    api: httpx.AsyncClient, store: Store, tmp_path: Path, name: str, content: bytes
) -> None:
    saved = await completed(store, tmp_path, content, name=f"files/{name}")

    answer = await api.get(saved.url)

    assert (answer.status_code, answer.content) == (200, content)
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{name}"'
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("name", ["files/a\nSet-Cookie: b", "files/a\0b", "files/../a", "/a", "files/a\r"])
def test_a_name_that_is_none_is_not_even_reported(name: str) -> None:
    with pytest.raises(ValidationError):
        ArtifactSaved(artifact_id=uuid4(), name=name, step=3, path="p", size_bytes=0, sha256="0" * 64)


def remove(saved: Saved) -> None:
    saved.file.unlink()


def cut(saved: Saved) -> None:
    os.truncate(saved.file, 10)


def link_file(saved: Saved) -> None:
    moved = saved.file.rename(saved.file.with_name("moved"))
    saved.file.symlink_to(moved)


def link_directory(saved: Saved) -> None:
    moved = saved.file.parent.rename(saved.file.parent.with_name("moved"))
    saved.file.parent.symlink_to(moved)


def pipe(saved: Saved) -> None:
    saved.file.unlink()
    os.mkfifo(saved.file)


def directory(saved: Saved) -> None:
    saved.file.unlink()
    saved.file.mkdir()


@pytest.mark.parametrize("change", [remove, cut, link_file, link_directory, pipe, directory])
async def test_a_file_that_is_not_what_was_saved_is_404_and_says_what_to_do(
    api: httpx.AsyncClient, store: Store, tmp_path: Path, change: object
) -> None:
    saved = await completed(store, tmp_path)
    assert callable(change)
    change(saved)

    answer = await api.get(saved.url)

    error = ErrorBody.model_validate(answer.json()).error
    assert (answer.status_code, error.code) == (404, "not_found")
    assert "restore it from a backup" in error.message


@pytest.mark.parametrize("path", ["../outside/secret", "{id}/../../outside/secret", "/etc/hostname", "{id}//secret"])
async def test_no_path_of_a_row_leads_outside_the_storage_root(
    api: httpx.AsyncClient, store: Store, tmp_path: Path, path: str
) -> None:
    saved = await completed(store, tmp_path)
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_bytes(CONTENT)
    place = path.format(id=saved.operation_id)
    await store.fetch("UPDATE artifacts SET path = :path RETURNING id", path=place)

    assert (await api.get(saved.url)).status_code == 404


async def test_an_unmounted_storage_root_is_503(api: httpx.AsyncClient, store: Store, tmp_path: Path) -> None:
    saved = await completed(store, tmp_path)
    shutil.rmtree(tmp_path)

    answer = await api.get(saved.url)

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "storage root" in answer.json()["error"]["message"]


async def test_only_the_operation_s_own_artifacts_are_found(
    api: httpx.AsyncClient, store: Store, tmp_path: Path
) -> None:
    saved = await completed(store, tmp_path)
    other = await store.submit()

    assert (await api.get(f"/operations/{other}/artifacts/{saved.artifact.artifact_id}")).status_code == 404
    assert (await api.get(f"/operations/{saved.operation_id}/artifacts/{other}")).status_code == 404


@contextmanager
def over_a_socket(database_url: str, root: Path) -> Iterator[str]:
    app = create_app(Settings(database_url=database_url, api_token=TOKEN, storage_root=root))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the API did not start"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def open_files(path: Path) -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(descriptor))
        except FileNotFoundError:
            continue
    return [target for target in found if target == str(path)]


async def test_a_client_that_goes_away_leaves_no_open_file(
    store: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = await completed(store, tmp_path, bytes(50_000_000))
    monkeypatch.setattr(Dispatcher, "_claim_all", AsyncMock())
    closed = threading.Event()
    answer = files.ArtifactResponse.__call__

    async def told(self: files.ArtifactResponse, *scope: object) -> None:
        try:
            await answer(self, *scope)  # type: ignore[arg-type]
        finally:
            closed.set()

    monkeypatch.setattr(files.ArtifactResponse, "__call__", told)

    def leave_in_the_middle(url: str) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client() as client, client.stream("GET", f"{url}/api/v1{saved.url}", headers=headers) as response:
            chunks = response.iter_raw()  # let go of, it would close the connection
            next(chunks)
            assert response.status_code == 200
            assert open_files(saved.file)

    with over_a_socket(database_url, tmp_path) as url:
        await asyncio.to_thread(leave_in_the_middle, url)
        assert await asyncio.to_thread(closed.wait, 60)
        assert not open_files(saved.file)


@pytest.mark.slow
async def test_a_large_file_takes_little_memory(
    store: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 MB, and both ends in this process."""
    size_bytes = 300_000_000
    saved = await completed(store, tmp_path, b"")
    os.truncate(saved.file, size_bytes)
    digest = hashlib.sha256()
    for _ in range(300):
        digest.update(bytes(1_000_000))
    await store.fetch(
        "UPDATE artifacts SET size_bytes = :n, sha256 = :sha RETURNING id", n=size_bytes, sha=digest.hexdigest()
    )
    monkeypatch.setattr(Dispatcher, "_claim_all", AsyncMock())

    with over_a_socket(database_url, tmp_path) as url, Client(url, TOKEN) as client:
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        [path] = await asyncio.to_thread(client.download, saved.operation_id, tmp_path / "here")
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb

    assert path.stat().st_size == size_bytes
    assert grown_kb < 60_000
