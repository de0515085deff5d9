"""What a gang is made of, without processes: parts of batches, who is asked, whose fault it was, what is refused."""

import socket
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from gang_child import Blocks, BlocksConfig, BlocksNet
from torch import Tensor, nn
from training_child import FixedItems, Listed, RandomItems

from ops_contract.agents import StartTraining
from ops_contract.jobs import Execution, Job, Strategy
from ops_contract.lifecycle import Kind, Outcome
from ops_contract.pipe import Rank, RunJob
from ops_contract.reports import PEER_LOST, Finish, Metrics
from ops_worker import trainer
from relight.manifest import Manifest
from relight.training import numerics
from relight.training.attempt import Attempt, Site
from relight.training.faults import PeerLost, TrainingFault, is_peer_lost
from relight.training.order import DataOrder
from relight.training.parallel import repeated
from relight.training.reporting import Reporter
from relight.training.state import Cursor
from relight.training.team import Team, agree, agreed_wish, join
from relight.workload import Env, LoopWorkload

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.7]:25510: Connection reset by peer"
)


pytestmark = pytest.mark.usefixtures("numerics_given_back")


class Told(Team):
    """A rank whose peers say what they are told to."""

    def __init__(self, rank: int = 0, others: list[Any] | None = None) -> None:
        self.rank = rank
        self.world_size = 1 + len(others or [])
        self.others = others or []

    def total(self, numbers: Any) -> list[int]:
        return [sum(each) for each in zip(numbers, *self.others, strict=True)]

    def gathered(self, value: Any) -> list[Any]:
        return [*self.others[: self.rank], value, *self.others[self.rank :]]


# ---- data


def order(rank: int = 0, world_size: int = 1, samples: int = 20, num_workers: int = 0) -> DataOrder:
    def noisy(items: list[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.stack(items), torch.randn(())

    return DataOrder(RandomItems(samples), noisy, 7, 8, num_workers, rank=rank, world_size=world_size)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_ranks_parts_are_the_batch_of_one_device(num_workers: int) -> None:
    whole = list(order().training(1, 0))
    parts = [list(order(rank, 3, num_workers=num_workers).training(1, 0)) for rank in range(3)]

    assert [[len(b.data[0]) for b in of_rank] for of_rank in parts] == [[3, 3, 2], [3, 3, 2], [2, 2, 2]]
    for batch, *of_ranks in zip(whole, *parts, strict=True):
        assert torch.equal(batch.data[0], torch.cat([part.data[0] for part in of_ranks if not part.idle]))
        assert {part.samples for part in of_ranks} == {batch.samples}
    assert [[part.idle for part in of_rank] for of_rank in parts] == [[False] * 3] * 2 + [[False, False, True]]


def test_a_rank_without_samples_gets_the_first_ones_and_is_idle() -> None:
    *_, last = order(2, 3, samples=18).training(0, 0)
    *_, whole = order(samples=18).training(0, 0)

    assert (last.idle, last.samples) == (True, 2)
    assert torch.equal(last.data[0], whole.data[0])


@pytest.mark.parametrize("left", range(1, 8))
def test_no_rank_gets_a_single_sample_of_a_short_batch_unless_that_is_all(left: int) -> None:
    parts = [list(order(rank, 3, samples=8 + left).training(0, 0))[-1] for rank in range(3)]

    assert {len(part.data[0]) for part in parts} <= ({1} if left == 1 else {2, 3})
    assert sum(len(part.data[0]) for part in parts if not part.idle) == left
    assert not parts[0].idle


def test_where_a_full_batch_has_no_two_for_every_rank_a_single_sample_is_a_part() -> None:
    parts = [
        next(DataOrder(FixedItems(9), torch.stack, 7, 4, 0, rank=r, world_size=3).training(0, 0)) for r in range(3)
    ]

    assert [(len(part.data), part.idle) for part in parts] == [(2, False), (1, False), (1, False)]


def test_what_collate_draws_is_each_ranks_own_and_of_one_device_as_ever() -> None:
    drawn = {float(next(order(rank, 3).training(0, 0)).data[1]) for rank in range(3)}

    assert len(drawn) == 3
    assert float(next(order().training(0, 0)).data[1]) == pytest.approx(0.197922885, abs=1e-8)


def test_every_rank_validates_on_the_whole() -> None:
    for mine, whole in zip(order(1, 3).validation(), order().validation(), strict=True):
        assert torch.equal(mine.data[0], whole.data[0])
        assert torch.equal(mine.data[1], whole.data[1])


# ---- what is agreed


@pytest.mark.parametrize(
    ("wishes", "why"),
    [
        ([None, None], None),
        ([None, "preempted"], "preempted"),
        (["cancelled", None], "cancelled"),
        (["preempted", "cancelled"], "cancelled"),
    ],
)
def test_to_cancel_outweighs_to_preempt(wishes: list[Any], why: str | None) -> None:
    mine, other = wishes
    team = Told(others=[[other == "cancelled", other == "preempted", 4]])

    assert agreed_wish(team, mine, 3) == (why, [7])


def test_all_fail_where_one_does_each_with_what_it_knows() -> None:
    agree(Told(others=[None]), None)
    with pytest.raises(OSError, match="no room"):
        agree(Told(others=[None]), OSError("no room"))
    with pytest.raises(PeerLost, match="rank 1: OSError: no room"):
        agree(Told(others=["OSError: no room"]), None)


def test_a_metric_is_the_mean_over_the_units_of_all_ranks() -> None:
    """One that an idle rank computed says nothing, be it NaN."""
    sink, others = Listed(), [[["loss", 0, 6, 12.0]], [["loss", 0, 0, 0.0]]]
    reporter = Reporter(sink, 1, lambda: 0.0, Told(others=others))

    reporter.add_micro_batch(0, 3, torch.tensor(5.0), {})
    reporter.add_micro_batch(0, 0, torch.tensor(torch.nan), {})
    reporter.flush(Cursor())

    [metrics] = [report for report in sink.reports if isinstance(report, Metrics)]
    assert {series.name: list(series.floats()) for series in metrics.series} == {"loss": [27 / 9]}


# ---- whose fault it was


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (PeerLost("rank 1: OSError"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (torch.distributed.DistNetworkError("recv failed"), True),
        (RuntimeError("Connection reset by peer"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),
        (RuntimeError("gloo has no such reduction"), False),
        (ValueError("nan"), False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_broken_collective_is_told_from_an_error_of_its_own(error: Exception, lost: bool) -> None:
    wrapped = RuntimeError("training_step failed")
    wrapped.__cause__ = error

    assert is_peer_lost(error) is lost
    assert is_peer_lost(wrapped) is lost


class Loops(LoopWorkload[BlocksConfig]):
    Config = BlocksConfig

    def run(self, ctl: Any) -> None:
        raise AssertionError("not reached")


class Fails(Blocks):
    error: Exception = ValueError("mine")

    def __init__(self, config: BlocksConfig, env: Env) -> None:
        raise self.error


class Agent:
    """The trainer's end of a pipe that nobody reads."""

    def __init__(self) -> None:
        self.reports: list[Any] = []

    def report(self, report: Any) -> None:
        self.reports.append(report)

    def mark(self, mark: Any) -> None:
        pass

    def should_stop(self) -> None:
        return None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(workload: type[Any], rank: Rank | None, devices: int = 2) -> Finish:
        monkeypatch.setattr(trainer, "find_workload", lambda name: workload)
        monkeypatch.setattr("relight.training.attempt.join", lambda *given: Told(others=[None] * (devices - 1)))
        monkeypatch.chdir(tmp_path)
        execution = Execution(devices=devices, accelerator="cpu")  # type: ignore[arg-type]
        start = StartTraining(
            incarnation=uuid4(),
            operation_id=uuid4(),
            attempt=1,
            slots=[0],
            deadline_s=60,
            job=Job(kind=Kind.TRAINING, workload="it", config={}, execution=execution),
        )
        given = RunJob(
            start=start, storage_root=str(tmp_path), directory=str(tmp_path), device="cpu", cores=1, rank=rank
        )
        return trainer.run(given, Agent())  # type: ignore[arg-type]

    return run


SECOND = Rank(rank=1, local_rank=1, world_size=2, host="127.0.0.1", port=1)


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (RuntimeError(GLOO), Outcome.PREEMPTED, PEER_LOST),
        (ValueError("mine"), Outcome.FAILED, "exception"),
    ],
)
def test_a_trainer_says_peer_lost_and_is_not_charged(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: Outcome, code: str
) -> None:
    monkeypatch.setattr(Fails, "error", error)

    finish = run(Fails, SECOND)

    assert (finish.outcome, finish.error.code) == (outcome, code)


def test_without_a_gang_nobody_is_lost(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fails, "error", RuntimeError(GLOO))

    assert run(Fails, None, devices=1).outcome is Outcome.FAILED


# ---- what is refused


def test_several_devices_need_a_gang(run: Any) -> None:
    finish = run(Blocks, None)

    assert (finish.permanent, finish.error.code) == (True, "no_gang")
    assert "execution.devices is 2, and this process is the only one" in finish.error.message


@pytest.mark.parametrize("rank", [None, SECOND])
def test_a_loop_of_its_own_cannot_be_divided(run: Any, rank: Rank | None) -> None:
    finish = run(Loops, rank)

    assert (finish.permanent, finish.error.code) == (True, "no_gang")
    assert "a LoopWorkload are its own" in finish.error.message


def test_that_is_said_at_submit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer, "find_workload", lambda name: Loops)
    monkeypatch.chdir(tmp_path)
    job = Job(kind=Kind.TRAINING, workload="it", config={}, execution=Execution(devices=2))
    start = StartTraining(incarnation=uuid4(), operation_id=uuid4(), attempt=1, slots=[0], deadline_s=60, job=job)

    said = trainer.validated(
        RunJob(start=start, storage_root=str(tmp_path), directory=str(tmp_path), device="cpu", cores=1)
    )

    assert [(p.field, p.problem[:29]) for p in said.problems] == [("workload", "loop and files of a LoopWorkl")]


def test_a_gang_that_does_not_form_says_who_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        rank = Rank(rank=0, local_rank=0, world_size=3, host="127.0.0.1", port=port)

        with pytest.raises(TrainingFault, match=f"127.0.0.1:{port}: of 3 ranks there did not come 1, 2") as caught:
            join(rank, "it-1", "cpu", listener.detach(), forming_s=0.2)

    assert (caught.value.code, caught.value.permanent) == ("gang_not_formed", False)


# ---- models and fingerprints


def test_blocks_that_repeat_are_divided_by_themselves() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU(), nn.ReLU()])
            self.layers[1].weight = self.layers[0].weight  # type: ignore[union-attr]
            self.nested = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.LayerNorm(2))

    blocks, shares = BlocksNet(BlocksConfig()), Shares()

    assert repeated(blocks) == list(blocks.blocks)
    assert repeated(shares) == [shares.layers[2], *shares.nested[0]]  # type: ignore[index, misc]


def test_another_number_of_devices_is_best_effort_from_one_device_too() -> None:
    about: dict[str, Any] = {"operation_id": uuid4(), "attempt": 1, "step": 0, "epoch": 0, "phase": "update"}
    more: dict[str, Any] = {"workload": "w", "code_digest": None, "data_digest": None, "files": {}}
    one = Manifest(**about, **more, numerics={"torch": "2"})

    def reasons(now: dict[str, str], before: Manifest) -> list[str]:
        return numerics.exactness(Execution(), now, before, []).reasons

    three = {"torch": "2", "devices": "3", "strategy": "ddp"}
    assert reasons({"torch": "2"}, one) == []
    assert reasons(three, one) == ["devices was 1 and is 3"]
    gang = Manifest(**about, **more, numerics=three)
    assert reasons(three, gang) == []
    assert reasons({"torch": "2"}, gang)[0] == "devices was 3 and is 1"
    assert reasons(three | {"strategy": "fsdp"}, gang) == ["strategy was ddp and is fsdp"]
    assert "network" in reasons(three | {"placement": "2+1"}, gang)[-1]


def test_an_attempt_knows_its_place(tmp_path: Path) -> None:
    job = Job(kind=Kind.TRAINING, workload="it", config={}, execution=Execution(devices=2, strategy=Strategy.DDP))
    start = StartTraining(incarnation=uuid4(), operation_id=uuid4(), attempt=1, slots=[1], deadline_s=60, job=job)

    env = Attempt(Blocks, start, Site(tmp_path, "cpu", 1), Listed(), lambda: None, rank=SECOND)._env

    assert (env.rank, env.world_size) == (1, 2)
