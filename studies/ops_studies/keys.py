"""The key of a child: SHA-256 of all that decides what it gives, so that nothing stale is taken for it."""

import hashlib
from collections.abc import Mapping

from ops_contract.jobs import Job
from ops_contract.wire import canonical

# Raised where the same job comes to mean something else: what was run under the one before is then run again.
VERSION = 1


def content_key(job: Job, digests: Mapping[str, str | None], repeat: int = 0) -> str:
    """`digests` are those of code and data, None where nobody can say one.

    Where the same job is to be run several times, `repeat` tells them apart.
    """
    irrelevant = {"timeout_s"} | ({"strategy"} if job.execution.devices == 1 else set())
    content = job.model_dump(
        mode="json",
        exclude={"study": True, "until_step": True, "code": True, "execution": irrelevant, "resources": {"nodes"}},
    )
    content |= {
        "secrets": sorted(set(job.secrets)),
        "snapshot": job.code.sha256 if job.code else None,  # what git said of it is for people
        "digests": dict(digests),
        "repeat": repeat,
        "version": VERSION,
    }
    return hashlib.sha256(canonical(content).encode()).hexdigest()
