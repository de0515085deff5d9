"""Trainings on several ranks, each a process that tests may kill, and the backend's view of them."""

import errno
import inspect
import os
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from training_child import (
    WORKLOADS,
    FixedItems,
    Operation,
    RandomItems,
    _ConnectionSink,
    processes,
    ref_of,
    reports,
    ticking,
)

from ops_contract.agents import StartTraining
from ops_contract.lifecycle import CheckpointType, Outcome
from ops_contract.pipe import Rank
from ops_contract.reports import Finish, Report
from ops_worker.trainer import _unexpected
from relight.manifest import CheckpointCorrupt, CheckpointMissing
from relight.training import parallel, reporting, sharding
from relight.training.attempt import Attempt, Site
from relight.training.checkpoint import SHARDS, restore
from relight.training.codec import digests, encode
from relight.training.faults import TrainingFault, finish_of, finish_of_lost_peer, is_peer_lost
from relight.training.loop import Loop
from relight.training.sharding import read_in
from relight.workload import MapDataset, Workload

RANKS = 3


class BlocksConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    samples: int = 46
    norm: Literal["batch", "layer"] = "batch"
    dropout: float = 0.2
    random: bool = True
    fails_on: int | None = None
    "the rank whose loss raises in the second step"


class Blocks(Workload[BlocksConfig]):
    """Repeated blocks, weights that are tied, one that is frozen, buffers; masked samples, so that units differ."""

    Config = BlocksConfig
    reports: ClassVar[dict[str, Literal["min", "max"]]] = {"val_loss": "min"}

    def data(self) -> tuple[MapDataset, MapDataset]:
        items = RandomItems if self.config.random else FixedItems
        return items(self.config.samples), FixedItems(10)

    def collate(self, items: list[Tensor]) -> Tensor:
        noise = 0.01 * torch.randn(()) if self.config.random else 0.0
        return torch.stack(items) + noise

    def model(self) -> nn.Module:
        return BlocksNet(self.config)

    def units(self, batch: Tensor) -> int:
        return int((batch[:, 0] > batch[:, 1]).sum()) + len(batch)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.steps = getattr(self, "steps", 0) + 1
        if self.config.fails_on == self.env.rank and self.steps > 2:
            raise ValueError("the second window is too much for me")
        weights = 1 + (batch[:, 0] > batch[:, 1]).float()
        each = model(batch).square().mean(1)
        return (each * weights).sum() / weights.sum(), {"largest": each.max()}

    def evaluate(self, model: nn.Module, loader: Iterable[Tensor]) -> dict[str, float]:
        return {"val_loss": sum(float(model(batch).square().mean()) for batch in loader)}


class Block(nn.Module):
    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if config.norm == "batch" else nn.LayerNorm(8)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.relu(self.norm(self.linear(x))))


class BlocksNet(nn.Module):
    """What it has seen is centred by, where it normalises over batches: a buffer that training depends on."""

    seen: Tensor

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        self.into = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(config) for _ in range(3))
        self.out = nn.Linear(8, 8, bias=False)
        self.out.weight = self.into.weight
        self.frozen = nn.Linear(8, 5).requires_grad_(False)
        self.centres = config.norm == "batch"
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x - self.seen)
        if self.centres and self.training:
            self.seen.lerp_(x.mean(0), 0.1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.frozen(self.out(hidden))


GANG_WORKLOADS: dict[str, type[Workload[Any]]] = {**WORKLOADS, "blocks": Blocks}


@dataclass(frozen=True)
class Upset:
    """What is done to the ranks: a mutant of the engine; a wish to stop that one of them gets at its n-th poll, or its
    death; and its death, or a full disk, in its n-th write of a part of a checkpoint.
    """

    mutant: str | None = None
    stop_rank: int = 0
    stop_at_poll: int | None = None
    why: Literal["cancelled", "preempted"] = "cancelled"
    die_rank: int = 0
    die_at_poll: int | None = None
    write_rank: int = 0
    die_in_write: int | None = None
    full_in_write: int | None = None


@dataclass
class GangOperation(Operation):
    """An operation whose attempts run on as many ranks as its job has devices."""

    finishes: list[Finish | None] = field(default_factory=list)
    "of the last attempt, by rank; None was killed"

    def train(self, kill_at: Callable[[int, Report], bool] = lambda n, report: False, **upset: Any) -> Outcome | None:
        """One attempt; the outcome, if all ranks have the same. All are killed where `kill_at` says so."""
        start, size = self.start(), self.execution.devices
        self.finishes = [None] * size
        with ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = listener.getsockname()[1]
            children, ends = [], list[Connection]()
            for number in range(size):
                receiver, sender = processes.Pipe(duplex=False)
                rank = Rank(rank=number, local_rank=number, world_size=size, host="127.0.0.1", port=port)
                given = (start.model_dump_json(), str(self.root), rank, listener, sender, Upset(**upset))
                child = processes.Process(target=_rank, args=given)
                child.start()
                stack.callback(child.join)
                stack.callback(child.kill)
                sender.close()
                children.append(child)
                ends.append(receiver)
            self._hear(ends, lambda n, report: [c.kill() for c in children] if kill_at(n, report) else None)
        outcomes = {finish and Outcome(finish.outcome) for finish in self.finishes}
        return outcomes.pop() if len(outcomes) == 1 else None

    def to_the_end(self) -> None:
        assert self.train() is Outcome.COMPLETED, self.finishes

    def final_state(self) -> dict[str, str]:
        """As of one device, whatever the strategy."""
        ref = ref_of(self.checkpoints[-1])
        tree = restore(self.root, ref)[1]
        return digests(encode(read_in(tree, self.root / ref.path / SHARDS, None)))

    def _hear(self, ends: list[Connection], seen: Callable[[int, Report], None]) -> None:
        numbers, open_ends = count(), dict(zip(ends, range(len(ends)), strict=True))
        while open_ends:
            for end in wait(list(open_ends)):
                assert isinstance(end, Connection)
                try:
                    report = reports.validate_json(end.recv_bytes())
                except (EOFError, ConnectionResetError):
                    del open_ends[end]
                    continue
                rank = open_ends[end]
                if isinstance(report, Finish):
                    self.finishes[rank] = report
                else:
                    assert rank == 0, f"rank {rank} reports {report}"
                    self.accept(report)
                    seen(next(numbers), report)


def _rank(
    start_json: str, root: str, rank: Rank, listener: socket.socket, connection: Connection, upset: Upset
) -> None:
    start = StartTraining.model_validate_json(start_json)
    sink = _ConnectionSink(connection, None)
    parallel.BUCKET_MIB = 1e-4  # several in the smallest model
    if upset.mutant is not None:
        MUTANTS[upset.mutant]()
    if rank.rank == upset.write_rank:
        _write_badly(rank.rank, upset)
    # Clocks differ, as they do: by that of rank 0 everything is due always, by the others' never.
    clock = ticking() if rank.rank == 0 else lambda: 0.0
    site, workload = Site(Path(root), "cpu", cores=1), GANG_WORKLOADS[start.job.workload]
    stop = _asked(rank.rank, upset)
    try:
        attempt = Attempt(workload, start, site, sink, stop, clock, rank, os.dup(listener.fileno()))
        finish = Finish(outcome=attempt.run())
    except (TrainingFault, CheckpointMissing, CheckpointCorrupt) as error:
        finish = finish_of(error)
    except BaseException as error:
        failed = Finish(outcome=Outcome.FAILED, error=_unexpected(error))
        finish = finish_of_lost_peer(error) if is_peer_lost(error) else failed
    sink.report(finish)
    os._exit(0)


def _asked(rank: int, upset: Upset) -> Callable[[], Any]:
    polls = count()

    def asked() -> str | None:
        poll = next(polls)
        if rank == upset.die_rank and poll == upset.die_at_poll:
            os.kill(os.getpid(), 9)
        stops = upset.stop_at_poll is not None and poll >= upset.stop_at_poll
        return upset.why if rank == upset.stop_rank and stops else None

    return asked


def _write_badly(rank: int, upset: Upset) -> None:
    """Half a file is there when it goes wrong."""
    really, writes = sharding.HuggingFaceStorageWriter.write_data, count()

    def write_data(self: Any, *args: Any) -> Any:
        number = next(writes)
        if number in (upset.die_in_write, upset.full_in_write):
            (Path(self.path) / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors").write_bytes(b"half")
        if number == upset.die_in_write:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == upset.full_in_write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(self, *args)

    sharding.HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]


def _buckets_as_ddp_likes() -> None:
    wrapped = parallel.DistributedDataParallel

    def wrap(module: nn.Module, **given: Any) -> nn.Module:
        return wrapped(module, **{**given, "find_unused_parameters": False})

    wrap.__signature__ = inspect.signature(wrapped)  # type: ignore[attr-defined]
    parallel.DistributedDataParallel = wrap  # type: ignore[assignment, misc]


def _means_of_ranks() -> None:
    def agreed(self: Loop, units: int) -> int:
        total = really(self, units)
        return self.team.world_size * units if units else total

    really = Loop._agreed
    Loop._agreed = agreed  # type: ignore[method-assign]


def _own_clocks() -> None:
    """Ranks that wait for each other in different places would do so for ever."""

    def agreed(self: Loop, units: int) -> int:
        total = really(self, units)
        signal.alarm(20)
        self._flush_ordered = self.reporter.is_due()
        self._save_ordered = self.pace.goes_by_time and self.pace.is_due()
        return total

    really = Loop._agreed
    Loop._agreed = agreed  # type: ignore[method-assign]


def _unweighted_metrics() -> None:
    means = reporting._means
    reporting._means_over = lambda team, parts: (team.gathered(0), means(parts))[1]


def _saves_restored() -> None:
    """At once, which an engine does not: it is there already."""

    def put_back(self: Attempt, *args: Any) -> Any:
        cursor = really(self, *args)
        self._restored_cursor = cursor  # type: ignore[attr-defined]
        return cursor

    def saver(self: Attempt, about: Any, live: Any, saved: Any, restored_s: float) -> Any:
        made = makes(self, about, live, None, restored_s)
        made.save(CheckpointType.PERIODIC, self._restored_cursor, {})  # type: ignore[attr-defined]
        return made

    really, makes = Attempt._put_back, Attempt._saver
    Attempt._put_back, Attempt._saver = put_back, saver  # type: ignore[method-assign]


MUTANTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "buckets as DDP likes": _buckets_as_ddp_likes,
    "buffers of each rank": lambda: setattr(parallel._Buffers, "take_over", lambda self: None),
    "means of ranks' means": _means_of_ranks,
    "each rank's clock": _own_clocks,
    "metrics of rank 0": _unweighted_metrics,
    "saves what it restored": _saves_restored,
}
