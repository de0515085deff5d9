"""The final model of a run: one safetensors file under the model's own names, for any tool that reads the format."""

import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from torch import Tensor, nn

from ops_contract.reports import MODEL, ArtifactSaved
from relight.publish import published_directory, write_file
from relight.training import tensorfile


def publish_model(
    root: Path, operation_id: UUID, attempt: int, step: int, model: nn.Module, state: dict[str, Any] | None = None
) -> ArtifactSaved:
    """Write `<operation>/<attempt>-<step>-model/model.safetensors` as a checkpoint is written, and say so.

    `state` stands for the model's own where that is not whole.
    Raises OSError; what was written is then removed.
    """
    tensors, metadata = named_tensors(model.state_dict() if state is None else state)
    name, whole = f"{attempt}-{step}-model", sha256()

    def hashed(parts: Iterable[memoryview]) -> Iterator[memoryview]:
        for part in parts:
            whole.update(part)
            yield part

    with published_directory(root, str(operation_id), name) as directory:
        entry = write_file(directory, MODEL, hashed(tensorfile.chunks(tensors, metadata)))
    return ArtifactSaved(
        artifact_id=uuid4(),
        name=MODEL,
        step=step,
        path=f"{operation_id}/{name}/{MODEL}",
        size_bytes=entry.size_bytes,
        sha256=whole.hexdigest(),
    )


def named_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the file holds, and its metadata.

    As `safetensors.torch.save_model`, whose `load_model` counts on it: of names that share memory the first that shows
    all of it is stored, and each other one is an entry of the metadata, alias to name. What is no tensor is left out.
    """
    tensors = {
        name: value.detach().resolve_conj().resolve_neg() for name, value in state.items() if isinstance(value, Tensor)
    }
    whole: dict[Any, str] = {}
    for name in sorted(tensors, reverse=True):
        if 0 < tensors[name].nbytes == tensors[name].untyped_storage().nbytes():
            whole[_memory(tensors[name])] = name
    kept = {name: whole.get(_memory(tensor), name) if tensor.numel() else name for name, tensor in tensors.items()}
    metadata = {name: stored for name, stored in kept.items() if stored != name}
    if left_out := sorted(state.keys() - tensors.keys()):
        metadata["relight.left_out"] = json.dumps(left_out)
    stored_once = {name: tensor.contiguous() for name, tensor in tensors.items() if kept[name] == name}
    return stored_once, {"format": "pt"} | metadata  # some readers ask for the format


def _memory(tensor: Tensor) -> tuple[Any, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
