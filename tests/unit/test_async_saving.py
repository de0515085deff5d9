"""Saves beside the training: each is of its own step, the disk stops nobody, and what fails is said."""

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest
import torch
from torch import nn
from training_child import Listed

from ops_contract.jobs import Execution
from ops_contract.lifecycle import CheckpointType, Phase
from ops_contract.reports import CheckpointSaved, Note
from relight.manifest import Manifest
from relight.training import checkpoint
from relight.training.checkpoint import Published
from relight.training.codec import Encoded, decode
from relight.training.marks import Marks
from relight.training.monitor import Monitor
from relight.training.saving import Saver
from relight.training.snapshot import Snapshot, allocate
from relight.training.state import Cursor, Live

PERIODIC, CANCEL, FINAL = CheckpointType.PERIODIC, CheckpointType.CANCEL, CheckpointType.FINAL
GIVE_UP_S = 60.0
ABOUT = Manifest(
    operation_id=UUID(int=1),
    attempt=1,
    step=0,
    epoch=0,
    phase=Phase.UPDATE,
    workload="net",
    code_digest=None,
    data_digest=None,
    numerics={},
    files={},
)


class Net(nn.Module):
    """Tied weights, a buffer, a teacher that the optimizer does not know, a view of a parameter as a buffer."""

    average: torch.Tensor
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(64)
        self.teacher = nn.Parameter(torch.zeros(64), requires_grad=False)
        self.register_buffer("seen", self.first.bias.detach()[:8])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.teacher.data.lerp_(self.norm.weight.data, 0.1)
        out: torch.Tensor = self.second(torch.relu(self.norm(self.first(x))))
        return out


@dataclass
class Disk:
    """Publishes, once it is let. `begun` names the steps whose writing began, `lost` what it fails with."""

    blocked: bool = False
    lost: OSError | None = None
    begun: list[int] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def publish(self, root: Path, about: Manifest, state: Encoded) -> Published:
        with self.changed:
            self.begun.append(about.step)
            self.priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: not self.blocked, GIVE_UP_S)
        if self.lost:
            raise self.lost
        return checkpoint.publish(root, about, state)

    def block(self) -> None:
        with self.changed:
            self.blocked = True

    def let(self) -> None:
        with self.changed:
            self.blocked = False
            self.changed.notify_all()

    def until_begun(self, step: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: step in self.begun, GIVE_UP_S)


class Training:
    """The loop's calls, and the state at each boundary as it was."""

    def __init__(self, root: Path, available_bytes: int | None = 2**40) -> None:
        torch.manual_seed(0)
        self.root = root
        self.net = Net()
        self.live = Live(self.net, torch.optim.AdamW(self.net.parameters(), lr=0.1), None, {}, Monitor(Execution()))
        self.disk = Disk()
        self.sink = Listed()
        self.step = 0
        self.was: dict[int, dict[str, bytes]] = {}
        self.in_forward: Callable[[], object] = lambda: None
        marks = Marks(self.sink, torch.device("cpu"))
        self.saver = Saver(
            root, ABOUT, self.live, self.sink, marks, None, self.disk.publish, available_bytes=lambda: available_bytes
        )

    def update(self, n: int = 1) -> None:
        for _ in range(n):
            self.live.optimizer.zero_grad()
            self.net(torch.randn(16, 64)).square().mean().backward()
            self.in_forward()
            self.saver.seal()
            self.live.optimizer.step()
            self.step += 1
            self.was[self.step] = bits(self.live.capture())

    def save(self, why: CheckpointType = PERIODIC, *, monitored: float | None = None) -> None:
        self.saver.save(why, Cursor(step=self.step), {}, monitored)

    @property
    def saved(self) -> list[tuple[int, CheckpointType]]:
        reports = [report for report in self.sink.reports if isinstance(report, CheckpointSaved)]
        return [(report.step, report.checkpoint_type) for report in reports]

    def on_disk(self, step: int) -> dict[str, bytes]:
        from relight.training import tensorfile

        directory = self.root / str(ABOUT.operation_id) / f"1-{step}"
        raw = torch.frombuffer(bytearray((directory / checkpoint.TENSORS).read_bytes()), dtype=torch.uint8)
        tree = decode((directory / checkpoint.DOCUMENT).read_bytes(), tensorfile.parse(raw))
        return bits({name: tree[name] for name in ("model", "optimizer")})


def bits(tree: object, path: str = "") -> dict[str, bytes]:
    if isinstance(tree, torch.Tensor):
        return {path: tree.detach().contiguous().numpy().tobytes()}
    if isinstance(tree, dict):
        parts = [bits(value, f"{path}.{key}") for key, value in tree.items()]
        return {path: part for found in parts for path, part in found.items()}
    return {}


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path)
    yield training
    training.disk.let()
    training.saver.__exit__(None, None, None) if training.disk.lost is None else None
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-writer"]


def test_a_snapshot_is_of_its_own_step_whatever_the_next_ones_do(training: Training) -> None:
    for _ in range(4):
        training.update()
        training.save()
        training.disk.block()
        training.update(3)
        training.disk.let()
        training.saver._writer.wait()

    assert [step for step, _ in training.saved] == [1, 5, 9, 13]
    for step, _ in training.saved:
        assert training.on_disk(step) == training.was[step]


def test_a_slow_disk_stops_no_step_and_the_newest_save_wins(training: Training) -> None:
    training.disk.block()
    for _ in range(6):
        training.update()
        training.save()
    training.update()

    training.disk.let()
    training.saver._writer.wait()

    assert training.saved == [(1, PERIODIC), (6, PERIODIC)]
    assert training.on_disk(6) == training.was[6]


def test_a_save_whose_metric_is_known_is_not_passed_over(training: Training) -> None:
    training.disk.block()
    training.update()
    training.save()
    training.update()
    training.save(monitored=1.0)
    training.update()
    training.disk.until_begun(1)
    threading.Timer(0, training.disk.let).start()
    training.save()
    training.update()
    training.saver._writer.wait()

    assert [step for step, _ in training.saved] == [1, 2, 3]
    assert training.on_disk(2) == training.was[2]


@pytest.mark.parametrize("why", [CANCEL, FINAL])
def test_a_last_save_is_committed_when_it_returns_and_needs_none_that_waited(
    training: Training, why: CheckpointType
) -> None:
    training.disk.block()
    for _ in range(3):
        training.update()
        training.save()
    training.update()
    training.disk.until_begun(1)
    threading.Timer(0, training.disk.let).start()

    training.save(why)

    assert training.saved == [(1, PERIODIC), (4, why)]
    assert training.on_disk(4) == training.was[4]


def test_a_stop_where_a_periodic_save_is_being_written_waits_for_that_one(training: Training) -> None:
    training.update()
    training.save()

    training.save(CANCEL)

    assert training.saved == [(1, PERIODIC)]


def test_leaving_waits_for_what_is_being_written_though_the_training_failed(tmp_path: Path) -> None:
    training = Training(tmp_path)

    def run() -> None:
        with training.saver:
            training.update()
            training.save()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()

    assert training.saved == [(1, PERIODIC)]
    assert training.on_disk(1) == training.was[1]


@pytest.mark.parametrize("then", ["boundary", "save", "leave"])
def test_a_write_that_fails_is_said_and_the_checkpoint_before_stays(tmp_path: Path, then: str) -> None:
    training = Training(tmp_path)

    def run() -> None:
        with training.saver:
            training.update()
            training.save(CheckpointType.INITIAL)
            training.disk.lost = OSError(errno.ENOSPC, "No space left on device")
            training.update()
            training.save()
            training.update()
            if then == "boundary":
                training.saver._writer._thread.join(GIVE_UP_S)  # type: ignore[union-attr]
                training.saver.raise_failure()
            elif then == "save":
                training.save(CANCEL)

    with pytest.raises(OSError, match="No space left"):
        run()

    assert training.saved == [(1, CheckpointType.INITIAL)]
    assert training.on_disk(1) == training.was[1]


def test_too_little_memory_makes_it_wait_and_says_so_once(tmp_path: Path) -> None:
    training = Training(tmp_path, available_bytes=100_000)

    with training.saver:
        for _ in range(2):
            training.update()
            training.save()
            assert training.saved[-1] == (training.step, PERIODIC)

    notes = [report.message for report in training.sink.reports if isinstance(report, Note)]
    assert len(notes) == 1
    assert notes[0].startswith("training waits while checkpoints are written")


def test_parameters_changed_between_updates_drop_the_snapshot_and_the_next_are_whole(training: Training) -> None:
    def clamp() -> None:
        with torch.no_grad():
            training.net.first.weight.clamp_(-0.01, 0.01)

    training.in_forward = clamp
    for _ in range(3):
        training.update()
        training.save()
    training.update()
    training.saver._writer.wait()

    notes = [report.message for report in training.sink.reports if isinstance(report, Note)]
    assert [step for step, _ in training.saved] == [2, 3]
    assert len(notes) == 1
    assert "step 1 was dropped: parameters changed between two updates" in notes[0]
    assert training.on_disk(2) == training.was[2]


def test_two_buffers_serve_every_save(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(encoded: Encoded) -> torch.Tensor:
        memory = allocate(encoded)
        sizes.append(memory.nbytes)
        return memory

    monkeypatch.setattr("relight.training.snapshot.allocate", counted)

    for _ in range(20):
        training.update()
        training.save()

    assert 1 <= len(sizes) <= 2


@pytest.mark.skipif(sys.platform != "linux", reason="a priority of its own thread is Linux's")
def test_the_writer_has_the_lowest_priority_and_the_training_keeps_its_own(training: Training) -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    training.update()
    training.save()
    training.saver.seal()
    training.saver._writer.wait()
    training.update()
    training.save(FINAL)

    assert training.disk.priorities == [19, own]


def test_pieces_of_a_tensor_are_copied_by_whoever_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relight.training.snapshot._PIECE_BYTES", 64)
    source = torch.arange(100_000, dtype=torch.float32)
    encoded = Encoded(b"{}", {"big": source, "empty": torch.empty(0, 3)}, {})
    for _ in range(5):
        memory = allocate(encoded).zero_()
        snapshot = Snapshot(encoded, memory, may_wait={"big", "empty"})
        helper = threading.Thread(target=snapshot.help)
        helper.start()

        snapshot.seal()

        assert torch.equal(snapshot.state.tensors["big"], source)
        helper.join()
