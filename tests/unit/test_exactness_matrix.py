"""Scenario 11: every two circumstances of a training meet in some configuration; killed anywhere, no bit differs.

`EXACTNESS_SEED=…` plays the kills again, `EXACTNESS_KILLS=…` is how many each configuration gets.
"""

import os
import random
import secrets
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from covering import all_pairs, covering_array, pairs_of
from training_child import MUTANTS, Operation

from ops_contract.jobs import CheckpointEvery, Execution
from ops_contract.lifecycle import Outcome, Phase

SEED = int(os.environ.get("EXACTNESS_SEED", secrets.randbelow(2**32)))
KILLS = int(os.environ.get("EXACTNESS_KILLS") or 5)
EPOCHS, BATCH, BATCHES, VALIDATION_BATCHES = 3, 5, 7, 2
CUT = 17  # samples of the last epoch, which makes the last of its batches one of two

# Seven batches: a last window of one, by twos as by threes.
DIMENSIONS: dict[str, list[Any]] = {
    "kill": ["step", "evaluation", "first of epoch", "last of epoch", "two in a row", "save", "before the first"],
    "scheduler": ["constant", "cosine", "onecycle", "multistep", "by epoch", "plateau"],
    "checkpoint_every": [1, 2, 3, "epoch"],
    "num_workers": [0, 2, 4],
    "optimizer": ["adam", "adamw", "sgd"],
    "accumulate_grad_batches": [1, 2, 3],
    "norm": ["batch", "layer", "none"],
    "random": [True, False],
    "tied": [True, False],
    "average": [True, False],
    "dtype": ["float32", "bfloat16"],
    "gradient_clip": [None, 0.5],
    "samples": [BATCH * BATCHES, BATCH * BATCHES - 2],
    "max_samples": [None, "within an epoch", "an epoch's end", "beyond max_epochs"],
}
MATRIX = covering_array(DIMENSIONS)
DEFAULT = 8

# What must not matter: the reference has none of it.
IMMATERIAL = {"kill": None, "num_workers": 0, "checkpoint_every": 1000}

Configuration = dict[str, Any]
Reference = Callable[[Configuration], Operation]


def operation_of(configuration: Configuration, root: Path) -> Operation:
    named = configuration["scheduler"]
    own = {"plateau": "plateau", "by epoch": "multistep"}.get(named, "knobs")
    every = configuration["checkpoint_every"]
    samples = configuration["samples"]
    max_samples = {
        None: None,
        "within an epoch": (EPOCHS - 1) * samples + CUT,
        "an epoch's end": EPOCHS * samples,
        "beyond max_epochs": EPOCHS * samples + CUT,
    }[configuration["max_samples"]]
    knobs = {name: configuration[name] for name in ("num_workers", "optimizer", "accumulate_grad_batches")}
    knobs |= {"scheduler": named} if own == "knobs" else {}
    knobs |= {"scheduler_milestones": [2, 5]} if named == "multistep" else {}
    return Operation(
        root,
        "zoo",
        config={name: configuration[name] for name in ("norm", "random", "tied", "average", "dtype", "samples")}
        | {"scheduler": own},
        execution=Execution.model_validate(
            knobs
            | {
                "threads": 1,
                "learning_rate": 0.02,
                "max_epochs": EPOCHS if configuration["max_samples"] in (None, "beyond max_epochs") else EPOCHS + 1,
                "max_samples": max_samples,
                "batch_size": BATCH,
                "gradient_clip": configuration["gradient_clip"],
                "checkpoint_every": CheckpointEvery(epochs=1) if every == "epoch" else CheckpointEvery(steps=every),
                "checkpoint_monitor": "val_noise",
                "checkpoint_mode": "max",
                "early_stop_patience": 100,
            }
        ),
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    known: dict[str, Operation] = {}

    def reference(configuration: Configuration) -> Operation:
        material = configuration | IMMATERIAL
        if repr(material) not in known:
            operation = known[repr(material)] = operation_of(material, tmp_path_factory.mktemp("reference"))
            assert operation.run() is Outcome.COMPLETED
        return known[repr(material)]

    return reference


def steps_by_epoch(configuration: Configuration) -> list[int]:
    last = -(-CUT // BATCH) if configuration["max_samples"] == "within an epoch" else BATCHES
    return [-(-batches // configuration["accumulate_grad_batches"]) for batches in (*[BATCHES] * (EPOCHS - 1), last)]


def harms(kind: str, steps: list[int], chance: random.Random) -> list[dict[str, int]]:
    """What kills the attempts, one after the other. The first one polls before each step and each validation batch."""
    begins = [sum(steps[:epoch]) + epoch * VALIDATION_BATCHES for epoch in range(EPOCHS)]
    epoch = chance.randrange(EPOCHS)
    anywhere = {"die_at_poll": begins[epoch] + chance.randrange(steps[epoch])}
    ends = begins[epoch] + steps[epoch]
    return {
        "step": [anywhere],
        "evaluation": [{"die_at_poll": ends + chance.randrange(VALIDATION_BATCHES)}],
        "first of epoch": [{"die_at_poll": chance.choice(begins[1:])}],
        "last of epoch": [{"die_at_poll": ends - 1}],
        "two in a row": [anywhere, {"die_at_poll": chance.randrange(1, 4)}],
        # Two saves there are at least, of five each and one for the directory; periodic ones may be passed over.
        "save": [{"die_at_fsync": chance.randrange(1 + 5 * 2)}],
        "before the first": [{"die_at_poll": 0}],
    }[kind]


def assert_exact(
    configuration: Configuration, kind: str, chance: random.Random, root: Path, expected: Operation
) -> None:
    operation = operation_of(configuration, root)
    for harm in harms(kind, steps_by_epoch(configuration), chance):
        assert operation.run(**harm) is None, f"{harm} did not kill it"
    assert operation.run() is Outcome.COMPLETED
    assert operation.differences(expected) == [], f"EXACTNESS_SEED={SEED}, killed by {kind}: {configuration}"


@pytest.mark.parametrize("number", range(DEFAULT))
def test_a_killed_run_equals_one_that_never_was(reference: Reference, tmp_path: Path, number: int) -> None:
    print(f"EXACTNESS_SEED={SEED}")
    configuration = MATRIX[number]

    chance = random.Random(f"{SEED} {number}")
    assert_exact(configuration, configuration["kill"], chance, tmp_path, reference(configuration))


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * KILLS)
@pytest.mark.parametrize("number", range(len(MATRIX)))
def test_a_run_killed_anywhere_equals_one_that_never_was(reference: Reference, tmp_path: Path, number: int) -> None:
    print(f"EXACTNESS_SEED={SEED}")
    configuration = MATRIX[number]

    for n in range(KILLS):
        chance = random.Random(f"{SEED} {number} {n}")
        kind = configuration["kill"] if n == 0 else chance.choice(DIMENSIONS["kill"])
        assert_exact(configuration, kind, chance, tmp_path / str(n), reference(configuration))


def test_every_two_values_meet_in_the_matrix() -> None:
    met = set[Any]().union(*map(pairs_of, MATRIX))
    early = set[Any]().union(*map(pairs_of, MATRIX[:DEFAULT]))

    assert met == all_pairs(DIMENSIONS)
    assert covering_array(DIMENSIONS) == MATRIX
    assert len(MATRIX) <= 60
    assert len(early) > len(met) / 2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Operation, Operation]:
    """A run with every kind of state, whole; and one like it that stopped within its second epoch."""
    values = {name: values[0] for name, values in DIMENSIONS.items()} | {"scheduler": "onecycle", "optimizer": "adamw"}
    whole, part = (operation_of(values | IMMATERIAL, tmp_path_factory.mktemp("mutants")) for _ in range(2))
    assert whole.run() is Outcome.COMPLETED
    assert part.run(stop_after_polls=BATCHES + VALIDATION_BATCHES + 2) is Outcome.CANCELLED
    at = part.checkpoints[-1]
    assert (at.step, at.epoch, at.phase) == (BATCHES + 2, 1, Phase.UPDATE)
    return whole, part


# The name that each must be found by.
FOUND_BY = {
    "scheduler not restored": "learning_rate from step 10",
    "generators not reseeded": "loss from step 9",
    "BatchNorm buffer skipped": "model.norm.running_var",
    "hidden buffer skipped": "model.average",
    "one weight skipped": "model.scale",
    "optimizer step counter off by one": "optimizer.state[0].step",
    "moments forgotten": "optimizer.state[0].exp_avg",
    "one batch skipped": "loss from step 9",
    "order of another epoch": "loss from step 9",
    "registered state forgotten": "state.history.steps[0]",
    "units counted from the resume": "cursor.units",
    "monitor forgotten": "monitor.evaluations_since",
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_whatever_is_resumed_wrongly_is_found_by_its_name(stopped: tuple[Operation, Operation], mutant: str) -> None:
    whole, part = stopped
    number = 1 + sorted(MUTANTS).index(mutant)
    resumed = replace(part, attempts=number, checkpoints=[*part.checkpoints], curves=deepcopy(part.curves))

    resumed.run(mutant=mutant)

    differences = resumed.differences(whole)
    assert (differences == []) == (mutant == "none")
    assert FOUND_BY.get(mutant, "") in "\n".join(differences)
