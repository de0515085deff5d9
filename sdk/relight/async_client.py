"""The client for asyncio: every call of Client in a thread, so that there is one of each (decision 23)."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from uuid import UUID

from ops_contract.history import ArtifactView
from ops_contract.operations import Operation, OperationSummary
from relight.client import Client
from relight.download import Progress
from relight.following import Bar, Changes, Output
from relight.transfers import ExportFormat

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 32


def _in_thread(
    method: Callable[Concatenate[Client, P], T],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    @functools.wraps(method)
    async def call(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(functools.partial(method, self.client, *args, **kwargs))

    return call


class AsyncClient:
    """Client's methods, to be awaited; use it as an async context manager.

    A call that is cancelled is not waited for, but may have been carried out. Waiting takes no thread between polls.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As Client's."""
        self.client = Client(*args, **kwargs)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="relight-client")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """After the calls that are being carried out."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self.client.close()

    submit = _in_thread(Client.submit)
    upload = _in_thread(Client.upload)
    snapshot = _in_thread(Client.snapshot)
    dry_run = _in_thread(Client.dry_run)
    preview = _in_thread(Client.preview)
    get = _in_thread(Client.get)
    cancel = _in_thread(Client.cancel)
    resume = _in_thread(Client.resume)
    fork = _in_thread(Client.fork)
    dry_run_fork = _in_thread(Client.dry_run_fork)
    replay = _in_thread(Client.replay)
    attempts = _in_thread(Client.attempts)
    events = _in_thread(Client.events)
    checkpoints = _in_thread(Client.checkpoints)
    delete_checkpoint = _in_thread(Client.delete_checkpoint)
    delete = _in_thread(Client.delete)
    cleanup = _in_thread(Client.cleanup)
    artifacts = _in_thread(Client.artifacts)
    metric_names = _in_thread(Client.metric_names)
    metric_summaries = _in_thread(Client.metric_summaries)
    metrics = _in_thread(Client.metrics)
    columns = _in_thread(Client.columns)
    energy = _in_thread(Client.energy)
    energy_windows = _in_thread(Client.energy_windows)
    results = _in_thread(Client.results)
    children = _in_thread(Client.children)
    export = _in_thread(Client.export)
    log_part = _in_thread(Client.log_part)
    workers = _in_thread(Client.workers)
    find_worker = _in_thread(Client.find_worker)
    drain = _in_thread(Client.drain)
    undrain = _in_thread(Client.undrain)
    workloads = _in_thread(Client.workloads)
    dashboard_link = _in_thread(Client.dashboard_link)
    create_token = _in_thread(Client.create_token)
    tokens = _in_thread(Client.tokens)
    revoke_token = _in_thread(Client.revoke_token)
    audit = _in_thread(Client.audit)
    add_webhook = _in_thread(Client.add_webhook)
    webhooks = _in_thread(Client.webhooks)
    deliveries = _in_thread(Client.deliveries)
    test_webhook = _in_thread(Client.test_webhook)
    remove_webhook = _in_thread(Client.remove_webhook)
    resolve = _in_thread(Client.resolve)

    async def list(self, **wanted: Any) -> AsyncIterator[OperationSummary]:
        """As Client.list."""
        items = self.client.list(**wanted)
        while (item := await self._run(lambda: next(items, None))) is not None:
            yield item

    async def stream(
        self, operation_id: UUID | str, *, poll_s: float = 1.0, patience_s: float = 300.0
    ) -> AsyncIterator[Operation]:
        """As Client.stream."""
        changes = Changes(functools.partial(self.client.get, operation_id), poll_s, patience_s)
        while not changes.ended:
            if (operation := await self._run(changes.poll)) is not None:
                yield operation
            if not changes.ended:
                await asyncio.sleep(poll_s)

    async def logs(
        self,
        operation_id: UUID | str,
        *,
        offset: int = 0,
        follow: bool = False,
        poll_s: float = 1.0,
        patience_s: float = 300.0,
        away: Callable[[str], None] | None = None,
    ) -> AsyncIterator[bytes]:
        """As Client.logs; `away` is called in another thread."""
        look = functools.partial(self.client.log_part, operation_id)
        output = Output(look, offset, follow, poll_s, patience_s, away)
        while not output.ended:
            if piece := await self._run(output.poll):
                yield piece
            elif not output.ended:
                await asyncio.sleep(poll_s)

    async def export_pieces(self, operation_id: UUID | str, format: ExportFormat = "csv") -> AsyncIterator[bytes]:
        """As Client.export_pieces."""
        pieces = self.client.export_pieces(operation_id, format)
        while (piece := await self._run(lambda: next(pieces, None))) is not None:
            yield piece

    async def wait(
        self, operation_id: UUID | str, *, poll_s: float = 1.0, patience_s: float = 300.0, progress: bool = False
    ) -> Operation:
        """As Client.wait."""
        with Bar(progress) as bar:
            async for operation in self.stream(operation_id, poll_s=poll_s, patience_s=patience_s):
                bar.show(operation)
        return operation

    async def download(
        self,
        operation_id: UUID | str,
        to: Path | str,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Sequence[Path]:
        """As Client.download. Cancelled, it stops at the next chunk; `progress` is called in its thread."""
        cancelled = threading.Event()

        def go_on(artifact: ArtifactView, size_bytes: int) -> None:
            if cancelled.is_set():
                raise asyncio.CancelledError
            if progress is not None:
                progress(artifact, size_bytes)

        try:
            return await self._run(functools.partial(self.client.download, operation_id, to, names, go_on))
        finally:
            cancelled.set()

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
