"""Deletes the files of retired checkpoints, then their rows; what a crash left in between is found again."""

import asyncio
import logging
from pathlib import Path

from ops_backend.database import Sessions
from ops_backend.storage import remove_checkpoint
from ops_backend.store.retention import Retired, deleting, forget, release

log = logging.getLogger(__name__)


class Sweeper:
    """One a backend, several do no harm. A loop of its own: the reaper must not wait for a slow disk."""

    def __init__(self, sessions: Sessions, storage_root: Path, tick_s: float) -> None:
        self._sessions = sessions
        self._storage_root = storage_root
        self._tick_s = tick_s

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.sweep()
            except Exception:
                log.exception("sweeper: tick failed; trying again")
            await asyncio.sleep(self._tick_s)

    async def sweep(self) -> None:
        async with self._sessions.begin() as session:
            await release(session)
            retired = await deleting(session)
        for checkpoint in retired:
            await self._delete(checkpoint)

    async def _delete(self, checkpoint: Retired) -> None:
        """Files before the row: a row without files is found again, files without a row by nobody."""
        try:
            await asyncio.to_thread(remove_checkpoint, self._storage_root, checkpoint.path)
        except OSError as error:
            log.warning("checkpoint %s is not deleted yet: %s", checkpoint.path, error)
            return
        async with self._sessions.begin() as session:
            await forget(session, checkpoint)
