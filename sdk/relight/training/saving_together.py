"""Checkpoints of a model that is divided among ranks: all write them together."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ops_contract.energy import Use
from ops_contract.lifecycle import CheckpointType
from relight.manifest import FileEntry, Manifest
from relight.publish import settled
from relight.training.checkpoint import Published, at, published_shards, shards_directory
from relight.training.codec import CodecError, Encoded, encode
from relight.training.faults import PeerLost, is_peer_lost
from relight.training.interval import SaveTimes
from relight.training.marks import Marks
from relight.training.reporting import Sink
from relight.training.saving import Saves
from relight.training.state import Cursor, Live, not_restorable
from relight.training.team import Team, agree

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)
T = TypeVar("T")


class SaverTogether(Saves):
    """Every rank calls `save` at the same boundaries. It returns when the checkpoint is committed: training waits.

    Rank 0 makes the directory, each rank writes, syncs and hashes its own file there, and rank 0 commits. When one
    fails nothing is left, and all fail.
    """

    def __init__(
        self,
        root: Path,
        about: Manifest,
        live: Live,
        sink: Sink,
        marks: Marks,
        team: Team,
        saved: Cursor | None,
        clock: Callable[[], float] = time.monotonic,
        restored_s: float = 0.0,
    ) -> None:
        self._root = root
        self._about = about
        self._live = live
        self._sink = sink
        self._marks = marks
        self._team = team
        self._newest = saved
        self._clock = clock
        self.times = SaveTimes(saved_at_s=clock(), whole_s=restored_s)

    def save(
        self, why: CheckpointType, cursor: Cursor, reported: dict[str, float], monitored: float | None = None
    ) -> None:
        """As `Saver.save`. Raises PeerLost where another rank could not."""
        if cursor == self._newest:
            return
        begun_at_s = self._clock()
        then = Use.FINISH if why is CheckpointType.FINAL else Use.TRAIN
        with self._marks.doing(Use.SAVE, cursor, then, edge=True):
            published = self._publish(at(self._about, cursor), {"cursor": cursor.as_tree(), "reported": reported})
            if published is not None:
                log.info("published %s, %d bytes", published.path, published.size_bytes)
                self._sink.report(published.saved(why, cursor, monitored))
        self._newest = cursor
        self.times.waited(begun_at_s, self._clock())
        if why is CheckpointType.PERIODIC:
            self.times.add_stall(self.times.whole_s)

    def _publish(self, about: Manifest, more: Mapping[str, Any]) -> Published | None:
        with ExitStack() as opened:
            state, parts, publish = self._agreed(lambda: self._prepared(about, more, opened))
            mine = self._agreed(lambda: self._written(shards_directory(self._root, about), parts))
            every = [
                (name, FileEntry.model_validate(entry))
                for files in self._team.gathered({name: entry.model_dump() for name, entry in mine.items()})
                for name, entry in files.items()
            ]

            def commit() -> Published | None:
                if publish is None:
                    return None
                published = publish(state, dict(every))
                opened.close()  # it gets its name here
                return published

            return self._agreed(commit)

    def _prepared(
        self, about: Manifest, more: Mapping[str, Any], opened: ExitStack
    ) -> tuple[Encoded, dict[str, "DTensor"], Callable[..., Published] | None]:
        from relight.training.sharding import taken_out

        try:
            tree, parts = taken_out({**self._live.capture(), **more})
            state = encode(tree)
        except CodecError as error:
            raise not_restorable(error) from error
        publish = opened.enter_context(published_shards(self._root, about)) if self._team.leads else None
        return state, parts, publish

    def _written(self, directory: Path, parts: dict[str, "DTensor"]) -> dict[str, FileEntry]:
        from relight.training.sharding import write

        write(directory, parts)
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            own = f"shard-{self._team.rank + 1:05d}-"
            return {name: settled(opened, name) for name in sorted(os.listdir(directory)) if name.startswith(own)}
        finally:
            os.close(opened)

    def _agreed(self, do: Callable[[], T]) -> T:
        """Its result, once every rank has one. Raises this rank's error, or PeerLost."""
        failure: Exception | None = None
        try:
            result = do()
        except Exception as error:
            if is_peer_lost(error) and not isinstance(error, PeerLost):
                raise  # nobody is there to agree with
            failure = error
        agree(self._team, failure)
        return result
