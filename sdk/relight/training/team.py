"""The ranks of one training, and what they have to agree on. A training of one process asks nobody.

What is agreed are small messages on the CPU: numbers are summed, everything else is JSON of rank 0 or of each rank.
"""

import json
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from ops_contract.jobs import Job
from ops_contract.pipe import Rank
from relight.pipe import Why
from relight.training.faults import PeerLost, TrainingFault, has_hung_up
from relight.workload import AnyWorkload, LoopWorkload

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import PrefixStore

FORMING_S = 120.0
# Of a collective: a rank that hangs is the agents' to notice, by the training's own stall_timeout_s.
_COLLECTIVE = timedelta(days=30)
_SIOCGIFADDR = 0x8915


class Team:
    """The world of one: every answer is at hand."""

    rank = 0
    world_size = 1

    @property
    def leads(self) -> bool:
        """Rank 0 does: it tells, saves and decides what goes by time."""
        return self.rank == 0

    @property
    def is_gang(self) -> bool:
        return self.world_size > 1

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Sums over the ranks. Nobody has them before everybody asked."""
        return list(numbers)

    def told(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank; what JSON can say, non-finite numbers too."""
        return value

    def gathered(self, value: Any) -> list[Any]:
        """Everybody's, by rank."""
        return [value]

    def take_over(self, tensor: "torch.Tensor") -> None:
        """Rank 0's values, in place."""

    def leave(self) -> None:
        """Returns once every rank has come here: what rank 0 did before is done."""


class Ranks(Team):
    """Over the process group, which is there already."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def total(self, numbers: Sequence[int]) -> list[int]:
        import torch
        import torch.distributed as dist

        sums = torch.tensor(list(numbers), dtype=torch.int64)
        dist.all_reduce(sums)
        return cast(list[int], sums.tolist())

    def told(self, value: Any) -> Any:
        import torch
        import torch.distributed as dist

        text = json.dumps(value).encode() if self.leads else b""
        [size] = self.total([len(text)])
        raw = torch.frombuffer(bytearray(text or size), dtype=torch.uint8)
        dist.broadcast(raw, 0)
        return json.loads(raw.numpy().tobytes())

    def gathered(self, value: Any) -> list[Any]:
        import torch
        import torch.distributed as dist

        text = json.dumps(value).encode()
        sizes = self.total([len(text) if rank == self.rank else 0 for rank in range(self.world_size)])
        mine = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(every, mine)
        return [json.loads(raw.numpy().tobytes()) for raw in every]

    def take_over(self, tensor: "torch.Tensor") -> None:
        import torch.distributed as dist

        dist.broadcast(tensor, 0)

    def leave(self) -> None:
        self.total([0])
        # All have been here, so nothing can be lost any more: a peer that has exited already is none that is missing.
        # Without it the first to leave could reset the connection that another one still reads from.
        with suppress(RuntimeError):
            self.total([0])


def check_ranks(job: Job, workload_type: AnyWorkload, in_gang: bool) -> None:
    """Raises a permanent TrainingFault where so many devices cannot train this, here."""
    devices = job.execution.devices
    if devices > 1 and issubclass(workload_type, LoopWorkload):
        what = "loop and files of a LoopWorkload are its own: nothing can be divided among ranks"
        raise TrainingFault("no_gang", f"{what}; give devices 1, or a relight.Workload", permanent=True)
    if devices > 1 and not in_gang:
        what = f"execution.devices is {devices}, and this process is the only one of its training"
        raise TrainingFault("no_gang", f"{what}: submit it to a service (ops train), or give devices 1", permanent=True)


def agreed_wish(team: Team, wish: Why | None, *numbers: int) -> tuple[Why | None, list[int]]:
    """How all are to stop, where one rank at least is, and the sums of `numbers`. To cancel outweighs the other."""
    if not team.is_gang:
        return wish, list(numbers)
    cancelled, preempted, *sums = team.total([wish == "cancelled", wish == "preempted", *numbers])
    return ("cancelled" if cancelled else "preempted" if preempted else None), sums


def agree(team: Team, error: BaseException | None) -> None:
    """Returns when no rank has an error. Raises this rank's own, or PeerLost with what the others say."""
    said = team.gathered(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failed := [f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None]:
        raise PeerLost("; ".join(failed))


def join(rank: Rank | None, name: str, device: str, listening_fd: int | None, forming_s: float = FORMING_S) -> Team:
    """The training's ranks, once all are there; `name` is the attempt's own. On rank 0 `listening_fd` listens.

    Raises a TrainingFault that may be tried again when they do not come.
    """
    if rank is None:
        return Team()
    import torch.distributed as dist

    _tell_users_code(rank)
    # By themselves they look the host's name up, and that is 127.0.1.1 on Debian: no other host would reach this rank.
    if (interface := _interface_towards(rank.host, rank.port)) is not None:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    try:
        store = _store(rank, name, listening_fd, forming_s)
    except RuntimeError as error:
        raise _not_formed(rank, f"{type(error).__name__}: {error}", forming_s) from error
    try:
        # On CUDA it has not been run yet: there was no GPU.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        within = timedelta(seconds=forming_s)
        dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world_size, timeout=within)
        team = Ranks(rank.rank, rank.world_size)
        team.total([0])
        dist.distributed_c10d._set_pg_timeout(_COLLECTIVE)
    except RuntimeError as error:
        if has_hung_up(error):  # it was there, and is gone again
            raise
        raise _not_formed(rank, f"{type(error).__name__}: {error}", forming_s) from error
    return team


def _store(rank: Rank, name: str, listening_fd: int | None, forming_s: float) -> "PrefixStore":
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's own
    from torch.distributed.distributed_c10d import PrefixStore

    within = timedelta(seconds=forming_s)
    server = TCPStore(
        rank.host,
        rank.port,
        is_master=rank.rank == 0,
        timeout=within,
        wait_for_workers=False,
        master_listen_fd=listening_fd if rank.rank == 0 else None,
    )
    store = PrefixStore(name, server)
    store.set(f"here/{rank.rank}", "")
    everybody = [f"here/{other}" for other in range(rank.world_size)]
    try:
        store.wait(everybody, within)
    except dist.DistStoreError as error:
        missing = [str(other) for other, key in enumerate(everybody) if not store.check([key])]
        raise _not_formed(
            rank, f"of {rank.world_size} ranks there did not come {', '.join(missing)}", forming_s
        ) from error
    return store


def _not_formed(rank: Rank, why: str, forming_s: float) -> TrainingFault:
    where = f"rank {rank.rank} waited up to {forming_s:.0f} s for the others at {rank.host}:{rank.port}"
    advice = "do the hosts reach each other there, and did each worker start its ranks?"
    return TrainingFault("gang_not_formed", f"{where}: {why[:500]}; {advice}", permanent=False)


def _tell_users_code(rank: Rank) -> None:
    """As torchrun does."""
    os.environ.update(
        RANK=str(rank.rank),
        LOCAL_RANK=str(rank.local_rank),
        WORLD_SIZE=str(rank.world_size),
        MASTER_ADDR=rank.host,
        MASTER_PORT=str(rank.port),
    )


def _interface_towards(host: str, port: int) -> str | None:
    """The name of the network interface by which packets go there; None where the system does not say."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # one without an address
                    request = struct.pack("256s", name.encode()[:15])
                    if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24] == own:
                        return name
    except (ImportError, OSError):
        return None
    return None
