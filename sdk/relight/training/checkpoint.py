"""Checkpoints on disk: published whole or not at all, verified while they are read.

`<root>/<operation>/<attempt>-<step>/` (`-evaluate` appended when an evaluation is next) holds `state.json`,
`state.safetensors` and `manifest.json`; of tensors that are divided among ranks, `shards/` has each rank's part in a
file of its own. An attempt writes below its own number only, so one that was fenced and still runs touches no file of
its successor.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ops_contract.agents import CheckpointRef
from ops_contract.lifecycle import CheckpointType, Phase
from ops_contract.reports import CheckpointSaved
from relight.manifest import MANIFEST, CheckpointCorrupt, FileEntry, Manifest, opened, read_chunks, verify_files
from relight.publish import hashed_tree, make_directory, published_directory, sync, write_file
from relight.training import tensorfile
from relight.training.codec import CodecError, Encoded, decode
from relight.training.state import Cursor
from relight.training.team import Team

DOCUMENT = "state.json"
TENSORS = "state.safetensors"
FILES = "files"  # of a LoopWorkload
SHARDS = "shards"  # of tensors that are divided among ranks


@dataclass(frozen=True)
class Published:
    """`path` is relative to the storage root; `size_bytes` counts every file, the manifest too."""

    path: str
    size_bytes: int
    manifest_sha256: str

    def saved(self, why: CheckpointType, cursor: Cursor, monitored: float | None) -> CheckpointSaved:
        """The report that commits it."""
        return CheckpointSaved(
            checkpoint_id=uuid4(),
            checkpoint_type=why,
            step=cursor.step,
            epoch=cursor.epoch,
            phase=cursor.phase,
            path=self.path,
            size_bytes=self.size_bytes,
            manifest_sha256=self.manifest_sha256,
            monitored=monitored,
        )


def ref_to(saved: CheckpointSaved) -> CheckpointRef:
    return CheckpointRef.model_validate(saved.model_dump(include=set(CheckpointRef.model_fields)))


def at(about: Manifest, cursor: Cursor) -> Manifest:
    """The manifest of an attempt's checkpoint that is taken there, but for its files."""
    return about.model_copy(update={"step": cursor.step, "epoch": cursor.epoch, "phase": cursor.phase})


def publish(root: Path, about: Manifest, state: Encoded) -> Published:
    """Write, fsync, rename, fsync the parent: after a crash at any point the directory is whole or is not there.

    `about` is the manifest but for its files. Raises OSError; what was written is then removed.
    """
    name = _directory_name(about)
    with published_directory(root, str(about.operation_id), name) as directory:
        return _with_manifest(directory, about, name, _state_files(directory, state))


def publish_files(root: Path, about: Manifest, write: Callable[[Path], object]) -> Published:
    """The same with files of the user's own: `write` makes them in the directory that it gets.

    Raises ValueError for what is no regular file or has a name that a manifest cannot hold.
    """
    name = _directory_name(about)
    with published_directory(root, str(about.operation_id), name) as directory:
        written = root / str(about.operation_id) / f"{name}.tmp" / FILES
        os.close(make_directory(directory, FILES))
        write(written)
        files = {f"{FILES}/{path}": entry for path, entry in hashed_tree(written)}
        return _with_manifest(directory, about, name, files)


def _state_files(directory: int, state: Encoded) -> dict[str, FileEntry]:
    return {
        DOCUMENT: write_file(directory, DOCUMENT, [memoryview(state.document)]),
        TENSORS: write_file(directory, TENSORS, tensorfile.chunks(state.tensors)),
    }


def _with_manifest(directory: int, about: Manifest, name: str, files: Mapping[str, FileEntry]) -> Published:
    manifest = Manifest.model_validate(about.model_dump() | {"files": files})
    raw = manifest.model_dump_json(indent=1).encode()
    write_file(directory, MANIFEST, [memoryview(raw)])
    return Published(f"{about.operation_id}/{name}", manifest.size_bytes + len(raw), sha256(raw).hexdigest())


@contextmanager
def published_shards(root: Path, about: Manifest) -> Iterator[Callable[[Encoded, Mapping[str, FileEntry]], Published]]:
    """`publish` in two steps: others write files to `shards_directory`, then it is called with their entries.

    It has its name when the block is done; if that fails nothing is left.
    """
    name = _directory_name(about)
    with published_directory(root, str(about.operation_id), name) as directory:
        os.close(make_directory(directory, SHARDS))

        def commit(state: Encoded, shards: Mapping[str, FileEntry]) -> Published:
            files = _state_files(directory, state) | {f"{SHARDS}/{file}": entry for file, entry in shards.items()}
            sync(shards_directory(root, about))
            return _with_manifest(directory, about, name, files)

        yield commit


def shards_directory(root: Path, about: Manifest) -> Path:
    """While it is written."""
    return root / str(about.operation_id) / f"{_directory_name(about)}.tmp" / SHARDS


def restore(root: Path, ref: CheckpointRef, team: Team | None = None) -> tuple[Manifest, Any]:
    """The manifest and the state tree, every byte checked against the manifest's hashes as it is read.

    What was divided among ranks is `Sharded` in it; the files of that are verified each by one of the ranks of `team`.
    Raises CheckpointMissing, CheckpointCorrupt, and OSError when the storage cannot be read now.
    """
    with opened(root, ref) as (directory, manifest):
        files = manifest.files
        shards = {name: entry for name, entry in files.items() if name.startswith(f"{SHARDS}/")}
        contents = {name: _read(directory, name, files[name]) for name in files.keys() - shards.keys()}
        if shards:
            _verify_shards(root / ref.path / SHARDS, directory, shards, team or Team())
    try:
        document = bytes(tensorfile.raw_bytes(contents[DOCUMENT]))
        return manifest, decode(document, tensorfile.parse(contents[TENSORS]))
    except (CodecError, tensorfile.TensorFileError, KeyError) as error:
        raise CheckpointCorrupt(f"{ref.path}: {error}") from error


def _verify_shards(where: Path, directory: int, shards: Mapping[str, FileEntry], team: Team) -> None:
    """Each rank those of its turn; all raise CheckpointCorrupt when one finds anything."""
    found = None
    try:
        if others := sorted({f"{SHARDS}/{name}" for name in os.listdir(where)} - shards.keys()):
            raise CheckpointCorrupt(f"{others[0]} is none of its files")
        verify_files(directory, sorted(shards.items())[team.rank :: team.world_size])
    except CheckpointCorrupt as error:
        found = str(error)
    if problems := [each for each in team.gathered(found) if each is not None]:
        raise CheckpointCorrupt("; ".join(dict.fromkeys(problems)))


def _directory_name(about: Manifest) -> str:
    suffix = "-evaluate" if about.phase is Phase.EVALUATE else ""
    return f"{about.attempt}-{about.step}{suffix}"


def _read(directory: int, name: str, entry: FileEntry) -> Tensor:
    """Its bytes, 1-D uint8, checked chunk by chunk."""
    contents = torch.empty(entry.size_bytes, dtype=torch.uint8)
    buffer = contents.numpy().data
    read_chunks(directory, name, entry, lambda start, end: buffer[start:end])
    return contents
