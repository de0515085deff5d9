"""The directory in which one attempt's own code runs."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ops_contract.agents import StartTraining


class Workspaces:
    """Those of one agent, below a directory of its own."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    @asynccontextmanager
    async def open(self, order: StartTraining) -> AsyncIterator[Path]:
        """A new directory, with the job's `workdir` in it; it is gone afterwards."""
        directory = self._root / f"{order.operation_id}-{order.attempt}"
        (directory / order.job.workdir).mkdir(mode=0o700, parents=True)
        try:
            yield directory
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
