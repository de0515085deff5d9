"""Downloads against scripted answers: what is gone on with, what is never written, what is verified."""

import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from ops_contract.errors import OpsError
from ops_contract.history import Artifacts, ArtifactView
from relight.client import Client
from relight.download import DownloadFailed
from relight.transport import TRIES, Unreachable

CONTENT = bytes(range(200))


def left(name: str = "files/out/a.pt", content: bytes = CONTENT, **changes: Any) -> ArtifactView:
    plain = {
        "id": uuid4(),
        "operation_id": uuid4(),
        "attempt": 1,
        "name": name,
        "step": 3,
        "path": f"x/1-3-files/{name}",
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "created_at": "2026-01-01T00:00:00Z",
    }
    return ArtifactView.model_validate(plain | changes)


class Breaking(httpx.SyncByteStream):
    def __init__(self, content: bytes, breaks: bool) -> None:
        self.content, self.breaks = content, breaks

    def __iter__(self) -> Iterator[bytes]:
        yield self.content
        if self.breaks:
            raise httpx.ReadError("lost")


class Server:
    """Sends `content`; each of the first answers breaks off after so many bytes."""

    def __init__(self, *artifacts: ArtifactView, content: bytes = CONTENT, breaks: tuple[int, ...] = ()) -> None:
        self.artifacts, self.content, self.breaks = artifacts, content, list(breaks)
        self.asked: list[tuple[str | None, str | None]] = []
        self.ranges = True

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/artifacts"):
            return httpx.Response(200, text=Artifacts(items=list(self.artifacts)).model_dump_json())
        wanted = request.headers.get("Range")
        self.asked.append((wanted, request.headers.get("If-Range")))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        rest = self.content[start:]
        breaks = bool(self.breaks)
        sent = rest[: self.breaks.pop(0)] if breaks else rest
        return httpx.Response(206 if start else 200, stream=Breaking(sent, breaks))

    def client(self) -> Client:
        transport = httpx.MockTransport(self)
        return Client("http://127.0.0.1:1", "t", transport=transport, sleep=lambda duration_s: None)


def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    artifact = left()
    server = Server(artifact, breaks=(50, 70))

    [path] = server.client().download(uuid4(), tmp_path)

    assert path == tmp_path / "out" / "a.pt"
    assert path.read_bytes() == CONTENT
    tag = f'"{artifact.sha256}"'
    assert server.asked == [(None, None), ("bytes=50-", tag), ("bytes=120-", tag)]
    assert [each.name for each in path.parent.iterdir()] == ["a.pt"]


def test_an_interrupted_download_is_gone_on_with_by_the_next_call(tmp_path: Path) -> None:
    server = Server(left(), breaks=(150,) + (0,) * TRIES)
    with pytest.raises(Unreachable):
        server.client().download(uuid4(), tmp_path)
    assert not (tmp_path / "out" / "a.pt").exists()
    server.breaks.clear()

    [path] = server.client().download(uuid4(), tmp_path)
    server.client().download(uuid4(), tmp_path)

    assert path.read_bytes() == CONTENT
    assert server.asked[-1][0] == "bytes=150-", "and nothing more for what is there"


def test_a_server_that_sends_all_again_is_believed(tmp_path: Path) -> None:
    server = Server(left(), breaks=(50,))
    server.ranges = False

    [path] = server.client().download(uuid4(), tmp_path)

    assert path.read_bytes() == CONTENT


def test_what_is_not_what_was_saved_does_not_stay(tmp_path: Path) -> None:
    server = Server(left(), content=CONTENT[::-1])

    with pytest.raises(DownloadFailed, match="SHA-256"):
        server.client().download(uuid4(), tmp_path)

    assert not list((tmp_path / "out").iterdir())


def test_another_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")

    with pytest.raises(DownloadFailed, match="other content"):
        Server(left("model.safetensors")).client().download(uuid4(), tmp_path)

    assert (tmp_path / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("name", ["files/../a", "../a", "/a", "files//a", "files/", "files/link/a"])
def test_nothing_is_written_outside_the_directory(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)

    with pytest.raises(DownloadFailed, match="leads outside"):
        Server(left(name)).client().download(uuid4(), inside)

    assert [each.name for each in tmp_path.rglob("*")] == ["inside", "link"]


def test_two_downloads_of_one_file_do_not_mix(tmp_path: Path) -> None:
    artifact = left("a.pt")
    part = tmp_path / f".a.pt.{artifact.sha256[:16]}.part"
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DownloadFailed, match="another download"):
            Server(artifact).client().download(uuid4(), tmp_path)

    assert Server(artifact).client().download(uuid4(), tmp_path) == [tmp_path / "a.pt"]


def test_the_latest_attempt_s_file_is_meant_and_unknown_names_are_refused(tmp_path: Path) -> None:
    server = Server(left("files/a", b"", attempt=2), left("files/a", b"old", attempt=1))
    server.content = b""

    [path] = server.client().download(uuid4(), tmp_path, ["files/a"])

    assert path.read_bytes() == b""
    with pytest.raises(OpsError, match="no artifact b; there are files/a"):
        server.client().download(uuid4(), tmp_path, ["b"])


def test_progress_is_told_and_may_end_it(tmp_path: Path) -> None:
    told: list[int] = []

    def stop(artifact: ArtifactView, size_bytes: int) -> None:
        told.append(size_bytes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Server(left("a")).client().download(uuid4(), tmp_path, progress=stop)

    assert told == [len(CONTENT)]
    assert not (tmp_path / "a").exists()
