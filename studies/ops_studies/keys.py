"""The key of a child: SHA-256 of all that decides what it gives, so that nothing stale is taken for it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ops_contract.jobs import Job

# Raised where the same job comes to mean something else: what was run under the one before is then run again.
VERSION = 1


def content_key(job: Job, digests: Mapping[str, str | None], repeat: int = 0) -> str:
    """`digests` are those of code and data, None where nobody can say one.

    Where the same job is to be run several times, `repeat` tells them apart.
    """
    content = job.model_dump(mode="json", exclude={"study", "until_step", "code"})
    content |= {
        "secrets": sorted(set(job.secrets)),
        "snapshot": job.code.sha256 if job.code else None,  # what git said of it is for people
        "digests": dict(digests),
        "repeat": repeat,
        "version": VERSION,
    }
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON that equal values share: sorted names, and 1.0 written as 1, as in RFC 8785.

    A database or a browser that the job went through may have made one of the other.
    """
    return json.dumps(_numbers_as_one(value), sort_keys=True, separators=(",", ":"))


def _numbers_as_one(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _numbers_as_one(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers_as_one(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
