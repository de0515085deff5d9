"""Publishing a training's state, and the report that commits it."""

import logging
from pathlib import Path
from uuid import uuid4

from ops_contract.lifecycle import CheckpointType
from ops_contract.reports import CheckpointSaved
from relight.manifest import Manifest
from relight.training.checkpoint import publish
from relight.training.codec import CodecError, Encoded, encode
from relight.training.faults import TrainingFault
from relight.training.reporting import Sink
from relight.training.state import Cursor, Live

log = logging.getLogger(__name__)


class Saver:
    """Writes `live` under `root`. `about` names the attempt; a cursor is saved once, `saved` being the newest."""

    def __init__(self, root: Path, about: Manifest, live: Live, sink: Sink, saved: Cursor | None) -> None:
        self._root = root
        self._about = about
        self._live = live
        self._sink = sink
        self._saved = saved

    def save(self, why: CheckpointType, cursor: Cursor, reported: dict[str, float]) -> None:
        """`reported` is what the successor sends again. A boundary that is on disk already needs no second copy.

        Raises TrainingFault for state that the codec does not know, and OSError.
        """
        if cursor == self._saved:
            return
        published = publish(self._root, self._manifest(cursor), self._encoded(cursor, reported))
        self._saved = cursor
        log.info("published %s, %d bytes", published.path, published.size_bytes)
        self._sink.report(
            CheckpointSaved(
                checkpoint_id=uuid4(),
                checkpoint_type=why,
                step=cursor.step,
                epoch=cursor.epoch,
                phase=cursor.phase,
                path=published.path,
                size_bytes=published.size_bytes,
                manifest_sha256=published.manifest_sha256,
            )
        )

    def _encoded(self, cursor: Cursor, reported: dict[str, float]) -> Encoded:
        try:
            return encode({**self._live.capture(), "cursor": cursor.as_tree(), "reported": reported})
        except CodecError as error:
            raise TrainingFault("not_restorable", f"this run could not be resumed: {error}", permanent=True) from error

    def _manifest(self, cursor: Cursor) -> Manifest:
        return self._about.model_copy(update={"step": cursor.step, "epoch": cursor.epoch, "phase": cursor.phase})
