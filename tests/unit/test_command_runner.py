"""The runner of commands as its agent has it: a real process, real pipes, real programs."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest

from helpers.processes import alive
from ops_contract.agents import StartTraining
from ops_contract.energy import Use
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Outcome
from ops_contract.pipe import STACKS_SIGNAL, FromTrainer, Hello, Mark, ProgressNow, RunJob, Stop, from_trainer, line
from ops_contract.reports import ArtifactSaved, Fault, Finish, Metrics, Note, Started
from ops_contract.wire import PIPE_VERSION

ATTACH = """
import json, os, sys
fd = int(os.environ["RELIGHT_FD"])
def say(**message): os.write(fd, json.dumps(message).encode() + b"\\n")
heard = os.fdopen(os.dup(fd), "rb")
"""


class Runner:
    """The agent's end of one runner, and the job that it gets."""

    def __init__(self, root: Path, **environ: str) -> None:
        self.root = root
        self.directory = root / "attempt"
        self.directory.mkdir()
        in_read, self.to_child = os.pipe()
        from_child, out_write = os.pipe()
        self.log = root / "output.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ops_worker.command", "--in-fd", str(in_read), "--out-fd", str(out_write)],
                pass_fds=(in_read, out_write),
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | environ,
                start_new_session=True,
            )
        os.close(in_read)
        os.close(out_write)
        self.messages = os.fdopen(from_child, "rb")
        self.seen: list[FromTrainer] = []
        self.operation_id = uuid4()

    def start(self, *command: str, environ: dict[str, str] | None = None, **setup: Any) -> "Runner":
        execution = setup.pop("execution", Execution())
        job = Job(kind=Kind.COMMAND, workload="command", config={}, execution=execution, command=command, **setup)
        order = StartTraining(
            incarnation=uuid4(), operation_id=self.operation_id, attempt=2, slots=[0], deadline_s=1, job=job
        )
        self.send(
            RunJob(
                start=order,
                storage_root=str(self.root / "storage"),
                directory=str(self.directory),
                environ=environ or {},
                device="cpu",
                cores=3,
            )
        )
        return self

    def python(self, code: str, **setup: Any) -> "Runner":
        return self.start("python", "-c", code, **setup)

    def send(self, message: RunJob | Stop) -> None:
        os.write(self.to_child, line(message))

    def stop(self, why: Literal["cancelled", "preempted"] = "cancelled") -> None:
        self.send(Stop(why=why))

    def receive(self) -> FromTrainer:
        text = self.messages.readline()
        assert text, self.log.read_bytes()
        self.seen.append(from_trainer.validate_json(text))
        return self.seen[-1]

    def until(self, kind: type[Any]) -> Any:
        while not isinstance(self.receive(), kind):
            pass
        return self.seen[-1]

    def until_printed(self, text: bytes) -> None:
        """What the program prints it reports as a metric too, so that nothing has to be waited for."""
        self.until(Metrics)
        assert text in self.log.read_bytes()

    def finish(self) -> Finish:
        finish = self.until(Finish)
        assert self.process.wait(30) == 0
        assert isinstance(finish, Finish)
        return finish

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.seen if isinstance(message, kind)]

    def points(self) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for message in self.of(Metrics):
            for series in message.series:
                found.setdefault(series.name, []).extend(zip(series.steps, series.floats(), strict=True))
        return found

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.messages.close()
        with suppress(OSError):
            os.close(self.to_child)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path)
    yield runner
    runner.close()


def gone(pid: int) -> bool:
    """Wait for the end of a process that is no child of ours, without looking at a clock."""
    while alive(pid):
        pass
    return True


# ---- how it runs


def test_a_program_finds_its_directory_environment_and_the_defaults_of_signals(runner: Runner) -> None:
    (runner.directory / "sub").mkdir()
    code = """
import os, signal, sys, json
print(json.dumps({"cwd": os.getcwd(), "python": sys.executable, "env": dict(os.environ), "group": os.getpgrp(),
    "ignored": [s.name for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1, signal.SIGABRT)
                if signal.getsignal(s) is signal.SIG_IGN and s is not signal.SIGPIPE]}))"""
    runner.python(code, workdir="sub", environ={"MINE": "1", "HF_TOKEN": "very secret"}, execution=Execution(threads=2))

    assert runner.finish() == Finish(outcome=Outcome.COMPLETED)

    said = json.loads(runner.log.read_text())
    assert said["cwd"] == str(runner.directory / "sub")
    assert Path(said["python"]).parent == Path(sys.executable).parent
    assert said["group"] == runner.process.pid
    assert said["ignored"] == []
    env = said["env"]
    assert (env["MINE"], env["HF_TOKEN"], env["OMP_NUM_THREADS"]) == ("1", "very secret", "2")
    assert (env["RELIGHT_OPERATION_ID"], env["RELIGHT_ATTEMPT"]) == (str(runner.operation_id), "2")
    output = runner.root / "storage" / str(runner.operation_id) / "output"
    assert env["RELIGHT_OUTPUT_DIR"] == str(output)
    assert output.is_dir()
    assert isinstance(runner.seen[0], Hello)
    started = runner.seen[1]
    assert isinstance(started, Started)
    assert started.exactness.promise == "best_effort"
    assert started.environment["env"] == ["HF_TOKEN", "MINE"]
    assert started.environment["cores"] == 3
    assert started.environment["packages"]["numpy"] == version("numpy")
    assert b"very secret" not in b"".join(line(message) for message in runner.seen)


@pytest.mark.slow
def test_signals_that_were_ignored_around_the_worker_are_not_for_its_programs(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        runner = Runner(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    runner.start("sh", "-c", "kill -HUP $$; exit 0")

    assert "SIGHUP" in runner.finish().error.message  # type: ignore[union-attr]
    runner.close()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("sh", "-c", "exit 3"), "exited with code 3"),
        (("sh", "-c", "kill -SEGV $$"), "killed by SIGSEGV"),
        (("sh", "-c", "kill -KILL $$"), "killed by SIGKILL"),
    ],
)
def test_how_a_program_failed_is_said_and_it_may_be_tried_again(
    runner: Runner, command: tuple[str, ...], says: str
) -> None:
    finish = runner.start(*command).finish()

    assert finish.outcome is Outcome.FAILED
    assert finish.error
    assert (finish.error.code, finish.permanent) == ("command_failed", False)
    assert says in finish.error.message


@pytest.mark.parametrize(
    ("command", "setup", "code"),
    [
        (("no-such-program",), {}, "program_not_found"),
        (("./no-such-script",), {}, "program_not_found"),
        (("./not-executable",), {}, "program_not_executable"),
        (("./no-interpreter",), {}, "program_not_executable"),
        (("true",), {"workdir": "nowhere"}, "workdir_missing"),
    ],
)
def test_what_cannot_be_started_is_one_clear_permanent_fault(
    runner: Runner, command: tuple[str, ...], setup: dict[str, str], code: str
) -> None:
    (runner.directory / "not-executable").write_text("#!/bin/sh\n")
    (runner.directory / "no-interpreter").write_text("echo hello\n")
    (runner.directory / "no-interpreter").chmod(0o755)

    finish = runner.start(*command, **setup).finish()

    assert finish.outcome is Outcome.FAILED
    assert finish.error
    assert (finish.error.code, finish.permanent) == (code, True)
    assert runner.of(Started) == []


# ---- how it ends


def test_a_stop_is_a_sigterm_that_a_program_can_catch_to_save_whatever_its_exit_code(runner: Runner) -> None:
    code = """
import os, signal, sys, time
def save(*_):
    open("saved", "w").write("weights")
    sys.exit(5)
signal.signal(signal.SIGTERM, save)
print('{"step": 1, "loss": 2}')
while True: time.sleep(0.01)"""
    runner.python(code, artifacts=["saved"])
    runner.until_printed(b"loss")

    runner.stop()

    assert runner.finish() == Finish(outcome=Outcome.CANCELLED)
    (saved,) = runner.of(ArtifactSaved)
    assert (runner.root / "storage" / saved.path).read_text() == "weights"


def test_a_stop_waits_for_the_child_of_a_script_to_save_though_the_script_is_gone(runner: Runner) -> None:
    code = """
import signal, sys, time, os
def save(*_):
    time.sleep(0.5)  # to save takes its time
    open("saved", "w").write("weights")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print('{"step": 1, "loss": 2}')
while True: time.sleep(0.01)"""
    (runner.directory / "train.py").write_text(code)
    runner.start("sh", "-c", "python train.py; true", artifacts=["saved"])
    runner.until_printed(b"loss")

    runner.stop("preempted")

    assert runner.finish() == Finish(outcome=Outcome.PREEMPTED)
    assert [saved.name for saved in runner.of(ArtifactSaved)] == ["files/saved"]


@pytest.mark.parametrize(
    "at_sigterm",
    ["signal.SIG_DFL", "lambda *_: sys.exit(0)", "lambda *_: sys.exit(3)"],
    ids=["dies", "leaves", "fails"],
)
def test_what_a_scheduler_ends_by_a_sigterm_to_every_process_is_preempted_when_its_agent_says_so(
    runner: Runner, at_sigterm: str
) -> None:
    runner.python(f"""
import signal, sys
signal.signal(signal.SIGTERM, {at_sigterm})
print('{{"step": 1, "loss": 2}}', flush=True)
while True: signal.pause()""")
    runner.until_printed(b"loss")

    os.killpg(runner.process.pid, signal.SIGTERM)
    assert gone(runner.of(Started)[0].trainer_pid)
    runner.stop("preempted")

    assert runner.finish() == Finish(outcome=Outcome.PREEMPTED)


def test_one_that_saves_at_such_a_sigterm_gets_no_second_one(runner: Runner) -> None:
    code = """
import os, signal, sys, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print('{"step": 2, "saves": 1}', flush=True)
    time.sleep(1)  # to save takes its time
    open("saved", "w").write("weights")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print('{"step": 1, "loss": 2}', flush=True)
while True: signal.pause()"""
    runner.python(code, artifacts=["saved"])
    runner.until_printed(b"loss")

    os.killpg(runner.process.pid, signal.SIGTERM)
    while "saves" not in runner.points():
        runner.receive()
    runner.stop("preempted")

    assert runner.finish() == Finish(outcome=Outcome.PREEMPTED)
    assert [saved.name for saved in runner.of(ArtifactSaved)] == ["files/saved"]


def test_its_death_by_a_sigterm_may_be_seen_before_the_runner_has_got_its_own(runner: Runner) -> None:
    runner.start("sh", "-c", "kill -TERM $$")
    assert gone(runner.until(Started).trainer_pid)
    while len(runner.of(Mark)) < 4:  # more than there are until it is gone
        runner.receive()

    runner.stop("preempted")

    assert runner.finish() == Finish(outcome=Outcome.PREEMPTED)


def test_a_sigterm_of_its_own_is_a_failure(runner: Runner) -> None:
    finish = runner.start("sh", "-c", "kill -TERM $$").finish()

    assert finish.error
    assert "killed by SIGTERM" in finish.error.message


def test_a_stop_before_the_job_starts_nothing(runner: Runner) -> None:
    runner.stop()
    runner.python("open('ran', 'w')")

    assert runner.finish() == Finish(outcome=Outcome.CANCELLED)
    assert not (runner.directory / "ran").exists()


def test_the_end_of_the_agent_is_that_of_the_program_and_of_its_children(runner: Runner) -> None:
    code = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
print('{"step": 1, "pid": %d}' % child.pid)
signal.pause()"""
    runner.python(code)
    runner.until(Metrics)
    grandchild = int(runner.points()["pid"][0][1])

    os.close(runner.to_child)

    assert runner.process.wait(30) == -signal.SIGKILL
    assert gone(runner.of(Started)[0].trainer_pid)
    assert gone(grandchild)


def test_the_end_of_the_runner_is_that_of_the_program(runner: Runner) -> None:
    runner.start("sleep", "1000")
    started = runner.until(Started)

    runner.process.kill()

    assert gone(started.trainer_pid)


def test_a_program_ends_though_something_that_it_left_behind_keeps_its_output_open(runner: Runner) -> None:
    runner.start("sh", "-c", "sleep 1000 & echo bye")

    assert runner.finish() == Finish(outcome=Outcome.COMPLETED)
    assert runner.log.read_text() == "bye\n"


@pytest.mark.slow
def test_a_hung_python_program_shows_its_stacks(runner: Runner) -> None:
    runner.python("""
def stuck_here():
    print('{"step": 1, "loss": 2}')
    while True: pass
stuck_here()""")
    runner.until(Metrics)

    os.kill(runner.process.pid, STACKS_SIGNAL)

    assert "SIGABRT" in runner.finish().error.message  # type: ignore[union-attr]
    assert "in stuck_here" in runner.log.read_text()


# ---- what it says


def test_json_lines_are_metrics_and_whatever_else_it_prints_is_only_in_the_log(runner: Runner) -> None:
    lines = [
        '{"step": 1, "loss": 0.5, "note": "text", "ok": true}',
        '  {"step": 2, "loss": NaN, "lr": 1}',
        '{"step": 3, "loss": -Infinity}',
        '{"step": "4", "loss": 1}',
        '{"step": 4.0, "loss": 1}',
        '{"step": true, "loss": 1}',
        '{"step": -1, "loss": 1}',
        '{"loss": 1}',
        '{"step": 5, "loss"',
        "[" * 60_000,
        '{"a":' * 10_000,
        '{"step": 6, "huge": 1' + "0" * 400 + "}",
        '{"step": 6, "": 1, "with\\u0000nul": 1}',
        '{"step": 99999999999999999999, "loss": 1}',
        '{"step": 7, "loss": 7, "pad": "' + "x" * 70_000 + '"}',
    ]
    text = "\n".join(lines)
    (runner.directory / "text").write_text(text)
    runner.start("cat", "text")

    assert runner.finish() == Finish(outcome=Outcome.COMPLETED)

    points = runner.points()
    assert set(points) == {"loss", "lr"}
    (first, second, third) = points["loss"]
    assert (first, third) == ((1, 0.5), (3, -math.inf))
    assert second[0] == 2
    assert math.isnan(second[1])
    assert runner.log.read_text() == text


def test_a_step_that_goes_back_is_dropped_with_one_note_and_many_values_make_few_reports(runner: Runner) -> None:
    runner.python("""
for step in [*range(1000), 10, 11, 1000]:
    print('{"step": %d, "loss": %d}' % (step, step))""")

    runner.finish()

    assert runner.points()["loss"] == [(step, float(step)) for step in range(1001)]
    assert len(runner.of(Metrics)) < 20
    (note,) = runner.of(Note)
    assert "'loss' at step 10 came after step 999" in note.message
    last = runner.of(ProgressNow)[-1].progress
    assert (last.step, last.loss, last.epoch) == (1000, 1000.0, None)


@pytest.mark.parametrize(("says", "step"), [("", 1), ('{"step": 4, "loss": 1}', 5)])
def test_what_a_command_does_is_marked_as_training_of_the_step_in_flight(runner: Runner, says: str, step: int) -> None:
    runner.python(f"print({says!r})")

    runner.finish()

    first, *others = runner.of(Mark)
    assert (first.use, first.then, first.step) == (Use.STARTUP, Use.TRAIN, 0)
    assert {mark.use for mark in others} == {Use.TRAIN}
    assert others[-1].step == step


def test_a_later_attempt_begins_where_its_first_report_says(runner: Runner) -> None:
    runner.python('print(\'{"step": 40, "loss": 1}\', \'{"step": 41, "loss": 1}\', sep=\'\\n\')')

    assert runner.finish().outcome == Outcome.COMPLETED

    assert [each.start_step for each in runner.of(Started)] == [0, 40]
    after = runner.seen[runner.seen.index(runner.of(Started)[1]) + 1 :][:2]
    assert [type(each) for each in after] == [ProgressNow, Metrics], "progress goes on with what comes after it"


def test_why_a_run_cannot_go_on_is_the_word_of_its_command_if_that_then_fails(runner: Runner) -> None:
    word = Finish(outcome=Outcome.CHECKPOINT_CORRUPT, error=Fault(code="checkpoint_corrupt", message="torn"))
    said = f"import os; os.write(int(os.environ['RELIGHT_FD']), {line(word)!r})"

    assert runner.python(f"{said}; raise SystemExit(1)").finish() == word


def test_a_command_that_minds_no_failed_run_is_completed(runner: Runner) -> None:
    word = Finish(outcome=Outcome.CHECKPOINT_CORRUPT, error=Fault(code="checkpoint_corrupt", message="torn"))
    said = f"import os; os.write(int(os.environ['RELIGHT_FD']), {line(word)!r})"

    assert runner.python(said).finish().outcome == Outcome.COMPLETED


def test_a_hundred_megabytes_of_output_pass_whole(runner: Runner) -> None:
    runner.start("sh", "-c", "head -c 60000000 /dev/zero; echo; head -c 40000000 /dev/zero; exit 3")

    assert "code 3" in runner.finish().error.message  # type: ignore[union-attr]
    assert runner.log.stat().st_size == 100_000_001


def test_relight_report_takes_numbers_and_tensors_from_any_thread_and_survives_the_service(runner: Runner) -> None:
    code = """
import os, threading, relight
class Tensor:
    def __float__(self): return 0.25
def work(name):
    for step in range(50): relight.report(step, **{name: step / 2})
threads = [threading.Thread(target=work, args=(f"m{i}",)) for i in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
relight.report(7, loss=Tensor(), count=3, bad=float("nan"))
for wrong in [dict(step=1.5, loss=1), dict(step=1, loss="much"), dict(step=-1, loss=1)]:
    try: relight.report(**wrong)
    except (TypeError, ValueError): pass
    else: raise SystemExit("not refused")
import sys; assert "torch" not in sys.modules
os.close(int(os.environ["RELIGHT_FD"]))  # as torchrun does
relight.report(8, loss=1)
del os.environ["RELIGHT_FD"]
relight.report(9, loss=1)"""
    runner.python(code)

    assert runner.finish() == Finish(outcome=Outcome.COMPLETED), runner.log.read_text()

    points = runner.points()
    assert all(points[f"m{i}"] == [(step, step / 2) for step in range(50)] for i in range(4))
    assert points["loss"] == [(7, 0.25), (8, 1.0)]
    assert points["count"] == [(7, 3.0)]
    assert math.isnan(points["bad"][0][1])


# ---- relight.Run in it


def test_a_run_that_attaches_gets_the_job_and_a_stop_as_a_message_and_its_reports_keep_their_order(
    runner: Runner,
) -> None:
    code = (
        ATTACH
        + """
import signal
signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
say(kind="hello", version=int(sys.argv[1]), pid=os.getpid())
job = json.loads(heard.readline())
assert job["kind"] == "job" and job["directory"] == os.getcwd() and job["environ"] == {}
say(kind="started", trainer_pid=os.getpid(), start_step=4, exactness={"promise": "promised"}, environment={})
print('{"step": 4, "loss": 1}', flush=True)
from ops_contract.pipe import line
from ops_contract.reports import Metrics, Note, Series
os.write(fd, line(Metrics(series=[Series.of("loss", [(5, 2.0)])])) + line(Note(message="saved")))
stop = json.loads(heard.readline())
assert stop == {"kind": "stop", "why": "cancelled"}, stop
"""
    )
    runner.start("python", "-c", code, str(PIPE_VERSION), environ={"A": "B"})
    runner.until(Note)

    runner.stop()

    assert runner.finish() == Finish(outcome=Outcome.CANCELLED), runner.log.read_text()
    first, second = runner.of(Started)
    assert (first.exactness.promise, second.exactness.promise) == ("best_effort", "promised")
    before_the_note = runner.seen[: [isinstance(message, Note) for message in runner.seen].index(True)]
    reported = [s for message in before_the_note if isinstance(message, Metrics) for s in message.series]
    assert 5 in [step for series in reported for step in series.steps]
    assert runner.of(ProgressNow) == []  # Run says it, and more of it
    assert "Traceback" not in runner.log.read_text()


def test_garbage_on_its_descriptor_is_noted_once_and_ignored(runner: Runner) -> None:
    code = (
        ATTACH
        + """
os.write(fd, b"\\xff\\x00 rubbish\\n" * 100)
say(kind="finish", outcome="completed")
say(kind="job")
say(kind="note", message="a good one")
say(kind="hello", version=1, pid=1)
assert heard.read() == b""  # another version gets no answer
sys.exit(4)"""
    )
    runner.python(code)

    finish = runner.finish()

    assert "code 4" in finish.error.message, runner.log.read_text()  # type: ignore[union-attr]
    garbage, good = (note.message for note in runner.of(Note))
    assert "no message of ours" in garbage
    assert good == "a good one"


# ---- artifacts


def test_files_that_match_are_kept_with_their_directories_also_of_a_failure_and_no_link_leads_out(
    runner: Runner, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    code = f"""
import os
os.makedirs("out/deep/er"); open("out/a.bin", "wb").write(bytes(3_000_000)); open("out/deep/er/b.txt", "w").write("b")
open("notes.md", "w").write("n"); open("other.txt", "w"); os.symlink("notes.md", "link.md"); os.mkfifo("out/fifo")
os.symlink({str(tmp_path / "outside")!r}, "out/leak"); os.symlink({str(tmp_path / "outside" / "secret")!r}, "leak.md")
open("out/" + "x" * 150, "w"); open("out/new\\nline", "w")
raise SystemExit(3)"""
    runner.python(code, artifacts=["out", "**/b.txt", "*.md", "nothing*", "**.bad"])

    finish = runner.finish()

    assert finish.error
    assert finish.error.code == "command_failed"
    saved = {artifact.name: artifact for artifact in runner.of(ArtifactSaved)}
    assert set(saved) == {"files/out/a.bin", "files/out/deep/er/b.txt", "files/notes.md", "files/link.md"}
    assert saved["files/notes.md"].path == f"{runner.operation_id}/2-0-files/notes.md"
    assert (runner.root / "storage" / saved["files/out/a.bin"].path).stat().st_size == 3_000_000
    notes = "\n".join(note.message for note in runner.of(Note))
    assert "'nothing*'" in notes
    assert "'**.bad'" in notes
    assert "3 files are not kept" in notes


@pytest.mark.slow
def test_artifacts_that_cannot_be_written_fail_a_command_that_had_completed(runner: Runner) -> None:
    storage = runner.root / "storage" / str(runner.operation_id)
    storage.mkdir(parents=True)
    (storage / "2-0-files").mkdir()
    (storage / "2-0-files" / "in the way").touch()

    finish = runner.python("open('a', 'w')", artifacts=["a"]).finish()

    assert finish.outcome is Outcome.FAILED
    assert finish.error
    assert finish.error.code == "artifacts_not_kept"
    assert runner.of(ArtifactSaved) == []
