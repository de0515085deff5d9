"""Deletes what nobody refers to: directories without a row, of attempts that have ended, and old snapshots."""

import asyncio
import logging
from pathlib import Path

from ops_backend.database import Sessions
from ops_backend.storage import owner, published_in, remove_checkpoint
from ops_backend.store.backup import may_sweep
from ops_backend.store.retention import without_row
from ops_backend.store.snapshots import delete_unused
from ops_backend.ticking import forever

log = logging.getLogger(__name__)

OPERATIONS_A_TICK = 1000


class OrphanSweeper:
    """One a backend, several do no harm. It reads the whole storage over time, so it has a slow pace of its own."""

    def __init__(self, sessions: Sessions, storage_root: Path, tick_s: float, limit: int = OPERATIONS_A_TICK) -> None:
        self._sessions = sessions
        self._storage_root = storage_root
        self._tick_s = tick_s
        self._limit = limit
        self._seen_up_to = ""

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.sleep(self._tick_s)
        await forever(self.sweep, self._tick_s, log)

    async def sweep(self) -> None:
        """The next operations in the order of their ids, after the last ones from the beginning."""
        found, self._seen_up_to = await asyncio.to_thread(
            published_in, self._storage_root, self._seen_up_to, self._limit
        )
        # The rows are read after the directories. The other way round, what was published, reported and ended between
        # the two would be here without a row. An attempt that is seen to have ended gets no row any more: whatever it
        # was allowed to report was committed before its end, and what waits in an outbox will be refused.
        async with self._sessions.begin() as session:
            orphans = await without_row(session, found) if await may_sweep(session) else []
            await delete_unused(session)
        for path in orphans:
            await self._delete(path)

    async def _delete(self, path: str) -> None:
        """A zombie may be writing there; it then fails, or leaves a directory that the next round finds."""
        try:
            await asyncio.to_thread(remove_checkpoint, self._storage_root, path)
            log.info("deleted %s, which no checkpoint or artifact refers to", path, extra=owner(path))
        except OSError as error:
            log.warning("%s is not deleted yet: %s", path, error, extra=owner(path))
