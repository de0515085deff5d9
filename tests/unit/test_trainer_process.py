"""The trainer as its agent has it: a real child, real pipes."""

import errno
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from training_child import Operation

from ops_contract.jobs import Accelerator, CheckpointEvery, Execution
from ops_contract.lifecycle import CheckpointType, Outcome
from ops_contract.pipe import Alive, FromTrainer, Hello, ProgressNow, RunJob, Stop, from_trainer, line
from ops_contract.reports import ArtifactSaved, CheckpointSaved, Finish, Metrics, Note, Started
from ops_contract.wire import Wire
from ops_worker.__main__ import TRAINER
from ops_worker.trainer import _fell_back, run
from relight.pipe import AgentPipe

STRANGE = '''
import os, sys
import torch
from torch import nn
from pydantic import BaseModel
from relight import LoopWorkload, Workload

class Base(Workload):
    """Does strange things.

    More about them."""
    Config = type("Config", (BaseModel,), {})
    reports = {}
    def data(self): return [torch.ones(2)] * 8, None
    def model(self): return nn.Linear(2, 1)
    def loss(self, model, batch): return model(batch).mean(), {}

class Raises(Base):
    def loss(self, model, batch): raise LookupError("no such \\x00 thing \\udc80")

class Exits(Base):
    def loss(self, model, batch): sys.exit("enough")

class Prints(Base):
    """Prints a lot"""
    def loss(self, model, batch):
        print("x" * 1_000_000)
        os.write(1, b"{}")
        return super().loss(model, batch)

class Loads(Base):
    def loss(self, model, batch):
        if torch.utils.data.get_worker_info() is None:
            open(os.environ["LOADERS"], "a").write(
                " ".join(open(f"/proc/self/task/{os.getpid()}/children").read().split()) + "\\n")
        return super().loss(model, batch)

class Writes(Base):
    def loss(self, model, batch):
        os.makedirs("out", exist_ok=True)
        open("out/notes.txt", "w").write("from the training")
        raise LookupError("after it has written")
class Loops(LoopWorkload):
    """Counts until it is stopped; once resumed, five further."""
    Config = Base.Config
    def run(self, ctl):
        restored = ctl.restored()
        step = int((restored / "step").read_text()) if restored else 0
        last = step + 5 if restored else 10**9
        while step < last:
            ctl.report(step, loss=1.0)
            step += 1
            if ctl.should_stop():
                ctl.save(step, lambda directory: (directory / "step").write_text(str(step)))
                return

print("imported")
'''
ENTRIES = {
    "raises": "strange:Raises",
    "exits": "strange:Exits",
    "prints": "strange:Prints",
    "loads": "strange:Loads",
    "writes": "strange:Writes",
    "loops": "strange:Loops",
    "absent": "strange:Absent",
    "no-class": "os:getpid",
    "broken": "strange_broken:X",
}


class Trainer:
    """The agent's end of one trainer process."""

    def __init__(self, root: Path, environment: dict[str, str] | None = None, python: str = sys.executable) -> None:
        self.root = root
        self.directory = root
        self.output_path = root / f"output-{uuid4()}"
        in_read, self.to_child = os.pipe()
        self.from_child, out_write = os.pipe()
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [python, "-m", "ops_worker.trainer", "--in-fd", str(in_read), "--out-fd", str(out_write)],
                pass_fds=(in_read, out_write),
                stdout=output,
                stderr=subprocess.PIPE,
                env=os.environ | (environment or {}),
                start_new_session=True,
            )
        os.close(in_read)
        os.close(out_write)
        self.lines = os.fdopen(self.from_child, "rb")

    def send(self, message: RunJob | Stop) -> None:
        os.write(self.to_child, line(message))

    def run(self, operation: Operation) -> None:
        self.send(
            RunJob(
                start=operation.start(),
                storage_root=str(self.root),
                directory=str(self.directory),
                device="cpu",
                cores=1,
            )
        )

    def receive(self) -> FromTrainer:
        return from_trainer.validate_json(self.lines.readline())

    def until(self, wanted: Callable[[FromTrainer], bool]) -> list[FromTrainer]:
        messages = [self.receive()]
        while not wanted(messages[-1]):
            messages.append(self.receive())
        return messages

    def finish(self) -> Finish:
        """Its last message; nothing follows it, and it exits with 0."""
        last = self.until(lambda message: isinstance(message, Finish))[-1]
        assert isinstance(last, Finish)
        assert self.lines.read() == b""
        assert self.exit_code() == 0
        return last

    def exit_code(self) -> int:
        _, self.errors = self.process.communicate(timeout=60)
        return self.process.returncode

    def end_pipe(self) -> None:
        os.close(self.to_child)
        self.to_child = -1

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.lines.close()
        if self.to_child >= 0:
            os.close(self.to_child)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path)
    yield trainer
    trainer.close()


@pytest.fixture
def strange(tmp_path: Path) -> dict[str, str]:
    """An environment in which strange workloads are installed."""
    site = tmp_path / "site"
    (site / "strange-1.dist-info").mkdir(parents=True)
    (site / "strange-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1\n")
    entries = "".join(f"{name} = {value}\n" for name, value in ENTRIES.items())
    (site / "strange-1.dist-info" / "entry_points.txt").write_text(f"[relight.workloads]\n{entries}")
    (site / "strange.py").write_text(STRANGE)
    (site / "strange_broken.py").write_text("import no_such_module")
    return {"PYTHONPATH": str(site), "LOADERS": str(tmp_path / "loaders")}


LONG = Execution(max_epochs=100_000, batch_size=256, checkpoint_every=CheckpointEvery(epochs=100_000))


def digits(root: Path, execution: Execution) -> Operation:
    return Operation(root, "digits", {"channels": 2, "hidden": 8}, execution)


def test_one_job_from_hello_to_exit(trainer: Trainer, tmp_path: Path) -> None:
    operation = digits(tmp_path, Execution(max_epochs=1))

    assert trainer.receive() == Hello(pid=trainer.process.pid)
    trainer.run(operation)
    messages = trainer.until(lambda message: isinstance(message, Finish))

    note, first = messages[:2]
    assert isinstance(note, Note)  # auto is the CPU here
    assert isinstance(first, Started)
    assert first.trainer_pid == trainer.process.pid
    assert messages[-1] == Finish(outcome=Outcome.COMPLETED)
    for message in messages:
        if isinstance(message, (Started, Metrics, CheckpointSaved)):
            operation.accept(message)
    assert sorted(operation.curves["loss"]) == list(range(48))
    assert [saved.step for saved in operation.checkpoints] == [0, 48]
    assert any(isinstance(m, ProgressNow) and m.progress.steps_total == 48 for m in messages)
    assert trainer.exit_code() == 0


def test_signals_are_not_for_it_stop_is_and_the_end_of_the_pipe(trainer: Trainer, tmp_path: Path) -> None:
    trainer.receive()
    trainer.run(digits(tmp_path, LONG))
    trainer.until(lambda message: isinstance(message, Metrics))
    os.killpg(trainer.process.pid, signal.SIGTERM)
    os.killpg(trainer.process.pid, signal.SIGINT)
    trainer.until(lambda message: isinstance(message, Metrics))

    trainer.send(Stop(why="preempted"))
    messages = trainer.until(lambda message: isinstance(message, Finish))

    assert messages[-1] == Finish(outcome=Outcome.PREEMPTED)
    (saved,) = [message for message in messages if isinstance(message, CheckpointSaved)]
    assert saved.checkpoint_type is CheckpointType.PREEMPT
    assert trainer.exit_code() == 0


def test_the_end_of_the_pipe_ends_it_at_once_while_it_trains(trainer: Trainer, tmp_path: Path) -> None:
    trainer.receive()
    trainer.run(digits(tmp_path, LONG))
    trainer.until(lambda message: isinstance(message, Metrics))

    trainer.end_pipe()

    assert trainer.exit_code() == 1


@pytest.mark.slow
def test_the_end_of_the_pipe_ends_it_before_a_job_and_a_stop_before_a_job_counts(
    trainer: Trainer, tmp_path: Path
) -> None:
    trainer.send(Stop(why="cancelled"))
    trainer.run(digits(tmp_path, LONG))
    trainer.receive()

    messages = trainer.until(lambda message: isinstance(message, Finish))

    assert messages[-1] == Finish(outcome=Outcome.CANCELLED)
    assert [message.step for message in messages if isinstance(message, CheckpointSaved)] == [0]
    idle = Trainer(tmp_path)
    try:
        idle.receive()
        idle.end_pipe()
        assert idle.exit_code() == 1
    finally:
        idle.close()


@pytest.mark.slow
def test_it_dies_with_its_agent_even_when_it_does_not_read(tmp_path: Path) -> None:
    # The agent here: starts a trainer, keeps both ends of the pipe inherited by nobody, says its pid, is killed.
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    assert agent.stdout is not None
    trainer = int(agent.stdout.readline())
    try:
        handle = os.pidfd_open(trainer)
    except OSError:
        pytest.skip("no pidfd here")
    agent.kill()
    agent.wait()

    gone, _, _ = select.select([handle], [], [], 60)

    if not gone:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    agent.stdout.close()
    assert gone


AGENT = """
import os, subprocess, sys
in_read, to_child = os.pipe()
os.set_inheritable(to_child, True)  # the child holds its own pipe open: only the death signal ends it
from_child, out_write = os.pipe()
command = [sys.executable, "-m", "ops_worker.trainer", "--in-fd", str(in_read), "--out-fd", str(out_write)]
child = subprocess.Popen(command, pass_fds=(in_read, out_write, to_child))
os.read(from_child, 1)
print(child.pid)
child.wait()
"""


class InThisProcess(AgentPipe):
    """An agent without pipes, for what needs no process of its own."""

    def __init__(self) -> None:
        self.why = None
        self._alive_at_s = -math.inf
        self.sent: list[Wire] = []

    def send(self, message: Wire) -> None:
        self.sent.append(message)


def run_here(operation: Operation, agent: InThisProcess | None = None) -> Finish:
    job = RunJob(
        start=operation.start(), storage_root=str(operation.root), directory=os.getcwd(), device="cpu", cores=1
    )
    return run(job, agent or InThisProcess())


@pytest.mark.usefixtures("numerics_given_back")
@pytest.mark.parametrize(
    ("workload", "code", "permanent", "said"),
    [
        ("nonsense", "unknown_workload", True, "there are: absent, broken, bytelm"),
        ("broken", "import_failed", True, "No module named 'no_such_module'"),
        ("no-class", "import_failed", True, "not a subclass"),
        ("raises", "exception", False, "LookupError: no such \\x00 thing \\udc80"),
        ("exits", "exception", False, "SystemExit: enough"),
    ],
)
def test_a_fault_is_its_finish(
    tmp_path: Path,
    strange: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    workload: str,
    code: str,
    permanent: bool,
    said: str,
) -> None:
    monkeypatch.syspath_prepend(strange["PYTHONPATH"])

    finish = run_here(Operation(tmp_path, workload))

    assert finish.error is not None
    assert (finish.outcome, finish.permanent, finish.error.code) == (Outcome.FAILED, permanent, code)
    assert said in finish.error.message
    assert ("traceback" in finish.error.details) == (workload in ("broken", "raises", "exits"))
    assert from_trainer.validate_json(line(finish)) == finish


OUT_OF_MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.usefixtures("numerics_given_back")
@pytest.mark.parametrize(
    ("error", "code"),
    [*((error, "out_of_memory") for error in OUT_OF_MEMORY), (RuntimeError("memory_format"), "exception")],
    ids=repr,
)
def test_memory_has_a_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def raise_it(*_: Any) -> None:
        raise error

    monkeypatch.setattr("ops_worker.workloads.digits.Digits.loss", raise_it)

    finish = run_here(digits(tmp_path, Execution()))

    assert finish.error is not None
    assert (finish.error.code, finish.permanent) == (code, False)
    assert ("smaller batch_size" in finish.error.message) == (code == "out_of_memory")
    assert "raise_it" in finish.error.details["traceback"]


@pytest.mark.usefixtures("numerics_given_back")
def test_what_to_do_is_said_however_much_the_exception_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_it(*_: Any) -> None:
        raise MemoryError("x" * 100_000)

    monkeypatch.setattr("ops_worker.workloads.digits.Digits.loss", raise_it)

    finish = run_here(digits(tmp_path, Execution()))

    assert finish.error is not None
    assert finish.error.message.endswith("accumulate_grad_batches needs less")
    assert len(line(finish)) < 20_000


def test_to_ask_whether_to_stop_is_the_sign_of_life() -> None:
    agent = InThisProcess()

    agent.should_stop()

    assert agent.sent == [Alive()]


@pytest.mark.parametrize(
    ("built", "available", "said"),
    [(False, False, "is not compiled for CUDA"), (True, False, "finds no CUDA device"), (True, True, "finds CUDA")],
)
def test_why_auto_came_to_a_cpu_is_what_torch_says(
    monkeypatch: pytest.MonkeyPatch, built: bool, available: bool, said: str
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)

    assert _fell_back().endswith(f" here {said}")


@pytest.mark.usefixtures("numerics_given_back")
def test_auto_on_a_cpu_says_so_once_an_attempt(tmp_path: Path) -> None:
    operation = digits(tmp_path, Execution(max_steps=1))

    for _ in range(2):  # the second attempt resumes
        agent = InThisProcess()
        assert run_here(operation, agent).outcome is Outcome.COMPLETED
        [note] = [message.message for message in agent.sent if isinstance(message, Note)]
        assert note.startswith("accelerator auto resolved to cpu: no live worker offers a GPU for this workload; ")
        for message in agent.sent:
            if isinstance(message, Started | Metrics | CheckpointSaved):
                operation.accept(message)


@pytest.mark.usefixtures("numerics_given_back")
def test_a_job_for_the_cpu_has_nothing_to_say_about_it(tmp_path: Path) -> None:
    agent = InThisProcess()
    run_here(digits(tmp_path, Execution(max_steps=1, accelerator=Accelerator.CPU)), agent)
    assert not any(isinstance(message, Note) for message in agent.sent)


@pytest.mark.usefixtures("numerics_given_back")
def test_a_full_disk_says_so_and_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("relight.publish.os.write", full)

    finish = run_here(digits(tmp_path, Execution()))

    assert finish.error is not None
    assert (finish.error.code, finish.permanent) == ("disk_full", False)
    assert "make room" in finish.error.message


@pytest.mark.usefixtures("numerics_given_back")
def test_a_disk_that_fills_up_beside_the_training_fails_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(fd: int, data: Any) -> int:
        if threading.current_thread().name == "checkpoint-writer":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr("relight.publish.os.write", full)
    operation = digits(tmp_path, Execution(max_epochs=100_000, checkpoint_every=CheckpointEvery(steps=2)))

    finish = run_here(operation)

    assert finish.error is not None
    assert (finish.error.code, finish.permanent) == ("disk_full", False)
    assert [path.name for path in (tmp_path / str(operation.id)).iterdir()] == ["1-0"]


def test_lines_of_two_threads_stay_whole() -> None:
    in_fd, out_fd = os.pipe()

    class OutOnly(AgentPipe):
        def __init__(self) -> None:
            self._out_fd = out_fd
            self._sending = threading.Lock()

    pipe = OutOnly()
    long = Note(message="x" * 3_000)  # together more than a pipe holds: writes are cut anywhere
    senders = [threading.Thread(target=lambda: [pipe.report(long) for _ in range(100)]) for _ in range(2)]
    for sender in senders:
        sender.start()
    with open(in_fd, "rb") as lines:
        received = [from_trainer.validate_json(lines.readline()) for _ in range(200)]
    for sender in senders:
        sender.join()
    os.close(out_fd)

    assert received == [long] * 200


@pytest.mark.usefixtures("numerics_given_back")
@pytest.mark.parametrize(("damage", "code"), [("truncate", "checkpoint_corrupt"), ("remove", "checkpoint_missing")])
def test_a_checkpoint_that_does_not_restore_is_its_own_outcome(tmp_path: Path, damage: str, code: str) -> None:
    operation = digits(tmp_path, Execution(max_epochs=1))
    operation.run(stop_after_polls=0)
    directory = tmp_path / operation.checkpoints[-1].path
    if damage == "truncate":
        os.truncate(directory / "state.safetensors", 10)
    else:
        shutil.rmtree(directory)

    finish = run_here(operation)

    assert finish.error is not None
    assert (finish.outcome, finish.error.code) == (Outcome.CHECKPOINT_CORRUPT, code)


@pytest.mark.usefixtures("numerics_given_back")
def test_a_file_in_place_of_the_storage_root_fails_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")

    finish = run_here(digits(tmp_path / "root", Execution()))

    assert finish.error is not None
    assert (finish.error.code, finish.permanent) == ("exception", False)
    assert str(tmp_path / "root") in finish.error.message


@pytest.mark.slow
def test_what_user_code_prints_is_not_taken_for_messages(tmp_path: Path, strange: dict[str, str]) -> None:
    trainer = Trainer(tmp_path, strange)
    try:
        trainer.receive()
        trainer.run(Operation(tmp_path, "prints", execution=Execution(max_steps=1)))
        finish = trainer.finish()
    finally:
        trainer.close()

    assert finish.outcome is Outcome.COMPLETED
    assert trainer.output_path.read_bytes().count(b"x") == 1_000_000


def test_a_training_leaves_the_files_that_its_job_asked_for_also_when_it_failed(
    tmp_path: Path, strange: dict[str, str]
) -> None:
    trainer = Trainer(tmp_path, strange)
    directory = tmp_path / "attempt"
    directory.mkdir()
    start = Operation(tmp_path, "writes").start()
    start = start.model_copy(update={"job": start.job.model_copy(update={"artifacts": ["out"]})})

    trainer.send(RunJob(start=start, storage_root=str(tmp_path), directory=str(directory), device="cpu", cores=1))
    *said, finish = trainer.until(lambda message: isinstance(message, Finish))
    trainer.close()

    assert isinstance(finish, Finish)
    assert finish.error
    assert "after it has written" in finish.error.message
    (artifact,) = [message for message in said if isinstance(message, ArtifactSaved)]
    assert artifact.name == "files/out/notes.txt"
    assert (tmp_path / artifact.path).read_text() == "from the training"


def test_loader_processes_end_with_the_trainer(tmp_path: Path, strange: dict[str, str]) -> None:
    trainer = Trainer(tmp_path, strange)
    try:
        trainer.receive()
        execution = Execution(
            max_epochs=100_000, num_workers=2, batch_size=1, checkpoint_every=CheckpointEvery(steps=2)
        )
        trainer.run(Operation(tmp_path, "loads", execution=execution))
        trainer.until(lambda message: isinstance(message, CheckpointSaved) and message.step > 0)
        loaders = [int(pid) for pid in (tmp_path / "loaders").read_text().splitlines()[-1].split()]
        handles = open_all(loaders)
        trainer.process.kill()
        for handle in handles:
            gone, _, _ = select.select([handle], [], [], 60)
            if not gone:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
            assert gone
    finally:
        trainer.close()

    assert len(loaders) >= 2


def open_all(pids: list[int]) -> list[int]:
    handles = []
    for pid in pids:
        with suppress(ProcessLookupError):  # an epoch ended meanwhile
            handles.append(os.pidfd_open(pid))
    return handles


@pytest.mark.slow
def test_garbage_from_the_agent_ends_it_with_a_word(trainer: Trainer) -> None:
    trainer.receive()
    os.write(trainer.to_child, b'{"kind": "dance"}\n')

    assert trainer.exit_code() == 2
    assert b"does not understand" in trainer.errors


@pytest.mark.slow
def test_a_workload_with_its_own_loop_is_stopped_and_goes_on(tmp_path: Path, strange: dict[str, str]) -> None:
    operation = Operation(tmp_path, "loops")
    outcomes = []
    for _ in range(2):
        trainer = Trainer(tmp_path, strange)
        trainer.receive()
        trainer.run(operation)
        messages = trainer.until(lambda message: isinstance(message, (Metrics, Finish)))
        if not outcomes:
            trainer.send(Stop(why="preempted"))
        while not isinstance(messages[-1], Finish):
            messages.append(trainer.receive())
        trainer.close()
        outcomes.append(messages[-1])
        for message in messages:
            if isinstance(message, (Started, Metrics, CheckpointSaved)):
                operation.accept(message)

    stopped = operation.checkpoints[-1]
    assert outcomes == [Finish(outcome=Outcome.PREEMPTED), Finish(outcome=Outcome.COMPLETED)]
    assert stopped.checkpoint_type is CheckpointType.PREEMPT
    assert sorted(operation.curves["loss"]) == list(range(stopped.step + 5))


@pytest.mark.slow
def test_describe_lists_what_loads_and_says_what_does_not(strange: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ops_worker.trainer", "--describe"],
        capture_output=True,
        check=True,
        env=os.environ | strange,
    )

    offers: dict[str, Any] = {offer["name"]: offer for offer in json.loads(done.stdout)["workloads"]}
    own = {"raises", "exits", "prints", "loads", "writes", "loops"}
    assert set(offers) == {"bytelm", "digits", "ptycho", "measurement"} | own
    assert offers["prints"]["title"] == "Prints a lot"
    assert offers["bytelm"]["config_schema"]["properties"]["block_size"]["default"] == 64
    assert offers["digits"]["reports"] == {"val_loss": "min", "val_accuracy": "max"}
    left_out = done.stderr.decode()
    assert all(f"workload {name} is left out" in left_out for name in ("absent", "no-class", "broken"))


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastapi", "uvicorn", "starlette", "sqlalchemy", "asyncpg", "sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_a_trainer_needs_nothing_of_the_agents_nor_of_its_directory(tmp_path: Path) -> None:
    """As in a user's environment; what wants more there is left out."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKED)
    (tmp_path / "pydantic.py").write_text("raise SystemExit('the file of a stranger')")

    done = subprocess.run(
        [sys.executable, *TRAINER, "--describe"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )

    described = json.loads(done.stdout)
    assert [offer["name"] for offer in described["workloads"]] == ["bytelm", "ptycho", "measurement"]
    assert described["versions"]["torch"] == version("torch")
    assert done.stderr.decode().count("\n") == 1
    assert "workload digits is left out" in done.stderr.decode()
