"""How the loops beside the API go on."""

import asyncio
from collections.abc import Awaitable, Callable
from logging import Logger
from typing import NoReturn


async def forever(tick: Callable[[], Awaitable[None]], pause_s: float, log: Logger) -> NoReturn:
    """A tick, a pause, until cancelled. One that fails is logged, and the next one comes all the same."""
    while True:
        try:
            await tick()
        except Exception:
            log.exception("%s: tick failed; trying again", log.name.rpartition(".")[2])
        await asyncio.sleep(pause_s)
