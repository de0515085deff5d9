"""Writes the files of operations that have ended, from their rows; what a crash left out is found again."""

import asyncio
import logging
from pathlib import Path
from uuid import UUID

from ops_backend.database import Sessions
from ops_backend.log_files import files
from ops_backend.storage import show_logs, write_logs
from ops_backend.store.log_files import mark_if_unmoved, read_if_unlogged, unlogged
from ops_backend.ticking import forever

log = logging.getLogger(__name__)


class Exporter:
    """One a backend; of several one writes at a time. A loop of its own: nobody must wait for a large file."""

    def __init__(self, sessions: Sessions, storage_root: Path, tick_s: float) -> None:
        self._sessions = sessions
        self._storage_root = storage_root
        self._tick_s = tick_s
        self._after: UUID | None = None
        self._said: set[str] = set()

    async def run(self) -> None:
        """Until cancelled."""
        await forever(self.export, self._tick_s, log)

    async def export(self) -> None:
        """A bounded number of operations; what cannot be written is said once, and tried again."""
        async with self._sessions.begin() as session:
            turn = await unlogged(session, self._after)
        failures = set()
        for self._after in turn:
            try:
                await self._write(self._after)
            except OSError as error:
                failures.add(str(error))
                if str(error) not in self._said:
                    self._said.add(str(error))
                    extra = {"operation_id": self._after}
                    log.warning("its logs, and maybe others', are not written yet: %s", error, extra=extra)
        self._said &= failures

    async def _write(self, id: UUID) -> None:
        """The files are shown under the lock of the row that says so: older ones never take the place of newer ones.

        A crash in between leaves files that the row does not know of; they are written again.
        """
        async with self._sessions.begin() as session:
            ended = await read_if_unlogged(session, id)
            if ended is None:
                return
            made = files(ended)
            if made:
                await asyncio.to_thread(write_logs, self._storage_root, str(id), made)
            if await mark_if_unmoved(session, ended) and made:
                await asyncio.to_thread(show_logs, self._storage_root, str(id), list(made))
