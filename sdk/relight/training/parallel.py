"""How the ranks of a gang compute one update together. A training of one process calls its workload, and that is all.

Each rank computes the gradient of its part of the batch, weighed so that the mean over the ranks, which torch takes, is
that of the whole batch.
"""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ops_contract.jobs import Strategy
from relight.training.codec import digests, encode
from relight.training.faults import TrainingFault
from relight.training.state import Live, check_round_trip
from relight.training.team import Team
from relight.workload import Workload

BUCKET_MIB = 25  # of gradients that are summed at once; torch's own choice


class Alone:
    """Of one process: `workload.loss` as it is."""

    def __init__(self, workload: Workload[Any], model: nn.Module) -> None:
        self._workload = workload
        self._model = model

    def loss(self, batch: Any, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """`last` of the micro-batches of an update: its backward pass leaves the sum of all in the gradients."""
        return self._workload.loss(self._model, batch)

    def updated(self) -> None:
        """After each update."""

    def passed(self) -> None:
        """After forward passes without a backward one."""

    def check_round_trip(self, live: Live) -> None:
        """Raises a permanent TrainingFault."""
        check_round_trip(live)

    def registered(self, live: Live) -> dict[str, str]:
        """Digests of the state of which a checkpoint has rank 0's alone, by path. Raises CodecError."""
        return digests(encode({name: stateful.state_dict() for name, stateful in live.registered.items()}))


class Replicated(Alone):
    """DDP: every rank holds the whole model, and has the same bits of it at every boundary.

    What DDP wraps is the loss and not the model, so that `loss` may use the model in any way that it likes. Parameters
    without a part in a loss are looked for in each one: they keep no gradient, as with one device, where without this
    the step fails. And the buckets in which gradients are summed are then for good those of the beginning; else DDP
    orders them by its first backward pass, and with three ranks and more the sums of a resumed run had other bits.
    """

    def __init__(self, workload: Workload[Any], model: nn.Module, team: Team) -> None:
        super().__init__(workload, model)
        self._buffers = _Buffers(model, team)
        self._wrap()

    def loss(self, batch: Any, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        if self._trainable != _trainable(self._model):
            self._wrap()  # DDP knows only what was to be trained when it was made
        with nullcontext() if last else self._ddp.no_sync():
            loss, extras = self._ddp(batch)
        return loss, extras

    def updated(self) -> None:
        self._buffers.take_over()

    def _wrap(self) -> None:
        self._trainable = _trainable(self._model)
        # It was renamed in torch 2.13. Before each forward it would cost a broadcast; see `updated`.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        self._ddp = DistributedDataParallel(
            _Loss(self._workload, self._model),
            find_unused_parameters=True,
            bucket_cap_mb=BUCKET_MIB,
            **{buffers: False},  # type: ignore[arg-type]  # of two names one is known
        )


class Divided(Alone):
    """FSDP2: parameters, gradients and optimizer state are divided among the ranks, each tensor by its first dimension.

    Of the modules, those that repeat within a ModuleList or a Sequential are gathered one by one, when they run; the
    rest with the whole model. Gradients are summed after every micro-batch: keeping them whole would need the memory
    that is to be saved.
    """

    def __init__(self, workload: Workload[Any], model: nn.Module, team: Team) -> None:
        super().__init__(workload, model)
        self._buffers = _Buffers(model, team)

    def updated(self) -> None:
        self._buffers.take_over()

    def passed(self) -> None:
        # What a forward pass gathered of the root stays until a backward one: nobody would see that it is divided.
        from torch.distributed.fsdp import FSDPModule

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def check_round_trip(self, live: Live) -> None:
        from relight.training.sharding import like, local

        check_round_trip(live, local, like)

    def registered(self, live: Live) -> dict[str, str]:
        from relight.training.sharding import taken_out

        states = {name: stateful.state_dict() for name, stateful in live.registered.items()}
        return digests(encode(taken_out(states)[0]))


class _Loss(nn.Module):
    def __init__(self, workload: Workload[Any], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._workload = workload

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extras = self._workload.loss(self.model, batch)
        # DDP waits for the gradients of all that leads to what this returns.
        return loss, {name: value.detach() for name, value in extras.items()}


def parallel(workload: Workload[Any], model: nn.Module, strategy: Strategy, team: Team) -> Alone:
    """`model` is divided already where the strategy is FSDP."""
    if not team.is_gang:
        return Alone(workload, model)
    return (Divided if strategy is Strategy.FSDP else Replicated)(workload, model, team)


def divide(model: nn.Module, device: torch.device, team: Team) -> None:
    """In place, before an optimizer is made. Raises a permanent TrainingFault for a model that FSDP2 cannot divide."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (team.world_size,))
    try:
        for module in (*repeated(model), model):
            fully_shard(module, mesh=mesh)
    except (NotImplementedError, ValueError, AssertionError) as error:
        what = f"FSDP2 cannot divide this model: {error}; take strategy ddp, or change the model"
        raise TrainingFault("not_divisible", what, permanent=True) from error


def repeated(model: nn.Module) -> list[nn.Module]:
    """Those children of each outermost ModuleList or Sequential that have a class in common and share no parameter."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1

    def own(module: nn.Module) -> bool:
        mine = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
        return bool(mine) and all(mine.count(each) == uses[each] for each in mine)

    def within(module: nn.Module) -> Iterator[nn.Module]:
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            for child in module.children():
                yield from within(child)
            return
        kinds = [type(child) for child in module]
        for child in module:
            if kinds.count(type(child)) > 1 and own(child) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                yield child
            else:
                yield from within(child)

    return list(dict.fromkeys(within(model)))


def _trainable(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


class _Buffers:
    """Rank 0's are everybody's, at every boundary: an evaluation, a checkpoint and the next step see the same."""

    def __init__(self, model: nn.Module, team: Team) -> None:
        self._model = model
        self._team = team
        self._seen: list[tuple[int, int]] = []
        self.take_over()

    def take_over(self) -> None:
        """Those that were changed since the last time, on any rank: an update may have, or a pass over its part."""
        buffers = [buffer for buffer in self._model.buffers() if buffer.numel()]
        if not buffers:
            return
        now = [(id(buffer), buffer._version) for buffer in buffers]
        known = self._seen if len(self._seen) == len(now) else [(0, 0)] * len(now)
        changed = self._team.total([new != old for new, old in zip(now, known, strict=True)])
        kinds: dict[Any, list[Tensor]] = {}
        for buffer, by in zip(buffers, changed, strict=True):
            if by:
                kinds.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        for same in kinds.values():
            self._of_one_kind(same)
        self._seen = [(id(buffer), buffer._version) for buffer in buffers]

    def _of_one_kind(self, buffers: list[Tensor]) -> None:
        with torch.no_grad():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            self._team.take_over(flat)
            if not self._team.leads:
                for buffer, part in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
                    buffer.copy_(part.reshape(buffer.shape))
