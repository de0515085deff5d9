"""Real processes throughout. Most tests share one database, which each of them leaves sound and stopped."""

import asyncio
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import ops_backend
from ops_backend import postgres as postgres_module
from ops_backend import postgres_place
from ops_backend.postgres import EmbeddedPostgres
from ops_backend.postgres_place import PostgresError

USER_WITH_ENTRY = pwd.getpwnam("nobody").pw_uid
USER_WITHOUT_ENTRY = 12345
OWNER = """
import ctypes, os, sys
from pathlib import Path
from ops_backend.postgres import run
if uid := int(sys.argv[2]):  # only now, because that user may be unable to read this interpreter
    os.setgroups([]), os.setgid(uid), os.setuid(uid)
    ctypes.CDLL(None).prctl(4, 1)  # dumpable, as an exec would make it: it may write its own uid_map
sys.exit(run(Path(sys.argv[1]), json=True, exit_on_eof=True))
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class Owner:
    """`ops db` on a data directory."""

    def __init__(self, data_dir: Path, uid: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(data_dir), str(uid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(ops_backend.__file__).parents[1]), "PGPORT": "1"},
        )

    def ready(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.error()
        ready: dict[str, Any] = json.loads(line)
        return ready

    def error(self) -> str:
        assert self.process.stderr
        return self.process.stderr.read()


@contextmanager
def owner(data_dir: Path, uid: int = 0) -> Iterator[Owner]:
    started = Owner(data_dir, uid)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        for stream in (started.process.stdin, started.process.stdout, started.process.stderr):
            assert stream
            stream.close()
        eventually(lambda: not processes_of(data_dir))


def processes_of(data_dir: Path) -> list[psutil.Process]:
    """The Postgres processes of a data directory: they have it as their working directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.name().startswith(("postgres", "initdb")) and Path(process.cwd()).is_relative_to(data_dir):
                found.append(process)
    return found


def eventually(condition: Callable[[], object], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def query(url: str, *statements: str) -> Any:
    """The last statement's scalar."""

    async def execute() -> Any:
        engine = create_async_engine(url, poolclass=NullPool)
        async with engine.connect() as connection:
            for statement in statements:
                result = await connection.execute(text(statement))
            answer = result.scalar() if result.returns_rows else None
            await connection.commit()
            return answer

    return asyncio.run(execute())


def count_up(url: str) -> int:
    return int(query(url, "UPDATE kept SET value = value + 1 RETURNING value"))


def answers(url: str) -> bool:
    with suppress(OSError, Exception):
        return bool(query(url, "SELECT 1") == 1)
    return False


def tree(directory: Path) -> dict[Path, tuple[int, int, int, int]]:
    found = {path: path.lstat() for path in directory.rglob("*")}
    return {path: (stat.st_mode, stat.st_uid, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture(scope="module")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("shared")
    with EmbeddedPostgres(data_dir / "postgres") as postgres:
        query(postgres.start(), "CREATE TABLE kept AS SELECT 0 AS value")
    return data_dir


@pytest.fixture
def data_dir(shared_dir: Path) -> Iterator[Path]:
    yield shared_dir
    assert not processes_of(shared_dir)


@pytest.fixture
def strangers() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """Outside pytest's private directories, so that other users reach it."""
    directory = Path(tempfile.mkdtemp(prefix="relight-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def test_fresh_start_serves_queries_on_a_private_socket_only(tmp_path: Path) -> None:
    with owner(tmp_path / "new" / "d") as owned:
        ready = owned.ready()

        assert ready["event"] == "ready"
        assert query(ready["url"], "SELECT current_database()") == "relight"
        assert query(ready["url"], "SHOW listen_addresses") == ""
        assert query(ready["url"], "SHOW timezone") == "UTC"
        assert query(ready["url"], "SHOW server_encoding") == "UTF8"
        assert query(ready["url"], "SHOW max_connections") == "100"
        assert not psutil.Process(ready["pid"]).net_connections("inet")
        home = tmp_path / "new/d/postgres"
        assert [path.stat().st_mode & 0o777 for path in (home.parent, home, home / "data")] == [0o700] * 3
        assert (home / "password").stat().st_mode & 0o777 == 0o600
        # A ctrl-C in the terminal must not reach it before us.
        assert os.getsid(ready["pid"]) == ready["pid"]

        owned.process.send_signal(signal.SIGTERM)
        assert owned.process.wait(20) == 0
        assert owned.process.stdout
        assert owned.process.stdout.read() == ""
        assert not psutil.pid_exists(ready["pid"])
        assert "database system is shut down" in (home / "postgres.log").read_text()


def test_a_wrong_password_is_refused(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir / "postgres") as postgres:
        url = postgres.start()
        assert answers(url)
        assert not answers(url.replace("relight:", "relight:x"))


def test_restart_keeps_data_and_url(data_dir: Path) -> None:
    urls, counts = [], []
    for _ in range(2):
        with owner(data_dir) as owned:
            urls.append(owned.ready()["url"])
            counts.append(count_up(urls[-1]))
            assert owned.process.stdin
            owned.process.stdin.close()  # as when the supervisor is killed
            assert owned.process.wait(20) == 0
            assert not processes_of(data_dir)

    assert urls[1] == urls[0]
    assert counts[1] == counts[0] + 1


def test_a_killed_owner_leaves_nothing_in_the_way(data_dir: Path) -> None:
    with owner(data_dir) as owned:
        url = owned.ready()["url"]
        before = count_up(url)
        assert processes_of(data_dir)

        owned.process.kill()
        # At once: whatever still shuts down is waited for.
        with owner(data_dir) as successor:
            assert successor.ready()["url"] == url
            assert count_up(url) == before + 1
            assert len({process.ppid() for process in processes_of(data_dir)}) == 2, "one postmaster and its children"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
def test_a_killed_postgres_comes_back_on_the_same_url(data_dir: Path, number: int) -> None:
    with owner(data_dir) as owned:
        ready = owned.ready()
        before = count_up(ready["url"])

        os.kill(ready["pid"], number)

        eventually(lambda: not psutil.pid_exists(ready["pid"]))
        eventually(lambda: answers(ready["url"]))
        assert count_up(ready["url"]) == before + 1


@pytest.mark.slow
def test_a_postgres_that_cannot_run_is_given_up_with_its_reason(data_dir: Path) -> None:
    pauses: list[float] = []
    control_file, hidden = data_dir / "postgres/data/global/pg_control", data_dir / "pg_control"

    def pause(duration_s: float) -> None:
        pauses.append(duration_s)
        time.sleep(min(duration_s, 0.01))

    with EmbeddedPostgres(data_dir / "postgres", pause) as postgres:
        postgres.start()
        assert postgres.pid
        control_file.rename(hidden)
        os.kill(postgres.pid, signal.SIGKILL)

        with pytest.raises(PostgresError, match=r"did not start: .*could not .*pg_control.*\(log: "):
            postgres.keep_running()

        hidden.rename(control_file)
        assert answers(postgres.start())
    assert [duration_s for duration_s in pauses if duration_s not in (0.02, 1.0)] == [0.2, 0.4, 0.8, 1.6, 3.2]


def test_a_second_owner_is_refused(data_dir: Path) -> None:
    with owner(data_dir) as first:
        ready = first.ready()
        with owner(data_dir) as second:
            assert second.process.wait(20) == 1
            error = second.error()
            assert f"{data_dir} is in use by another Relight (pid {first.process.pid})" in error
            assert error.count("\n") == 1
            assert answers(ready["url"])
            first.process.send_signal(signal.SIGINT)
            assert first.process.wait(20) == 0


def test_another_major_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    data = tmp_path / "postgres/data"
    (data / "base/1").mkdir(parents=True)
    (data / "PG_VERSION").write_text("17\n")
    (data / "base/1/PG_VERSION").write_text("17\n")
    before = tree(data)

    with (
        EmbeddedPostgres(tmp_path / "postgres") as postgres,
        pytest.raises(PostgresError, match=r"PostgreSQL 17 .* brings 18; nothing was changed.*OPS_DATABASE_URL"),
    ):
        postgres.start()

    assert tree(data) == before


@pytest.fixture(params=["x" * 100, "a b,c:d"], ids=["long", "odd"])
def unfit_dir(data_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    unfit = data_dir.rename(tmp_path / request.param)
    yield unfit
    unfit.rename(data_dir)


def test_a_path_unfit_for_a_socket_gets_a_private_one_elsewhere(unfit_dir: Path, tmp_path: Path) -> None:
    urls = []
    for _ in range(2):
        with EmbeddedPostgres(unfit_dir / "postgres") as postgres:
            urls.append(postgres.start())
            assert answers(urls[-1])
            socket_dir = postgres.socket_dir
            assert socket_dir.stat().st_mode & 0o777 == 0o700
    assert urls[1] == urls[0]

    socket_dir.rmdir()
    (tmp_path / "trap").mkdir(mode=0o700)
    socket_dir.symlink_to(tmp_path / "trap")
    try:
        with (
            EmbeddedPostgres(unfit_dir / "postgres") as postgres,
            pytest.raises(PostgresError, match="choose a shorter and plainer --data-dir"),
        ):
            postgres.start()
    finally:
        socket_dir.unlink()


@pytest.mark.slow
def test_an_initdb_that_was_killed_is_made_anew(tmp_path: Path) -> None:
    with owner(tmp_path) as owned:
        eventually((tmp_path / "postgres/data.new/base").exists)
        owned.process.kill()
    assert not (tmp_path / "postgres/data").exists()

    with owner(tmp_path) as owned:
        assert answers(owned.ready()["url"])
        assert not (tmp_path / "postgres/data.new").exists()


def test_stale_pid_files_that_name_strangers_harm_nobody(
    data_dir: Path, strangers: list[subprocess.Popen[bytes]]
) -> None:
    home = data_dir / "postgres"
    paths = [home / "data/postmaster.pid", home / ".s.PGSQL.5432.lock"]
    with EmbeddedPostgres(home) as postgres:
        postgres.start()
        contents = [path.read_text() for path in paths]
    for path, content, stranger in zip(paths, contents, strangers, strict=True):
        path.write_text(f"{stranger.pid}\n" + content.partition("\n")[2])

    with EmbeddedPostgres(home) as postgres:
        assert answers(postgres.start())

    assert [stranger.poll() for stranger in strangers] == [None, None]


def test_a_postgres_started_by_hand_is_noticed_and_unharmed(data_dir: Path) -> None:
    home = data_dir / "postgres"
    place = postgres_place.find_place(home)
    socket = ["-c", f"unix_socket_directories={data_dir}", "-c", "listen_addresses="]
    command = [str(place.bin / "postgres"), "-D", str(home / "data"), *socket]
    by_hand = place.account.popen(command, home, signal.SIGKILL, stderr=subprocess.DEVNULL)
    try:
        eventually((data_dir / ".s.PGSQL.5432").exists)
        with EmbeddedPostgres(home) as postgres, pytest.raises(PostgresError, match=r"still in use.*started by hand"):
            postgres.start()
        assert by_hand.poll() is None
    finally:
        by_hand.send_signal(signal.SIGQUIT)
        by_hand.wait(20)


def test_a_predecessor_that_still_shuts_down_is_waited_for(data_dir: Path) -> None:
    """Its processes hold the lock, as the file does here."""
    held = (data_dir / "postgres/data.lock").open()
    fcntl.flock(held, fcntl.LOCK_EX)

    with EmbeddedPostgres(data_dir / "postgres", pause=lambda _: held.close()) as postgres:
        assert answers(postgres.start())


def test_a_predecessor_that_does_not_end_is_an_error(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_module, "SHUTDOWN_WAIT_S", 0)
    with (data_dir / "postgres/data.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            EmbeddedPostgres(data_dir / "postgres") as postgres,
            pytest.raises(PostgresError, match="still shutting down"),
        ):
            postgres.start()


def test_the_lock_is_held_as_long_as_any_process_of_postgres_lives(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir / "postgres") as postgres, (data_dir / "postgres/data.lock").open() as probe:
        postgres.start()
        with pytest.raises(BlockingIOError):
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        postgres.stop("immediate")
        fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lost_password_is_replaced(data_dir: Path) -> None:
    (data_dir / "postgres/password").unlink()

    with EmbeddedPostgres(data_dir / "postgres") as postgres:
        assert answers(postgres.start())


def test_the_log_is_bounded(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = data_dir / "postgres/postgres.log"
    with EmbeddedPostgres(data_dir / "postgres") as postgres:
        url = postgres.start()
        monkeypatch.setattr(postgres_module, "LOG_BYTES", 100)
        assert log.stat().st_size > 100

        # Where it belongs to an account that is less than root's, that must not make root overwrite things.
        log.with_name("postgres.log.1").symlink_to(data_dir / "victim")
        postgres._trim_log()

        assert not (data_dir / "victim").exists()
        assert log.stat().st_size == 0
        query(url, "DO $$ BEGIN RAISE WARNING 'after the cut'; END $$")
        assert log.read_bytes()[:1] == b"2", "Postgres goes on at the beginning, not at its old offset"
        assert "after the cut" in log.read_text()

        log.with_name("postgres.log.1").unlink()
        before = log.read_text()
        postgres._trim_log()
        assert log.with_name("postgres.log.1").read_text() == before


def test_a_missing_wheel_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PostgresError, match=r"pip install 'relight\[backend\]'.*OPS_DATABASE_URL"):
        EmbeddedPostgres(tmp_path / "postgres")


@needs_root
def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    script = f"mount -t tmpfs -o size=20M none {tmp_path} && exec {sys.executable} -c '{OWNER}' {tmp_path} 0"
    environment = os.environ | {"PYTHONPATH": str(Path(ops_backend.__file__).parents[1])}
    full = subprocess.run(["unshare", "-m", "sh", "-c", script], env=environment, capture_output=True, text=True)
    if "unshare" in full.stderr or "mount:" in full.stderr:
        pytest.skip("needs a mount namespace")

    assert full.returncode == 1
    assert re.fullmatch(r"ops db: initdb failed .*No space left on device: free some space.*\n", full.stderr)


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("uid", [USER_WITH_ENTRY, USER_WITHOUT_ENTRY])
def test_an_ordinary_user_stays_who_he_is(public_dir: Path, uid: int) -> None:
    binary = postgres_place._wheel_package() / "pginstall/bin/postgres"
    if not can_run(uid, str(binary), "--version"):
        pytest.skip("the environment is out of reach for ordinary users")
    if uid == USER_WITHOUT_ENTRY and not can_run(uid, "unshare", "-Ur", "true"):
        pytest.skip("initdb needs an entry in /etc/passwd, or a user namespace")
    os.chown(public_dir, uid, uid)

    with owner(public_dir, uid) as owned:
        ready = owned.ready()
        assert answers(ready["url"])
        assert psutil.Process(ready["pid"]).uids().real == uid
        assert {path.stat().st_uid for path in public_dir.rglob("*")} == {uid}
        owned.process.kill()
        eventually(lambda: not processes_of(public_dir))


def can_run(uid: int, *command: str) -> bool:
    with suppress(OSError):
        return subprocess.run(command, user=uid, group=uid, extra_groups=[], capture_output=True).returncode == 0
    return False


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("reachable", [True, False])
def test_root_without_namespaces_uses_a_system_uid(
    public_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    system_root = public_dir / "system"
    monkeypatch.setattr(postgres_place, "enter_namespace", refuse)
    monkeypatch.setattr(postgres_place, "SYSTEM_ROOT", system_root)
    data_dir = public_dir / "d" if reachable else tmp_path / "d"
    data_dir.mkdir(mode=0o755)
    tmp_path.chmod(0o700)
    if not reachable:
        monkeypatch.setattr(postgres_place, "_wheel_package", wheel_that_only_root_reads(tmp_path))

    for _ in range(2):
        with EmbeddedPostgres(data_dir / "postgres") as postgres:
            assert answers(postgres.start())
            assert psutil.Process(postgres.pid).uids().real == postgres_place._system_user().pw_uid
            assert postgres.home.is_relative_to(data_dir if reachable else system_root)
            assert reachable or postgres.bin.is_relative_to(system_root)

    assert data_dir.stat().st_mode & 0o777 == 0o755
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    # With namespaces allowed again, the database stays where and whose it is.
    monkeypatch.undo()
    if reachable:
        assert postgres_place.find_place(data_dir / "postgres").account.uid == postgres_place._system_user().pw_uid


def wheel_that_only_root_reads(private_dir: Path) -> Callable[[], Path]:
    package = postgres_place._wheel_package()
    for name in (package.name, f"{package.name}.libs"):
        (private_dir / name).symlink_to(package.with_name(name))
    return lambda: private_dir / package.name
