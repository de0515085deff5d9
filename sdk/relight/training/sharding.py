"""State that is divided among ranks: out of the tree and back into it, on this or another number of ranks.

Tensors are divided by their first dimension, as FSDP2 does it, over all ranks. The format is that of a checkpoint of
one process, but for these: they lie in the files of `shards/`, in the safetensors format, each rank's parts in its own.
"""

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from relight.manifest import CheckpointCorrupt
from relight.training.codec import CodecError, Sharded, dtype_named
from relight.training.faults import PeerLost
from relight.training.state import Live

Keys = tuple[Any, ...]  # the keys that lead to a leaf of a tree


def taken_out(tree: Any) -> tuple[Any, dict[str, DTensor]]:
    """The tree with each divided tensor as `Sharded`, and these tensors by name. Raises CodecError."""
    found: dict[str, DTensor] = {}
    names: dict[int, str] = {}

    def leaf(value: Any, path: Keys) -> Any:
        if not isinstance(value, DTensor):
            return value
        name = ".".join(map(str, path))
        if value.placements != (Shard(0),):
            raise CodecError(f"{name}: is divided as {value.placements}; a checkpoint keeps those by dimension 0")
        if id(value) not in names:
            # {"a.b": x} and {"a": {"b": y}} have one path.
            names[id(value)] = name if name not in found else f"{name}#{len(found)}"
            found[names[id(value)]] = value
        name = names[id(value)]
        return Sharded(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))

    return _mapped(tree, leaf), found


def local(tree: Any) -> Any:
    """This rank's parts as plain tensors."""
    return _mapped(tree, lambda value, path: value.to_local() if isinstance(value, DTensor) else value)


def like(tree: Any, sample: Any) -> Any:
    """`local` undone: this rank's parts as those of the divided tensors that stand in `sample` at their paths."""
    known: dict[Keys, DTensor] = {}
    _mapped(sample, lambda value, path: known.update({path: value}) if isinstance(value, DTensor) else None)

    def leaf(value: Any, path: Keys) -> Any:
        if (of := known.get(path)) is None:
            return value
        return DTensor.from_local(
            value, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
        )

    return _mapped(tree, leaf)


def write(directory: Path, tensors: dict[str, DTensor]) -> None:
    """By all ranks together, each a file of its own. Raises this rank's own error, or PeerLost with those of others."""
    writer = HuggingFaceStorageWriter(path=str(directory), save_distributed=True)
    try:
        save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
    except CheckpointException as error:
        mine = error.failures.get(torch.distributed.get_rank())
        if mine is not None:
            raise mine[0] from error
        raise PeerLost("; ".join(f"rank {rank}: {said[0]}" for rank, said in error.failures.items())) from error


def put_in(tree: Any, directory: Path, live: Live) -> Any:
    """`read_in` as `live` has it: what is divided there is divided, also what is whole in the tree; the rest is whole.

    Raises CheckpointCorrupt.
    """
    mesh = next((p.device_mesh for p in live.model.parameters() if isinstance(p, DTensor)), None)
    tree = read_in(tree, directory, mesh)
    if mesh is None:
        return tree
    model = dict(live.model.named_parameters(remove_duplicate=False))
    tree["model"] = {name: _divided(value, model.get(name)) for name, value in tree["model"].items()}
    parameters = [p for group in live.optimizer.param_groups for p in group["params"]]
    for index, state in tree["optimizer"]["state"].items():
        if index < len(parameters):
            tree["optimizer"]["state"][index] = {k: _divided(v, parameters[index]) for k, v in state.items()}
    return tree


def read_in(tree: Any, directory: Path, mesh: DeviceMesh | None) -> Any:
    """The tree with each `Sharded` read from the files of `directory`: this rank's part of it, or all without a mesh.

    Raises CheckpointCorrupt.
    """
    wanted: dict[str, Tensor] = {}

    def leaf(value: Any, path: Keys) -> Any:
        return wanted.setdefault(value.name, _room(value, mesh)) if isinstance(value, Sharded) else value

    tree = _mapped(tree, leaf)
    if wanted:
        _read(directory, wanted)
    return tree


def whole_state(model: torch.nn.Module, kept: bool) -> dict[str, Any]:
    """`model.state_dict()` with each tensor whole, on the CPU where it was divided; by all ranks together.

    Tied ones stay tied. Where it is not `kept`, no more than one of them is there at a time.
    """
    owners = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    known: dict[int, Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor):
            owner = owners.get(name, id(value))
            if owner not in known:
                whole = value.full_tensor().detach()
                # A copy: where ranks have rows more or less, it is a view of more than it shows.
                known[owner] = torch.empty(whole.shape, dtype=whole.dtype).copy_(whole) if kept else torch.empty(0)
            value = known[owner]
        state[name] = value
    return state


def _room(sharded: Sharded, mesh: DeviceMesh | None) -> Tensor:
    dtype = dtype_named(sharded.dtype)
    if mesh is None:
        return torch.empty(sharded.shape, dtype=dtype)
    return torch.distributed.tensor.empty(sharded.shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])


def _read(directory: Path, into: dict[str, Tensor]) -> None:
    """Each rank what it needs, by itself."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
            load(dict(into), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    except (CheckpointException, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointCorrupt(f"{directory.name}: {error}") from error


def _divided(value: Any, parameter: Any) -> Any:
    """As the parameter it belongs to, where it is whole and has its shape."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != parameter.shape or not value.ndim:
        return value
    on_device = value.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _mapped(tree: Any, leaf: Callable[[Any, Keys], Any], path: Keys = ()) -> Any:
    """The same nest of dicts, lists and tuples with its leaves mapped."""
    if type(tree) in (dict, OrderedDict, Counter):
        return type(tree)({key: _mapped(value, leaf, (*path, key)) for key, value in tree.items()})
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(value, leaf, (*path, i)) for i, value in enumerate(tree))
    return leaf(tree, path)
