"""A directory of the user's own, where a `Run` or a sweep keeps what must survive, without a service."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, assert_never
from uuid import UUID, uuid4

from pydantic import ValidationError

from ops_contract.agents import CheckpointRef, FailureRecord
from ops_contract.pipe import Mark
from ops_contract.reports import (
    ArtifactSaved,
    CheckpointSaved,
    Finish,
    LogChunk,
    Metrics,
    Note,
    Progress,
    Report,
    Result,
    Standing,
    Started,
)
from ops_contract.wire import Name, Wire
from relight.manifest import CheckpointCorrupt, CheckpointMissing, Manifest
from relight.pipe import Why
from relight.publish import replace_file, sync
from relight.training.checkpoint import ref_to, restore
from relight.training.faults import TrainingFault

_INDEX = "index.json"
_METRICS = "metrics.jsonl"
_KEPT = 2  # checkpoints: the newest, and the one before for when it turns out to be damaged
_LOCKED_S = 3.0
_ACCEPT = "RELIGHT_ACCEPT_CHANGES"
_SIGNALS: dict[int, Why] = {signal.SIGINT: "cancelled", signal.SIGTERM: "preempted"}


class Index(Wire):
    """Stands for the rows that the service has: what is in it is committed. The newest checkpoint is the last."""

    format: Literal[1] = 1
    operation_id: UUID
    attempt: int = 0
    checkpoints: list[CheckpointSaved] = []
    damaged: list[Name] = []
    model: ArtifactSaved | None = None


class Directory:
    """Files only: `index.json`, `metrics.jsonl` and the checkpoints, laid out as in the service's storage.

    One process at a time. A first SIGINT or SIGTERM is a wish to stop, a second one is what it always is.
    Raises a permanent TrainingFault when another process has it, or when its index cannot be read.
    """

    threads: int | None = None
    cores: int | None = None

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self.metrics = self.root / _METRICS
        (self.root / ".gitignore").write_text("*\n")  # it lies beside the code, and is none
        self._lock = locked(
            self.root, "another Run is at work in {}; wait for its end (or close() it), or give Run another directory"
        )
        self._index = _read_index(self.root / _INDEX)
        self.operation_id, self.attempt = self._index.operation_id, self._index.attempt + 1
        self.record = FailureRecord()
        self.accept_changes = os.environ.get(_ACCEPT, "") not in ("", "0")
        self.accepting = f"set {_ACCEPT}=1 for this one time; or give Run another directory to begin anew"
        self._signals = _Signals()

    def restored(self) -> tuple[Manifest, Any] | None:
        index, found = self._index, None
        while index.checkpoints and found is None:
            *before, newest = index.checkpoints
            try:
                found = restore(self.root, ref_to(newest))
            except (CheckpointMissing, CheckpointCorrupt) as error:
                self.say(f"the checkpoint of step {newest.step} is left out: {error}")
                index = index.model_copy(update={"checkpoints": before, "damaged": [*index.damaged, newest.path]})
        if found is None and index.damaged:
            raise TrainingFault(
                "checkpoint_corrupt",
                f"no checkpoint in {self.root} can be read ({', '.join(index.damaged)}); put the files back, or remove "
                "the directory to begin anew",
                permanent=True,
            )
        # Its number is taken before anything is published under it.
        self._write(index.model_copy(update={"attempt": self.attempt}))
        self._sweep()
        self.say(self._told(found[0] if found else None))
        return found

    def newest(self) -> CheckpointRef | None:
        return ref_to(self._index.checkpoints[-1]) if self._index.checkpoints else None

    def report(self, report: Report) -> None:
        match report:
            case Started():
                self._cut_metrics(report.start_step)
                for reason in report.exactness.reasons:
                    self.say(f"exactness is best effort: {reason}")
            case Metrics():
                self._add_metrics(report)
            case CheckpointSaved():
                self._add_checkpoint(report)
            case ArtifactSaved():
                self._write(self._index.model_copy(update={"model": report}))
                self._sweep()
            case Note():
                self.say(report.message)
            case Finish() | LogChunk() | Result() | Standing():
                pass  # the exception says it, and the terminal has it
            case _:
                assert_never(report)

    def progress(self, progress: Progress) -> None:
        """The metrics say it."""

    def mark(self, mark: Mark) -> None:
        """Nobody measures here."""

    def should_stop(self) -> Why | None:
        return _SIGNALS.get(self._signals.got) if self._signals.got else None

    def has_model(self, step: int) -> bool:
        model = self._index.model
        return model is not None and model.step == step and (self.root / model.path).is_file()

    def leave(self) -> NoReturn:
        self.say(f"stopped before step {self._index.checkpoints[-1].step}; the same command goes on from there")
        raise SystemExit(128 + self._signals.got)

    def over(self) -> None:
        self._signals.give_back()
        model = self.root / self._index.model.path if self._index.model else None
        step = self._index.checkpoints[-1].step
        self.say(f"done after {step} steps; metrics in {self.metrics}, model in {model}")

    def say(self, message: str) -> None:
        say(message)

    def close(self) -> None:
        self._signals.give_back()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _told(self, found: Manifest | None) -> str:
        if found is None:
            return f"begins at step 0; checkpoints and metrics go to {self.root}"
        return f"goes on from step {found.step}, epoch {found.epoch}: {self._index.checkpoints[-1].path} in {self.root}"

    def _cut_metrics(self, start_step: int) -> None:
        """What predecessors reported from there on is reported again; what a power cut tore is of no checkpoint."""
        end = 0
        with open(self.metrics, "a+b") as file:
            file.seek(0)
            for text in file:
                if (step := _step_of(text)) is None or step >= start_step:
                    break
                end += len(text)
            file.truncate(end)

    def _add_metrics(self, metrics: Metrics) -> None:
        steps: dict[int, dict[str, Any]] = {}
        for series in metrics.series:
            for step, value in zip(series.steps, series.floats(), strict=True):
                steps.setdefault(step, {"step": step})[series.name] = _plain(value)
        lines = "".join(json.dumps(steps[step]) + "\n" for step in sorted(steps))
        with open(self.metrics, "ab", buffering=0) as file:
            file.write(lines.encode())

    def _add_checkpoint(self, saved: CheckpointSaved) -> None:
        # What was reported before it is part of it: a power cut must not leave a checkpoint without its past.
        sync(self.metrics)
        self._write(self._index.model_copy(update={"checkpoints": [*self._index.checkpoints[1 - _KEPT :], saved]}))
        self._sweep()

    def _write(self, index: Index) -> None:
        self._index = index
        replace_file(self.root / _INDEX, index.model_dump_json(indent=1))

    def _sweep(self) -> None:
        """Remove what the index does not name: what it gave up, and what a crash left. Nothing is being published."""
        model = [self._index.model.path.rpartition("/")[0]] if self._index.model else []
        named = {*(saved.path for saved in self._index.checkpoints), *self._index.damaged, *model}
        with contextlib.suppress(FileNotFoundError):
            for found in (self.root / str(self.operation_id)).iterdir():
                if f"{self.operation_id}/{found.name}" not in named:
                    shutil.rmtree(found, ignore_errors=True)


class _Signals:
    """Takes the first SIGINT or SIGTERM as a wish; from then on both do what they do by default.

    Handlers of the script's own stay, and threads other than the main one cannot have any.
    """

    def __init__(self) -> None:
        self.got = 0
        self._ours = threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        for number in _SIGNALS if self._ours else ():
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._take)

    def give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.got = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"relight: saves after this step, then leaves; once more ends it at once\n")


def say(message: str) -> None:
    print(f"relight: {message}", file=sys.stderr, flush=True)


def locked(root: Path, refusal: str) -> int:
    """A descriptor that holds the directory. Raises a permanent TrainingFault, with the refusal formatted by its path.

    Waits a moment: loader processes outlive a killed trainer by a little.
    """
    lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    until_s = time.monotonic() + _LOCKED_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > until_s:
                os.close(lock)
                raise TrainingFault("directory_in_use", refusal.format(root), permanent=True) from None
            time.sleep(0.05)


def _read_index(path: Path) -> Index:
    try:
        return Index.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Index(operation_id=uuid4())
    except ValidationError as error:
        raise TrainingFault(
            "index_damaged",
            f"{path} cannot be read: {error.errors()[0]['msg']}; put it back, or remove the directory to begin anew",
            permanent=True,
        ) from error


def _step_of(text: bytes) -> int | None:
    try:
        return int(json.loads(text)["step"]) if text.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def _plain(value: float) -> float | str:
    """As the wire has it: JSON knows no NaN."""
    return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
