"""Checkpoints on disk: published whole or not at all, verified while they are read.

`<root>/<operation>/<attempt>-<step>/` (`-evaluate` appended when an evaluation is next) holds `state.json`,
`state.safetensors` and `manifest.json`. An attempt writes below its own number only, so one that was fenced and still
runs touches no file of its successor.
"""

import os
from collections.abc import Callable, Mapping
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
from relight.manifest import (
    MANIFEST,
    CheckpointCorrupt,
    FileEntry,
    Manifest,
    opened,
    read_chunks,
)
from relight.publish import hashed_tree, make_directory, published_directory, write_file
from relight.training import tensorfile
from relight.training.codec import CodecError, Encoded, decode
from relight.training.state import Cursor

DOCUMENT = "state.json"
TENSORS = "state.safetensors"
FILES = "files"  # of a LoopWorkload


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


def publish(root: Path, about: Manifest, state: Encoded) -> Published:
    """Write, fsync, rename, fsync the parent: after a crash at any point the directory is whole or is not there.

    `about` is the manifest but for its files. Raises OSError; what was written is then removed.
    """
    name = _directory_name(about)
    with published_directory(root, str(about.operation_id), name) as directory:
        files = {
            DOCUMENT: write_file(directory, DOCUMENT, [memoryview(state.document)]),
            TENSORS: write_file(directory, TENSORS, tensorfile.chunks(state.tensors)),
        }
        return _with_manifest(directory, about, name, files)


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


def _with_manifest(directory: int, about: Manifest, name: str, files: Mapping[str, FileEntry]) -> Published:
    manifest = Manifest.model_validate(about.model_dump() | {"files": files})
    raw = manifest.model_dump_json(indent=1).encode()
    write_file(directory, MANIFEST, [memoryview(raw)])
    return Published(f"{about.operation_id}/{name}", manifest.size_bytes + len(raw), sha256(raw).hexdigest())


def restore(root: Path, ref: CheckpointRef) -> tuple[Manifest, Any]:
    """The manifest and the state tree, every byte checked against the manifest's hashes as it is read.

    Raises CheckpointMissing, CheckpointCorrupt, and OSError when the storage cannot be read now.
    """
    with opened(root, ref) as (directory, manifest):
        contents = _read_all(directory, manifest.files)
    try:
        document = bytes(tensorfile.raw_bytes(contents[DOCUMENT]))
        return manifest, decode(document, tensorfile.parse(contents[TENSORS]))
    except (CodecError, tensorfile.TensorFileError, KeyError) as error:
        raise CheckpointCorrupt(f"{ref.path}: {error}") from error


def _directory_name(about: Manifest) -> str:
    suffix = "-evaluate" if about.phase is Phase.EVALUATE else ""
    return f"{about.attempt}-{about.step}{suffix}"


def _read_all(directory: int, files: Mapping[str, FileEntry]) -> dict[str, Tensor]:
    """Each file's bytes (1-D uint8), checked chunk by chunk."""
    return {name: _read(directory, name, entry) for name, entry in files.items()}


def _read(directory: int, name: str, entry: FileEntry) -> Tensor:
    contents = torch.empty(entry.size_bytes, dtype=torch.uint8)
    buffer = contents.numpy().data
    read_chunks(directory, name, entry, lambda start, end: buffer[start:end])
    return contents
