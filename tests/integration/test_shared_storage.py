"""What the doctor says of the storage roots of real workers, against real directories and mounts."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from helpers.agents import AgentProcess, running_agent
from helpers.fake_api import FakeApi
from helpers.store import Store
from ops_backend import doctor, shared_storage
from ops_backend.shared_storage import LiveWorker, compare
from ops_contract.agents import PROBE_PREFIX
from ops_contract.doctor import Finding

# As root on a host that lets it, which containers often do not.
CAN_MOUNT = shutil.which("unshare") and not subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with FakeApi() as api:
        yield api


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of this host."""
    made = tmp_path / "agent" / "storage"
    made.mkdir(parents=True)
    return made


def live(agent: AgentProcess, name: str = "one") -> LiveWorker:
    return LiveWorker(agent.incarnation, name, agent.url, agent.api.registration(agent.incarnation).secret)


async def look(root: Path, *workers: LiveWorker) -> list[Finding]:
    found = await compare(root, workers)
    assert all(finding.advice for finding in found if finding.state != "ok")
    assert os.listdir(root) == [], "it leaves nothing behind"
    return found


async def test_a_worker_that_shares_the_root_is_in_order(api: FakeApi, root: Path) -> None:
    async with running_agent(api, root.parent) as agent:
        await agent.ready()
        (found,) = await look(root, live(agent))
    assert (found.check, found.state) == ("storage of worker one", "ok")
    assert f"the same as here, at {root}" in found.message
    assert "GB free" in found.message


async def test_a_worker_with_another_root_is_found(
    api: FakeApi, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_storage, "WAIT_S", 0.05)
    (other := tmp_path / "other").mkdir()
    async with running_agent(api, root.parent, environ={"OPS_STORAGE_ROOT": str(other)}) as agent:
        await agent.ready()
        (found,) = await look(root, live(agent))
    assert (found.state, found.advice) == ("fail", shared_storage.MOUNT_ADVICE)
    assert f"its {other}" in found.message
    assert os.listdir(other) == [], "nor there"


async def test_what_is_seen_too_late_is_said_to_be_a_cache(
    api: FakeApi, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that remembers what was not there when it looked, as NFS does."""
    remembers = """
import os, ops_worker.storage_probe as probe
find, exists, known = probe._find, os.path.exists, set()
def remembering(path, wait_s):
    return find(path.with_name("never") if path.parent in known else path, wait_s)
def noted(path):
    if not exists(path):
        known.add(path)
    return exists(path)
probe._find, os.path.exists = remembering, noted
""".strip()
    monkeypatch.setattr(shared_storage, "WAIT_S", 0.05)
    async with running_agent(api, root.parent, first=f"exec({remembers!r})") as agent:
        await agent.ready()
        (found,) = await look(root, live(agent))
    assert (found.state, found.advice) == ("fail", shared_storage.CACHE_ADVICE)


@pytest.mark.skipif(not CAN_MOUNT, reason="mounts are not allowed here")
async def test_a_root_that_is_mounted_read_only_is_found(api: FakeApi, root: Path, tmp_path: Path) -> None:
    """Another mount of the same directory, in a namespace of the worker's own."""
    (there := tmp_path / "mounted").mkdir()
    mounted = f"""
import ctypes, subprocess
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0
bind = ["--bind", {str(root)!r}, {str(there)!r}]
for command in (["--make-rprivate", "/"], bind, ["-o", "remount,ro,bind", {str(there)!r}]):
    subprocess.run(["mount", *command], check=True)
""".strip()
    environ = {"OPS_STORAGE_ROOT": str(there)}
    async with running_agent(api, root.parent, environ=environ, first=f"exec({mounted!r})") as agent:
        await agent.ready()
        (found,) = await look(root, live(agent))
    assert found.state == "fail"
    assert "cannot publish" in found.message
    assert "EROFS" in found.message
    assert "read-only" in (found.advice or "")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another")
async def test_a_worker_of_a_user_who_may_not_is_told_who_wrote_and_who_cannot_read(
    api: FakeApi, root: Path, tmp_path: Path
) -> None:
    os.chmod(root, 0o700)
    shutil.chown(tmp_path, 65534)
    first = "import ops_worker.storage_probe as p; o = p.probe; import ops_worker.agent as a, os"
    becomes = "a.probe = lambda r, w: (os.seteuid(65534), o(r, w), os.seteuid(0))[1]"
    async with running_agent(api, root.parent, first=f"{first}; {becomes}") as agent:
        await agent.ready()
        (found,) = await look(root, live(agent))
    assert found.state == "fail"
    assert "uid 65534 cannot read what uid 0 wrote here" in found.message
    assert "root_squash" in (found.advice or "")


async def test_those_that_do_not_answer_are_said_and_hide_nobody(
    api: FakeApi, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_storage, "CALL_S", 0.5)
    monkeypatch.setattr(shared_storage, "WAIT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # which accepts nothing
        async with running_agent(api, root.parent) as agent:
            await agent.ready()
            workers = [
                live(agent, "well"),
                replace(live(agent, "stranger"), secret="s" * 43),
                replace(live(agent, "replaced"), incarnation=uuid4()),
                replace(live(agent, "gone"), url="http://127.0.0.1:9"),
                replace(live(agent, "hangs"), url=f"http://127.0.0.1:{silent.getsockname()[1]}"),
            ]
            found = {finding.check.rpartition(" ")[2]: finding for finding in await look(root, *workers)}
    assert {name: finding.state for name, finding in found.items()} == {
        "well": "ok",
        **dict.fromkeys(["stranger", "replaced", "gone", "hangs"], "fail"),
    }
    assert "cannot be reached" in found["gone"].message
    assert "does not answer" in found["hangs"].message
    assert "409" in found["replaced"].message
    assert "401" in found["stranger"].message


async def test_what_a_killed_doctor_left_is_removed_by_the_next(
    api: FakeApi, root: Path, store: Store, database_url: str
) -> None:
    left, fresh = root / f"{PROBE_PREFIX}{UUID(int=1).hex}", root / f"{PROBE_PREFIX}{UUID(int=2).hex}"
    for directory in (left, fresh):
        (directory / "first.tmp").mkdir(parents=True)
    os.utime(left, (1.0, 1.0))

    found = await asyncio.to_thread(doctor.examine, None, database_url, root)

    assert {item.check: item.state for item in found.items}["storage"] == "ok"
    assert os.listdir(root) == [fresh.name], "another doctor may be at work in it"


@pytest.mark.slow
async def test_the_process_asks_the_workers_that_live_by_the_database(
    api: FakeApi, root: Path, store: Store, database_url: str
) -> None:
    await store.tick()
    async with running_agent(api, root.parent) as agent:
        await agent.ready()
        gone, here = await store.worker("gone"), await store.worker("here")
        row = {"url": agent.url, "secret": live(agent).secret, "is": agent.incarnation, "id": here}
        await store.execute("DELETE FROM slots")
        moved = "UPDATE workers SET url = :url, secret = :secret, incarnation = :is WHERE incarnation = :id"
        await store.execute(moved, **row)
        await store.execute("UPDATE workers SET last_seen_at = now() - interval '1 h' WHERE incarnation = :id", id=gone)
        environ = os.environ | {"OPS_DATABASE_URL": database_url, "OPS_STORAGE_ROOT": str(root)}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ops_backend", "doctor", env=environ, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await process.communicate()
    found = {item.check: item.state for item in doctor.Findings.model_validate_json(said).items}
    assert (process.returncode, found["storage of worker here"]) == (0, "ok")
    assert "storage of worker gone" not in found
