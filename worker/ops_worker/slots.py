"""A slot: one place for one trainer, kept warm, or for one process of another kind beside it."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

from ops_contract.agents import SlotOffer
from ops_contract.pipe import Hello
from ops_contract.wire import PIPE_VERSION
from ops_worker.confinement import trainer_environment
from ops_worker.trainers import PipeGarbage, Trainer, prune_logs
from ops_worker.waiting import Backoff

log = logging.getLogger(__name__)

HELLO_S = 300.0
RESPAWN_CAP_S = 30.0
DEATHS_TOLERATED = 3


class Slot:
    """Keeps one trainer ready, lends it for one job, then replaces it. A job that needs another process gets that.

    `environ` shows its processes the slot's device. Trainers alone have `gang_fd`, the socket of the offer's port.
    """

    def __init__(
        self,
        offer: SlotOffer,
        command: Sequence[str],
        logs: Path,
        log_prefix: str,
        environ: Mapping[str, str],
        gang_fd: int,
    ) -> None:
        self.offer = offer
        self.environ = environ
        self.ready = asyncio.Event()
        self.failing = asyncio.Event()
        self._command = command
        self._environment = trainer_environment(os.environ, offer.cores) | dict(environ)
        self._gang_fd = gang_fd
        self._logs = logs
        self._log_prefix = log_prefix
        self._spawned = 0
        self._warm: Trainer | None = None
        self._returned = asyncio.Event()
        self._backoff = Backoff(RESPAWN_CAP_S, first_s=0.5)
        self._early_deaths = 0
        self._last_death = ""

    @property
    def trouble(self) -> str | None:
        """Why no job should come here; None while all is well."""
        return self._last_death if self.failing.is_set() else None

    async def keep_warm(self) -> None:
        """Until cancelled, which kills the trainer."""
        while True:
            try:
                async with self.trainer() as trainer:
                    try:
                        await self._use(trainer)
                    finally:
                        self.ready.clear()
            except OSError as error:
                await self._died_early(f"cannot be started: {error}")

    @contextlib.contextmanager
    def lend(self) -> Iterator[Trainer]:
        """The warm trainer of a slot that is `ready`; it is killed on leaving, if it has not ended."""
        assert self._warm is not None
        self._returned.clear()
        self.ready.clear()
        try:
            yield self._warm
        finally:
            self._warm.kill()
            self._returned.set()

    def trainer(self, environ: Mapping[str, str] = {}) -> contextlib.AbstractAsyncContextManager[Trainer]:
        """A new trainer, which has not greeted yet; on leaving it is killed and gone. Entering raises OSError.

        The warm one may stay beside it: it holds memory, but no device.
        """
        return self._process(self._command, environ, self._gang_fd)

    def runner(self, command: Sequence[str]) -> contextlib.AbstractAsyncContextManager[Trainer]:
        """As `trainer`, of a command: what gangs need is none of it."""
        return self._process(command, {}, None)

    @contextlib.asynccontextmanager
    async def _process(
        self, command: Sequence[str], environ: Mapping[str, str], gang_fd: int | None
    ) -> AsyncIterator[Trainer]:
        self._spawned += 1
        self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        prune_logs(self._logs)
        path = self._logs / f"{self._log_prefix}-{self.offer.index}-{self._spawned}.log"
        trainer = await Trainer.spawn(command, {**self._environment, **environ}, path, gang_fd)
        try:
            yield trainer
        finally:
            trainer.kill()
            await trainer.ended()
            trainer.close()

    async def _use(self, trainer: Trainer) -> None:
        problem = await hello(trainer)
        if problem is not None:
            trainer.kill()
            return await self._died_early(f"{problem}; its output ends:\n{trainer.log_tail()}")
        self._early_deaths = 0
        self.failing.clear()
        self._backoff.reset()
        self._warm = trainer
        self._returned.set()
        self.ready.set()
        await trainer.ended()
        await self._returned.wait()

    async def _died_early(self, problem: str) -> None:
        self._early_deaths += 1
        self._last_death = f"the trainer of slot {self.offer.index} {problem}"
        if self._early_deaths >= DEATHS_TOLERATED:
            self.failing.set()
        tell = log.error if self.failing.is_set() else log.warning
        tell("%s (%d times in a row)", self._last_death, self._early_deaths)
        await self._backoff.pause()


async def hello(trainer: Trainer) -> str | None:
    """What is wrong with its greeting, or None."""
    try:
        async with asyncio.timeout(HELLO_S):
            messages = await trainer.receive()
    except TimeoutError:
        return f"was not ready after {HELLO_S:.0f} s"
    except PipeGarbage as garbage:
        return f"sent {garbage}"
    if not messages:
        return "ended before it was ready"
    if not isinstance(messages[0], Hello) or messages[0].version != PIPE_VERSION:
        return f"greeted with {messages[0]!r:.200}; this agent speaks version {PIPE_VERSION}"
    return None
