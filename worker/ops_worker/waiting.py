"""Waiting: for the first of several things, longer after each failure, and without a log line for each."""

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def first_of(*things: Awaitable[Any]) -> None:
    """Until one of them is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(thing) for thing in things]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def in_daemon(call: Callable[[], T]) -> asyncio.Future[T]:
    """For what may never return: unlike `asyncio.to_thread` it takes no place in a pool, and keeps no process alive."""
    loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if not done.done():
            done.set_result(result) if error is None else done.set_exception(error)

    def run() -> None:
        result, problem = None, None
        try:
            result = call()
        except Exception as error:
            problem = error
        with suppress(RuntimeError):  # the loop is closed: nobody wants to know
            loop.call_soon_threadsafe(tell, result, problem)

    threading.Thread(target=run, daemon=True).start()
    return done


class Backoff:
    """Pauses that double up to a cap, with jitter, so that many workers do not come back in step."""

    def __init__(
        self, cap_s: float, first_s: float = 0.1, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._cap_s = cap_s
        self._first_s = first_s
        self._sleep = sleep
        self._failures = 0

    async def pause(self, at_least_s: float = 0.0) -> None:
        await self._sleep(max(self.next_s(), at_least_s))

    def next_s(self) -> float:
        """The length of the next pause, which counts as taken."""
        # The exponent is bounded: 2.0 ** 1024 overflows after some hours without an API.
        pause_s = min(self._cap_s, self._first_s * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return pause_s * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._failures = 0


class Trouble:
    """Says once what does not work, and once that it does again."""

    def __init__(self, what: str, log: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self._what = what
        self._log = log
        self._last = ""

    def now(self, problem: object) -> None:
        if str(problem) != self._last:
            self._log.warning("%s: %s; trying again", self._what, problem)
        self._last = str(problem)

    def over(self) -> None:
        if self._last:
            self._log.info("%s: works again", self._what)
        self._last = ""
