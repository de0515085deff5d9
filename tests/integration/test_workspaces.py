"""An attempt's directory: the snapshot comes from the API, is checked, kept, unpacked, and goes with the attempt."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from helpers.agents import AgentProcess, eventually, running_agent
from helpers.fake_api import TOKEN, FakeApi
from helpers.processes import alive
from ops_contract.agents import StartTraining
from ops_contract.jobs import Code, Execution, Job
from ops_contract.lifecycle import Kind, Outcome
from ops_worker import workspace
from ops_worker.api_client import ApiClient
from ops_worker.workspace import NoWorkspace, Workspaces
from relight.archive import Entry, write_archive

CODE = write_archive({"train.py": Entry(b"print()"), "pkg/run.sh": Entry(b"#!", executable=True)})


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with FakeApi() as api:
        yield api


@pytest.fixture
def workspaces(api: FakeApi, tmp_path: Path) -> Workspaces:
    return of(api, tmp_path)


def of(api: FakeApi, state_dir: Path, patience_s: float = 30.0) -> Workspaces:
    return Workspaces(state_dir, uuid4(), lambda: ApiClient(api.url, TOKEN), patience_s)


def order(sha256: str | None, workdir: str = ".") -> StartTraining:
    code = Code(sha256=sha256) if sha256 else None
    job = Job(kind=Kind.TRAINING, workload="a:B", config={}, execution=Execution(), code=code, workdir=workdir)
    return StartTraining(incarnation=uuid4(), operation_id=uuid4(), attempt=1, slots=[0], deadline_s=20, job=job)


@asynccontextmanager
async def opened(workspaces: Workspaces, wanted: StartTraining) -> AsyncIterator[Path]:
    async with workspaces.open(wanted, await workspaces.code(wanted)) as directory:
        yield directory


async def refused(workspaces: Workspaces, wanted: StartTraining) -> tuple[str, bool, str]:
    with pytest.raises(NoWorkspace) as refusal:
        async with workspaces.held(), opened(workspaces, wanted):
            pass
    return refusal.value.fault.code, refusal.value.permanent, refusal.value.fault.message


def everything(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


async def test_an_attempt_finds_its_snapshot_and_its_directory_goes_with_it(
    api: FakeApi, workspaces: Workspaces, tmp_path: Path
) -> None:
    async with workspaces.held():
        async with opened(workspaces, order(api.keep(CODE), "pkg")) as directory:
            assert everything(directory) == {"train.py", "pkg", "pkg/run.sh"}
            assert os.access(directory / "pkg" / "run.sh", os.X_OK)
        assert not directory.exists()
    assert everything(tmp_path / "attempts") == set()


async def test_an_attempt_without_code_has_an_empty_directory(workspaces: Workspaces) -> None:
    async with workspaces.held(), opened(workspaces, order(None, "a/b")) as directory:
        assert everything(directory) == {"a", "a/b"}


async def test_two_attempts_at_once_have_directories_of_their_own(api: FakeApi, workspaces: Workspaces) -> None:
    sha256 = api.keep(CODE)
    async with (
        workspaces.held(),
        opened(workspaces, order(sha256)) as one,
        opened(workspaces, order(sha256)) as other,
    ):
        (one / "train.py").write_text("changed by the run itself")
        assert (other / "train.py").read_bytes() == b"print()"


async def test_a_snapshot_is_fetched_once_and_then_taken_from_the_disk_by_successors_too(
    api: FakeApi, tmp_path: Path
) -> None:
    wanted = order(api.keep(CODE))
    assert await of(api, tmp_path).code(wanted) == CODE
    await api.down()

    assert await of(api, tmp_path).code(wanted) == CODE
    assert api.fetched == 1


async def test_ten_attempts_at_once_keep_one_whole_copy(api: FakeApi, tmp_path: Path) -> None:
    wanted = order(api.keep(CODE))

    got = await asyncio.gather(*(of(api, tmp_path).code(wanted) for _ in range(10)))

    assert got == [CODE] * 10
    assert [path.read_bytes() for path in (tmp_path / "snapshots").iterdir()] == [CODE]


async def test_a_damaged_copy_on_the_disk_is_fetched_anew(api: FakeApi, tmp_path: Path) -> None:
    wanted = order(api.keep(CODE))
    await of(api, tmp_path).code(wanted)
    (copy,) = (tmp_path / "snapshots").iterdir()
    copy.write_bytes(CODE[:-1])

    assert await of(api, tmp_path).code(wanted) == CODE
    assert copy.read_bytes() == CODE


async def test_of_many_snapshots_the_last_used_stay_on_the_disk(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "CACHED", 2)
    orders = [order(api.keep(write_archive({"a": Entry(bytes([n]))}))) for n in range(3)]
    for wanted in (orders[0], orders[1], orders[0], orders[2]):
        await of(api, tmp_path).code(wanted)
        for path in (tmp_path / "snapshots").iterdir():
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))  # the next one is younger, however coarse the clock

    kept = {path.name for path in (tmp_path / "snapshots").iterdir()}

    assert kept == {wanted.job.code.sha256 for wanted in (orders[0], orders[2]) if wanted.job.code}


async def test_an_api_that_is_away_is_waited_for(
    api: FakeApi, workspaces: Workspaces, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = order(api.keep(CODE))
    await api.down()
    fetching = asyncio.create_task(workspaces.code(wanted))
    await eventually(lambda: "trying again" in caplog.text)

    await api.up()

    assert await fetching == CODE


async def test_a_snapshot_changed_on_its_way_is_fetched_again(api: FakeApi, workspaces: Workspaces) -> None:
    wanted = order(api.keep(CODE))
    api.garble = 2

    assert await workspaces.code(wanted) == CODE
    assert api.fetched == 3


async def test_an_api_that_never_gives_it_is_no_permanent_failure(api: FakeApi, tmp_path: Path) -> None:
    api.garble = 1000

    code, permanent, _ = await refused(of(api, tmp_path, patience_s=0.3), order(api.keep(CODE)))

    assert (code, permanent) == ("code_unavailable", False)


async def test_a_snapshot_that_the_api_does_not_have_is_one(workspaces: Workspaces) -> None:
    code, permanent, message = await refused(workspaces, order("0" * 64))

    assert (code, permanent) == ("code_missing", True)
    assert "Submit it anew" in message


@pytest.mark.parametrize(
    ("entries", "workdir", "said"),
    [
        ({"../evil": Entry(b"x")}, ".", "'../evil' is no path within a project"),
        ({"out": Entry(link="../..")}, ".", "the link out leads out of the project"),
        ({"a": Entry(b"x")}, "absent", "has no directory 'absent'"),
        ({"a": Entry(b"x")}, "a", "has no directory 'a'"),
    ],
)
async def test_a_snapshot_that_cannot_be_unpacked_fails_for_good_and_leaves_nothing(
    api: FakeApi, workspaces: Workspaces, tmp_path: Path, entries: dict[str, Entry], workdir: str, said: str
) -> None:
    code, permanent, message = await refused(workspaces, order(api.keep(write_archive(entries)), workdir))

    assert (code, permanent) == ("code_invalid", True)
    assert said in message
    assert everything(tmp_path / "attempts") == set()
    assert {path.split("/")[0] for path in everything(tmp_path)} == {"attempts", "snapshots"}


@pytest.mark.parametrize(("where", "fails"), [("snapshots", False), ("attempts", True)])
async def test_a_full_disk_keeps_no_copy_and_fails_what_cannot_be_unpacked(
    api: FakeApi, workspaces: Workspaces, monkeypatch: pytest.MonkeyPatch, where: str, fails: bool
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workspace.os if where == "snapshots" else workspace, "replace" if not fails else "unpack", full)
    wanted = order(api.keep(CODE))

    if fails:
        code, permanent, message = await refused(workspaces, wanted)
        assert (code, permanent) == ("disk_full", False)
        assert "make room" in message
    else:
        async with workspaces.held(), opened(workspaces, wanted) as directory:
            assert (directory / "train.py").exists()


async def test_what_a_killed_agent_left_goes_and_what_a_living_one_has_stays(api: FakeApi, tmp_path: Path) -> None:
    dead = tmp_path / "attempts" / str(uuid4())
    (dead / "1" / "files").mkdir(parents=True)
    living, next_one = of(api, tmp_path), of(api, tmp_path)

    async with living.held(), opened(living, order(None)) as directory, next_one.held():
        await next_one.clear()
        await living.clear()

        assert directory.exists()
        assert not dead.exists()
    assert everything(tmp_path / "attempts") == set()


async def test_an_agent_whose_code_does_not_come_beats_on_and_stops_at_once_when_it_is_cancelled(
    api: FakeApi, tmp_path: Path
) -> None:
    api.garble = 1000
    async with running_agent(api, tmp_path, environ={"OPS_USER_CODE": "1"}) as agent:
        await agent.ready()
        hold = api.claim(uuid4(), agent.incarnation)
        await start(agent, hold.ref.operation_id, api.keep(CODE))
        await eventually(lambda: api.fetched >= 2 and hold.beats >= 2)

        assert (await agent.cancel(hold, force=True)).status_code == 202

        await eventually(lambda: hold.finish)
        assert hold.finish is not None
        assert (hold.finish.outcome, hold.finish.error and hold.finish.error.code) == (Outcome.CANCELLED, "not_started")


@pytest.mark.slow
async def test_an_agent_that_was_killed_leaves_no_directory_to_its_successor(api: FakeApi, tmp_path: Path) -> None:
    async with running_agent(api, tmp_path, environ={"OPS_USER_CODE": "1"}) as agent:
        await agent.ready()
        hold = api.claim(uuid4(), agent.incarnation)
        await start(agent, hold.ref.operation_id, api.keep(CODE))
        await eventually(lambda: "train.py" in attempted(tmp_path))
        attempt = attempted(tmp_path)["train.py"]
        children = agent.children()
        agent.process.kill()
        await agent.process.wait()
        await eventually(lambda: not any(alive(pid) for pid in children))
    assert attempt.exists()

    async with running_agent(api, tmp_path, environ={"OPS_USER_CODE": "1"}) as successor:
        await successor.ready()
        await eventually(lambda: not attempt.exists())


async def start(agent: AgentProcess, operation_id: UUID, sha256: str) -> None:
    job = order(sha256).job.model_copy(update={"workload": "fake", "config": {"end": "wait"}})
    wanted = order(sha256).model_copy(
        update={"incarnation": agent.incarnation, "operation_id": operation_id, "job": job}
    )
    assert (await agent.post("/training/start", wanted)).status_code == 202


def attempted(state_dir: Path) -> dict[str, Path]:
    return {path.name: path for path in (state_dir / "attempts").glob("*/*/*")}
