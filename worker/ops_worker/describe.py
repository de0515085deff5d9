"""What a trainer of this installation can run, asked of a throw-away child: the agent imports no workload."""

import asyncio
import logging
import os
import subprocess
from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from ops_contract.agents import WorkloadOffer
from ops_worker.trainers import trainer_environment

log = logging.getLogger(__name__)

# An import of torch from a cold network file system takes minutes.
DESCRIBE_S = 300.0

_offers = TypeAdapter(list[WorkloadOffer])


class DescribeError(Exception):
    """The workloads are not known; the message has the child's last words."""


async def describe(command: Sequence[str]) -> list[WorkloadOffer]:
    """Raises DescribeError."""
    child = await asyncio.create_subprocess_exec(
        *command,
        "--describe",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=trainer_environment(os.environ, cores=1),
        start_new_session=True,
    )
    try:
        output, errors = await asyncio.wait_for(child.communicate(), DESCRIBE_S)
    except TimeoutError:
        raise DescribeError(f"`{' '.join(command)} --describe` took more than {DESCRIBE_S:.0f} s") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    last_words = errors.decode(errors="replace")[-2000:].strip()
    try:
        if child.returncode == 0:
            if last_words:
                log.warning("workloads: %s", last_words)
            return _offers.validate_json(output)
    except ValidationError as error:
        last_words = str(error)
    raise DescribeError(f"`{' '.join(command)} --describe` ended with code {child.returncode}: {last_words}")
