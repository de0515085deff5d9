"""Scripts with a `relight.Run`, in processes of their own that tests may kill."""

import json
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from training_child import Operation, processes

from ops_contract.agents import CheckpointRef
from ops_contract.pipe import Hello, RunJob, Stop, from_trainer, line
from ops_contract.reports import Report
from relight.run import Run
from relight.training.checkpoint import restore
from relight.training.codec import digests, encode
from relight.training.directory import Index
from relight.training.saving import Saver

PLAIN_LOOP = Path(__file__).parents[2] / "examples" / "plain_loop"


@dataclass(frozen=True)
class Harm:
    """`signals` come at the `at`-th step of the process, or at its `at`-th fsync, from 0.

    With `waits` training waits for every save: none is passed over.
    """

    at: int
    where: Literal["step", "fsync"] = "step"
    signals: tuple[int, ...] = (signal.SIGKILL,)
    waits: bool = False


@dataclass(frozen=True)
class Ended:
    code: int | None
    said: str


def run(script: Path, cwd: Path, *arguments: str, harm: Harm | None = None, **environ: str) -> Ended:
    """To its end; -9 is a SIGKILL."""
    return _end(_start(script, cwd, arguments, harm, environ, None), cwd)


def _start(
    script: Path,
    cwd: Path,
    arguments: tuple[str, ...],
    harm: Harm | None,
    environ: dict[str, str],
    pipe: socket.socket | None,
) -> Any:
    cwd.mkdir(exist_ok=True)
    child = processes.Process(target=_child, args=(str(script), str(cwd), arguments, harm, environ, pipe))
    child.start()
    return child


def _end(child: Any, cwd: Path) -> Ended:
    try:
        child.join()
    except BaseException:
        child.kill()  # a test that times out leaves nothing running
        raise
    return Ended(child.exitcode, (cwd / "said").read_text())


def _child(
    script: str, cwd: str, arguments: tuple[str, ...], harm: Harm | None, environ: dict[str, str], pipe: Any
) -> None:
    os.chdir(cwd)
    os.environ.update(environ)
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if pipe is not None:
        os.set_inheritable(pipe.fileno(), True)
        os.environ["RELIGHT_FD"] = str(pipe.fileno())
    if harm is not None and harm.waits:
        Saver._memory = lambda self, encoded: None
    if harm is not None and harm.where == "fsync":
        os.fsync = _harmed(harm, os.fsync)
    elif harm is not None:
        Run._begin_step = _harmed(harm, Run._begin_step)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _harmed(harm: Harm, do: Callable[..., Any]) -> Callable[..., Any]:
    calls = count()

    def harmed(*args: Any) -> Any:
        if next(calls) == harm.at:
            for number in harm.signals:
                os.kill(os.getpid(), number)
        return do(*args)

    return harmed


def index(directory: Path) -> Index:
    return Index.model_validate_json((directory / "index.json").read_bytes())


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]


def left(directory: Path) -> dict[str, Any]:
    """All that a run left, bit for bit."""
    known = index(directory)
    ref = CheckpointRef.model_validate(known.checkpoints[-1].model_dump(include=set(CheckpointRef.model_fields)))
    return {
        "metrics": (directory / "metrics.jsonl").read_bytes(),
        "model": (directory / known.model.path).read_bytes() if known.model else None,
        **digests(encode(restore(directory, ref)[1])),
    }


class Runner:
    """The other end of RELIGHT_FD: what `ops run` has around a command, without an agent."""

    def __init__(self, operation: Operation, script: Path, *arguments: str, harm: Harm | None) -> None:
        self.cwd = operation.root / "cwd"
        self._pipe, theirs = socket.socketpair()
        self._child = _start(script, self.cwd, arguments, harm, {}, theirs)
        theirs.close()
        self._lines = self._pipe.makefile("rb")
        self.operation = operation
        self.messages: list[Any] = []

    def reports(self) -> Iterator[Report]:
        """As they come, until the end; the operation has accepted them."""
        for text in self._lines:
            message = from_trainer.validate_json(text)
            self.messages.append(message)
            if isinstance(message, Hello):
                self._send(self._job())
            elif message.kind not in ("alive", "progress", "mark"):
                self.operation.accept(message)
                yield message

    def stop(self, why: Literal["cancelled", "preempted"]) -> None:
        self._send(Stop(why=why))

    def hang_up(self) -> None:
        self._pipe.shutdown(socket.SHUT_RDWR)

    def signal(self, number: int) -> None:
        os.kill(self._child.pid or 0, number)

    def end(self) -> Ended:
        return _end(self._child, self.cwd)

    def _job(self) -> RunJob:
        root = str(self.operation.root)
        return RunJob(start=self.operation.start(), storage_root=root, directory=root, device="cpu", cores=1)

    def _send(self, message: RunJob | Stop) -> None:
        self._pipe.sendall(line(message))

    def close(self) -> None:
        self._child.kill()
        self._child.join()
        self._lines.close()
        self._pipe.close()


@contextmanager
def running(operation: Operation, script: Path, *arguments: str, harm: Harm | None = None) -> Iterator[Runner]:
    runner = Runner(operation, script, *arguments, harm=harm)
    try:
        yield runner
    finally:
        runner.close()
