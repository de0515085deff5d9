"""Several ranks train as one device does, stop as one, and go on bit for bit as if they had never been killed.

Every rank is a process. `EXACTNESS_SEED=…` plays the kills again.
"""

import os
import random
import secrets
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from gang_child import GANG_WORKLOADS, RANKS, GangOperation
from training_child import Listed, Operation, ticking

from ops_contract.jobs import Execution, SchedulerName, Strategy
from ops_contract.lifecycle import CheckpointType, Outcome, Phase
from ops_contract.reports import ArtifactSaved, Started
from relight.training.attempt import Attempt, Site

SEED = int(os.environ.get("EXACTNESS_SEED", secrets.randbelow(2**32)))
STRATEGIES = [Strategy.DDP, Strategy.FSDP]
LONGER = pytest.mark.slow

# Batches of 3, 3, 2 and a last one of 2, 2, 2: 46 samples are six batches, of which the last window has two.
KNOBS: dict[str, Any] = {
    "devices": RANKS,
    "threads": 1,
    "max_epochs": 2,
    "batch_size": 8,
    "accumulate_grad_batches": 4,
    "gradient_clip": 0.5,
    "learning_rate": 0.02,
    "checkpoint_every": {"steps": 1},
}
# What one device computes too: nothing is drawn, and nothing is normalised over a batch.
PLAIN = {"norm": "layer", "dropout": 0.0, "random": False}

Maker = Callable[..., GangOperation]


pytestmark = pytest.mark.usefixtures("numerics_given_back")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    def make(workload: str = "blocks", config: dict[str, Any] | None = None, **execution: Any) -> GangOperation:
        knobs = Execution.model_validate(KNOBS | execution)
        return GangOperation(tmp_path_factory.mktemp(workload), workload, config=config or {}, execution=knobs)

    return make


@pytest.fixture(scope="module")
def uninterrupted(make: Maker) -> Maker:
    known: dict[str, GangOperation] = {}

    def uninterrupted(*args: Any, **different: Any) -> GangOperation:
        key = repr((args, different))
        if key not in known:
            known[key] = make(*args, **different)
            known[key].to_the_end()
        return known[key]

    return uninterrupted


def alone(operation: GangOperation) -> Operation:
    """The same job on one device."""
    one = operation.execution.model_dump() | {"devices": 1, "strategy": Strategy.DDP}
    execution = Execution.model_validate(one)
    return Operation(operation.root / "alone", operation.workload, operation.config, execution)


def _run_alone(one: Operation) -> dict[str, dict[int, float]]:
    sink = Listed()
    site, workload = Site(one.root, "cpu", cores=1), GANG_WORKLOADS[one.workload]
    assert Attempt(workload, one.start(), site, sink, lambda: None, ticking()).run() is Outcome.COMPLETED
    for report in sink.reports:
        one.accept(report)
    return one.curves


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gang_trains_as_one_device_does(uninterrupted: Maker, strategy: Strategy) -> None:
    """Of samples that weigh differently, in parts and windows that are uneven."""
    gang = uninterrupted("blocks", PLAIN, strategy=strategy, optimizer="sgd")

    expected = _run_alone(alone(gang))

    assert gang.curves.keys() - {"largest"} == expected.keys() - {"largest"}
    for name in ("loss", "val_loss", "learning_rate", "epoch"):
        assert gang.curves[name] == pytest.approx(expected[name], rel=1e-5), name
    started = [report for report in gang.reports if isinstance(report, Started)]
    assert [(s.exactness.promise, s.environment["devices"], s.environment["strategy"]) for s in started] == [
        ("promised", "3", strategy)
    ]
    assert [r.name for r in gang.reports if isinstance(r, ArtifactSaved)] == ["model.safetensors"]


# With FSDP the stops below are quick, and go on exactly too.
@pytest.mark.parametrize("strategy", [Strategy.DDP, pytest.param(Strategy.FSDP, marks=LONGER)])
@pytest.mark.parametrize("kill", [0, *(pytest.param(n, marks=LONGER) for n in range(1, 8))])
def test_a_gang_killed_anywhere_equals_one_that_never_was(
    make: Maker, uninterrupted: Maker, strategy: Strategy, kill: int
) -> None:
    """With BatchNorm, dropout, samples and batches that are drawn, tied and frozen weights, and a gradient clip."""
    print(f"EXACTNESS_SEED={SEED}")
    chance = random.Random(f"{SEED} {strategy} {kill}")
    reference = uninterrupted(strategy=strategy)
    gang = make(strategy=strategy)

    at = chance.randrange(1, len(reference.reports) - 3)
    gang.train(kill_at=lambda n, report: n == at)
    gang.to_the_end()

    assert gang.differences(reference) == []


@LONGER
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "knobs",
    [
        {"num_workers": 2},
        {"scheduler": SchedulerName.ONECYCLE, "optimizer": "sgd"},
        {"precision": "bf16"},
        {"precision": "16"},
        {"checkpoint_every": "auto"},
        {"max_samples": 46 + 14},
        {"early_stop_patience": 1, "early_stop_min_delta": 0.5, "checkpoint_monitor": "val_loss", "max_epochs": 5},
    ],
    ids=lambda knobs: next(iter(knobs)),
)
def test_whatever_the_knobs_a_gang_goes_on_exactly(
    make: Maker, uninterrupted: Maker, strategy: Strategy, knobs: dict[str, Any]
) -> None:
    reference = uninterrupted(strategy=strategy, **knobs | {"num_workers": 0})
    gang = make(strategy=strategy, **knobs)

    gang.train(kill_at=lambda n, report: getattr(report, "step", -1) == 2)
    assert gang.train(stop_rank=1, stop_at_poll=2) in (Outcome.CANCELLED, Outcome.COMPLETED)
    gang.to_the_end()

    assert gang.attempts == 3
    assert gang.differences(reference) == []


@LONGER
@pytest.mark.parametrize("samples", [40 + 1, 40 + 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_without_samples_of_a_short_batch_waits_for_nothing(
    uninterrupted: Maker, strategy: Strategy, samples: int
) -> None:
    gang = uninterrupted("blocks", PLAIN | {"samples": samples}, strategy=strategy, optimizer="sgd")

    expected = _run_alone(alone(gang))

    assert gang.curves["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@LONGER
@pytest.mark.parametrize("samples", [40 + 2, 40 + 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batchnorm_trains_on_short_batches_of_which_no_rank_gets_one_sample(
    make: Maker, uninterrupted: Maker, strategy: Strategy, samples: int
) -> None:
    reference = uninterrupted("blocks", {"samples": samples}, strategy=strategy)
    gang = make("blocks", {"samples": samples}, strategy=strategy)

    gang.train(kill_at=lambda n, report: getattr(report, "step", -1) == 2)
    gang.to_the_end()

    assert gang.differences(reference) == []


@LONGER
def test_a_moving_average_registered_state_and_every_draw_resume_exactly(make: Maker, uninterrupted: Maker) -> None:
    """Those of one device that are a way to resume wrongly; scalars and transposed weights, with DDP."""
    reference = uninterrupted("zoo", {"samples": 46})
    gang = make("zoo", {"samples": 46})

    gang.train(kill_at=lambda n, report: getattr(report, "step", -1) == 3)
    gang.to_the_end()

    assert gang.differences(reference) == []


@pytest.mark.slow
@pytest.mark.parametrize("stop_rank", [2, pytest.param(0, marks=LONGER)])
@pytest.mark.parametrize(
    ("polls", "cursor"),
    # Two steps an epoch, then two batches of an evaluation; the beginning of an attempt is none without a checkpoint.
    [(1, (1, Phase.UPDATE)), pytest.param(3, (1, Phase.EVALUATE), marks=LONGER)],
)
@pytest.mark.parametrize("strategy", [Strategy.FSDP, pytest.param(Strategy.DDP, marks=LONGER)])
def test_the_wish_of_any_rank_stops_all_at_one_boundary_from_which_they_go_on(
    make: Maker, uninterrupted: Maker, strategy: Strategy, stop_rank: int, polls: int, cursor: tuple[int, Phase]
) -> None:
    gang = make(strategy=strategy)

    outcome = gang.train(stop_rank=stop_rank, stop_at_poll=polls, why="preempted")

    assert outcome is Outcome.PREEMPTED
    last = gang.checkpoints[-1]
    assert (last.step, last.phase) == cursor
    assert polls == 1 or last.checkpoint_type is CheckpointType.PREEMPT

    known = len(gang.reports)
    assert gang.train(stop_rank=stop_rank, stop_at_poll=0) is Outcome.CANCELLED
    assert len(gang.reports) == known, "nothing is restored of what is to stop where it is"

    gang.to_the_end()
    assert gang.differences(uninterrupted(strategy=strategy)) == []


def test_the_error_of_a_rank_is_its_own_and_the_others_have_lost_it(make: Maker) -> None:
    gang = make(config={"fails_on": 1})

    assert gang.train() is None

    errors = [finish.error for finish in gang.finishes if finish and finish.error]
    assert [error.code for error in errors] == ["peer_lost", "exception", "peer_lost"]
    assert "the second window is too much for me" in errors[1].message
    assert [f.outcome for f in gang.finishes if f] == [Outcome.PREEMPTED, Outcome.FAILED, Outcome.PREEMPTED]


@LONGER
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_that_is_killed_is_lost_to_the_others(make: Maker, strategy: Strategy) -> None:
    gang = make(strategy=strategy)

    gang.train(die_rank=2, die_at_poll=3)

    assert [finish and finish.error and finish.error.code for finish in gang.finishes] == ["peer_lost"] * 2 + [None]
    gang.to_the_end()


@LONGER
@pytest.mark.parametrize(
    ("mutant", "strategy", "found_by"),
    [
        ("buckets as DDP likes", Strategy.DDP, "resume"),
        ("buffers of each rank", Strategy.DDP, "resume"),
        ("buffers of each rank", Strategy.FSDP, "resume"),
        ("means of ranks' means", Strategy.DDP, "one device"),
        ("means of ranks' means", Strategy.FSDP, "one device"),
        ("metrics of rank 0", Strategy.DDP, "one device"),
        ("each rank's clock", Strategy.DDP, "end"),
        ("each rank's clock", Strategy.FSDP, "end"),
    ],
)
def test_an_engine_that_does_it_wrongly_is_found(make: Maker, mutant: str, strategy: Strategy, found_by: str) -> None:
    if found_by == "end":
        gang = make(strategy=strategy, checkpoint_every="auto")
        assert gang.train(mutant=mutant) is not Outcome.COMPLETED
        return
    if found_by == "one device":
        gang = make("blocks", PLAIN, strategy=strategy, optimizer="sgd")
        gang.train(mutant=mutant)
        assert gang.curves["loss"] != pytest.approx(_run_alone(alone(gang))["loss"], rel=1e-5)
        return
    whole, part = make(strategy=strategy), make(strategy=strategy)
    whole.train(mutant=mutant)
    part.train(mutant=mutant, stop_at_poll=1)
    part.train(mutant=mutant)
    assert part.differences(whole) != []


def test_one_device_asks_nobody(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective")

    for name in ("init_process_group", "all_reduce", "broadcast", "all_gather", "barrier"):
        monkeypatch.setattr(dist, name, refused)

    curves = _run_alone(alone(make("blocks", PLAIN)))

    assert len(curves["loss"]) == 4
    assert not dist.is_initialized()
