"""One trainer process: its start, its pipe, its output, its end."""

import asyncio
import contextlib
import ctypes
import fcntl
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from ops_contract.pipe import STACKS_SIGNAL, FromTrainer, RunJob, Stop, from_trainer, line

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 100 * 2**20
READ_BYTES = 2**20
DRAIN_S = 2.0
LOGS_KEPT = 50
TAIL_BYTES = 8192
# Of each trainer's output: the beginning, which says what was run, and the end, which says how it went.
LOG_HEAD_BYTES = 2**20
LOG_END_BYTES = 63 * 2**20

_BEFORE_IMPORTS = ("PYTHON", "OMP_", "MKL_", "LD_", "CUBLAS_WORKSPACE_CONFIG")

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class PipeGarbage(Exception):
    """What came is not a message of ours."""


def before_imports(environ: Mapping[str, str]) -> dict[str, str]:
    """What of a job's environment an interpreter and its libraries read once, when they start."""
    return {name: value for name, value in environ.items() if name.startswith(_BEFORE_IMPORTS)}


class Trainer:
    """A single-use child in a session of its own. It ends when the agent does: its command pipe ends then."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        commands: asyncio.WriteTransport,
        messages: asyncio.StreamReader,
        messages_transport: asyncio.ReadTransport,
        log_path: Path,
    ) -> None:
        self._process = process
        self._commands = commands
        self._messages = messages
        self._messages_transport = messages_transport
        self._unfinished: list[bytes] = []
        self._garbage: PipeGarbage | None = None
        self._dead = asyncio.Event()
        self._trimmed_to = LOG_HEAD_BYTES
        self.log_path = log_path
        threading.Thread(target=self._watch, args=(asyncio.get_running_loop(),), daemon=True).start()

    @classmethod
    async def spawn(
        cls, command: Sequence[str], environment: Mapping[str, str], log_path: Path, gang_fd: int | None = None
    ) -> Self:
        """Raises OSError. Call it from the main thread: PR_SET_PDEATHSIG kills when the *spawning thread* ends.

        It begins beside its log, in none of the agent's directories: the job brings its own. `gang_fd`, a listening
        socket, is inherited.
        """
        process, to_child, from_child = _spawn(command, environment, log_path, gang_fd)
        loop = asyncio.get_running_loop()
        messages = asyncio.StreamReader(limit=READ_BYTES)
        reading, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(messages), os.fdopen(from_child, "rb", 0)
        )
        commands, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(to_child, "wb", 0))
        return cls(process, commands, messages, reading, log_path)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: RunJob | Stop) -> None:
        """To a trainer that is gone it goes nowhere: its end is noticed elsewhere."""
        self._commands.write(line(message))

    async def receive(self) -> list[FromTrainer]:
        """What came since the last call; nothing at the end of the pipe. Raises PipeGarbage."""
        messages: list[FromTrainer] = []
        if self._garbage is None:
            try:
                for text in await self._lines():
                    messages.append(_parse(text))
            except PipeGarbage as garbage:
                self._garbage = garbage  # for the next call: what came before it counts
        if self._garbage is not None and not messages:
            raise self._garbage
        return messages

    def kill(self) -> None:
        """SIGKILL, to its whole process group; nothing happens to one that is reaped."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Wait for the end, kill what is left of its group, reap. Minus the signal, or the exit code."""
        await self._dead.wait()
        # While the zombie holds the number, it is nobody else's: this cannot hit a stranger.
        self.kill()
        status = self._process.wait()
        await self._group_gone()
        return status

    def close(self) -> None:
        self._commands.close()
        self._messages_transport.close()

    def log_tail(self) -> str:
        """The last lines that it or its children wrote to stdout or stderr; none if somebody removed the file."""
        with contextlib.suppress(FileNotFoundError), self.log_path.open("rb") as output:
            output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL_BYTES))
            # Postgres has no NUL in text.
            return output.read().decode(errors="replace").replace("\x00", "�")
        return ""

    def dump_stacks(self) -> None:
        """Have every thread's Python stack written to its output, whatever it is doing."""
        if self._process.returncode is None:
            os.kill(self._process.pid, STACKS_SIGNAL)

    def trim_log(self) -> None:
        """Free the middle of a long output on the disk, which reads as zeros from then on: offsets stay what they were.

        A file system that cannot (not ext4, xfs, btrfs, tmpfs, NFS 4.2) keeps it all.
        """
        with contextlib.suppress(OSError), self.log_path.open("r+b") as output:
            end = output.seek(0, os.SEEK_END) - LOG_END_BYTES
            if end > self._trimmed_to:
                _fallocate(output.fileno(), _PUNCH_HOLE | _KEEP_SIZE, LOG_HEAD_BYTES, end - LOG_HEAD_BYTES)
                self._trimmed_to = end

    async def _group_gone(self) -> None:
        """A command, killed with its runner, may take longer. Where init reaps no orphans, that is not waited for."""
        with contextlib.suppress(TimeoutError, ProcessLookupError, PermissionError):
            async with asyncio.timeout(DRAIN_S):
                while True:
                    os.killpg(self._process.pid, 0)  # the number is the group's as long as it has a member
                    await asyncio.sleep(0.01)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread, for there is no pidfd in every sandbox. WNOWAIT leaves the reaping to `ended`."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
            loop.call_soon_threadsafe(self._dead.set)

    async def _lines(self) -> list[bytes]:
        while chunk := await self._read():
            head, newline, tail = chunk.rpartition(b"\n")
            if newline:
                lines = b"".join([*self._unfinished, head]).split(b"\n")
                self._unfinished = [tail]
                return lines
            self._unfinished.append(chunk)
            if sum(map(len, self._unfinished)) > MAX_LINE_BYTES:
                raise PipeGarbage(f"a line of more than {MAX_LINE_BYTES} bytes")
        return []

    async def _read(self) -> bytes:
        """Nothing also when the process is gone and the pipe silent: a daemon it left behind may keep it open."""
        reading = asyncio.ensure_future(self._messages.read(READ_BYTES))
        death = asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait({reading, death}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({reading}, timeout=DRAIN_S)
            return reading.result() if reading.done() else b""
        finally:
            reading.cancel()
            death.cancel()


def prune_logs(directory: Path, keep: int = LOGS_KEPT) -> None:
    """Remove the oldest; what a living process still writes is locked and stays."""
    with contextlib.suppress(FileNotFoundError):  # another agent with this directory prunes too
        logs = sorted(directory.glob("*.log"), key=lambda path: path.stat().st_mtime)
        for path in logs[: max(0, len(logs) - keep)]:
            with path.open("rb") as output, contextlib.suppress(BlockingIOError):
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _spawn(
    command: Sequence[str], environment: Mapping[str, str], log_path: Path, gang_fd: int | None
) -> tuple[subprocess.Popen[bytes], int, int]:
    """The process, and our ends of its pipes: to write and to read. All our descriptors are closed in any child."""
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        commands_in, to_child = os.pipe()
        theirs.callback(os.close, commands_in)
        ours.callback(os.close, to_child)
        from_child, messages_out = os.pipe()
        theirs.callback(os.close, messages_out)
        ours.callback(os.close, from_child)
        output = os.open(log_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
        theirs.callback(os.close, output)
        # The child inherits the lock with the descriptor and holds it for as long as anybody writes there.
        fcntl.flock(output, fcntl.LOCK_EX)
        fds = {"--in-fd": commands_in, "--out-fd": messages_out} | ({} if gang_fd is None else {"--gang-fd": gang_fd})
        process = subprocess.Popen(
            [*command, *(word for name, fd in fds.items() for word in (name, str(fd)))],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            cwd=log_path.parent,
            pass_fds=tuple(fds.values()),
            start_new_session=True,
        )
        ours.pop_all()
        return process, to_child, from_child


def _parse(text: bytes) -> FromTrainer:
    try:
        return from_trainer.validate_json(text)
    except ValidationError as error:
        raise PipeGarbage(f"{error.errors(include_url=False)[0]['msg']}: {text[:200]!r}") from error
