"""How an attempt begins, whoever owns its loop: what its checkpoints say of it, and what it tells first."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ops_contract.jobs import Execution
from ops_contract.lifecycle import Phase
from ops_contract.reports import Note, Resolved, Started
from relight.manifest import Manifest
from relight.training import numerics
from relight.training.source import source_digest


def threads(asked: int | None, before: Manifest | None, cores: int) -> int:
    """Sums depend on the number of threads: what the first attempt's slot decided holds for its successors."""
    frozen = before.numerics.get("threads") if before else None
    return asked or int(frozen or cores)


def manifest(code_files: dict[str, str], **about: Any) -> Manifest:
    """That of the attempt's checkpoints, but for where they are taken and their files."""
    code: dict[str, Any] = {"code_digest": source_digest(code_files), "code_files": code_files}
    return Manifest(step=0, epoch=0, phase=Phase.UPDATE, files={}, **code, **about)


def started(
    about: Manifest,
    before: Manifest | None,
    start_step: int,
    knobs: Execution,
    device: torch.device,
    inexact: Sequence[str],
    more: Mapping[str, str | None] = {},
    resolved: Resolved | None = None,
) -> Started:
    """`before` is the manifest of what it goes on from, `inexact` reasons why it is not exact, `more` for people."""
    return Started(
        trainer_pid=os.getpid(),
        start_step=start_step,
        exactness=numerics.exactness(knobs, about.numerics, before, list(inexact)),
        environment={
            **about.numerics,  # of a gang more than what `environment` has
            **numerics.environment(device),
            "code_digest": about.code_digest,
            **more,
        },
        resolved=resolved,
    )


def inexact_operator(reason: str) -> Note:
    return Note(message=f"exactness is best effort: {reason}", inexact=reason)
