"""What a trainer of this installation can run, asked of a throw-away child: the agent imports no workload."""

import asyncio
import logging
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from ops_contract.agents import VALIDATED_MAX_BYTES, Validated
from ops_contract.pipe import Description, RunJob, line
from ops_contract.wire import PIPE_VERSION
from ops_worker.confinement import trainer_environment
from relight.interpreter import install_command

log = logging.getLogger(__name__)

# An import of torch from a cold network file system takes minutes.
DESCRIBE_S = 300.0
# Schemas of all that is installed; the API takes no larger registration.
DESCRIBE_MAX_BYTES = 16 * 2**20
_LAST_WORDS_BYTES = 2000
_READ_BYTES = 2**16


class DescribeError(Exception):
    """The workloads are not known; the message has the child's last words."""


async def describe(command: Sequence[str]) -> Description:
    """Raises DescribeError."""
    try:
        with tempfile.TemporaryDirectory(prefix="relight-describe-") as directory:
            async with asyncio.timeout(DESCRIBE_S):
                code, output, last_words = await _ask_child(
                    [*command, "--describe"], b"", Path(directory), DESCRIBE_MAX_BYTES
                )
    except TimeoutError:
        raise DescribeError(f"`{' '.join(command)} --describe` took more than {DESCRIBE_S:.0f} s") from None
    try:
        if code == 0:
            if last_words:
                log.warning("workloads: %s", last_words)
            found = Description.model_validate_json(output)
            if found.version != PIPE_VERSION:
                here = found.versions.get("relight", "an unknown version")
                advice = install_command(command[0])
                raise DescribeError(f"{command[0]} has relight {here}, which speaks another language; {advice}")
            return found
    except ValidationError:
        last_words = f"it has another version of Relight; {install_command(command[0])}"
    raise DescribeError(f"`{' '.join(command)} --describe` ended with code {code}: {last_words}")


async def validate(command: Sequence[str], job: RunJob) -> Validated | None:
    """What the workload makes of the job; None when the child ends without saying it, or says too much."""
    code, output, last_words = await _ask_child(
        [*command, "--validate"], line(job), Path(job.directory), VALIDATED_MAX_BYTES
    )
    try:
        return Validated.model_validate_json(output)
    except ValidationError:
        log.warning("validating %s ended with code %s: %s", job.start.job.workload, code, last_words)
    return None


async def _ask_child(
    command: Sequence[str], question: bytes, directory: Path, max_bytes: int
) -> tuple[int | None, bytes, str]:
    """Its exit code, its answer and its last words; an answer of more than `max_bytes` is none.

    It is killed, with all that it started, when this is cancelled.
    """
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=trainer_environment(os.environ, cores=1),
        cwd=directory,
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_say(child.stdin, question))
            # To their ends, whatever comes: a child that is not read does not end.
            answer = group.create_task(_first_bytes(child.stdout, max_bytes + 1))
            last_words = group.create_task(_last_bytes(child.stderr, _LAST_WORDS_BYTES))
        await child.wait()
        if len(answer.result()) > max_bytes:
            return child.returncode, b"", f"it answered more than {max_bytes} bytes"
        return child.returncode, answer.result(), last_words.result().decode(errors="replace").strip()
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()


async def _say(to: asyncio.StreamWriter, question: bytes) -> None:
    with suppress(ConnectionError):  # it does not want to hear it
        to.write(question)
        await to.drain()
        to.close()


async def _first_bytes(stream: asyncio.StreamReader, count: int) -> bytes:
    found = bytearray()
    while more := await stream.read(_READ_BYTES):
        found += more[: count - len(found)]
    return bytes(found)


async def _last_bytes(stream: asyncio.StreamReader, count: int) -> bytes:
    last = b""
    while more := await stream.read(_READ_BYTES):
        last = (last + more)[-count:]
    return last
