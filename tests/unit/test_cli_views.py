"""What `ops` shows of several operations: top, compare, watch, plot."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from rich.console import Console

from helpers.answers import operation
from helpers.cli import Api, Ops, api, ops, worker
from ops_cli import show, top
from ops_cli.canvas import Curve, draw
from ops_cli.exits import ExitCode
from ops_cli.plot import smoothed
from ops_cli.watch import Bar
from ops_contract.cleanup import CleanupItem
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Status
from ops_contract.operations import ProgressView
from relight.client import Client

__all__ = ["api", "ops"]  # fixtures

NAN = float("nan")


def shown(api: Api, width: int, height: int | None, away: str | None = None, typed: str = "") -> list[str]:
    """The lines of a screen of `ops top`."""
    with Client(api.url) as client:
        seen = top.look(client)
    screen = top.Screen("queue", "http://here")
    assert screen.key(typed)
    console = Console(width=width, file=StringIO())
    with console.capture() as captured:
        console.print(screen.render(seen, away, width, height))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_top_asks_three_times_and_shows_what_is_live(api: Api, ops: Ops) -> None:
    progress = ProgressView(percent=25, step=123_456, steps_total=500_000, loss=NAN, samples_per_s=5000.0, eta_s=3700)
    id = api.holds(operation(name="a-[bold]-name" * 5, progress=progress, started_at="2026-01-01T00:00:00Z"))
    api.holds(operation(status=Status.COMPLETED, name="over"))
    api.holds(*[operation(name=f"waits-{n}", status=Status.PENDING, priority=n) for n in (5,)])
    api.workers = [worker(name="w-1", runs=id), worker(name="gone", live=False)]

    ran = ops("top")

    assert ran.code == ExitCode.DONE
    assert len(api.asked) == 3
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("1 running, 1 pending, 1 of 1 slots taken")
    assert [line.split()[0] for line in lines if line.startswith("w-1")] == ["w-1"]
    [row] = [line for line in lines if line.startswith(str(id)[:8]) and "running" in line]
    assert "a-[bold]" in row
    assert row.split()[-5:] == ["25%", "123456", "nan", "5000/s", "1h01m"]
    assert "over" not in ran.out
    assert "gone" not in ran.out
    found = json.loads(ops("top", "--json").out)
    assert ([each["name"] for each in found["workers"]], len(found["operations"])) == (["w-1"], 2)
    assert ops("top", "--sort", "speeed").code == ExitCode.USAGE


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 10), (40, 12), (200, 60)])
def test_top_fits_its_screen_however_much_there_is(api: Api, width: int, height: int) -> None:
    for n in range(150):
        api.holds(operation(name=f"o{n}", status=Status.PENDING if n % 2 else Status.RUNNING))
    api.workers = [worker(name=f"w-{n}") for n in range(64)]

    lines = shown(api, width, height)

    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert "sorted by queue" in lines[-1]
    assert lines[-2].startswith("…"), "more operations"
    away = shown(api, width, height, away="No server answers at http://here.")
    assert (len(away), away[1].startswith("Server away")) == (height, True)


def test_top_sorts_by_keys_with_what_is_unknown_last(api: Api) -> None:
    for name, loss in (("b", 2.0), ("n", NAN), ("a", None), ("c", 1.0)):
        api.holds(operation(name=name, progress=ProgressView(step=1, loss=loss)))

    def names(typed: str) -> list[str]:
        return [line.split()[1] for line in shown(api, 80, 24, typed=typed) if re.match("[0-9a-f]{8} ", line)]

    assert names("s") == ["a", "b", "c", "n"]
    assert names("ssss") == ["c", "b", "n", "a"], "by loss"
    assert names("ssssr") == ["b", "c", "n", "a"]
    assert not top.Screen("queue", "").key("xq")


def job(**execution: Any) -> Job:
    return Job(kind=Kind.TRAINING, workload="digits", config={}, execution=Execution(**execution))


def test_compare_shows_what_differs_and_that_every_bit_is_equal(api: Api, ops: Ops) -> None:
    times = {"started_at": "2026-01-01T00:00:00Z", "ended_at": "2026-01-01T00:01:30Z", "status": Status.COMPLETED}
    one = api.holds(operation(name="one", job=job(seed=1, max_epochs=3), **times))
    other = api.holds(operation(name="other", job=job(seed=2, max_epochs=3), **times))
    api.curves = {"loss": [(0, 2.0), (1, 0.5), (2, NAN)], "val_accuracy": [(1, 0.75), (2, 0.5)]}
    api.replays = [None]

    ran = ops("compare", one, other)

    rows = {line[:18].strip(): line[18:].split() for line in ran.out.splitlines()}
    assert (ran.code, max(map(len, ran.out.splitlines())) <= 80) == (ExitCode.DONE, True)
    assert rows["execution.seed"] == ["1", "2"]
    assert "execution.max_epochs" not in ran.out
    assert rows["time"] == ["1m30s", "1m30s"]
    assert rows["energy"] == ["not", "measured"] * 2
    assert (rows["best val_accuracy"], rows["best loss"]) == (["0.75", "0.75"], ["0.5", "0.5"])
    assert "Curves equal bit for bit: yes, all 5 values" in ran.out
    found = json.loads(ops("compare", one, other, one, "--json").out)
    assert [each["energy_j"] for each in found["operations"]] == [None, None]
    assert found["operations"][0]["metrics"]["loss"] == {"last": "NaN", "best": 0.5, "goal": "min"}
    assert found["job"] == {"execution.seed": ["1", "2"]}
    assert found["curves"] == [{"id": str(other), "equal": True, "values": 5, "first_difference": None}]
    assert ops("compare", one, one).code == ExitCode.USAGE


def test_compare_says_where_curves_first_part(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (api.holds(operation(name=name)) for name in ("one", "other"))
    curves = {one: {"loss": [(0, 0.0), (1, 1.0)], "a": [(9, 1.0)]}, other: {"loss": [(0, -0.0), (1, 1.0)], "a": []}}
    monkeypatch.setattr(Client, "metric_names", lambda self, id: ["a", "loss"])
    monkeypatch.setattr(
        Client, "metrics", lambda self, id, name: type("Series", (), {"points": curves[UUID(str(id))][name]})
    )

    assert "no, at step 0 loss is 0.0 and -0.0" in ops("compare", one, other).out
    api.curves.clear()
    monkeypatch.setattr(Client, "metric_names", lambda self, id: [])
    nothing = ops("compare", one, other).out
    assert "no, neither run reported a metric" in nothing


def test_a_long_name_gives_way_to_ids_and_sizes_in_80_columns(
    api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    id, name = "11111111-0000-4000-8000-000000000000", "/".join(["a-name-that-never-ends"] * 9)
    facts = {"name": name, "status": "completed", "ended_at": "2026-01-01T00:00:00Z", "size_bytes": 2_000_000}
    monkeypatch.setattr(Client, "cleanup", lambda *_, **__: [CleanupItem(id=UUID(id), goes="all", **facts)])

    lines = ops("cleanup", "--older-than", "1s").out.splitlines()

    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["ID", "NAME", "STATUS", "ENDED", "GOES", "SIZE"]
    assert lines[1].split()[0] == "11111111"
    assert "…" in lines[1]


def test_a_list_of_none_says_how_to_make_one(api: Api, ops: Ops) -> None:
    assert "ops tokens create NAME" in ops("tokens", "list").out
    assert "ops webhooks add URL" in ops("webhooks", "list").out


def test_a_sentence_is_broken_between_words_on_a_terminal_and_whole_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sentence = "Warning: [bold] " + "word " * 30

    show.print_words(sentence)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show.print_words(sentence)

    whole, *broken = capsys.readouterr().out.splitlines()
    assert whole == sentence
    assert max(map(len, broken)) <= 80
    assert " ".join(" ".join(broken).split()) == sentence.strip()


def test_watch_follows_several_and_fails_when_one_does(api: Api, ops: Ops) -> None:
    going = operation(name="slow")
    slow = api.holds(going, going, going.model_copy(update={"status": Status.COMPLETED}))
    quick = api.holds(operation(name="quick", status=Status.COMPLETED))
    failed = api.holds(operation(name="bad", status=Status.FAILED))

    fine, bad = ops("watch", slow, quick), ops("watch", quick, failed)

    assert (fine.code, bad.code) == (ExitCode.DONE, ExitCode.FAILED)
    assert fine.out.index("slow completed") < fine.out.index("quick completed")
    assert "bad failed" in bad.out


def test_bars_say_that_the_server_is_away_but_for_what_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    bars, ended = Bar(), operation(name="over", status=Status.COMPLETED, ended_at="2026-01-01T00:00:00Z")
    bars.show(operation(name="a-[name]"))
    bars.show(ended)

    bars.away("No server answers.")
    bars.away("No server answers.")

    assert capsys.readouterr().out.count("No server answers. Waiting for it.") == 1
    assert [task.description.split("]")[-2] for task in bars._progress.tasks] == ["server away[/", "completed[/"]


def test_a_submit_that_is_watched_is_json_lines_too(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.cli.operation", lambda **given: operation(status=Status.FAILED, **given))

    ran = ops("train", "digits", "--watch", "--json")

    assert ran.code == ExitCode.FAILED
    assert [json.loads(line)["status"] for line in ran.out.splitlines()] == ["failed", "failed"]


def test_ctrl_c_leaves_without_a_traceback_whatever_it_waits_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = [Path(sys.executable).with_name("ops"), "list", "--url", url]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(100)
                waiting.send_signal(signal.SIGINT)
                out, err = waiting.communicate()

    assert (waiting.returncode, out, err) == (ExitCode.DETACHED, "", "")


def test_ctrl_c_is_quiet_while_it_is_still_importing(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}

    ran = subprocess.run([sys.executable, "-m", "ops_cli", "list"], env=environ, capture_output=True, text=True)

    assert (ran.returncode, ran.stdout, ran.stderr) == (ExitCode.DETACHED, "", "")


def drawn(curves: list[Curve], log: bool = False) -> list[str]:
    return [line.plain for line in draw(curves, 60, 10, log)]


def test_a_curve_in_the_terminal_has_scale_gaps_and_restarts() -> None:
    falling = [(step, 100.0 - step) for step in range(100)]
    lines = drawn([Curve("one", falling, restarts=[50]), Curve("two", [(0, 20.0), (99, NAN)])])

    assert [line.split()[0] for line in lines if "┤" in line] == ["100", "50.5", "1"]
    assert max(map(len, lines)) <= 60
    first = next(n for n, character in enumerate(lines[0]) if ord(character) > 0x2800)
    last = max(n for n, character in enumerate(lines[9]) if ord(character) > 0x2800)
    assert first < last, "it falls"
    assert lines[10].index("┴") == pytest.approx((len(lines[10]) + 5) / 2, abs=2)
    assert lines[11].split() == ["0", "step", "99"]
    assert lines[12:14] == ["── one", "── two"]


def test_a_logarithmic_curve_leaves_out_what_has_no_logarithm() -> None:
    lines = drawn([Curve("one", [(0, 1000.0), (1, 0.0), (2, -1.0), (3, 0.1)])], log=True)

    assert [line.split()[0] for line in lines if "┤" in line] == ["1000", "10", "0.1"]
    assert drawn([Curve("one", [(0, -1.0)])], log=True) == ["no value that can be drawn"]
    assert drawn([Curve("flat", [(5, 2.0)])])[0].split()[0] == "2.5"


def test_smoothing_is_unbiased_and_passes_over_nan() -> None:
    assert smoothed([(0, 4.0), (1, NAN), (2, 4.0)], 0.9) == [(0, pytest.approx(4.0)), (2, pytest.approx(4.0))]
    [_, (_, second)] = smoothed([(0, 0.0), (1, 3.0)], 0.5)
    assert second == pytest.approx(2.0)
    assert smoothed([(0, NAN)], 0) == [(0, pytest.approx(NAN, nan_ok=True))]


def test_plot_in_the_terminal_needs_nothing_installed(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    id = api.holds(operation(name="one"))
    api.curves = {"loss": [(n, 1.0 / (n + 1)) for n in range(200)]}
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    ran = ops("plot", id, "--log", "--smooth", "0.5")

    assert ran.code == ExitCode.DONE
    assert ran.out.splitlines()[0] == "loss"
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "┴ where a later attempt went on" in ran.out
