"""Randomness by counter: every place that draws is seeded from where it is, so no generator's state needs saving."""

import random
import struct
from enum import Enum
from hashlib import blake2b

import numpy as np
import torch


class Stream(Enum):
    """Independent streams of one run; the counters that each takes."""

    BUILD = b"build"  # none: workload, data and model are built under it
    SHUFFLE = b"shuffle"  # epoch
    SAMPLE = b"sample"  # epoch, index
    COLLATE = b"collate"  # epoch, batch; rank, in a gang
    TRAIN = b"train"  # step, micro-batch, rank; in a gang also step, micro-batches, 0: after_step()
    VALIDATION_SAMPLE = b"val-sample"  # index: every evaluation sees the same samples
    VALIDATION_COLLATE = b"val-collate"  # batch
    EVALUATE = b"evaluate"  # step, batch, 0: the same on every rank
    FINISH = b"finish"  # step


def derive(seed: int, stream: Stream, *counters: int) -> int:
    """64 bits for this place: BLAKE2b-64 of the little-endian int64 (seed, *counters), personalised by the stream."""
    packed = struct.pack(f"<{1 + len(counters)}q", seed, *counters)
    return int.from_bytes(blake2b(packed, digest_size=8, person=stream.value).digest(), "little")


def seed_everything(value: int) -> None:
    """Seed torch, `random` and numpy's legacy generator, 7 µs in all: a sample may draw from any of them."""
    # torch.manual_seed takes 150 µs: it also visits backends that this process does not use.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
        torch.cuda.manual_seed_all(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
