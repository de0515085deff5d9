"""`ops up` as a real process over stand-ins for its children: order, restarts, and what is left behind."""

import json
import os
import signal
import socket
import stat
from pathlib import Path

import pytest

from helpers.house import House, make_house, running, wait_until
from ops_cli.child import Child, rotate
from ops_cli.comparison import first_difference


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path)


def test_up_starts_the_server_after_the_database_and_ends_workers_server_and_database(house: House) -> None:
    with running(house, "--workers", "2") as up:
        started = house.noted("start")
        up.terminate()
        up.communicate()

    # The workers wait for nothing: they try to register until the server answers.
    assert sorted(started) == ["db", "server", "worker-1", "worker-2"]
    assert started.index("db") < started.index("server")
    assert sorted(house.noted("end")[:2]) == ["worker-1", "worker-2"]
    assert house.noted("end")[2:] == ["server", "db"]
    assert up.returncode == 0


def test_the_state_for_clients_is_private_and_goes_with_up(house: House) -> None:
    state = house.root / ".local/state/relight/up.json"

    with running(house):
        told = json.loads(state.read_text())
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        assert told["token"] == (house.data_dir / "token").read_text()
        assert stat.S_IMODE((house.data_dir / "token").stat().st_mode) == 0o600

    assert not state.exists()


def test_a_second_up_on_the_directory_says_who_is_there(house: House) -> None:
    with running(house) as first, house.start() as second:
        _, err = second.communicate()

    assert second.returncode == 4
    assert f"pid {first.pid}" in err
    assert house.noted("start").count("db") == 1


def test_a_killed_up_leaves_no_child_and_nothing_in_the_way_of_the_next(house: House) -> None:
    with running(house) as up:
        up.kill()
        wait_until(lambda: sorted(house.noted("end")) == ["db", "server", "worker-1"])

    with running(house):
        assert house.noted("start").count("worker-1") == 2


def test_a_worker_that_dies_is_started_again(house: House) -> None:
    with running(house) as up:
        [first] = [pid for _, name, pid in house.journal() if name == "worker-1"]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: house.noted("start").count("worker-1") == 2)
        up.terminate()
        _, err = up.communicate()

    assert "worker-1 was ended by SIGKILL" in err


def test_a_child_that_keeps_ending_ends_up_with_its_last_words(house: House) -> None:
    with house.start(BROKEN="server") as up:
        out, err = up.communicate()

    assert up.returncode == 1
    assert "server has no disk" in err
    assert "Relight is up" not in out
    assert house.noted("end") == ["worker-1", "db"]


def test_a_wanted_port_that_is_busy_is_named(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with house.start("--port", str(port)) as up:
            _, err = up.communicate()

    assert up.returncode == 1
    assert f"port {port}" in err
    assert not house.journal()


def test_logs_are_rotated_and_bounded_in_number(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    for start in range(6):
        rotate(log)
        log.write_text(str(start))

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "server.log": "5",
        "server.log.1": "4",
        "server.log.2": "3",
        "server.log.3": "2",
    }


def test_a_child_that_says_much_is_drained(tmp_path: Path) -> None:
    (tmp_path / "talker.py").write_text("print('{\"event\": \"ready\"}')\nprint('x' * 10_000_000, flush=True)\n")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    child = Child("talker", ["talker"], lambda: environ, tmp_path / "talker.log")

    child.start()
    wait_until(lambda: not child.running)
    child.close()

    assert child.ending == "ended with code 0"
    assert child.ready == {"event": "ready"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"loss": [(0, 1.0), (1, float("nan"))]}, None),
        ({"loss": [(0, 1.0), (1, 2.0)]}, "step 1"),
        ({"loss": [(0, 1.0)]}, "step 1 loss is nan and missing"),
        ({"loss": [(0, 1.0), (1, float("nan"))], "val_loss": [(1, 1.0)]}, "val_loss"),
        ({"loss": [(0, 1.0000000000000002), (1, float("nan"))]}, "step 0"),
    ],
)
def test_curves_are_equal_when_every_bit_is(other: dict[str, list[tuple[int, float]]], said: str | None) -> None:
    found = first_difference({"loss": [(0, 1.0), (1, float("nan"))]}, other)

    assert (found is None) == (said is None)
    assert said is None or said in str(found)
