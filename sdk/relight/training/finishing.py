"""`Workload.finish`: its files are published, its scores are reported."""

from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import torch
from pydantic import ValidationError
from torch import nn

from ops_contract.reports import ArtifactSaved, Metrics, Report, Series
from relight.publish import MAX_ARTIFACTS, file_artifact, hashed_tree, published_directory
from relight.training.faults import TrainingFault
from relight.training.randomness import Stream, derive, seed_everything
from relight.training.team import Team
from relight.workload import Workload

PREFIX = "final/"


def finish(
    workload: Workload[Any], model: nn.Module, root: Path, operation_id: UUID, attempt: int, step: int
) -> list[Report]:
    """Call it, publish `<operation>/<attempt>-<step>-finish/` as a checkpoint is, and say what there is.

    Scores are metrics of `step`, the number of steps done: an attempt that does this again starts there, so that of
    two the later one counts. Raises TrainingFault, OSError, and what the workload raises; then nothing is left.
    """
    if type(workload).finish is Workload.finish:
        return []
    name = f"{attempt}-{step}-finish"
    with published_directory(root, str(operation_id), name):
        out = root / str(operation_id) / f"{name}.tmp"
        seed_everything(derive(workload.env.seed, Stream.FINISH, step))
        model.eval()
        with torch.no_grad():
            scores = workload.finish(model, out)
        try:
            series = _series(scores, step)
            saved = _saved(out, operation_id, name, step)
        except (TypeError, ValueError) as error:  # pydantic's is a ValueError
            raise TrainingFault("finish_refused", _why(error), permanent=True) from error
    if not saved:
        (root / str(operation_id) / name).rmdir()
    return [*saved, *([Metrics(series=series)] if series else [])]


def finish_together(
    team: Team, workload: Workload[Any], model: nn.Module, root: Path, operation_id: UUID, attempt: int, step: int
) -> list[Report]:
    """By every rank, as a model that is divided among them needs it; what rank 0's leaves is published."""
    if team.leads:
        return finish(workload, model, root, operation_id, attempt, step)
    with TemporaryDirectory(prefix="relight-finish-") as scratch:
        finish(workload, model, Path(scratch), operation_id, attempt, step)
    return []


def _series(scores: Mapping[str, float] | None, step: int) -> list[Series]:
    if not isinstance(scores, Mapping | None):
        raise TypeError(f"it gives a {type(scores).__name__}; return a dict of scores")
    return [Series.of(f"{PREFIX}{name}", [(step, float(value))]) for name, value in (scores or {}).items()]


def _saved(out: Path, operation_id: UUID, name: str, step: int) -> list[ArtifactSaved]:
    files = list(hashed_tree(out))
    if len(files) > MAX_ARTIFACTS:
        raise ValueError(f"it left {len(files)} files; at most {MAX_ARTIFACTS} are kept: put them into an archive")
    return [
        file_artifact(operation_id, name, path, step, entry.size_bytes, _sha256(out / path)) for path, entry in files
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _why(error: Exception) -> str:
    said = "; ".join(str(e["msg"]) for e in error.errors()) if isinstance(error, ValidationError) else str(error)
    return (
        f"finish() was called, but what it left cannot be kept: {said}. The training is done: mend finish(), then "
        "resume with --accept-changes, which calls it again"
    )
