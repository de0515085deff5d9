"""What a checkpoint costs the training loop: ours, torch.save + fsync, torch.distributed.checkpoint.async_save.

One model of 25 M parameters with AdamW is trained in blocks of steps. A block saves once, at its first boundary, by one
of the three ways, or not at all; the ways alternate, so that what else the machine does meets all of them. Two numbers
count: how long the loop stood still (in the save's call, and where it waits before the update), and how much longer
the whole block took than the block without a save beside it, which has in it what the writer takes from the steps.
The share of the loop's time is that of a block, with one save in its ten steps, far more often than any run has it.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import lines
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ops_contract.jobs import Execution
from ops_contract.lifecycle import CheckpointType, Phase
from ops_contract.pipe import Mark
from ops_contract.reports import Progress, Report
from relight.manifest import Manifest
from relight.training.marks import Marks
from relight.training.monitor import Monitor
from relight.training.saving import Saver
from relight.training.state import Cursor, Live

WAYS = ("no save", "ours", "torch.save + fsync", "dcp.async_save")
ABOUT = Manifest(
    operation_id=UUID(int=1),
    attempt=1,
    step=0,
    epoch=0,
    phase=Phase.UPDATE,
    workload="bench",
    code_digest=None,
    data_digest=None,
    numerics={},
    files={},
)


class Quiet:
    def report(self, report: Report) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def mark(self, mark: Mark) -> None: ...


@dataclass
class Block:
    """`landed` is whether the checkpoint was on disk when the last step ended."""

    total_s: float = 0.0
    stood_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    landed: bool = True


class Bench:
    def __init__(self, root: Path, batch: int) -> None:
        torch.manual_seed(0)
        layers = [m for _ in range(6) for m in (nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 1024))]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(batch, 1024)
        self.live = Live(self.model, self.optimizer, None, {}, Monitor(Execution()))
        self.root = root
        self.saver = Saver(root, ABOUT, self.live, Quiet(), Marks(Quiet(), torch.device("cpu")), None)
        self.saves = 0
        self.future: Any = None

    def block(self, way: str, steps: int) -> Block:
        block = Block()
        start_s = time.perf_counter()
        for step in range(steps):
            step_s = time.perf_counter()
            if step == 0:
                block.stood_s += timed(lambda: self.save(way))
            self.optimizer.zero_grad(set_to_none=True)
            self.model(self.batch).square().mean().backward()
            block.stood_s += timed(self.saver.seal)
            self.optimizer.step()
            block.steps_s.append(time.perf_counter() - step_s)
        block.total_s = time.perf_counter() - start_s
        block.landed = timed(lambda: self.landed(way)) < 0.01
        for directory in self.root.iterdir():
            shutil.rmtree(directory)
        os.sync()  # the next block does not pay for this one's pages
        return block

    def save(self, way: str) -> None:
        self.saves += 1
        if way == "ours":
            self.saver.save(CheckpointType.PERIODIC, Cursor(step=self.saves), {})
        elif way == "torch.save + fsync":
            (self.root / "torch").mkdir()
            with open(self.root / "torch" / "state.pt", "wb") as file:
                torch.save(self.state(), file)
                file.flush()
                os.fsync(file.fileno())
        elif way == "dcp.async_save":
            self.future = dcp.async_save(self.state(), checkpoint_id=self.root / f"dcp-{self.saves}")

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def landed(self, way: str) -> None:
        if way == "ours":
            self.saver._writer.wait()
        elif way == "dcp.async_save":
            self.future.result()


def timed(act: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    act()
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="blocks of each way")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block, which has one save")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where to write; a new temporary directory by default")
    lines.add_option(parser)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")  # that there is one process only is meant
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(dir=given.dir) as root:
        bench = Bench(Path(root), given.batch)
        with bench.saver:
            blocks: dict[str, list[Block]] = {way: [] for way in WAYS}
            for way in WAYS:
                bench.block(way, 2)  # warm: buffers, threads, optimizer state
            for round in range(given.rounds):
                for i in range(len(WAYS)):
                    way = WAYS[(i + round) % len(WAYS)]
                    blocks[way].append(bench.block(way, given.steps))
    tell(bench, blocks, given)
    found = compared(blocks)
    print(f"\n{lines.table(found)}")
    lines.write(given.lines, found)


def compared(blocks: dict[str, list[Block]]) -> list[lines.Line]:
    """Our stall with the goal for it, and with what the others' saves cost."""
    stood_ms = {way: [block.stood_s * 1e3 for block in blocks[way]] for way in WAYS}
    share = [100 * block.stood_s / block.total_s for block in blocks["ours"]]
    ours = stood_ms["ours"]
    return [
        lines.limit("a checkpoint: the loop stands still, of its time", share, "%", 1.0),
        *(
            lines.ratio("a checkpoint: the loop stands still", way, ours, stood_ms[way], "ms", "≤", 0.2)
            for way in WAYS[2:]
        ),
    ]


def tell(bench: Bench, blocks: dict[str, list[Block]], given: argparse.Namespace) -> None:
    millions = sum(p.numel() for p in bench.model.parameters()) / 1e6
    plain = [block.total_s for block in blocks["no save"]]
    plain_step_s = statistics.median(s for block in blocks["no save"] for s in block.steps_s)
    ours_s = statistics.median(block.stood_s for block in blocks["ours"])
    print(
        f"{millions:.1f} M parameters, AdamW; {given.threads} threads of {os.cpu_count()} cores, "
        f"torch {torch.__version__}, {platform.machine()}; {given.rounds} rounds of {given.steps} steps with one save; "
        f"load {os.getloadavg()[0]:.1f}\n"
        f"without a save: a step {plain_step_s * 1e3:.0f} ms, a block {spread(plain, 1)} s\n"
    )
    print("| way | stood still, ms | of the loop | ours ÷ it | block longer by, ms | step beside it | landed |")
    print("|---|---|---|---|---|---|---|")
    for way in WAYS[1:]:
        stood = [block.stood_s for block in blocks[way]]
        longer = [block.total_s - base for block, base in zip(blocks[way], plain, strict=True)]
        beside_s = statistics.median(s for block in blocks[way] for s in block.steps_s[1:])
        share = statistics.median(block.stood_s / block.total_s for block in blocks[way])
        landed = f"{sum(block.landed for block in blocks[way])} of {len(stood)}"
        cells = [way, spread(stood), f"{share:.2%}", f"{ours_s / statistics.median(stood):.3f}×", spread(longer)]
        print(f"| {' | '.join([*cells, f'{beside_s / plain_step_s:.2f}×', landed])} |")


def spread(values_s: list[float], factor: float = 1e3) -> str:
    scaled = [value_s * factor for value_s in values_s]
    return f"{statistics.median(scaled):.1f} ({min(scaled):.1f} to {max(scaled):.1f})"


if __name__ == "__main__":
    main()
