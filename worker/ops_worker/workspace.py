"""The directories in which attempts' own code runs, and the snapshots that are unpacked there."""

import asyncio
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import UUID

from ops_contract.agents import StartTraining
from ops_contract.reports import Fault
from ops_worker import locks
from ops_worker.api_client import ApiClient, ApiRefused, ApiUnavailable
from ops_worker.waiting import Backoff, Trouble
from relight.archive import BadArchive, unpack
from relight.publish import DISK_FULL

log = logging.getLogger(__name__)

# The heartbeats see to an API that is away. This is for one that answers them and does not give the snapshot.
PATIENCE_S = 600.0
RETRY_CAP_S = 5.0
CACHED = 16


class NoWorkspace(Exception):
    """The attempt cannot begin; `permanent` if it never could."""

    def __init__(self, fault: Fault, *, permanent: bool = False) -> None:
        super().__init__(fault.message)
        self.fault = fault
        self.permanent = permanent


class Workspaces:
    """Those of one agent, in a directory of its own, and the snapshots, which it shares with its successors."""

    def __init__(
        self, state_dir: Path, incarnation: UUID, api: Callable[[], ApiClient], patience_s: float = PATIENCE_S
    ) -> None:
        self._all = state_dir.absolute() / "attempts"
        self._root = self._all / str(incarnation)
        self._cache = state_dir.absolute() / "snapshots"
        self._api = api
        self._patience_s = patience_s

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """As long as this agent lives: no other one takes its directories for those of a dead one."""
        self._all.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = locks.lock(self._root)
        assert lock is not None, "an incarnation is new"
        self._root.mkdir(mode=0o700)
        try:
            yield
        finally:
            await asyncio.to_thread(_remove, self._root, lock)

    async def clear(self) -> None:
        """Remove what agents left that were killed."""
        try:
            for path in self._all.iterdir():
                if path.is_dir() and (lock := locks.lock(path)) is not None:
                    log.info("removing %s, which a worker that was killed has left", path)
                    await asyncio.to_thread(_remove, path, lock)
        except OSError as error:
            log.warning("what killed workers left stays until the next start: %s", error)

    async def code(self, order: StartTraining) -> bytes | None:
        """The archive of the job's snapshot, if it has one. Raises NoWorkspace."""
        if order.job.code is None:
            return None
        sha256 = order.job.code.sha256
        archive = await asyncio.to_thread(self._cached, sha256)
        if archive is None:
            archive = await self._fetched(sha256)
            await asyncio.to_thread(self._keep, sha256, archive)
        return archive

    @asynccontextmanager
    async def open(self, order: StartTraining, archive: bytes | None) -> AsyncIterator[Path]:
        """A new directory with the snapshot and the job's `workdir`; it is gone afterwards. Raises NoWorkspace."""
        directory = self._root / f"{order.operation_id}-{order.attempt}"
        try:
            await asyncio.to_thread(_fill, directory, archive, order.job.workdir)
            yield directory
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def _fetched(self, sha256: str) -> bytes:
        trouble, backoff = Trouble(f"fetching the snapshot {sha256[:12]}", log), Backoff(RETRY_CAP_S)
        last = ""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s), self._api() as api:
                while True:
                    try:
                        archive = await api.snapshot(sha256)
                        trouble.over()
                        return archive
                    except ApiUnavailable as problem:
                        last = str(problem)
                        trouble.now(problem)
                        await backoff.pause(problem.retry_after_s)
                    except ApiRefused as refusal:
                        message = f"The API does not give the job's code: {refusal}. Submit it anew, with its code."
                        raise NoWorkspace(Fault(code="code_missing", message=message), permanent=True) from refusal
        message = f"The job's code did not come from the API within {self._patience_s:g} s: {last}. It is tried again."
        raise NoWorkspace(Fault(code="code_unavailable", message=message))

    def _cached(self, sha256: str) -> bytes | None:
        path = self._cache / sha256
        with suppress(OSError):
            archive = path.read_bytes()
            if hashlib.sha256(archive).hexdigest() == sha256:
                os.utime(path)
                return archive
            path.unlink()
        return None

    def _keep(self, sha256: str, archive: bytes) -> None:
        """Whole or not at all, also beside another agent that does the same. Only a cache: a full disk is no reason."""
        try:
            self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._cache)
            with open(descriptor, "wb") as file:
                file.write(archive)
            os.replace(name, self._cache / sha256)
            kept = sorted(self._cache.iterdir(), key=lambda path: path.stat().st_mtime)
            for old in kept[:-CACHED]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the snapshot %s is not kept for later: %s", sha256[:12], error)


def _fill(directory: Path, archive: bytes | None, workdir: str) -> None:
    place = directory / workdir
    try:
        directory.mkdir(mode=0o700)
        if archive is None:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            unpack(archive, directory)
    except BadArchive as error:
        raise _bad_code(f"is no snapshot that can be unpacked: {error}") from error
    except OSError as error:
        message = f"No directory could be made for the attempt: {error}; make room in the worker's state directory."
        code = "disk_full" if error.errno in DISK_FULL else "no_workspace"
        raise NoWorkspace(Fault(code=code, message=message)) from error
    if not place.is_dir():
        raise _bad_code(f"has no directory {workdir!r}, its workdir")


def _bad_code(what: str) -> NoWorkspace:
    message = f"The job's code {what}. Submit it anew, with code that `ops pack` shows."
    return NoWorkspace(Fault(code="code_invalid", message=message), permanent=True)


def _remove(directory: Path, lock: int) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():  # else the next start tries again
        locks.lock_path(directory).unlink(missing_ok=True)
    os.close(lock)
