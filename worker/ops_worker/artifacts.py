"""The files that a job asked to keep, published when it has ended. Without torch."""

import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from ops_contract.lifecycle import Outcome
from ops_contract.pipe import RunJob
from ops_contract.reports import ArtifactSaved, Fault, Finish, Note
from relight.pipe import AgentPipe
from relight.publish import (
    DISK_FULL,
    MAX_ARTIFACTS,
    file_artifact,
    make_directory,
    published_directory,
    sync,
    write_file,
)

_READ_BYTES = 2**20


def keep(job: RunJob, step: int, agent: AgentPipe, finish: Finish) -> Finish:
    """Publish what the job's globs match, and report it. Returns `finish`, or a failure when that did not work."""
    globs = job.start.job.artifacts
    if not globs:
        return finish
    directory = Path(job.directory) / job.start.job.workdir
    try:
        files, notes = matching(directory, globs)
        for artifact in published(job, step, directory, files, agent):
            agent.report(artifact)
    except OSError as error:
        message = f"The artifacts could not be kept: {error.strerror or error}."
        if finish.outcome is not Outcome.COMPLETED:
            agent.report(Note(message=message))
            return finish
        code = "disk_full" if error.errno in DISK_FULL else "artifacts_not_kept"
        advice = "It ran to its end all the same; look at the storage root, then resume, which runs it again."
        return Finish(outcome=Outcome.FAILED, error=Fault(code=code, message=f"{message} {advice}"))
    for note in notes:
        agent.report(Note(message=note))
    return finish


def matching(directory: Path, globs: Iterable[str]) -> tuple[list[PurePosixPath], list[str]]:
    """Regular files below `directory`, relative to it, and what to say of the rest. A directory is all in it."""
    inside = directory.resolve()
    matches = {pattern: list(_files(directory, pattern)) for pattern in globs}
    notes = [f"artifacts: no file matches {pattern!r}" for pattern, files in matches.items() if not files]
    paths = dict.fromkeys(path for files in matches.values() for path in files)
    good = [p for p in paths if p.resolve().is_relative_to(inside) and _nameable(str(p.relative_to(directory)))]
    kept = good[:MAX_ARTIFACTS]
    if left_out := [str(path.relative_to(directory)) for path in paths if path not in set(kept)]:
        why = (
            f"over {MAX_ARTIFACTS} files, a link out of the working directory, or a name that is long or not plain text"
        )
        notes.append(f"artifacts: {len(left_out)} files are not kept, such as {left_out[0]!a:.200} ({why})")
    return [PurePosixPath(path.relative_to(directory)) for path in kept], notes


def _files(directory: Path, pattern: str) -> Iterator[Path]:
    try:
        matches = sorted(directory.glob(pattern))
    except ValueError:  # such as `**.pt`: nothing is called so
        return
    for match in matches:
        below = sorted(match.rglob("*")) if match.is_dir() and not match.is_symlink() else [match]
        yield from (path for path in below if path.is_file())


def _nameable(path: str) -> bool:
    """Whether the contract has room for it, with what stands before it in the storage root."""
    try:
        file_artifact(UUID(int=0), f"{2**31}-{2**63 - 1}-files", path, 0, 0, "0" * 64)
    except ValidationError:
        return False
    return True


def published(
    job: RunJob, step: int, directory: Path, files: list[PurePosixPath], agent: AgentPipe
) -> list[ArtifactSaved]:
    """All of them or none."""
    if not files:
        return []
    operation, name = job.start.operation_id, f"{job.start.attempt}-{step}-files"
    with published_directory(Path(job.storage_root), str(operation), name) as target:
        parents = sorted({parent for file in files for parent in file.parents if parent.name})
        for parent in parents:
            os.close(make_directory(target, str(parent)))
        saved = []
        for file in files:
            whole = sha256()
            entry = write_file(target, str(file), _parts(directory / file, whole, agent))
            saved.append(file_artifact(operation, name, str(file), step, entry.size_bytes, whole.hexdigest()))
        for parent in parents:
            sync(str(parent), above=target)
        return saved


def _parts(file: Path, whole: Any, agent: AgentPipe) -> Iterator[memoryview]:
    with file.open("rb") as source:
        while part := source.read(_READ_BYTES):
            agent.alive()
            whole.update(part)
            yield memoryview(part)
