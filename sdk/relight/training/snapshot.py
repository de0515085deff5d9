"""A copy of the state at one boundary, exact whatever the next steps do: most is taken beside the next forward."""

import threading
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from relight.training.codec import Encoded
from relight.training.state import Live
from relight.training.tensorfile import flat

_PIECE_BYTES = 8 * 2**20
_ALIGNED_BYTES = 64


class Snapshot:
    """Copies `encoded` into `memory`: what only an update changes until `seal`, everything else at once.

    `may_wait` names the tensors that may be copied until `seal`; the rest is copied when this returns.
    """

    def __init__(self, encoded: Encoded, memory: Tensor, may_wait: Collection[str]) -> None:
        copies: dict[str, Tensor] = {}
        self._pieces: deque[tuple[Tensor, Tensor]] = deque()
        self._helping = threading.Lock()
        self._stream = _SideStream() if any(tensor.is_cuda for tensor in encoded.tensors.values()) else None
        for (name, tensor), place in zip(encoded.tensors.items(), _places(encoded, memory), strict=True):
            copies[name] = place.view(tensor.dtype).view(tensor.shape)
            self._copy(place, tensor, now=name not in may_wait)
        self.memory = memory
        self.state = Encoded(encoded.document, copies, encoded.shown_at)

    def help(self) -> None:
        """Copy what there is left to copy, in another thread than the training's."""
        with suppress(IndexError):
            while True:
                with self._helping:
                    place, source = self._pieces.popleft()
                    # Not by torch: its copy would start threads of its own beside those of the training.
                    np.copyto(place.numpy(), source.numpy())

    def seal(self) -> None:
        """The next update may begin. The training thread copies what nobody did, so it never waits for more than one
        piece of a helper, which may run at a lower priority."""
        if self._stream is not None:
            self._stream.hold_updates()
        with suppress(IndexError):
            while True:
                place, source = self._pieces.popleft()
                place.copy_(source)
        with self._helping:
            pass  # the piece that a helper took is copied, too

    def arrived(self) -> None:
        """Wait until the copies from a GPU are in memory."""
        if self._stream is not None:
            self._stream.synchronize()

    def _copy(self, place: Tensor, tensor: Tensor, now: bool) -> None:
        if tensor.is_cuda and self._stream is not None:
            self._stream.copy(place.view(tensor.dtype), tensor.reshape(-1), beside=not now)
        elif now:
            place.copy_(_bytes(tensor))
        else:
            source = _bytes(tensor)
            for at in range(0, tensor.nbytes, _PIECE_BYTES):
                self._pieces.append((place[at : at + _PIECE_BYTES], source[at : at + _PIECE_BYTES]))


class _SideStream:
    """Copies from a GPU that the host does not wait for."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
        self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, place: Tensor, source: Tensor, *, beside: bool) -> None:
        """In the training's own stream whatever comes after is ordered behind the copy; beside it, behind the hold."""
        with torch.cuda.stream(self._stream if beside else torch.cuda.current_stream()):
            place.copy_(source, non_blocking=True)
            source.record_stream(torch.cuda.current_stream())

    def hold_updates(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
        self._held = torch.cuda.current_stream().record_event()

    def synchronize(self) -> None:
        self._held.synchronize()


def size_bytes(encoded: Encoded) -> int:
    """What a snapshot of it takes."""
    return sum(_room(tensor) for tensor in encoded.tensors.values())


def allocate(encoded: Encoded) -> Tensor:
    """Memory for snapshots of this size, page-locked where a GPU copies into it."""
    pinned = any(tensor.is_cuda for tensor in encoded.tensors.values())
    return torch.empty(size_bytes(encoded), dtype=torch.uint8, pin_memory=pinned)


def changed_by_updates_only(encoded: Encoded, live: Live) -> set[str]:
    """The stored tensors that are seen nowhere but in the optimizer's state and the parameters that it updates.

    Frozen parameters are not among them: a teacher's moving average may be taken in the forward.
    """
    updated = {id(parameter) for parameter in _updated(live)}
    named = live.model.named_parameters(remove_duplicate=False)
    parameters = {f"model.{name}" for name, parameter in named if id(parameter) in updated}
    return {
        name
        for name, paths in encoded.shown_at.items()
        if all(path in parameters or path.startswith("optimizer.") for path in paths)
    }


def versions(live: Live) -> list[int]:
    """Torch's counts of in-place changes to what `changed_by_updates_only` trusts."""
    state = [value for kept in live.optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
    return [tensor._version for tensor in (*_updated(live), *state)]


def _updated(live: Live) -> list[Tensor]:
    groups = live.optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]


def _places(encoded: Encoded, memory: Tensor) -> Iterator[Tensor]:
    at = 0
    for tensor in encoded.tensors.values():
        yield memory[at : at + tensor.nbytes]
        at += _room(tensor)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _bytes(tensor: Tensor) -> Tensor:
    return flat(tensor).view(torch.uint8)
