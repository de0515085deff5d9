"""Checkpoints whose tensors are divided among ranks: read on any number of them, refused where a byte is wrong."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gang_child import RANKS, GangOperation
from safetensors import safe_open
from training_child import Listed, Operation, ref_of, ticking

from ops_contract.jobs import Execution, Strategy
from ops_contract.lifecycle import Outcome
from ops_contract.reports import ArtifactSaved, CheckpointSaved, Started
from relight.manifest import CheckpointCorrupt
from relight.training.attempt import Attempt, Site
from relight.training.checkpoint import SHARDS, restore
from relight.training.codec import CodecError, Sharded, decode, encode
from relight.training.sharding import read_in

KNOBS: dict[str, Any] = {
    "devices": RANKS,
    "strategy": Strategy.FSDP,
    "threads": 1,
    "max_epochs": 1,
    "batch_size": 8,
    "learning_rate": 0.02,
    "checkpoint_every": {"steps": 2},
}


pytestmark = pytest.mark.usefixtures("numerics_given_back")


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> GangOperation:
    """Ran to its end on three ranks."""
    root = tmp_path_factory.mktemp("gang")
    operation = GangOperation(root, "blocks", config={}, execution=Execution.model_validate(KNOBS))
    operation.to_the_end()
    return operation


@pytest.fixture
def shard(gang: GangOperation) -> Iterator[Path]:
    """One of a checkpoint's, to be spoiled."""
    path = gang.root / gang.checkpoints[-1].path / SHARDS / "shard-00002-model-00001-of-00001.safetensors"
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


def test_each_rank_has_a_file_and_there_is_no_pickle(gang: GangOperation) -> None:
    directory = gang.root / gang.checkpoints[-1].path
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}

    shards = [f"shards/shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in (1, 2, 3)]
    assert files == {"state.json", "state.safetensors", "manifest.json", *shards}
    assert set(json.loads((directory / "manifest.json").read_text())["files"]) == files - {"manifest.json"}
    with safe_open(directory / shards[0], framework="pt") as file:
        assert {"model.into.weight", "optimizer.state.0.exp_avg"} <= set(file.keys())
        assert file.get_slice("model.into.weight").get_shape() == [3, 8]


def test_the_final_model_is_whole(gang: GangOperation) -> None:
    [model] = [report for report in gang.reports if isinstance(report, ArtifactSaved)]
    tree = whole_tree(gang, gang.checkpoints[-1])

    with safe_open(gang.root / model.path, framework="pt") as file:
        assert file.metadata()["out.weight"] == "into.weight"
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            assert torch.equal(file.get_tensor(name), tree["model"][name]), name
        assert {*file.keys(), "out.weight"} == set(tree["model"])


def whole_tree(gang: Operation, saved: CheckpointSaved) -> Any:
    ref = ref_of(saved)
    return read_in(restore(gang.root, ref)[1], gang.root / ref.path / SHARDS, None)


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_flip, "differs from what was written"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, not"),
        (Path.unlink, "is missing or a symbolic link"),
    ],
    ids=["a bit", "truncated", "missing"],
)
def test_a_spoiled_file_is_refused(gang: GangOperation, shard: Path, spoil: Callable[[Path], Any], said: str) -> None:
    spoil(shard)

    with pytest.raises(CheckpointCorrupt, match=said):
        restore(gang.root, ref_of(gang.checkpoints[-1]))


@pytest.mark.parametrize("name", [".metadata", "shard-00009-model-00001-of-00001.safetensors"])
def test_a_file_that_nobody_committed_is_refused(gang: GangOperation, shard: Path, name: str) -> None:
    """torch would read a pickle there, or tensors that have no hash."""
    foreign = shard.with_name(name)
    foreign.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    try:
        with pytest.raises(CheckpointCorrupt, match="is none of its files"):
            restore(gang.root, ref_of(gang.checkpoints[-1]))
    finally:
        foreign.unlink()


def directories(operation: GangOperation) -> set[str]:
    """Of checkpoints that have their name."""
    place = operation.root / str(operation.id)
    names = {path.name for path in place.iterdir()}
    return {f"{operation.id}/{name}" for name in names if not name.endswith((".tmp", "-model"))}


def committed(operation: GangOperation) -> set[str]:
    return {saved.path for saved in operation.checkpoints}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_is_killed_while_it_writes_leaves_no_half_checkpoint_and_the_next_goes_on(
    gang: GangOperation, tmp_path: Path, rank: int
) -> None:
    killed = GangOperation(tmp_path, gang.workload, gang.config, gang.execution)

    assert killed.train(write_rank=rank, die_in_write=2) is None

    assert [saved.step for saved in killed.checkpoints] == [0, 2]
    assert directories(killed) == committed(killed)
    codes = [finish.error.code for finish in killed.finishes if finish and finish.error]
    assert (codes, killed.finishes[rank]) == (["peer_lost"] * 2, None)
    killed.to_the_end()
    assert directories(killed) == committed(killed)
    assert killed.differences(gang) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_fails_all_and_the_checkpoint_before_is_good(
    gang: GangOperation, tmp_path: Path, rank: int
) -> None:
    full = GangOperation(tmp_path, gang.workload, gang.config, gang.execution)

    full.train(write_rank=rank, full_in_write=2)

    codes = [finish.error.code for finish in full.finishes if finish and finish.error]
    assert codes == ["disk_full" if number == rank else "peer_lost" for number in range(RANKS)]
    assert [saved.step for saved in full.checkpoints] == [0, 2]
    assert {str(path.relative_to(tmp_path)) for path in (tmp_path / str(full.id)).iterdir()} == committed(full)
    full.to_the_end()
    assert full.differences(gang) == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Of a quarter of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "relight-test", place]
    if (mounted := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.slow
def test_a_gang_whose_disk_fills_up_goes_on_exactly_once_there_is_room(disk: Path, tmp_path: Path) -> None:
    often = Execution.model_validate(KNOBS | {"checkpoint_every": {"steps": 1}, "max_epochs": 4})
    calm = GangOperation(tmp_path / "calm", "blocks", {}, often)
    calm.to_the_end()
    full = GangOperation(disk, "blocks", {}, often)

    assert full.train() is not Outcome.COMPLETED

    codes = {finish.error.code for finish in full.finishes if finish and finish.error}
    assert "disk_full" in codes <= {"disk_full", "peer_lost"}
    assert 0 < len(full.checkpoints) < len(calm.checkpoints)
    assert directories(full) == committed(full)
    subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
    full.to_the_end()
    assert full.differences(calm) == []


@pytest.mark.slow
def test_every_rank_of_a_resume_says_that_it_is_corrupt(gang: GangOperation, shard: Path) -> None:
    _flip(shard)
    gang.attempts += 1
    again = GangOperation(gang.root, gang.workload, gang.config, gang.execution, id=gang.id, attempts=gang.attempts)
    again.checkpoints = gang.checkpoints[-1:]

    assert again.train() is Outcome.CHECKPOINT_CORRUPT
    assert {finish.error.code for finish in again.finishes if finish and finish.error} == {"checkpoint_corrupt"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((3, Strategy.FSDP), (2, Strategy.FSDP)),
        ((2, Strategy.FSDP), (3, Strategy.FSDP)),
        ((3, Strategy.FSDP), (3, Strategy.DDP)),
        ((3, Strategy.DDP), (3, Strategy.FSDP)),
        ((3, Strategy.DDP), (2, Strategy.DDP)),
        ((2, Strategy.DDP), (3, Strategy.DDP)),
    ],
    ids=str,
)
def test_another_number_of_ranks_or_strategy_goes_on_from_the_same_tensors(
    tmp_path: Path, before: tuple[int, Strategy], after: tuple[int, Strategy]
) -> None:
    """What it writes of the state that it restored, at once, has the bits of what it read."""
    parent = GangOperation(tmp_path, "blocks", {}, Execution.model_validate(KNOBS | _on(*before) | {"max_steps": 3}))
    parent.to_the_end()
    at = parent.checkpoints[-1]
    child = GangOperation(
        tmp_path,
        "blocks",
        {},
        Execution.model_validate(KNOBS | _on(*after) | {"max_steps": 3}),
        forked_from=(parent, at),
    )
    child.train(mutant="saves what it restored")

    assert child.checkpoints[0].step == at.step
    assert child.final_state() == parent.final_state()
    [started] = [report for report in child.reports if isinstance(report, Started)]
    assert started.exactness.promise == "best_effort"
    said = [f"devices was {before[0]} and is {after[0]}"] if before[0] != after[0] else []
    said += [f"strategy was {before[1]} and is {after[1]}"] if before[1] != after[1] else []
    assert started.exactness.reasons == said


def _on(devices: int, strategy: Strategy) -> dict[str, Any]:
    return {"devices": devices, "strategy": strategy}


def test_one_device_goes_on_from_what_three_had_divided(gang: GangOperation) -> None:
    at = gang.checkpoints[1]
    one = Execution.model_validate(KNOBS | _on(1, Strategy.DDP))
    child = Operation(gang.root, "blocks", {}, one, forked_from=(gang, at))
    from gang_child import Blocks

    sink = Listed()
    attempt = Attempt(Blocks, child.start(), Site(gang.root, "cpu", cores=1), sink, lambda: "cancelled", ticking())
    attempt._should_stop = iter([None, "cancelled"]).__next__  # type: ignore[method-assign]

    assert attempt.run() is Outcome.CANCELLED
    [started] = [report for report in sink.reports if isinstance(report, Started)]
    assert started.start_step == at.step
    assert "devices was 3 and is 1" in started.exactness.reasons


def test_the_place_of_a_divided_tensor_survives_the_document() -> None:
    tree = {"a": [Sharded("x", (4, 2), "float32")], "b": Sharded("x", (4, 2), "float32")}

    assert decode(encode(tree).document, {}) == tree


@pytest.mark.parametrize(
    "spoiled",
    [{"dtype": "load"}, {"dtype": 3}, {"shape": [-1]}, {"shape": 2}, {"of": None}, {"shape": [2**70]}],
    ids=str,
)
def test_a_place_that_says_nonsense_is_refused(spoiled: dict[str, Any]) -> None:
    place = {"$": "sharded", "of": "x", "shape": [4, 2], "dtype": "float32"} | spoiled

    with pytest.raises(CodecError, match="not a sharded"):
        decode(json.dumps({"a": place}).encode(), {})
