"""A loop of the user's own: killed, stopped, changed or damaged, it goes on as if nothing had been."""

import difflib
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_child import PLAIN_LOOP, Harm, index, left, metrics, run, running
from test_training_exactness import BASE_SEED
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler
from training_child import Operation

import relight
from ops_contract.lifecycle import CheckpointType, Phase
from ops_contract.reports import ArtifactSaved, CheckpointSaved, Finish, Metrics, Started
from relight.training.faults import TrainingFault

KILLS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 24))]

# Draws its own batches; every kind of generator, scaled gradients gathered over two steps, state that is no tensor.
OWN_BATCHES = """
import random, sys
import numpy as np
import torch
from torch import nn
import relight

class Best:
    value = float("inf")
    def state_dict(self): return {"value": self.value}
    def load_state_dict(self, state): self.value = state["value"]

model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
best = Best()
run = relight.Run(model=model, optimizer=optimizer, scheduler=scheduler, state={"best": best}, scaler=scaler,
                  checkpoint_every={"steps": 3})
for step in run.steps(int(sys.argv[1])):
    x = torch.randn(6, 4) + random.random() + float(np.random.rand())
    loss = model(x).square().mean()
    scaler.scale(loss).backward()
    if step % 2:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    best.value = min(best.value, float(loss))
    run.report(loss=loss, best=best.value)
    if step % 5 == 4:
        scheduler.step(best.value)
        run.report(noise=torch.rand(()))
run.report(final=best.value)
"""

# 10 batches of 3 an epoch, the last of one sample; processes that load; an evaluation with noise; an epoch that breaks
# off; dropout that ends with the first epoch.
LOADERS = """
import random, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import relight

class Items(Dataset):
    def __len__(self): return 28
    def __getitem__(self, i): return torch.randn(4) * random.random() + i

model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 1))
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
run = relight.Run(model=model, optimizer=optimizer, scheduler=scheduler, checkpoint_every={"steps": 4},
                  data=DataLoader(Items(), batch_size=3, shuffle=True, num_workers=int(sys.argv[1])))
for epoch in run.epochs(3):
    for x in run.batches():
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(loss=loss)
        if epoch == 1 and run.step == 14:
            break
    run.report(val=torch.rand(()), mode=model[1].training)
    model[1].eval()
    scheduler.step()
"""

Undisturbed = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The example, but that it saves often, and those above."""
    plain = (PLAIN_LOOP / "train.py").read_text().replace("data=loader", 'data=loader, checkpoint_every={"steps": 7}')
    sources = {"plain": plain, "own": OWN_BATCHES, "loaders": LOADERS}
    folder = tmp_path_factory.mktemp("scripts")
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return {name: folder / f"{name}.py" for name in sources}


@pytest.fixture(scope="module")
def undisturbed(scripts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def undisturbed(name: str, *arguments: str) -> dict[str, Any]:
        if (name, *arguments) not in known:
            cwd = tmp_path_factory.mktemp(name)
            ended = run(scripts[name], cwd, *arguments)
            assert ended.code == 0, ended.said
            assert "was dropped" not in ended.said  # a copy was whole before the next update
            known[name, *arguments] = left(cwd / "relight-run")
        return known[name, *arguments]

    return undisturbed


def test_the_example_changes_at_most_ten_lines() -> None:
    before, after = ((PLAIN_LOOP / name).read_text().splitlines() for name in ("train_before.py", "train.py"))

    changed = [text for text in difflib.ndiff(before, after) if text[0] in "+-"]

    assert len(after) <= 60
    assert 0 < len([text for text in changed if text[0] == "+"]) <= len(changed) <= 10


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize(
    ("name", "argument", "steps"),
    [pytest.param("plain", "2", 60, marks=pytest.mark.slow), ("own", "23", 23), ("loaders", "0", 25)],
)
def test_a_script_killed_anywhere_leaves_what_an_undisturbed_one_does(
    scripts: dict[str, Path], undisturbed: Undisturbed, tmp_path: Path, name: str, argument: str, steps: int, kill: int
) -> None:
    print(f"EXACTNESS_SEED={BASE_SEED}")
    chance = random.Random(f"{BASE_SEED} {name} {kill}")
    for _ in range(chance.choice([1, 1, 2])):
        where = chance.choice(["step", "fsync"])
        run(scripts[name], tmp_path, argument, harm=Harm(chance.randrange(steps), where))

    ended = run(scripts[name], tmp_path, argument)

    assert ended.code == 0, ended.said
    assert left(tmp_path / "relight-run") == undisturbed(name, argument)


def test_processes_that_load_change_nothing(scripts: dict[str, Path], undisturbed: Undisturbed, tmp_path: Path) -> None:
    assert run(scripts["loaders"], tmp_path, "2", harm=Harm(18, waits=True)).code == -signal.SIGKILL
    ended = run(scripts["loaders"], tmp_path, "2")

    assert "goes on from step" in ended.said
    assert left(tmp_path / "relight-run") == undisturbed("loaders", "0")


def test_each_step_is_in_the_metrics_once_and_what_was_evaluated_in_its_epoch_s_last(
    undisturbed: Undisturbed, scripts: dict[str, Path], tmp_path: Path
) -> None:
    run(scripts["loaders"], tmp_path, "0")

    lines = metrics(tmp_path / "relight-run")

    # Ten steps, five until it breaks off, ten.
    assert [line["step"] for line in lines] == list(range(25))
    assert [line["epoch"] for line in lines] == [0] * 10 + [1] * 5 + [2] * 10
    assert [line["step"] for line in lines if "val" in line] == [9, 14, 24]
    assert [line["mode"] for line in lines if "mode" in line] == [1, 0, 0]
    assert sorted({line["learning_rate"] for line in lines}) == [0.00025, 0.0005, 0.001]


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_at_the_next_boundary_and_leaves(
    scripts: dict[str, Path], undisturbed: Undisturbed, tmp_path: Path, number: int, code: int
) -> None:
    stopped = run(scripts["plain"], tmp_path, "2", harm=Harm(4, signals=(number,)))
    newest = index(tmp_path / "relight-run").checkpoints[-1]
    ended = run(scripts["plain"], tmp_path, "2")

    assert (stopped.code, newest.step) == (code, 5)
    assert newest.checkpoint_type is (CheckpointType.CANCEL if code == 130 else CheckpointType.PREEMPT)
    assert "stopped before step 5" in stopped.said
    assert "goes on from step 5" in ended.said
    assert left(tmp_path / "relight-run") == undisturbed("plain", "2")


def test_a_second_signal_ends_it_at_once(scripts: dict[str, Path], tmp_path: Path) -> None:
    ended = run(scripts["plain"], tmp_path, "2", harm=Harm(4, signals=(signal.SIGINT, signal.SIGINT)))

    assert ended.code == -signal.SIGINT
    assert index(tmp_path / "relight-run").checkpoints[-1].step == 0


def test_a_stop_at_the_end_of_an_epoch_redoes_its_evaluation_whole(
    scripts: dict[str, Path], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    stopped = run(scripts["loaders"], tmp_path, "0", harm=Harm(9, signals=(signal.SIGTERM,)))
    newest = index(tmp_path / "relight-run").checkpoints[-1]
    run(scripts["loaders"], tmp_path, "0")

    assert (stopped.code, newest.step, newest.phase) == (143, 9, Phase.EVALUATE)
    assert left(tmp_path / "relight-run") == undisturbed("loaders", "0")


def test_gathered_gradients_are_not_cut_off(scripts: dict[str, Path], undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Even steps only gather, odd ones update."""
    stopped = run(scripts["own"], tmp_path, "23", harm=Harm(4, signals=(signal.SIGTERM,)))

    newest = index(tmp_path / "relight-run").checkpoints[-1].step
    run(scripts["own"], tmp_path, "23", harm=Harm(14, waits=True))

    assert (stopped.code, newest) == (143, 6)
    # Every third is due, but 15 comes after a step that gathers.
    assert [saved.step for saved in index(tmp_path / "relight-run").checkpoints] == [16, 18]


def test_a_finished_script_is_over_at_once_and_goes_on_with_more(
    scripts: dict[str, Path], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run(scripts["own"], tmp_path, "16")
    before = left(tmp_path / "relight-run")

    again = run(scripts["own"], tmp_path, "16")
    same = left(tmp_path / "relight-run")
    run(scripts["own"], tmp_path, "23")

    assert "goes on from step 16" in again.said
    assert same == before
    assert left(tmp_path / "relight-run") == undisturbed("own", "23")


def test_a_damaged_checkpoint_is_told_and_left_out(
    scripts: dict[str, Path], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    directory = tmp_path / "relight-run"
    run(scripts["plain"], tmp_path, "2", harm=Harm(30, waits=True))
    kept = index(directory).checkpoints
    file = directory / kept[-1].path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")

    ended = run(scripts["plain"], tmp_path, "2")

    assert len(kept) == 2
    assert f"the checkpoint of step {kept[-1].step} is left out: state.safetensors differs" in ended.said
    assert f"goes on from step {kept[0].step}" in ended.said
    assert index(directory).damaged == [kept[-1].path]
    assert left(directory) == undisturbed("plain", "2")


def test_nothing_that_can_be_read_is_refused_and_stays_as_it_is(scripts: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "relight-run"
    run(scripts["own"], tmp_path, "5")
    before = index(directory)
    for saved in before.checkpoints:
        (directory / saved.path / "state.json").write_bytes(b"{}")

    ended = run(scripts["own"], tmp_path, "5")
    (directory / "index.json").write_text("{")
    unreadable = run(scripts["own"], tmp_path, "5")

    assert ended.code == unreadable.code == 1
    assert "can be read" in ended.said
    assert "remove the directory to begin anew" in ended.said
    assert "index.json cannot be read" in unreadable.said


def test_other_code_is_refused_until_it_is_accepted(scripts: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(OWN_BATCHES)
    run(script, tmp_path, "5")
    script.write_text(OWN_BATCHES.replace("lr=0.05", "lr=0.06"))

    refused = run(script, tmp_path, "7")
    accepted = run(script, tmp_path, "7", RELIGHT_ACCEPT_CHANGES="1")

    assert refused.code == 1
    assert "train.py was" in refused.said
    assert "RELIGHT_ACCEPT_CHANGES=1" in refused.said
    assert accepted.code == 0
    assert "exactness is best effort: the workload's code changed: train.py was" in accepted.said


def test_only_the_newest_two_checkpoints_are_kept(scripts: dict[str, Path], tmp_path: Path) -> None:
    run(scripts["own"], tmp_path, "23", harm=Harm(20))
    run(scripts["own"], tmp_path, "23")

    known = index(tmp_path / "relight-run")
    assert known.model
    names = {path.name for path in (tmp_path / "relight-run" / str(known.operation_id)).iterdir()}

    assert len(known.checkpoints) == 2
    assert names == {*(saved.path.split("/")[1] for saved in known.checkpoints), "2-23-model"}


# --- in this process


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    model = nn.Linear(2, 1)
    yield {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "directory": tmp_path / "run"}
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_two_runs_in_one_directory_are_refused(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relight.training.directory._LOCKED_S", 0.0)
    first = relight.Run(**parts)
    with pytest.raises(TrainingFault, match="another Run is at work in"):
        relight.Run(**parts)
    first.close()
    relight.Run(**parts).close()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


ITEMS = TensorDataset(torch.zeros(9, 2))


def test_an_early_end_is_an_end_also_for_whoever_starts_it_again(parts: dict[str, Any]) -> None:
    items = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2)
    turns = []
    for _ in range(2):
        run = relight.Run(data=items, **parts)
        for epoch in run.epochs(5):
            for _ in run.batches():
                parts["optimizer"].step()
                turns.append(run.step)
            if epoch == 1:
                run.end()
        run.report(test=1.0)
        run.close()

        assert run.done
    assert turns == [0, 1, 2, 3]
    assert [line["step"] for line in metrics(parts["directory"])] == [0, 1, 2, 3, 4]
    assert index(parts["directory"]).checkpoints[-1].checkpoint_type is CheckpointType.FINAL


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ITEMS, "give a torch DataLoader"),
        (DataLoader(Stream()), "no positions"),
        (DataLoader(ITEMS, batch_size=None), "batch_size=n"),
        (DataLoader(ITEMS, batch_sampler=[[1], [2]]), "no batch_sampler"),
        (DataLoader(ITEMS, sampler=WeightedRandomSampler([1.0] * 9, 9)), "leave out sampler=WeightedRandomSampler"),
        (DataLoader(ITEMS, shuffle=True, generator=torch.Generator()), "leave out generator="),
        (DataLoader(ITEMS, worker_init_fn=print), "leave out worker_init_fn="),
        (DataLoader(ITEMS, batch_size=10, drop_last=True), "not one batch of 10"),
    ],
)
def test_data_that_cannot_be_gone_on_with_are_refused(parts: dict[str, Any], data: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        relight.Run(data=data, **parts)
    assert not parts["directory"].exists()


def test_a_loader_s_order_and_last_batch_are_taken_over(parts: dict[str, Any]) -> None:
    items = TensorDataset(torch.arange(9.0))
    run = relight.Run(data=DataLoader(items, batch_size=4, drop_last=True), **parts)

    seen = [[x.tolist() for (x,) in run.batches()] for _ in run.epochs(2)]
    run.close()

    assert seen == [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2


def test_other_settings_are_told_and_end_the_promise(parts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    items = TensorDataset(torch.arange(9.0))
    for seed, batch_size in ((0, 4), (1, 2)):
        run = relight.Run(data=DataLoader(items, batch_size=batch_size), seed=seed, **parts)
        next(run.epochs(1))
        run.close()

    said = capsys.readouterr().err
    assert "exactness is best effort: seed was 0 and is 1" in said
    assert "exactness is best effort: batch_size was 4 and is 2" in said


def test_what_would_be_lost_is_named_after_the_first_step(parts: dict[str, Any]) -> None:
    class Forgetful:
        n = 3

        def state_dict(self) -> dict[str, Any]:
            return {"n": self.n}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.n = 0

    run = relight.Run(**parts, state={"forgetful": Forgetful()})
    steps = run.steps(2)
    next(steps)
    parts["optimizer"].step()
    with pytest.raises(TrainingFault, match=r"does not give back what state_dict gave for state\.forgetful\.n"):
        next(steps)
    run.close()
    with pytest.raises(TypeError, match="needs state_dict"):
        relight.Run(**parts, state={"dict": {}})


def test_loops_that_cannot_be_gone_on_with_are_refused(parts: dict[str, Any]) -> None:
    run = relight.Run(**parts)
    with pytest.raises(ValueError, match="needs Run"):
        next(run.epochs(1))
    with pytest.raises(ValueError, match="within the loop"):
        run.report(loss=1.0)
    for _ in run.steps(1):
        with pytest.raises(ValueError, match="Run reports epoch itself"):
            run.report(epoch=1)
        with pytest.raises(ValueError, match=r"report\(\) gave 'loss' of shape \[2\]"):
            run.report(loss=torch.zeros(2))
    with pytest.raises(ValueError, match="one loop"):
        next(run.steps(2))
    run.close()


# --- in the service


@pytest.fixture
def operation(tmp_path: Path) -> Operation:
    return Operation(tmp_path, "command")


def completed(operation: Operation, script: Path, *arguments: str) -> list[Any]:
    with running(operation, script, *arguments) as runner:
        for _ in runner.reports():
            pass
        ended = runner.end()
    assert ended.code == 0, ended.said
    return runner.messages


def test_in_the_service_it_speaks_as_a_trainer_and_ends_bit_for_bit_as_undisturbed(
    scripts: dict[str, Path], operation: Operation, tmp_path: Path
) -> None:
    reference = Operation(tmp_path, "command")
    completed(reference, scripts["plain"], "2")
    with running(operation, scripts["plain"], "2", harm=Harm(30, waits=True)) as runner:
        killed = list(runner.reports())
    messages = completed(operation, scripts["plain"], "2")

    started = next(message for message in messages if isinstance(message, Started))
    models = [report for made in (reference, operation) for report in made.reports if isinstance(report, ArtifactSaved)]
    assert started.start_step == max(report.step for report in killed if isinstance(report, CheckpointSaved)) == 28
    assert (started.exactness.promise, started.environment["threads"]) == ("promised", "1")
    assert {"hello", "alive", "progress", "metrics"} <= {message.kind for message in messages}
    assert operation.differences(reference) == []
    assert len({(tmp_path / model.path).read_bytes() for model in models}) == 1
    assert len(models) == 2


@pytest.mark.parametrize("why", ["cancelled", "preempted"])
def test_a_stop_saves_at_the_next_boundary_and_leaves_with_0(
    scripts: dict[str, Path], operation: Operation, why: Any
) -> None:
    """Also where a scheduler has sent a SIGTERM to every process."""
    with running(operation, scripts["plain"], "1000") as runner:
        for report in runner.reports():
            if isinstance(report, Metrics):
                if why == "preempted":
                    runner.signal(signal.SIGTERM)
                runner.stop(why)
        ended = runner.end()

    saved = operation.checkpoints[-1]
    assert ended.code == 0, ended.said
    assert saved.checkpoint_type is (CheckpointType.CANCEL if why == "cancelled" else CheckpointType.PREEMPT)
    assert max(operation.curves["loss"]) == saved.step - (saved.phase is Phase.UPDATE)


def test_a_sigterm_ends_what_the_script_has_forked_and_after_the_last_step_the_script_itself(
    operation: Operation, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text("""
import os, signal, torch, relight
from torch import nn
model = nn.Linear(2, 1)
run = relight.Run(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
for step in run.steps(2):
    run.report(loss=float(step))
    for _ in range(40):  # it comes in the middle of a fork too
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            signal.pause()
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
""")

    with running(operation, script) as runner:
        for _ in runner.reports():
            pass
        ended = runner.end()

    assert ended.code == -signal.SIGTERM, ended.said
    assert operation.curves["loss"] == {0: 0.0, 1: 1.0}


def test_it_ends_at_once_when_nobody_listens_any_more(scripts: dict[str, Path], operation: Operation) -> None:
    with running(operation, scripts["plain"], "1000") as runner:
        for report in runner.reports():
            if isinstance(report, Metrics):
                runner.hang_up()
        ended = runner.end()

    assert ended.code == 1
    assert CheckpointType.CANCEL not in {saved.checkpoint_type for saved in operation.checkpoints}


def test_other_code_is_refused_in_the_service_with_the_command_that_accepts_it(
    operation: Operation, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(OWN_BATCHES)
    completed(operation, script, "5")
    script.write_text(OWN_BATCHES + "# changed\n")

    with running(operation, script, "5") as runner:
        [word] = runner.reports()
        ended = runner.end()

    assert isinstance(word, Finish)
    assert (word.permanent, word.error and word.error.code) == (True, "code_changed")
    assert ended.code == 1
    assert f"ops resume {operation.id} --accept-changes" in ended.said


def test_a_second_run_in_a_command_is_refused(operation: Operation, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(OWN_BATCHES + "relight.Run(model=model, optimizer=optimizer)\n")
    with running(operation, script, "2") as runner:
        list(runner.reports())
        ended = runner.end()

    assert ended.code == 1
    assert "a command has one Run" in ended.said
