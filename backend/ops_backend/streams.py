"""Server-sent events: one reader a backend for all streams, and what each stream still has to catch up with."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import anyio
from sqlalchemy.ext.asyncio import AsyncSession

from ops_backend.database import Sessions
from ops_backend.store import queries, stream
from ops_backend.store.stream import Mark, Message, News, Position, Wanted
from ops_backend.store.transitions import not_found
from ops_contract.errors import ErrorCode, OpsError

log = logging.getLogger(__name__)

# What waits for one client, which then comes back with its position. A single message may be longer.
WAITING_MESSAGES = 500
WAITING_BYTES = 2**20
# Proxies close what is silent for a minute or half of it.
COMMENT_S = 15.0
COMMENT = b":\n\n"
# How soon a client comes back when the connection is lost.
RETRY = b"retry: 1000\n\n"


class Streams:
    """Reads while somebody watches: per tick so many statements, however many operations and streams there are."""

    def __init__(self, sessions: Sessions, poll_s: float, limit: int) -> None:
        self.poll_s = poll_s
        self._sessions = sessions
        self._limit = limit
        self._watched: dict[UUID, _Watched] = {}
        self._some = asyncio.Event()
        self._reading = asyncio.Lock()
        self._closed = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._some.wait()
            try:
                await self.tick()
            except Exception as error:
                log.warning("streams: reading failed, trying again: %r", error)
            await asyncio.sleep(self.poll_s)

    async def open(self, id: UUID, after: Position | None) -> "Stream":
        """A stream from `after` on, or from now. Raises 404, 422 for a position that is not one yet, 503."""
        async with self._snapshot() as session:
            marks = await stream.marks(session, [id])
            summaries = await queries.summaries(session, [id])
        if not marks:
            raise not_found(id)
        now = marks[id]
        if after and not now.position.covers(after):
            raise OpsError(ErrorCode.INVALID, f"after: the operation is at {now.position}; start without it")
        self._have_room()
        watched = self._watched.setdefault(id, _Watched(id, now, summaries[id].model_dump_json()))
        opened = Stream(self, watched, after)
        watched.streams.add(opened)
        self._some.set()
        try:
            # From another backend, whose reader was ahead of ours.
            while after and not watched.deleted and not watched.mark.position.covers(after):
                await self.tick()
        except BaseException:
            self.leave(opened)
            raise
        return opened

    def leave(self, gone: "Stream") -> None:
        watched = gone.watched
        watched.streams.discard(gone)
        if not watched.streams and self._watched.get(watched.id) is watched:
            del self._watched[watched.id]
        if not self._watched:
            self._some.clear()

    def close(self) -> None:
        """End all, for good: clients come back to the next backend."""
        self._closed = True
        for watched in self._watched.values():
            for opened in watched.streams:
                opened.end()

    async def tick(self) -> None:
        """Read what is new of all that is watched, and give it to those that have caught up."""
        async with self._reading:
            seen = dict(self._watched)
            async with self._snapshot() as session:
                marks = await stream.marks(session, list(seen))
                moved = [Wanted(id, w.mark, marks[id]) for id, w in seen.items() if id in marks and w.mark != marks[id]]
                news = await stream.news(session, moved) if moved else {}
                summaries = await queries.summaries(session, list(news)) if news else {}
            for id in news:
                whole = news[id].reached == marks[id]
                seen[id].publish(news[id], summaries[id].model_dump_json() if whole else None)
            for id in seen.keys() - marks.keys():
                seen[id].publish_deleted()
                self._watched.pop(id, None)

    async def read(self, wanted: Wanted) -> News:
        async with self._sessions.begin() as session:
            return (await stream.news(session, [wanted]))[wanted.id]

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[AsyncSession]:
        """One for all statements, so that no progress is ahead of the mark it is told with."""
        async with self._sessions.begin() as session:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            yield session

    def _have_room(self) -> None:
        if self._closed:
            raise OpsError(ErrorCode.UNAVAILABLE, "this API is ending; try again in a moment")
        if sum(len(watched.streams) for watched in self._watched.values()) >= self._limit:
            message = f"there are {self._limit} streams already, all that OPS_MAX_STREAMS allows; close one, or poll"
            raise OpsError(ErrorCode.UNAVAILABLE, message)


class _Watched:
    """An operation, up to where all streams that have caught up have got it."""

    def __init__(self, id: UUID, mark: Mark, summary: str) -> None:
        self.id = id
        self.mark = mark
        self.summary = summary
        self.deleted = False
        self.streams: set[Stream] = set()

    def publish(self, news: News, summary: str | None) -> None:
        """`summary` is None where the page ends before it."""
        self.mark = news.reached
        frames = [_frame(message) for message in news.messages]
        if summary and summary != self.summary:
            self.summary = summary
            frames.append(_frame(self.progress))
        for opened in self.streams:
            if frames and opened.caught_up:
                opened.put(frames)

    def publish_deleted(self) -> None:
        self.deleted = True
        for opened in self.streams:
            opened.wake()

    @property
    def progress(self) -> Message:
        return Message(self.mark.position, "progress", self.summary)

    @property
    def farewell(self) -> Message:
        return Message(self.mark.position, "deleted", f'{{"id":"{self.id}"}}')


class Stream:
    """One client's. `scope` is cancelled when it has to end."""

    def __init__(self, streams: Streams, watched: _Watched, after: Position | None) -> None:
        self.watched = watched
        self.scope = anyio.CancelScope()
        self.caught_up = False
        self._streams = streams
        self._after = after
        self._waiting: list[bytes] = []
        self._some = asyncio.Event()

    async def frames(self) -> AsyncIterator[bytes]:
        """What to send: bytes of one or several messages. Holds no connection to the database while it waits."""
        yield RETRY
        if self._after:
            async for frame in self._missed(Mark(self._after, None)):
                yield frame
        # Nothing is published between the last look and this.
        self.caught_up = True
        yield _frame(self.watched.progress)
        while not self.watched.deleted:
            with anyio.move_on_after(COMMENT_S):
                await self._some.wait()
            yield self._take() or COMMENT
        yield self._take() + _frame(self.watched.farewell)

    def put(self, frames: list[bytes]) -> None:
        """To be sent; a client for which too much waits already is dropped."""
        if len(self._waiting) > WAITING_MESSAGES or sum(map(len, self._waiting)) > WAITING_BYTES:
            log.info("stream dropped: its client is too slow", extra={"operation_id": self.watched.id})
            self.end()
            return
        self._waiting += frames
        self.wake()

    def wake(self) -> None:
        self._some.set()

    def end(self) -> None:
        self._waiting.clear()
        self.scope.cancel()

    def close(self) -> None:
        self._streams.leave(self)

    async def _missed(self, reached: Mark) -> AsyncIterator[bytes]:
        """All until the position that the operation is watched from; where its attempt begins is told anew."""
        while True:
            try:
                page = await self._streams.read(Wanted(self.watched.id, reached, self.watched.mark))
            except Exception as error:
                log.warning("streams: reading failed, trying again: %r", error)
                yield COMMENT
                await asyncio.sleep(self._streams.poll_s)
                continue
            reached = page.reached
            if page.messages:
                yield b"".join(map(_frame, page.messages))
            if reached.position == self.watched.mark.position:
                return

    def _take(self) -> bytes:
        taken = b"".join(self._waiting)
        self._waiting.clear()
        self._some.clear()
        return taken


def _frame(message: Message) -> bytes:
    """Our JSON has no line break, so one `data` line is enough."""
    return f"id: {message.position}\nevent: {message.event}\ndata: {message.data}\n\n".encode()
