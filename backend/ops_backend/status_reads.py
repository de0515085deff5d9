"""What every dashboard polls, one operation's status: always fresh, and one query for all who ask at the same time."""

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from typing import Any
from uuid import UUID

from ops_backend.database import Drivers
from ops_backend.store import polls
from ops_backend.store.transitions import not_found
from ops_backend.tags import Tagged

IDS_A_QUERY = 200
# While Postgres carries out one query, the answers of another are sent.
READERS = 2
# A connection serves one query after another for so long, then goes back to its pool, which looks whether it lives ...
TURN_S = 0.1
# ... and no longer than so long after the last of them.
LINGER_S = 0.05
# Of rows that have not changed since the bodies are not built again.
BODIES_KEPT = 256

Waiting = dict[UUID, list[asyncio.Future[Tagged]]]


class StatusReads:
    """A read joins only a query that is not sent yet, so no answer is older than its request.

    `READERS` queries at a time: those who come while they are under way are the next one's. Nothing is answered from
    memory.
    """

    def __init__(self, drivers: Drivers) -> None:
        self._drivers = drivers
        self._waiting: Waiting = {}
        self._asked = asyncio.Event()
        self._readers: list[asyncio.Task[None]] = []
        self._idle = 0
        self._bodies: dict[UUID, tuple[Any, Tagged]] = {}  # the longest unread first

    async def get(self, id: UUID) -> Tagged:
        """Raises 404, and whatever becomes of the query. A caller who goes away disturbs nobody."""
        answer: asyncio.Future[Tagged] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(id, []).append(answer)
        self._asked.set()
        if not self._idle:
            self._readers = [reader for reader in self._readers if not reader.done()]
            if len(self._readers) < READERS:
                self._readers.append(asyncio.create_task(self._read()))
        return await answer

    async def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader

    async def _read(self) -> None:
        """Until nobody asks any more."""
        while self._waiting:
            under_way: Waiting = {}
            served = False
            try:
                async with self._drivers.connection() as driver:
                    until_s = time.monotonic() + TURN_S
                    while time.monotonic() < until_s and await self._somebody_asks():
                        under_way = self._taken()
                        self._tell(under_way, await polls.rows(driver, list(under_way)))
                        under_way, served = {}, True
            except Exception as error:
                # A connection that had served may have died since, as after a restart: a fresh one tells.
                if served and not isinstance(error, TimeoutError):
                    self._put_back(under_way)
                else:
                    for answers in (under_way or self._taken()).values():
                        _tell(answers, error)

    async def _somebody_asks(self) -> bool:
        if not self._waiting:
            self._asked.clear()
            self._idle += 1
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_S):
                        await self._asked.wait()
            finally:
                self._idle -= 1
        return bool(self._waiting)

    def _taken(self) -> Waiting:
        """For a query that is sent now."""
        return {id: self._waiting.pop(id) for id in list(islice(self._waiting, IDS_A_QUERY))}

    def _put_back(self, waiting: Waiting) -> None:
        for id, answers in waiting.items():
            self._waiting.setdefault(id, []).extend(answers)

    def _tell(self, waiting: Waiting, rows: Iterable[Any]) -> None:
        found = {row["id"]: row for row in rows}
        for id, answers in waiting.items():
            _tell(answers, self._body(found[id]) if id in found else not_found(id))

    def _body(self, row: Any) -> Tagged | Exception:
        """A row that cannot be shown is nobody's trouble but its own readers'."""
        kept = self._bodies.pop(row["id"], None)
        if kept is None or kept[0] != row:
            try:
                kept = row, Tagged(polls.operation(row))
            except ValueError as error:
                return error
        self._bodies[row["id"]] = kept
        if len(self._bodies) > BODIES_KEPT:
            del self._bodies[next(iter(self._bodies))]
        return kept[1]


def _tell(answers: list[asyncio.Future[Tagged]], outcome: Tagged | Exception) -> None:
    for answer in answers:
        if answer.done():  # its reader has gone away
            continue
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)
