"""What is said of a workload before it is trained: the size of its model, its data, and what a unit of them costs."""

from typing import Any, ClassVar

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ops_contract.jobs import Execution
from ops_worker.workloads.bytelm import ByteLM
from relight.training.faults import TrainingFault
from relight.training.sizing import ModelSize, Sizer, count_parameters
from relight.workload import AnyWorkload, LoopWorkload, MapDataset, Workload

KNOBS = Execution(batch_size=4)


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int = 3


class Line(Workload[Config]):
    """Ten samples of two numbers; a unit is a number. Its model is width × 2 weights, and as many in its head."""

    Config = Config
    data_calls: ClassVar[int] = 0

    def data(self) -> tuple[MapDataset, MapDataset | None]:
        type(self).data_calls += 1
        self.numbers = 2
        return torch.arange(20.0).view(10, 2), None

    def data_digest(self) -> str:
        return f"{self.numbers} numbers"

    def model(self) -> nn.Module:
        return Net(2, self.config.width)

    def units(self, batch: Tensor) -> int:
        return batch.numel()

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch).square().mean(), {}


class Net(nn.Module):
    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(numbers, width, bias=False)
        self.head = nn.Linear(width, numbers, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


# Of a sample at width 3: 2 · 2 · 3 in each of two layers, and backward twice that, but for the gradient of the data.
FLOPS_PER_UNIT = (12 + 12 + 24 + 12) / 2


def sized(workload_type: AnyWorkload, **config: Any) -> ModelSize:
    return Sizer(workload_type, config, KNOBS).model(config, count_flops=True)


def test_bytelm_is_as_large_and_costs_as_much_as_one_computes_by_hand() -> None:
    sizer = Sizer(ByteLM, {"max_bytes": 10_000, "validation_bytes": 200}, KNOBS)

    size = sizer.model({"n_layer": 3, "d_model": 32, "block_size": 64}, count_flops=True)

    positions, table, block = 64 * 32, 256 * 32, 12 * 32**2 + 13 * 32
    assert (size.params, size.embedding_params) == (positions + table + 3 * block + 2 * 32, positions + table)
    products = 3 * 12 * 32**2 + 256 * 32 + 3 * 2 * 64 * 32  # multiplications for a byte, those of attention the last
    assert size.flops_per_unit == 3 * 2 * products
    assert (size.flops_reason, size.notes) == (None, ())
    assert (sizer.data.samples, sizer.data.units_per_sample, sizer.data.validates) == (153, 64.0, True)


def test_data_are_built_once_and_models_of_any_size_have_no_memory() -> None:
    Line.data_calls = 0
    sizer = Sizer(Line, {}, KNOBS)

    sizes = [sizer.model({"width": width}, count_flops=True) for width in (3, 10**12)]

    assert Line.data_calls == 1
    assert [size.params for size in sizes] == [12, 4 * 10**12]
    assert [size.flops_per_unit for size in sizes] == [FLOPS_PER_UNIT, FLOPS_PER_UNIT / 3 * 10**12]
    data = sizer.data
    assert (data.samples, data.units_per_sample, data.validates) == (10, 2.0, False)
    assert data.data_digest == "2 numbers"
    assert len(data.code_digest or "") == 64


def test_flops_are_counted_on_demand_only() -> None:
    size = Sizer(Line, {}, KNOBS).model({}, count_flops=False)

    assert (size.flops_per_unit, size.flops_reason) == (None, "they were not counted")


class Asks(Line):
    """Of the data, how many numbers there are; of its device, where to be."""

    def model(self) -> nn.Module:
        return Net(self.numbers, self.config.width).to(self.env.device)


class Reads(Line):
    def model(self) -> nn.Module:
        assert torch.ones(()).item() == 1
        return super().model()


class ReadsItsLoss(Line):
    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = model(batch).square().mean()
        return loss * (1 if loss.item() > 0 else 2), {}


def test_a_model_that_asks_the_data_is_built_after_them() -> None:
    assert sized(Asks, width=10**12).params == 4 * 10**12


def test_what_does_not_run_on_the_meta_device_runs_on_the_cpu_and_says_so() -> None:
    reads, reads_its_loss = sized(Reads), sized(ReadsItsLoss)

    assert (reads.params, reads.flops_per_unit) == (12, FLOPS_PER_UNIT)
    assert reads.notes[0].startswith("the model is built on the CPU; on the meta device: ")
    assert (reads_its_loss.params, reads_its_loss.flops_per_unit) == (12, FLOPS_PER_UNIT)
    assert "meta tensors" in " ".join(reads_its_loss.notes)
    assert "\n" not in "".join(reads.notes + reads_its_loss.notes)


class ByteLMReadsItsLoss(ByteLM):
    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extras = super().loss(model, batch)
        return loss * (1 if loss.item() > 0 else 2), extras


def test_attention_costs_the_same_on_every_device() -> None:
    """The CPU's own kernel for it has no formula, and would count nothing."""
    on_meta, on_cpu = (
        Sizer(workload_type, {"max_bytes": 5000}, KNOBS).model({}, count_flops=True)
        for workload_type in (ByteLM, ByteLMReadsItsLoss)
    )

    assert (len(on_meta.notes), len(on_cpu.notes)) == (0, 1)
    assert on_cpu.flops_per_unit == on_meta.flops_per_unit


def test_a_large_model_is_not_run_to_count_its_flops() -> None:
    size = sized(ReadsItsLoss, width=10**12)

    assert (size.params, size.flops_per_unit) == (4 * 10**12, None)
    assert "meta" in (size.flops_reason or "")
    assert "up to 20,000,000 parameters" in (size.flops_reason or "")


def test_flops_that_cannot_be_counted_are_none_with_the_reason() -> None:
    class Raises(Line):
        def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            raise LookupError("mine\nand more")

    class Scale(Line):
        def model(self) -> nn.Module:
            return nn.PReLU()

    assert sized(Raises).flops_reason == "loss() on the CPU: LookupError: mine"
    assert (sized(Scale).flops_per_unit, sized(Scale).flops_reason) == (None, "torch counts no FLOPs for its operators")


@pytest.mark.parametrize(("says", "told"), [(12, 0), (10, 1), (None, 1)])
def test_a_model_that_counts_otherwise_is_told_and_not_believed(says: int | None, told: int) -> None:
    class Counts(Net):
        def num_params(self) -> int:
            if says is None:
                raise LookupError("mine")
            return says

    class Counting(Line):
        def model(self) -> nn.Module:
            return Counts(2, self.config.width)

    size = sized(Counting)

    assert (size.params, len(size.notes)) == (12, told)
    assert all("num_params()" in note for note in size.notes)


def test_a_parameter_with_two_names_counts_once_and_as_an_embedding() -> None:
    embedding, head = nn.Embedding(5, 2), nn.Linear(2, 5, bias=False)
    head.weight = embedding.weight
    frozen = nn.Linear(2, 2, bias=False).requires_grad_(False)

    assert count_parameters(nn.Sequential(embedding, frozen, head)) == (14, 10)


class Loop(LoopWorkload[Config]):
    Config = Config

    def run(self, ctl: Any) -> None: ...


class RaisesInData(Line):
    def data(self) -> Any:
        raise LookupError("mine")


class RaisesInModel(Line):
    def model(self) -> Any:
        raise LookupError("mine")


class WithoutData(Line):
    def data(self) -> Any:
        return [], None


class WithoutUnits(Line):
    def units(self, batch: Tensor) -> int:
        return 0


@pytest.mark.parametrize(
    ("workload_type", "config", "code", "permanent", "words"),
    [
        (Loop, {}, "not_sizable", True, "give a relight.Workload"),
        (Line, {"widht": 2}, "bad_config", True, "widht: no such field; did you mean width?"),
        (WithoutData, {}, "no_data", True, "empty"),
        (WithoutUnits, {}, "not_sizable", True, "return its tokens or samples"),
        (RaisesInData, {}, "exception", False, "data() of the workload: LookupError: mine"),
        (RaisesInModel, {}, "exception", False, "model() of the workload: LookupError: mine"),
    ],
)
def test_what_cannot_be_sized_up_is_refused_in_words(
    workload_type: AnyWorkload, config: dict[str, Any], code: str, permanent: bool, words: str
) -> None:
    with pytest.raises(TrainingFault) as raised:
        sized(workload_type, **config)

    assert (raised.value.code, raised.value.permanent) == (code, permanent)
    assert words in raised.value.message
    assert ("LookupError" in raised.value.traceback) == (code == "exception")
