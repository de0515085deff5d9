"""What a trainer of this installation can run, asked of a throw-away child: the agent imports no workload."""

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

from pydantic import ValidationError

from ops_contract.agents import Validated
from ops_contract.pipe import Description, RunJob, line
from ops_contract.wire import PIPE_VERSION
from ops_worker.trainers import trainer_environment
from relight.interpreter import install_command

log = logging.getLogger(__name__)

# An import of torch from a cold network file system takes minutes.
DESCRIBE_S = 300.0


class DescribeError(Exception):
    """The workloads are not known; the message has the child's last words."""


async def describe(command: Sequence[str]) -> Description:
    """Raises DescribeError."""
    try:
        async with asyncio.timeout(DESCRIBE_S):
            code, output, errors = await ask_child([*command, "--describe"], b"", os.environ)
    except TimeoutError:
        raise DescribeError(f"`{' '.join(command)} --describe` took more than {DESCRIBE_S:.0f} s") from None
    last_words = errors.decode(errors="replace")[-2000:].strip()
    try:
        if code == 0:
            if last_words:
                log.warning("workloads: %s", last_words)
            return _same_version(Description.model_validate_json(output), command[0])
    except ValidationError:
        last_words = f"it has another version of Relight; {install_command(command[0])}"
    raise DescribeError(f"`{' '.join(command)} --describe` ended with code {code}: {last_words}")


async def validate(command: Sequence[str], job: RunJob) -> Validated | None:
    """What the workload makes of the job; None when the child ends without saying it."""
    code, output, errors = await ask_child([*command, "--validate"], line(job), os.environ, job.cores)
    try:
        return Validated.model_validate_json(output)
    except ValidationError:
        last_words = errors.decode(errors="replace")[-2000:].strip()
        log.warning("validating %s ended with code %s: %s", job.start.job.workload, code, last_words)
    return None


async def ask_child(
    command: Sequence[str], question: bytes, environ: Mapping[str, str], cores: int = 1
) -> tuple[int | None, bytes, bytes]:
    """Its exit code, stdout and stderr. It is killed, with all that it started, when this is cancelled."""
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=trainer_environment(environ, cores),
        start_new_session=True,
    )
    try:
        output, errors = await child.communicate(question)
        return child.returncode, output, errors
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()


def _same_version(description: Description, python: str) -> Description:
    if description.version != PIPE_VERSION:
        here = description.versions.get("relight", "an unknown version")
        raise DescribeError(f"{python} has relight {here}, which speaks another language; {install_command(python)}")
    return description
