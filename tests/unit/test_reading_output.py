"""Reading output: by the clients against scripted answers, and by `ops logs` as it is typed against a small API."""

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from ops_cli.exits import ExitCode
from ops_cli.logs import Screen
from ops_cli.main import main
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.wire import API_PREFIX, LOG_COMPLETE, LOG_END, LOG_OFFSET
from relight import AsyncClient
from relight.client import Client
from relight.transport import TRIES, Unreachable

ID = UUID("12345678-0000-0000-0000-000000000000")
AWAY = OpsError(ErrorCode.UNAVAILABLE, "the database is away")


@dataclass
class Printing:
    """An operation's output as a server has it. `turn` is called before each answer."""

    pieces: dict[int, bytes] = field(default_factory=dict)  # by the offset at which each begins
    ended: bool = False
    away: int = 0
    asked: list[int] = field(default_factory=list)
    turn: Callable[["Printing"], None] = lambda printing: None

    @property
    def end(self) -> int:
        return max((start + len(data) for start, data in self.pieces.items()), default=0)

    def part(self, offset: int) -> tuple[int, bytes]:
        start = min(self.end, offset if offset >= 0 else max(0, self.end + offset))
        for begins, data in sorted(self.pieces.items()):
            if begins + len(data) > start:
                return max(start, begins), data[max(0, start - begins) :]
        return start, b""

    def answer(self, offset: int) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(offset)
        self.turn(self)
        if self.away:
            self.away -= 1
            return 503, {"Retry-After": "0"}, AWAY.body().model_dump_json().encode()
        start, data = self.part(offset)
        complete = self.ended and start + len(data) == self.end
        headers = {LOG_OFFSET: str(start), LOG_END: str(self.end), LOG_COMPLETE: str(complete).lower()}
        return 200, headers, data

    def over_http(self, request: httpx.Request) -> httpx.Response:
        status, headers, data = self.answer(int(request.url.params["offset"]))
        return httpx.Response(status, headers=headers, content=data)

    def client(self) -> Client:
        transport = httpx.MockTransport(self.over_http)
        return Client("http://127.0.0.1:1", "t", transport=transport, sleep=lambda duration_s: None)


def grows(*steps: Callable[[Printing], None]) -> Callable[[Printing], None]:
    """One of them at each request."""
    left = list(steps)

    def turn(printing: Printing) -> None:
        if left:
            left.pop(0)(printing)

    return turn


def prints(data: bytes, skipped: int = 0) -> Callable[[Printing], None]:
    return lambda printing: printing.pieces.update({printing.end + skipped: data})


def ends(printing: Printing) -> None:
    printing.ended = True


def goes_away(printing: Printing) -> None:
    printing.away = TRIES


# ---- the client


def test_what_there_is_is_read_to_its_end_and_a_line_says_what_was_left_out() -> None:
    printing = Printing({0: b"one\n", 1004: b"no newline", 2000: b"\x00\xff"})

    with printing.client() as client:
        got = b"".join(client.logs(ID))

    gaps = ["[… 1,000 bytes left out …]\n".encode(), "\n[… 986 bytes left out …]\n".encode()]
    assert got == b"one\n" + gaps[0] + b"no newline" + gaps[1] + b"\x00\xff"


def test_from_the_end_nothing_counts_as_left_out() -> None:
    with Printing({0: b"one\n", 1004: b"two\n"}).client() as client:
        assert b"".join(client.logs(ID, offset=-3)) == b"wo\n"


def follows() -> Printing:
    return Printing(turn=grows(prints(b"one\n"), lambda _: None, goes_away, prints(b"two\n", 10), ends))


def test_following_waits_for_what_comes_and_outlives_an_absent_server() -> None:
    printing, told = follows(), []

    with printing.client() as client:
        got = b"".join(client.logs(ID, follow=True, away=told.append))

    assert got == "one\n[… 10 bytes left out …]\ntwo\n".encode()
    assert told == ["the database is away"]


def test_following_loses_its_patience() -> None:
    with Printing(away=10**9).client() as client, pytest.raises(Unreachable):
        list(client.logs(ID, follow=True, patience_s=3.0))


def test_without_following_an_absent_server_is_said_at_once() -> None:
    printing = Printing(away=10**9)
    with printing.client() as client, pytest.raises(Unreachable):
        list(client.logs(ID))
    assert len(printing.asked) == TRIES


async def test_the_asynchronous_client_follows_too() -> None:
    printing = follows()
    transport = httpx.MockTransport(printing.over_http)

    async with AsyncClient("http://127.0.0.1:1", "t", transport=transport, sleep=lambda duration_s: None) as client:
        got = [piece async for piece in client.logs(ID, follow=True, poll_s=0.0)]

    assert b"".join(got) == "one\n[… 10 bytes left out …]\ntwo\n".encode()


# ---- the command


@pytest.fixture
def printing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Printing]:
    printing, app = Printing(), FastAPI()

    @app.get(f"{API_PREFIX}/operations/{{id}}/logs")
    async def logs(id: UUID, offset: int = 0) -> Response:
        if id != ID:
            return JSONResponse(OpsError(ErrorCode.NOT_FOUND, "no such operation").body().model_dump(mode="json"), 404)
        status, headers, data = printing.answer(offset)
        return Response(data, status, headers)

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the API did not start"
    monkeypatch.setenv("OPS_API_URL", f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    monkeypatch.setattr("ops_cli.logs.POLL_S", 0.001)
    yield printing
    server.should_exit = True
    thread.join()


def ops(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ops", "logs", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code if isinstance(left.value.code, int) else 0


def process(*arguments: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", "from ops_cli.main import main; main()", "logs", str(ID), *arguments]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        ("0", b""),
        ("1", b"five"),
        ("2", b"\xfffour\nfive"),
        ("3", b"three\n\xfffour\nfive"),
        ("99", b"three\n\xfffour\nfive"),
    ],
)
def test_the_last_lines_are_shown_as_they_are(
    printing: Printing,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    lines: str,
    shown: bytes,
) -> None:
    printing.pieces = {0: b"one\ntwo\n", 900: b"three\n\xfffour\nfive"}

    assert ops(monkeypatch, str(ID), "--tail", lines) == ExitCode.DONE

    assert capfdbinary.readouterr().out == shown
    printing.pieces[900] += b"\n"
    assert ops(monkeypatch, str(ID), "--tail", lines) == ExitCode.DONE
    assert capfdbinary.readouterr().out == (shown and shown + b"\n")


def test_following_outlives_a_restart_and_ends_with_the_operation(
    printing: Printing, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    printing.turn = grows(prints(b"one\n"), goes_away, prints(b"two\n", 5), ends)

    assert ops(monkeypatch, str(ID), "-f") == ExitCode.DONE

    ran = capfdbinary.readouterr()
    assert ran.out == "one\n[… 5 bytes left out …]\ntwo\n".encode()
    assert ran.err.count(b"Waiting for it.") == 1


def test_an_unknown_operation_has_its_exit_code(printing: Printing, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops(monkeypatch, str(uuid4()), "-f") == ExitCode.NOT_FOUND


def test_ctrl_c_detaches_and_says_how_to_come_back(printing: Printing) -> None:
    printing.pieces = {0: b"running\n"}

    with process("-f") as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"running\n"
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate()

    assert follower.returncode == ExitCode.DETACHED
    assert b"ops logs -f 12345678" in err


def test_a_closed_pipe_ends_it_quietly(printing: Printing) -> None:
    printing.pieces = {0: b"a line\n"}
    printing.turn = lambda printing: prints(b"x" * 100_000)(printing)

    with process("-f") as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"a line\n"
        follower.stdout.close()
        follower.stdout = None
        _, err = follower.communicate()

    assert err == b""


def test_a_terminal_gets_colours_but_nothing_that_could_move_its_cursor(printing: Printing) -> None:
    printing.pieces = {0: b"\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J\x9b ok\n"}
    ours, theirs = pty.openpty()

    with process(stdout=theirs) as shown:
        os.close(theirs)
        assert shown.wait() == 0
    got = os.read(ours, 1000)
    os.close(ours)

    assert got.decode() == "\x1b[31mred\x1b[0m �]0;title� �[2J� ok\r\n\x1b[0m"


def test_what_is_split_between_two_pieces_is_judged_as_a_whole() -> None:
    screen = Screen()
    pieces = ["ü".encode()[:1], "ü".encode()[1:] + b"\x1b", b"[3", b"1mred", b"\x1b[", b"2J"]

    assert b"".join(map(screen.harmless, pieces)).replace(b"\x1b[0m", b"").decode() == "ü\x1b[31mred�[2J"
