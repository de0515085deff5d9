"""What a process writes to stdout and stderr, on its way into the outbox: live, and bounded whatever it writes."""

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ops_contract.reports import LOG_CHUNK_BYTES, LogChunk
from ops_worker.waiting import first_of

EVERY_S = 1.0
# The beginning is taken whole, and the end: what lags behind by more is left out. Neither is ever in the part of the
# file that `trim_log` frees.
HEAD_BYTES = 2**20
LAG_BYTES = 2**20
# On average, past the beginning: some 400 lines a second.
RATE_BYTES_S = 32 * 1024
# In the outbox while the API is away.
UNSENT_BYTES = 2**20


class Tail:
    """Reads a growing file. A reader that goes on from here misses nothing that it is not told of."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._skipped = 0

    def take(self, limit_bytes: int) -> list[LogChunk]:
        """What is new, at most so much; what lags behind too far is left out."""
        chunks: list[LogChunk] = []
        with suppress(OSError), self._path.open("rb") as output:
            while limit_bytes > 0 and (content := self._next(output.fileno(), limit_bytes)):
                chunks.append(LogChunk.of(content, self._skipped))
                self._skipped = 0
                limit_bytes -= len(content)
        return chunks

    def rest(self) -> list[LogChunk]:
        """When nothing more is written: the end, and the beginning if it has not been taken."""
        return self.take(HEAD_BYTES + LAG_BYTES)

    def _next(self, file: int, limit_bytes: int) -> bytes:
        skipped = os.fstat(file).st_size - LAG_BYTES - self._position
        if self._position >= HEAD_BYTES and skipped > 0:
            self._position += skipped
            self._skipped += skipped
        head_bytes = HEAD_BYTES - self._position
        at_most = min(limit_bytes, LOG_CHUNK_BYTES, head_bytes if head_bytes > 0 else limit_bytes)
        content = os.pread(file, at_most, self._position)
        self._position += len(content)
        return content


class Budget:
    """Bytes that may be sent: HEAD_BYTES at first, then RATE_BYTES_S, saved up to HEAD_BYTES.

    At most UNSENT_BYTES are on their way to the API at a time.
    """

    def __init__(self) -> None:
        self._saved_bytes = float(HEAD_BYTES)
        self._on_their_way: deque[tuple[int, int]] = deque()

    def left_bytes(self, sent_seq: int) -> int:
        while self._on_their_way and self._on_their_way[0][0] <= sent_seq:
            self._on_their_way.popleft()
        unsent_bytes = sum(size_bytes for _, size_bytes in self._on_their_way)
        return int(min(self._saved_bytes, UNSENT_BYTES - unsent_bytes))

    def earn(self, duration_s: float) -> None:
        self._saved_bytes = min(HEAD_BYTES, self._saved_bytes + RATE_BYTES_S * duration_s)

    def spend(self, size_bytes: int, last_seq: int) -> None:
        self._saved_bytes -= size_bytes
        self._on_their_way.append((last_seq, size_bytes))


async def pass_on(
    path: Path,
    ended: asyncio.Event,
    store: Callable[[Sequence[LogChunk]], Awaitable[int]],
    sent_seq: Callable[[], int],
) -> None:
    """Until the process has ended and all that counts of its output is stored; `store` gives the last number."""
    tail, budget = Tail(path), Budget()
    while not ended.is_set():
        await first_of(ended.wait(), asyncio.sleep(EVERY_S))
        budget.earn(EVERY_S)
        if chunks := await asyncio.to_thread(tail.take, budget.left_bytes(sent_seq())):
            budget.spend(sum(len(chunk.content()) for chunk in chunks), await store(chunks))
    await store(await asyncio.to_thread(tail.rest))
