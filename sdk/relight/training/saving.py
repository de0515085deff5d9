"""Publishing a training's state, periodic saves beside the training, and the report that commits each."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from ops_contract.energy import Use
from ops_contract.lifecycle import CheckpointType
from ops_contract.reports import Note
from relight.manifest import Manifest
from relight.memory import available_bytes
from relight.training import snapshot
from relight.training.checkpoint import Published, at, publish
from relight.training.codec import CodecError, Encoded, encode
from relight.training.interval import SaveTimes
from relight.training.marks import Marks
from relight.training.reporting import Sink
from relight.training.snapshot import Snapshot
from relight.training.state import Cursor, Live, not_restorable
from relight.training.writer import Writer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Periodic:
    """A snapshot on its way to the disk; `versions` are those of its sources when it was begun.

    `monitored` is what an evaluation said of this very state: retention counts on it.
    """

    cursor: Cursor
    monitored: float | None
    snapshot: Snapshot
    versions: list[int]
    begun_at_s: float


class Saves:
    """What a loop wants of a saver. This one saves nothing: it is that of a rank whose state is rank 0's."""

    def __init__(self) -> None:
        self.times = SaveTimes(saved_at_s=0.0, whole_s=0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def save(
        self, why: CheckpointType, cursor: Cursor, reported: dict[str, float], monitored: float | None = None
    ) -> None:
        """`reported` is what the successor sends again, `monitored` the metric of this very state."""

    def seal(self) -> None:
        """Before an update changes parameters."""

    def raise_failure(self) -> None:
        """Raises the error of a save that was to be written beside the training."""


class Saver(Saves):
    """Writes `live` under `root`. `about` names the attempt; a cursor is saved once, `saved` being the newest.

    Periodic saves are copied and then written by a thread; every other save returns when it is committed. Use it as a
    context: leaving waits for what is being written, which is a good checkpoint however the training ended.
    `times` tells what saves cost, `restored_s` being what reading `saved` took.
    """

    def __init__(
        self,
        root: Path,
        about: Manifest,
        live: Live,
        sink: Sink,
        marks: Marks,
        saved: Cursor | None,
        publish: Callable[[Path, Manifest, Encoded], Published] = publish,
        available_bytes: Callable[[], int | None] = available_bytes,
        clock: Callable[[], float] = time.monotonic,
        restored_s: float = 0.0,
    ) -> None:
        self._root = root
        self._about = about
        self._live = live
        self._sink = sink
        self._marks = marks
        self._newest = saved
        self._publish = publish
        self._available_bytes = available_bytes
        self._clock = clock
        self.times = SaveTimes(saved_at_s=clock(), whole_s=restored_s)
        self._stood_still_s = 0.0  # in the save that is being copied
        self._writer = Writer[_Periodic](self._write)
        self._copying: _Periodic | None = None
        self._free: list[Tensor] = []
        self._copies_all_at_once = False
        self._told_no_memory = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None:
            self._writer.raise_failure()

    def close(self) -> None:
        """Wait for what is being written. Raises nothing."""
        self.seal()
        self._writer.close()

    def save(
        self, why: CheckpointType, cursor: Cursor, reported: dict[str, float], monitored: float | None = None
    ) -> None:
        """A boundary that is on disk already needs no second copy. A save takes the place of a periodic one that still
        waits to be written; for one that has a monitored value it waits.
        Raises TrainingFault for state that the codec does not know, and OSError, also that of an earlier save.
        """
        self.seal()
        then = Use.FINISH if why is CheckpointType.FINAL else Use.TRAIN
        if cursor != self._newest:
            begun_at_s = self._clock()
            encoded = self._encoded(cursor, reported)
            memory = self._memory(encoded) if why is CheckpointType.PERIODIC else None
            if memory is not None:
                self._marks.mark(cursor, edge=True)
                self._begin(cursor, monitored, encoded, memory, begun_at_s)
            else:
                with self._marks.doing(Use.SAVE, cursor, then, edge=True):
                    self._save_now(why, cursor, monitored, encoded, begun_at_s)
        elif why is not CheckpointType.PERIODIC:
            with self._marks.doing(Use.SAVE, cursor, then):
                self._writer.wait()

    def seal(self) -> None:
        """What was begun at the last boundary is copied when this returns."""
        periodic, self._copying = self._copying, None
        if periodic is None:
            return
        begun_at_s = self._clock()
        periodic.snapshot.seal()
        self.times.add_stall(self._stood_still_s + self._clock() - begun_at_s)
        if self._copies_all_at_once or periodic.versions == snapshot.versions(self._live):
            self._writer.put(periodic)
        else:
            self._discard(periodic)

    def raise_failure(self) -> None:
        self._writer.raise_failure()

    def _begin(
        self, cursor: Cursor, monitored: float | None, encoded: Encoded, memory: Tensor, begun_at_s: float
    ) -> None:
        may_wait = set() if self._copies_all_at_once else snapshot.changed_by_updates_only(encoded, self._live)
        versions = snapshot.versions(self._live)
        self._copying = _Periodic(cursor, monitored, Snapshot(encoded, memory, may_wait), versions, begun_at_s)
        self._newest = cursor
        self._writer.help(self._copying.snapshot.help)
        self.times.saved_at_s = self._clock()
        self._stood_still_s = self.times.saved_at_s - begun_at_s

    def _save_now(
        self, why: CheckpointType, cursor: Cursor, monitored: float | None, encoded: Encoded, begun_at_s: float
    ) -> None:
        """From the live state. It comes after the one that is being written, and in place of one that waits."""
        self._reclaim()
        self._writer.wait()
        self._commit(why, cursor, monitored, encoded)
        self._newest = cursor
        self.times.waited(begun_at_s, self._clock())
        if why is CheckpointType.PERIODIC:
            self.times.add_stall(self.times.whole_s)

    def _write(self, periodic: _Periodic) -> None:
        """In the writer's thread."""
        periodic.snapshot.arrived()
        self._commit(CheckpointType.PERIODIC, periodic.cursor, periodic.monitored, periodic.snapshot.state)
        self._free.append(periodic.snapshot.memory)
        self.times.commit_s = self._clock() - periodic.begun_at_s

    def _commit(self, why: CheckpointType, cursor: Cursor, monitored: float | None, state: Encoded) -> None:
        published = self._publish(self._root, at(self._about, cursor), state)
        log.info("published %s, %d bytes", published.path, published.size_bytes)
        self._sink.report(published.saved(why, cursor, monitored))

    def _memory(self, encoded: Encoded) -> Tensor | None:
        """For a snapshot: that of one that waits, free, or new. There are two at most, as one is written at a time.

        None when there is too little; half of what is available is left to the training.
        """
        self._reclaim()
        size_bytes = snapshot.size_bytes(encoded)
        while self._free:
            memory = self._free.pop()
            if memory.nbytes >= size_bytes:
                return memory
        available_bytes = self._available_bytes()
        if available_bytes is None or 2 * size_bytes <= available_bytes:
            return snapshot.allocate(encoded)
        if not self._told_no_memory:
            self._told_no_memory = True
            self._note(
                f"training waits while checkpoints are written: a copy of the state takes {size_bytes / 1e9:.2f} GB, "
                f"more than half of the {available_bytes / 1e9:.2f} GB of memory that are available"
            )
        return None

    def _reclaim(self) -> None:
        """Let nothing wait to be written."""
        waiting = self._writer.withdraw()
        if waiting is None:
            return
        if waiting.monitored is not None:
            self._writer.put(waiting)
            self._writer.wait()
        else:
            self._free.append(waiting.snapshot.memory)

    def _discard(self, periodic: _Periodic) -> None:
        """What was copied may be of two steps; nothing has been written of it."""
        self._free.append(periodic.snapshot.memory)
        self._newest = None
        self._copies_all_at_once = True
        self._note(
            f"the checkpoint of step {periodic.cursor.step} was dropped: parameters changed between two updates; "
            "from now on training waits for every copy; change them right after the update (after_step()) to avoid that"
        )

    def _note(self, message: str) -> None:
        log.warning("%s", message)
        self._sink.report(Note(message=message))

    def _encoded(self, cursor: Cursor, reported: dict[str, float]) -> Encoded:
        try:
            return encode({**self._live.capture(), "cursor": cursor.as_tree(), "reported": reported})
        except CodecError as error:
            raise not_restorable(error) from error
