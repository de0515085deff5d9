"""Deletes the files of retired checkpoints and deleted operations before the last row that knows of them."""

import asyncio
import logging
from pathlib import Path
from uuid import UUID

from ops_backend.database import Sessions
from ops_backend.storage import owner, remove_checkpoint, remove_operation
from ops_backend.store.backup import may_sweep
from ops_backend.store.deletion import mark_swept, unswept
from ops_backend.store.retention import Retired, deleting, forget, release
from ops_backend.ticking import forever

log = logging.getLogger(__name__)


class Sweeper:
    """One a backend, several do no harm. A loop of its own: the reaper must not wait for a slow disk."""

    def __init__(self, sessions: Sessions, storage_root: Path, tick_s: float) -> None:
        self._sessions = sessions
        self._storage_root = storage_root
        self._tick_s = tick_s

    async def run(self) -> None:
        """Until cancelled."""
        await forever(self.sweep, self._tick_s, log)

    async def sweep(self) -> None:
        async with self._sessions.begin() as session:
            await release(session)
            if not await may_sweep(session):
                return
            retired = await deleting(session)
            deleted = await unswept(session)
        for checkpoint in retired:
            await self._delete(checkpoint)
        for operation in deleted:
            await self._clear(operation)

    async def _delete(self, checkpoint: Retired) -> None:
        """Files before the row: a row without files is found again, files without a row by nobody."""
        try:
            await asyncio.to_thread(remove_checkpoint, self._storage_root, checkpoint.path)
        except OSError as error:
            log.warning("checkpoint %s is not deleted yet: %s", checkpoint.path, error, extra=owner(checkpoint.path))
            return
        async with self._sessions.begin() as session:
            await forget(session, checkpoint)

    async def _clear(self, operation: UUID) -> None:
        try:
            await asyncio.to_thread(remove_operation, self._storage_root, operation)
        except OSError as error:
            extra = {"operation_id": operation}
            log.warning("the files of the deleted operation are still there: %s", error, extra=extra)
            return
        async with self._sessions.begin() as session:
            await mark_swept(session, operation)
