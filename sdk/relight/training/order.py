"""Data order: which samples make which batch, and how they are fetched; the same bits for any number of workers."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from relight.process import die_with_parent
from relight.training.randomness import Stream, derive, seed_everything
from relight.workload import MapDataset, Workload

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


class Batch(NamedTuple):
    """Of this many samples, over all ranks; `data` is what `Workload.collate` made of this rank's part of them.

    One that is `idle` got none of a short batch. It has the first ones, of weight 0, for each rank has to compute.
    """

    samples: int
    data: Any
    idle: bool = False


@dataclass(frozen=True)
class DataOrder:
    """The batches of a data set. Positions are samples consumed in the epoch.

    `shuffle`, `drop_last` and `pin_memory` are torch's; the first two are of training, and so is `max_samples`, with
    which it ends, over all epochs. Of `world_size` ranks each fetches its contiguous part of every batch of training;
    `batch_size` is of all. Where a full batch has two samples for every rank, a short one is divided among so few ranks
    that no part of it is a single sample: BatchNorm refuses those.
    """

    dataset: MapDataset
    collate: Callable[[list[Any]], Any]
    seed: int
    batch_size: int
    num_workers: int
    shuffle: bool = True
    drop_last: bool = False
    pin_memory: bool = False
    max_samples: int | None = None
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        """Batches in an epoch; a short last one counts, unless it is dropped."""
        return -(-self.samples // self.batch_size)

    @property
    def samples(self) -> int:
        """Those that an epoch of training consumes."""
        return len(self.dataset) - self.drop_last * (len(self.dataset) % self.batch_size)

    def training(self, epoch: int, start_sample: int) -> Iterator[Batch]:
        """The rest of an epoch in its order, or of the run; what was consumed is skipped without being read."""
        n = len(self.dataset)
        order = shuffled(n, derive(self.seed, Stream.SHUFFLE, epoch)) if self.shuffle else np.arange(n)
        order = order[: self.samples]
        if self.max_samples is not None:
            order = order[: max(0, self.max_samples - epoch * self.samples)]
        return self._fetch(order, (epoch,), start_sample, Stream.SAMPLE, Stream.COLLATE, self.rank, self.world_size)

    def validation(self) -> Iterator[Batch]:
        """Whole on every rank."""
        order = np.arange(len(self.dataset))
        return self._fetch(order, (), 0, Stream.VALIDATION_SAMPLE, Stream.VALIDATION_COLLATE)

    def _fetch(
        self,
        order: NDArray[np.int64],
        epoch: tuple[int, ...],
        start_sample: int,
        sample: Stream,
        collate: Stream,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        keys = (
            _Key(epoch, at // self.batch_size, order[at : at + self.batch_size])
            for at in range(start_sample, len(order), self.batch_size)
        )
        return iter(
            DataLoader(
                _Fetcher(self, sample, collate, rank, world_size),
                sampler=keys,
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                # Forked workers need no pickling of the user's data set and share its memory.
                multiprocessing_context="fork" if self.num_workers else None,
                worker_init_fn=_WorkerStart(os.getpid()),
                # Its own generator: starting an epoch draws nothing from the training stream.
                generator=torch.Generator(),
            )
        )


def shuffled(n: int, key: int) -> NDArray[np.int64]:
    """A permutation of range(n): the indices sorted by SplitMix64(key + index) (Steele, Lea, Flood 2014).

    SplitMix64 is a bijection, so no two keys tie. Integer arithmetic alone, so the order does not change with the
    version of numpy or torch, as that of their generators may.
    """
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN_GAMMA) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


class _Key(NamedTuple):
    """One batch as the loader asks for it; `epoch` is empty for validation data."""

    epoch: tuple[int, ...]
    batch: int
    indices: NDArray[np.int64]


class _Fetcher(Dataset[Batch]):
    """Fetches a rank's part of each batch: each sample under its own seed, then the collate under the batch's."""

    def __init__(
        self, order: DataOrder, sample_stream: Stream, collate_stream: Stream, rank: int, world_size: int
    ) -> None:
        self.dataset = order.dataset
        self.collate = order.collate
        self.seed = order.seed
        self.sample_stream = sample_stream
        self.collate_stream = collate_stream
        self.rank = rank
        self.world_size = world_size
        self.smallest_part = 2 if order.batch_size >= 2 * order.world_size else 1
        self.samples_draw = not _is_plain(order.dataset)
        self.draws = self.samples_draw or getattr(order.collate, "__func__", None) is not Workload.collate

    def __getitem__(self, key: _Key) -> Batch:
        if not self.draws:  # nor does it compute: what it does has the same bits under all of this
            return self._batch(key)
        # An evaluation fetches within its autocast, a training step does not, and a loader process inherits either.
        with _one_thread(), torch.autocast("cpu", enabled=False):
            return self._batch(key)

    def _batch(self, key: _Key) -> Batch:
        mine = self._part(key.indices)
        indices = mine or key.indices[: self.smallest_part].tolist()
        if self.samples_draw:
            items = [self._item(key.epoch, index) for index in indices]
        else:
            items = [self.dataset[index] for index in indices]
        if self.draws:
            of_rank = (self.rank,) if self.world_size > 1 else ()
            seed_everything(derive(self.seed, self.collate_stream, *key.epoch, key.batch, *of_rank))
        return Batch(len(key.indices), self.collate(items), idle=not mine)

    def _part(self, indices: NDArray[np.int64]) -> list[int]:
        """This rank's; none of a short batch that has not `smallest_part` for each."""
        if self.world_size == 1:
            whole: list[int] = indices.tolist()
            return whole
        busy = min(self.world_size, max(1, len(indices) // self.smallest_part))
        part: list[int] = np.array_split(indices, busy)[self.rank].tolist() if self.rank < busy else []
        return part

    def _item(self, epoch: tuple[int, ...], index: int) -> Any:
        seed_everything(derive(self.seed, self.sample_stream, *epoch, index))
        return self.dataset[index]


def _is_plain(dataset: MapDataset) -> bool:
    """Tensors that are indexed, and nothing else: a seed for each sample takes longer than the sample."""
    return type(dataset) is TensorDataset and all(type(tensor) is Tensor for tensor in dataset.tensors)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Loader processes have one thread, and sums depend on the number: so has fetching in the training process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _WorkerStart:
    """First thing in a loader process: it ends with the trainer, and only with it."""

    def __init__(self, trainer_pid: int) -> None:
        self.trainer_pid = trainer_pid

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        die_with_parent(self.trainer_pid)


def _as_it_is(batch: Any) -> Any:
    return batch


def to_device(data: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts with its tensors on the device."""
    if isinstance(data, torch.Tensor):
        return data.to(device)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(to_device(part, device) for part in data))
    if isinstance(data, (tuple, list)):
        return type(data)(to_device(part, device) for part in data)
    if isinstance(data, dict):
        return {key: to_device(part, device) for key, part in data.items()}
    return data
