"""The workloads that come with Relight, and the defaults of the interface."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from training_child import Operation

from ops_contract.jobs import Execution, OptimizerName, SchedulerName
from ops_contract.lifecycle import Outcome
from ops_worker.workloads.bytelm import GPT, ByteLM, ByteLMConfig, Windows, standard_library_source
from ops_worker.workloads.digits import Digits, DigitsConfig
from relight.training.randomness import seed_everything
from relight.workload import Env, WarmupCosine, Workload

ENV = Env(device=torch.device("cpu"), rank=0, world_size=1, seed=0)


def bytelm(**config: Any) -> ByteLM:
    return ByteLM(ByteLMConfig(max_bytes=1000, block_size=16, d_model=16, n_head=2, n_layer=2, **config), ENV)


def test_digits_learns_its_digits_in_seconds(tmp_path: Path) -> None:
    operation = Operation(tmp_path, "digits", execution=Execution(max_epochs=3))

    assert operation.run() is Outcome.COMPLETED

    assert operation.curves["val_accuracy"][143] > 0.85
    assert operation.curves["loss"][143] < operation.curves["loss"][0] / 3


def test_bytelm_learns_from_the_standard_library(tmp_path: Path) -> None:
    config = {"max_bytes": 20_000, "block_size": 32, "n_layer": 1, "d_model": 32}
    operation = Operation(tmp_path, "bytelm", config, Execution(max_epochs=4, learning_rate=3e-3))

    assert operation.run() is Outcome.COMPLETED

    curve = operation.curves["loss"]
    assert curve[0] == pytest.approx(math.log(256), abs=0.2)
    assert curve[max(curve)] < 3.5
    assert operation.curves["val_loss"][max(curve)] < 4.0


def test_digits_have_a_digest_and_a_split() -> None:
    workload = Digits(DigitsConfig(), ENV)

    training, validation = workload.data()

    assert (len(training), len(validation)) == (1536, 261)
    assert len(workload.data_digest()) == 64


def test_the_corpus_is_source_without_tests_and_always_the_same() -> None:
    corpus = standard_library_source(200_000)

    assert len(corpus) == 200_000
    assert standard_library_source(100) == corpus[:100]
    assert b"import" in corpus


@pytest.mark.parametrize(("validation_bytes", "held_out"), [(None, 100), (40, 40), (1000, 100)])
def test_no_more_bytes_are_held_out_than_asked_for(validation_bytes: int | None, held_out: int) -> None:
    config = {"max_bytes": 1000, "validation_share": 0.1, "validation_bytes": validation_bytes}
    workload = ByteLM(ByteLMConfig.model_validate(config), ENV)

    training, validation = workload.data()

    assert (len(training.text), len(validation.text)) == (1000 - held_out, held_out)
    assert bytes([*training.text, *validation.text]) == standard_library_source(1000)


def test_windows_cover_the_corpus_without_gaps() -> None:
    windows = Windows(bytes(range(10)), block=3)

    assert [windows[i].tolist() for i in range(len(windows))] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [len(Windows(text, block=3)) for text in (b"", b"abc", b"abcd")] == [0, 0, 1]


def test_bytelm_predicts_from_the_past_alone() -> None:
    model = GPT(bytelm().config).eval()
    one = torch.randint(0, 256, (1, 16))
    other = one.clone()
    other[0, 10:] += 1

    differs = (model(one) != model(other % 256)).any(dim=2)[0]

    assert differs.tolist() == [False] * 10 + [True] * 6


def test_bytelm_ties_its_head_and_counts_predicted_bytes() -> None:
    workload = bytelm()
    model = workload.model()

    assert isinstance(model, GPT)
    assert model.head.weight is model.embedding.weight
    assert workload.units(torch.zeros(4, 17, dtype=torch.uint8)) == 64


@pytest.mark.parametrize("config", [{"d_model": 30}, {"unknown": 1}, {"block_size": 0}, {"dropout": 1.0}])
def test_a_config_that_cannot_work_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ByteLMConfig.model_validate(config)


@pytest.mark.parametrize("config_type", [ByteLMConfig, DigitsConfig])
def test_every_field_of_a_config_says_what_it_is(config_type: Any) -> None:
    schema = config_type.model_json_schema()

    assert all(field.get("description") for field in schema["properties"].values())
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("workload", [bytelm(), Digits(DigitsConfig(), ENV)])
def test_models_also_build_on_the_meta_device(workload: Workload[Any]) -> None:
    with torch.device("meta"):
        model = workload.model()

    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_is_the_same_under_the_same_seed() -> None:
    models = []
    for _ in range(2):
        seed_everything(5)
        models.append(bytelm().model().state_dict())

    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_warm_up_then_half_a_cosine() -> None:
    factor = WarmupCosine(steps_total=100)

    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(5) == 1.0
    assert factor(5 + 95 // 2) == pytest.approx(0.5, abs=0.02)
    assert 0 < factor(99) < 1e-3
    assert factor(100) == 0.0


@pytest.mark.parametrize("steps_total", [1, 2])
def test_a_cosine_over_almost_no_steps_still_trains(steps_total: int) -> None:
    assert all(0 < WarmupCosine(steps_total)(step) <= 1 for step in range(steps_total))


def test_the_default_optimizers_come_from_the_knobs() -> None:
    workload, model = bytelm(), nn.Linear(1, 1)

    adamw = workload.optimizer(model, Execution(learning_rate=0.5))
    sgd = workload.optimizer(model, Execution(optimizer=OptimizerName.SGD, learning_rate=0.25))

    adam = workload.optimizer(model, Execution(optimizer=OptimizerName.ADAM, learning_rate=0.1))

    assert (type(adam), adam.param_groups[0]["lr"]) == (torch.optim.Adam, 0.1)
    assert (type(adamw), adamw.param_groups[0]["lr"]) == (torch.optim.AdamW, 0.5)
    assert (type(sgd), sgd.param_groups[0]["lr"]) == (torch.optim.SGD, 0.25)
    assert workload.scheduler(sgd, Execution(), 10) is None
    assert workload.scheduler(sgd, Execution(scheduler=SchedulerName.COSINE), 10) is not None


def test_the_default_evaluation_weighs_batches_by_their_units() -> None:
    class Means(ByteLM):
        def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return batch.float().mean(), {}

        def units(self, batch: Tensor) -> int:
            return Workload.units(self, batch)

    batches = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0])]

    assert Means(ByteLMConfig(), ENV).evaluate(nn.Identity(), batches) == {"val_loss": 2.0}


@pytest.mark.parametrize("batch", [torch.zeros(3), (torch.zeros(3), 1), [torch.zeros(3)], {"x": torch.zeros(3)}])
def test_units_are_samples_by_default(batch: Any) -> None:
    assert Workload.units(bytelm(), batch) == 3


def test_the_interface_and_manifests_load_without_torch() -> None:
    code = (
        "import sys, relight.manifest; from relight import Env, Workload; "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
