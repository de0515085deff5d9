"""Whether every live worker has the same storage root as this host: each reads what the other has published."""

import asyncio
import errno
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from secrets import token_bytes
from typing import Literal
from uuid import UUID, uuid4

import httpx

from ops_backend.storage import new_file, sync_directory
from ops_backend.worker_calls import connections, post
from ops_contract.agents import PROBE_FILE, PROBE_PREFIX, ProbeStorage, StorageProbed
from ops_contract.doctor import Finding, fail, ok, warn

FREE_BYTES = 2_000_000_000
STALE_S = 600.0
# What is published is to be seen at once. Attribute caches of NFS hold back for 3 to 60 s by default.
WAIT_S = 5.0
SLOW_MS = 1000.0
CALL_S = 10.0
AT_A_TIME = 256
ANSWER_BYTES = 65_536
_LOOK_EVERY_S = 0.005

MOUNT_ADVICE = (
    "mount it there at OPS_STORAGE_ROOT, the same export and directory, before the worker starts; `findmnt -T DIR` "
    "says what is there"
)
CACHE_ADVICE = (
    "its mount caches too much: for NFS mount with `lookupcache=positive` (or `none`) and `actimeo=0` or `noac`, on "
    "all hosts"
)
_ADVICE = {
    "EROFS": "it is mounted read-only there: remount it with `rw`, and look at the export",
    "ENOSPC": "it is full: `ops cleanup --older-than 30d`, or a smaller checkpoint_save_top_k",
    "EDQUOT": "the quota of that user is used up: raise it, or `ops cleanup --older-than 30d`",
    "ESTALE": "its mount is of an export that is gone: unmount it there and mount it again",
    "EIO": "its disk or network has errors: see `dmesg` there",
}


@dataclass(frozen=True)
class LiveWorker:
    incarnation: UUID
    name: str
    url: str
    secret: str

    @property
    def check(self) -> str:
        return f"storage of worker {self.name}"


class NotTold(Exception):
    """The worker says nothing of its storage: what was found, and what to do."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(found)
        self.advice = advice


async def compare(root: Path, workers: Sequence[LiveWorker]) -> list[Finding]:
    """All at once, each within a bounded time: a finding for each, and another where room is short.

    What a doctor that is killed leaves is removed by the next one.
    """
    turns = asyncio.Semaphore(AT_A_TIME)
    async with connections() as http:
        looks = [_Look(http, root, worker) for worker in workers]
        found = await asyncio.gather(*(look.findings(turns) for look in looks))
    return [finding for findings in found for finding in findings]


def remove_stale(root: Path, now_s: float) -> None:
    """Of doctors that were killed; `now_s` is by the storage's own clock."""
    for path in root.glob(f"{PROBE_PREFIX}*"):
        with suppress(OSError):
            if now_s - path.lstat().st_mtime > STALE_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Look:
    """At one worker, in a directory below the root that no other look uses."""

    def __init__(self, http: httpx.AsyncClient, root: Path, worker: LiveWorker) -> None:
        self._http = http
        self._root = root
        self._worker = worker
        self._probe = uuid4()
        self._directory = root / f"{PROBE_PREFIX}{self._probe.hex}"

    async def findings(self, turns: asyncio.Semaphore) -> list[Finding]:
        check = self._worker.check
        async with turns:
            try:
                return await self._compare()
            except NotTold as problem:
                return [fail(check, str(problem), problem.advice)]
            except OSError as error:
                return [fail(check, f"not looked at: this host cannot publish: {error}", "see the storage above")]
            finally:
                await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _compare(self) -> list[Finding]:
        theirs = self._directory / str(self._worker.incarnation) / PROBE_FILE
        first = await asyncio.to_thread(self._publish, "first")
        await asyncio.to_thread(os.path.exists, theirs)  # a cache may remember that it was not there
        told = await self._ask(look_for="first", absent="second", publish=True, wait_s=WAIT_S)
        if told.found_sha256 != first or told.published_sha256 is None:
            with suppress(NotTold):
                await self._ask(look_for="first", publish=False, wait_s=0)  # it removes its own
            return [self._cannot_read(told) if told.found_sha256 != first else self._cannot_write(told)]
        seen, ours_ms = await self._find(theirs)
        second = await asyncio.to_thread(self._publish, "second")
        again = await self._ask(look_for="second", publish=False, wait_s=WAIT_S)
        return [*self._both_ways(told, seen, ours_ms, again, second), *self._room(told)]

    def _both_ways(
        self, told: StorageProbed, seen: str, ours_ms: float, again: StorageProbed, second: str
    ) -> list[Finding]:
        check = self._worker.check
        if seen != told.published_sha256:
            found = f"what it published is not seen here within {WAIT_S:g} s ({seen or 'it is other bytes'})"
            return [fail(check, found, _advice(seen, told, here=True) or CACHE_ADVICE)]
        if again.found_sha256 != second:
            why = again.find_errno or "it is other bytes"
            found = f"the same directory, but what is new in it is not seen there within {WAIT_S:g} s ({why})"
            return [fail(check, found, _advice(again.find_errno, told) if why != "ENOENT" else CACHE_ADVICE)]
        theirs_ms = max(told.found_after_ms or 0.0, again.found_after_ms or 0.0)
        where = f"{told.root}{f' ({told.filesystem})' if told.filesystem else ''}"
        times = f"new files are seen there after {theirs_ms:.0f} ms, and its own here after {ours_ms:.0f} ms"
        if max(theirs_ms, ours_ms) > SLOW_MS:
            return [warn(check, f"the same as here, at {where}, but {times}", CACHE_ADVICE)]
        return [ok(check, f"the same as here, at {where}: {times}; {told.free_bytes / 1e9:.1f} GB free")]

    def _cannot_read(self, told: StorageProbed) -> Finding:
        where = f"its {told.root}" + (f" ({told.filesystem})" if told.filesystem else "")
        if told.found_sha256 is not None:
            return fail(self._worker.check, f"{where} has other bytes than were written here", _ADVICE["EIO"])
        if told.find_errno == "ENOENT":
            found = f"{where} is another directory than {self._root} of this host, or not mounted"
            return fail(self._worker.check, found, MOUNT_ADVICE)
        found = f"{where}: uid {told.uid} cannot read what uid {os.geteuid()} wrote here: {_said(told.find_errno)}"
        return fail(self._worker.check, found, _advice(told.find_errno, told))

    def _cannot_write(self, told: StorageProbed) -> Finding:
        found = f"the same as here, but uid {told.uid} cannot publish in {told.root}: {_said(told.publish_errno)}"
        return fail(self._worker.check, found, _advice(told.publish_errno, told))

    def _room(self, told: StorageProbed) -> list[Finding]:
        if told.free_bytes > FREE_BYTES:
            return []
        found = f"{told.free_bytes / 1e9:.1f} GB free by what {self._worker.name} sees"
        return [warn(f"free space of worker {self._worker.name}", found, _ADVICE["ENOSPC"].partition(": ")[2])]

    def _publish(self, name: str) -> str:
        """As a checkpoint is published; the SHA-256 of what it holds."""
        content = token_bytes(64)
        scratch = f"{self._directory.name}/{name}.tmp"
        with new_file(self._root, f"{scratch}/{PROBE_FILE}") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self._root / scratch)
        (self._root / scratch).rename(self._directory / name)
        sync_directory(self._directory)
        return sha256(content).hexdigest()

    async def _find(self, path: Path) -> tuple[str, float]:
        """Its SHA-256, or the name of the error; and after how many ms."""
        began_s = time.monotonic()
        while True:
            try:
                found = sha256(await asyncio.to_thread(path.read_bytes)).hexdigest()
                return found, (time.monotonic() - began_s) * 1e3
            except OSError as error:
                if time.monotonic() - began_s >= WAIT_S:
                    return errno.errorcode.get(error.errno or 0, str(error)), WAIT_S * 1e3
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _ask(
        self,
        *,
        look_for: Literal["first", "second"],
        publish: bool,
        wait_s: float,
        absent: Literal["second"] | None = None,
    ) -> StorageProbed:
        """Raises NotTold."""
        worker = self._worker
        wish = ProbeStorage(
            incarnation=worker.incarnation,
            probe=self._probe,
            look_for=look_for,
            absent=absent,
            publish=publish,
            wait_s=wait_s,
        )
        url = f"{worker.url}/storage"
        try:
            answer = await post(self._http, url, worker.secret, wish, wait_s + CALL_S, ANSWER_BYTES)
        except httpx.ReadTimeout as error:
            found = f"{worker.url} does not answer within {wait_s + CALL_S:g} s"
            raise NotTold(found, "a disk or mount hangs there: look at it, by `ls` and `dmesg`") from error
        except httpx.HTTPError as error:
            found = f"{worker.url} cannot be reached from this host: {error or type(error).__name__}"
            raise NotTold(found, "is the worker up, and OPS_WORKER_URL right? If it is gone, wait a lease") from error
        if answer.status == 404:
            raise NotTold(f"{worker.url} cannot look at it", "install this version there, and restart it")
        try:
            if not answer.is_success:
                raise ValueError
            return StorageProbed.model_validate_json(answer.body)
        except ValueError as error:
            found = f"{worker.url} answered {answer.status}: {answer.body[:200].decode(errors='replace')}"
            raise NotTold(found, "is that this worker? Its log says more; restart it") from error


def _said(name: str | None) -> str:
    number = getattr(errno, name or "", None)
    return f"{os.strerror(number)} ({name})" if number else str(name)


def _advice(name: str | None, told: StorageProbed, *, here: bool = False) -> str:
    if name in ("EACCES", "EPERM"):
        ours, theirs = os.geteuid(), told.uid
        writer, reader = (theirs, ours) if here else (ours, theirs)
        root_squash = "; NFS makes nobody of uid 0 unless the export says `no_root_squash`"
        return (
            f"uid {writer} wrote it, uid {reader} wants it: run backends and workers as one user (the same uid on all "
            f"hosts), or give the root mode 2770 and a group of both{root_squash if 0 in (ours, theirs) else ''}"
        )
    return _ADVICE.get(name or "", "look at the mount on both hosts")
