"""The main flow as somebody at a terminal of 80 columns sees it: real service, real pseudo-terminal."""

import os
import re
from pathlib import Path
from uuid import UUID

import pytest

from helpers.service import Service
from helpers.terminal import CTRL_C, Terminal
from ops_cli.exits import ExitCode

ALTERNATE_SCREEN, MAIN_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.fixture
def environ(service: Service) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return inherited | {"OPS_API_URL": service.url, "OPS_API_TOKEN": service.token}


def seen(environ: dict[str, str], *words: object) -> list[str]:
    """The lines of a command that ends by itself and is content."""
    with Terminal(environ, *words) as terminal:
        assert terminal.leave() == ExitCode.DONE, terminal.text
        return terminal.lines


def test_a_training_from_submit_to_curve(service: Service, environ: dict[str, str]) -> None:
    # ctrl-C detaches, and cancels nothing
    words = ("train", "digits", "--max-epochs", 4000, "--name", "a-[rather]-long-name-of-digits")
    with Terminal(environ, *words, "--watch") as watch:
        watch.until("is running, attempt 1", "loss ", "/s")
        watch.type(CTRL_C)
        assert watch.leave() == ExitCode.DETACHED
        [found] = re.findall(r"Submitted .*: ([0-9a-f-]{36})", watch.text)
        assert f"Detached; {found[:8]} goes on." in watch.text
    id = UUID(found)
    assert service.get(id).status == "running"

    # a row each, none wrapped, however long the name
    header, *rows = seen(environ, "list", "--limit", 5)
    assert header.split() == ["ID", "NAME", "STATUS", "DONE", "STEP", "LOSS", "AGE"]
    assert all(re.match(r"[0-9a-f]{8} ", row) for row in rows)
    assert rows[0].split()[:3:2] == [found[:8], "running"]
    assert "a-[rather]" in rows[0]
    facts = "\n".join(seen(environ, "status", found[:8]))
    assert "\nenergy     " in facts
    assert facts.endswith(f"Next: ops watch {found[:8]}")

    # a screen of its own, that goes by keys and by size
    with Terminal(environ, "top", exact=True) as top:
        top.until("1 running", "slots taken", found[:8], "sorted by queue", "1/1")
        top.type("s")
        top.until("sorted by name")
        top.resize(120, 10)
        top.until("WORKLOAD")
        assert len(top.lines) <= 10
        top.type("q")
        assert top.leave() == ExitCode.DONE
        assert top.raw.index(ALTERNATE_SCREEN) < top.raw.index(MAIN_SCREEN)

    assert f"{found[:8]} is stopping: it saves a checkpoint first" in seen(environ, "cancel", found)
    step = service.wait(id, "cancelled").progress.step  # type: ignore[union-attr]
    assert f"step {step} (cancel checkpoint" in seen(environ, "resume", found[:8])[0]
    service.until_step(id, step + 2)  # type: ignore[operator]
    service.client.cancel(id)
    service.wait(id, "cancelled")

    *_, last = [line for line in seen(environ, "events", found) if re.match(r"\d+ ", line)]
    assert last.endswith("attempt 2 has ended; cancelled")
    drawn = seen(environ, "plot", found[:8])
    assert drawn[0] == "loss"
    assert sum("┤" in line for line in drawn) == 3
    assert any(0x2800 < ord(character) < 0x2900 for character in drawn[10])
    assert "┴" in "".join(drawn), "where attempt 2 went on"


def test_a_token_is_made_used_and_revoked(service: Service, environ: dict[str, str]) -> None:
    told, token = seen(environ, "tokens", "create", "ana", "--scope", "read", "--expires", "30d")
    assert told.startswith("ana may read until ")
    try:
        hers = environ | {"OPS_API_TOKEN": token}
        seen(hers, "list")
        with Terminal(hers, "cancel", UUID(int=0)) as refused:
            assert refused.leave() == ExitCode.FAILED
            assert "it takes a token of scope operate, not read" in refused.text
        header, row = seen(environ, "tokens", "list")
        assert header.split() == ["ID", "NAME", "SCOPE", "MADE", "BY", "MADE", "LAST", "USED", "ENDS"]
        assert row.split()[1:4] == ["ana", "read", "operator"]
        assert " in 29d23h" in row
        assert "never" not in row
    finally:
        assert seen(environ, "tokens", "revoke", "ana") == ["Revoked ana"]
    with Terminal(hers, "list") as refused:
        assert refused.leave() == ExitCode.FAILED


@pytest.mark.slow
def test_output_is_followed_and_left(service: Service, environ: dict[str, str]) -> None:
    id = service.client.submit({"command": ["sh", "-c", "echo hello; sleep 1000"]}).id
    with Terminal(environ, "logs", "-f", id) as logs:
        logs.until("hello")
        logs.type(CTRL_C)
        assert logs.leave() == ExitCode.DETACHED
        assert f"Back: ops logs -f {str(id)[:8]}" in logs.text
    assert service.get(id).status == "running"

    with Terminal(environ, "watch", id) as watch:
        watch.until("is running")
        service.client.cancel(id, force=True)
        assert watch.leave() == ExitCode.FAILED
        assert watch.lines[-1] == f"Next: ops resume {str(id)[:8]}"


@pytest.mark.slow
def test_a_server_that_goes_away_is_said_and_waited_for(
    service: Service, environ: dict[str, str], tmp_path: Path
) -> None:
    id = service.submit(max_epochs=4000)
    service.until_step(id, 1)
    with Terminal(environ, "top", exact=True) as top, Terminal(environ, "watch", id) as watch:
        top.until(str(id)[:8])
        watch.until("loss ")
        service.server.kill()
        service.server.close()
        top.until("Server away")
        watch.until("server away", "Waiting for it.")
        service.restart_server()
        while "Server away" in top.text:
            top.until("slots taken")
            top._read(0)
        watch.until("running ")
        top.type(CTRL_C)
        assert top.leave() == ExitCode.DONE
        service.client.cancel(id)
        assert watch.leave() == ExitCode.FAILED
        assert "cancelled: " in watch.text
