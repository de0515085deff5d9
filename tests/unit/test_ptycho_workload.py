"""The workload `ptycho`: its config, its groups, and the smoke preset, run in this process."""

import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from training_child import Listed, Operation, ticking

from ops_contract.agents import StartTraining
from ops_contract.jobs import Execution, Job, JobSpec
from ops_contract.lifecycle import CheckpointType, Kind, Outcome
from ops_contract.pipe import RunJob
from ops_contract.reports import ArtifactSaved, CheckpointSaved
from ops_worker import trainer
from ops_worker.ptycho.config import PtychoConfig
from ops_worker.ptycho.network import PatchNet
from ops_worker.ptycho.workload import Ptycho
from relight.importing import checks_by_code
from relight.ptycho.data import save_scan
from relight.ptycho.simulation import Simulation, simulate
from relight.training.attempt import Attempt, Site
from relight.training.faults import TrainingFault
from relight.workload import Env

PRESETS = Path(__file__).parents[2] / "cli" / "ops_cli" / "presets" / "ptycho"
ENV = Env(device=torch.device("cpu"), rank=0, world_size=1, seed=0)
SMALL: dict[str, Any] = {"simulate": {"size": 64, "step": 3.0}, "n_groups": 16}


pytestmark = pytest.mark.usefixtures("numerics_given_back")


def workload(**config: Any) -> Ptycho:
    return Ptycho(PtychoConfig.model_validate(SMALL | config), ENV)


def preset(name: str) -> JobSpec:
    return JobSpec.model_validate(yaml.safe_load((PRESETS / name).read_text()))


def run(root: Path, config: dict[str, Any], **execution: Any) -> Operation:
    """To the end, of the smoke preset's knobs but for those given."""
    knobs = preset("smoke.yaml").execution.model_dump(exclude_unset=True) | execution
    operation = Operation(root, "ptycho", config, Execution.model_validate(knobs))
    sink = Listed()
    site = Site(root, "cpu", cores=1)
    assert Attempt(Ptycho, operation.start(), site, sink, lambda: None, ticking()).run() is Outcome.COMPLETED
    for report in sink.reports:
        operation.accept(report)
    return operation


# ---- the config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "exactly one of train_data_file and simulate"),
        ({"train_data_file": "a.npz", "simulate": {}}, "exactly one of train_data_file and simulate"),
        ({"simulate": {}, "test_data_file": "a.npz", "simulate_test": {}}, "at most one of test_data_file"),
        ({"simulate": {}, "gridsize": 1, "enable_oversampling": True}, "gridsize"),
        ({"simulate": {}, "neighbor_count": 4, "enable_oversampling": True}, "neighbor_count"),
        ({"simulate": {"size": 64}, "n_groups": 500}, "enable_oversampling"),
        ({"simulate": {}, "epochs": 3}, "Extra inputs"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PtychoConfig.model_validate(config)


def test_how_many_points_a_file_has_is_not_known_at_submit() -> None:
    assert PtychoConfig(train_data_file="a.npz", n_groups=10**6).n_groups == 10**6


def test_a_worker_refuses_too_few_neighbours_at_submit_and_names_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it answers is the 422 of the submit; it is asked because the Config has validators."""
    monkeypatch.setattr(trainer, "enter", lambda job: None)

    judged = trainer.validated(order({"simulate": {}, "gridsize": 2, "neighbor_count": 3}))

    assert checks_by_code(PtychoConfig)
    [problem] = judged.problems
    assert "neighbor_count 3" in problem.problem
    assert "4" in problem.problem.replace("neighbor_count 3", "")


def order(config: dict[str, Any]) -> RunJob:
    job = Job(kind=Kind.TRAINING, workload="ptycho", config=config, execution=Execution())
    start = StartTraining(
        incarnation=uuid4(), operation_id=uuid4(), attempt=1, slots=[0], deadline_s=60, job=job, checkpoint=None
    )
    return RunJob(start=start, storage_root="/", directory=os.getcwd(), device="cpu", cores=1)


@pytest.mark.parametrize("name", ["smoke.yaml", "reconstruction.yaml"])
def test_presets_need_no_file(name: str) -> None:
    job = preset(name)
    config = PtychoConfig.model_validate(job.config)

    assert (job.workload, job.execution.checkpoint_monitor) == ("ptycho", "poisson_val_loss")
    assert config.train_data_file is config.test_data_file is None


# ---- the data


def test_held_out_patterns_are_in_no_group_that_is_learned_from() -> None:
    patterns = workload(simulate={"size": 96}, n_groups=100, validation_fraction=0.2)._patterns

    assert patterns.training.shape == (100, 4)
    assert len(patterns.held_out) == round(0.2 * len(patterns.scan.positions))
    assert not np.intersect1d(patterns.training, patterns.held_out).size


def test_without_a_share_to_hold_out_there_is_no_validation() -> None:
    training, validation = workload(validation_fraction=0.0).data()

    assert (len(training), validation) == (16, None)


def test_an_item_is_a_group_whose_positions_are_those_of_the_scan() -> None:
    made = workload()
    scan, members = made._patterns.scan, made._patterns.training[3]

    item = made.data()[0][3]

    assert torch.equal(item["amplitudes"], torch.from_numpy(scan.amplitudes[members]))
    within = item["offsets"].double() + item["fractions"].double()
    expected = torch.from_numpy(scan.positions[members])
    assert torch.allclose(within - within[0], expected - expected[0], atol=1e-6)
    assert int(item["offsets"].abs().max()) <= (made._patterns.canvas - scan.n) // 2


def test_the_digest_is_of_the_data_and_of_its_groups() -> None:
    digests = [workload(**config).data_digest() for config in ({}, {}, {"n_groups": 15}, {"simulate_test": {}})]
    other = workload(simulate={"size": 64, "step": 3.0, "seed": 1}).data_digest()

    assert digests[0] == digests[1]
    assert len({*digests, other}) == 4


def test_files_are_read_of_which_n_images_count(tmp_path: Path) -> None:
    scan = simulate(Simulation(size=64, step=3.0))
    save_scan(tmp_path / "train.npz", scan)
    made = workload(simulate=None, train_data_file=str(tmp_path / "train.npz"), n_images=90)

    training, _ = made.data()

    assert made._patterns.scan.n == 32, "of the probe"
    assert np.array_equal(made._patterns.scan.amplitudes, scan.amplitudes[:90])
    assert len(training) == 16


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"simulate": {"size": 64, "n": 28}}, "multiple of 8"),
        ({"simulate_test": {"size": 96, "n": 64}}, r"\(64, 64\)"),
        ({"n_images": 40}, "holds out 4 of 40 points, and neighbor_count 6"),
        ({"simulate": None, "train_data_file": "nowhere.npz"}, "nowhere.npz: No such file.*give its absolute path"),
    ],
)
def test_data_that_cannot_be_learned_from_fail_for_good(config: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingFault, match=said) as caught:
        workload(**config).data()

    assert (caught.value.code, caught.value.permanent) == ("bad_data", True)


# ---- the network


def test_the_network_has_about_124_thousand_parameters_on_the_meta_device_too() -> None:
    with torch.device("meta"):
        model = workload().model()

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert 120_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 140_000


def test_it_sees_each_pattern_by_itself() -> None:
    torch.manual_seed(0)
    network, inputs = PatchNet(4), torch.rand(2, 3, 16, 16)

    patches = network(inputs)

    assert (patches.shape, patches.dtype) == ((2, 3, 16, 16), torch.complex64)
    assert torch.allclose(network(inputs[:, [2, 0, 1]]), patches[:, [2, 0, 1]], atol=1e-6)


def test_a_unit_is_a_pattern() -> None:
    made = workload()
    batch = made.collate([made.data()[0][i] for i in range(3)])

    assert made.units(batch) == 12


@pytest.mark.parametrize("loss", ["poisson", "mae"])
def test_poisson_train_loss_is_the_deviance_whatever_is_minimised(loss: str) -> None:
    made, plain = workload(loss=loss), workload()
    torch.manual_seed(0)
    model = made.model()
    batch = made.collate([made.data()[0][i] for i in range(2)])

    value, extras = made.loss(model, batch)

    expected = plain.loss(model, batch)[0]
    assert torch.equal(extras["poisson_train_loss"], expected)
    assert torch.equal(value, expected) == (loss == "poisson")
    assert value.dtype == torch.float64


# ---- the smoke preset


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Operation:
    return run(tmp_path_factory.mktemp("smoke"), preset("smoke.yaml").config)


@pytest.mark.slow
def test_smoke_learns(smoke: Operation) -> None:
    losses = list(smoke.curves["poisson_train_loss"].values())

    assert len(losses) == 6 * 16
    assert fmean(losses[-16:]) < 0.85 * fmean(losses[:16])
    assert list(smoke.curves["poisson_val_loss"]) == [15, 31, 47, 63, 79, 95]
    assert smoke.curves["learning_rate"][0] == 1e-3


@pytest.mark.slow
def test_smoke_has_the_same_bits_again(smoke: Operation, tmp_path: Path) -> None:
    again = run(tmp_path, preset("smoke.yaml").config)

    assert smoke.differences(again) == []
    assert {"final/train_phase_pearson", "final/epie_train_amplitude_frc50"} <= smoke.curves.keys()
    [one, other] = [{a.name: a.sha256 for a in o.reports if isinstance(a, ArtifactSaved)} for o in (smoke, again)]
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} <= {"files/seconds.json"}


def test_the_two_best_are_measured_where_they_were_saved(smoke: Operation) -> None:
    """What stays of them is the service's to say: tests/e2e/test_ptycho.py."""
    saved = {c.step: c.monitored for c in smoke.reports if isinstance(c, CheckpointSaved) and c.step}

    assert saved == {step + 1: value for step, value in smoke.curves["poisson_val_loss"].items()}


def test_finish_leaves_arrays_and_pictures(smoke: Operation) -> None:
    files = {a.name: smoke.root / a.path for a in smoke.reports if isinstance(a, ArtifactSaved)}

    arrays = np.load(files["files/reconstruction.npz"])
    assert arrays["train_object"].dtype == np.complex64
    assert arrays["train_object"].shape == arrays["epie_train_phase"].shape == arrays["train_covered"].shape == (96, 96)
    assert np.array_equal(arrays["train_amplitude"], np.abs(arrays["train_object"]))
    assert set(json.loads(files["files/seconds.json"].read_text())) == {"train", "epie_train"}
    assert {"files/train-phase.png", "files/train-amplitude.png", "model.safetensors"} <= files.keys()


def test_patience_ends_it(tmp_path: Path) -> None:
    """Steps as large as these make everything worse."""
    operation = run(tmp_path, SMALL | {"epie_iterations": 1}, learning_rate=1.0, early_stop_patience=1, max_epochs=9)

    measured = operation.curves["poisson_val_loss"].values()
    assert len(measured) < 9
    assert operation.checkpoints[-1].checkpoint_type is CheckpointType.FINAL
