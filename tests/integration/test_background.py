"""`ops up -d`, `ops down` and systemd's part, over stand-ins for the children of `ops up`."""

import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.house import House, make_house, running, wait_until
from helpers.processes import alive
from ops_cli.holder import find_holder
from ops_cli.up import free_port
from ops_contract.backup import RESTORING


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = make_house(tmp_path)
    yield made
    if (left := find_holder(made.data_dir)) is not None:
        os.kill(left.pid, signal.SIGKILL)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        assert process.poll() is None, "a process that is none of ours was ended"
        process.kill()


def up(house: House, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return house.ops("up", "-d", *arguments, **environ)


def test_up_in_the_background_is_up_when_it_returns_and_down_ends_it_in_order(house: House) -> None:
    port = free_port()
    begun = up(house, "--port", str(port))
    assert begun.returncode == 0, begun.stderr
    assert f"Relight is up: http://127.0.0.1:{port}" in begun.stdout
    assert "In a browser" in begun.stdout
    holder = find_holder(house.data_dir)
    assert holder is not None
    assert os.getsid(holder.pid) == holder.pid, "a terminal that is closed must not end it"
    assert Path(f"/proc/{holder.pid}/fd/0").readlink() == Path("/dev/null")
    log = house.data_dir / "logs" / "up.log"
    assert f"Relight is up: http://127.0.0.1:{port}" in log.read_text()
    assert "#login" not in log.read_text()
    assert "In a browser" not in log.read_text()

    ended = house.ops("down")

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("Stopped.\n")
    assert house.noted("end") == ["worker-1", "server", "db"]
    assert not alive(holder.pid)
    assert find_holder(house.data_dir) is None


@pytest.mark.slow
def test_a_second_one_in_the_background_is_content_with_the_first(house: House) -> None:
    with running(house) as first:
        again = up(house)
        elsewhere = up(house, "--port", str(free_port()))
        assert first.poll() is None

    assert again.returncode == 0, again.stderr
    assert f"pid {first.pid}" in again.stdout
    assert elsewhere.returncode == 4
    assert "`ops down` first" in elsewhere.stderr
    assert house.noted("start").count("db") == 1


def test_one_that_does_not_come_up_shows_the_end_of_its_log(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failed = up(house, "--port", str(port))

    assert failed.returncode == 1
    assert f"port {port} on 127.0.0.1 is busy" in failed.stderr
    assert "Relight is up" not in failed.stdout
    assert find_holder(house.data_dir) is None


@pytest.mark.slow
def test_ctrl_c_while_it_comes_up_takes_back_what_was_begun(house: House) -> None:
    environ = house.environ(MUTE="server")
    with subprocess.Popen(house.command("up", "-d"), env=environ, start_new_session=True) as starting:
        wait_until(lambda: "server" in house.noted("start"))
        starting.send_signal(signal.SIGINT)

    assert starting.returncode == 130
    assert house.noted("end") == ["worker-1", "server", "db"]
    assert find_holder(house.data_dir) is None


@pytest.mark.slow
def test_down_ends_one_in_the_foreground_too(house: House) -> None:
    with running(house) as first:
        ended = house.ops("down")
        first.communicate()

    assert (ended.returncode, first.returncode) == (0, 0)
    assert house.noted("end") == ["worker-1", "server", "db"]


@pytest.mark.slow
def test_down_now_does_not_wait_for_those_that_take_their_time(house: House) -> None:
    with running(house, PATIENT="worker-1") as first:
        ended = house.ops("down", "--now")
        first.communicate()

    assert ended.returncode == 0
    assert house.noted("end") == ["worker-1", "server", "db"]


def test_down_where_nothing_runs_says_so_whatever_a_killed_one_has_left(
    house: House, stranger: subprocess.Popen[bytes]
) -> None:
    assert house.ops("down").returncode == 0
    house.data_dir.mkdir()
    (house.data_dir / "lock").write_text(json.dumps({"pid": stranger.pid, "doing": "ops up"}))

    ended = house.ops("down")

    assert (ended.returncode, ended.stdout) == (0, f"Nothing runs on {house.data_dir}.\n")


def test_down_leaves_a_process_alone_that_does_not_hold_the_lock(
    house: House, stranger: subprocess.Popen[bytes]
) -> None:
    house.data_dir.mkdir()
    with (house.data_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        json.dump({"pid": stranger.pid, "doing": "ops up"}, lock)
        lock.flush()

        ended = house.ops("down")

    assert ended.returncode == 1
    assert "does not hold its lock" in ended.stdout + ended.stderr.replace("\n", "")


@pytest.mark.slow
def test_a_restore_is_not_ended_and_nothing_begins_beside_it(house: House, stranger: subprocess.Popen[bytes]) -> None:
    house.data_dir.mkdir()
    with (house.data_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        json.dump({"pid": stranger.pid, "doing": "ops restore"}, lock)
        lock.flush()

        refusals = [house.ops("down"), up(house)]

    assert [refused.returncode for refused in refusals] == [4, 4]
    assert all("`ops restore`" in refused.stderr for refused in refusals)


def test_nothing_begins_on_a_restore_that_did_not_finish(house: House) -> None:
    (house.data_dir / "storage").mkdir(parents=True)
    (house.data_dir / "storage" / RESTORING).touch()

    refused = house.ops("up")

    assert refused.returncode == 1
    assert "did not finish" in refused.stderr
    assert not house.journal()


def test_systemd_is_told_when_it_is_ready_and_how_long_the_end_may_take(house: House) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(60)
        systemd.bind(str(house.root / "notify"))
        with running(house, NOTIFY_SOCKET=str(house.root / "notify"), OPS_CANCEL_GRACE_S="100"):
            assert systemd.recv(4096) == b"READY=1"
            ended = house.ops("down")
            stopping = systemd.recv(4096).decode().splitlines()

    assert stopping[0] == "STOPPING=1"
    assert int(stopping[1].removeprefix("EXTEND_TIMEOUT_USEC=")) > 100e6
    assert "systemd starts it again at the next boot" in ended.stdout
