"""What `find_optimal` trains: model, data and loss, as the engine wants them. Given by names, on the service too."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from relight.importing import imported
from relight.optimal.content import Content, Unsteady, add_data, is_own, made_by
from relight.training.order import shuffled
from relight.workload import Env, MapDataset, Workload

_SPLIT_KEY = 0  # one split for all seeds: their validation losses are compared
_LABELS = "labels"


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_kwargs: dict[str, Any] = Field({}, description="what the model is made with, its size among them")
    val_share: float = Field(0.1, gt=0, lt=1, description="held out of the dataset where there is no val_dataset")
    tokens_per_sample: int | None = Field(
        None, ge=1, description="else the elements of the labels count, those of the whole batch where there are none"
    )
    data_digest: str | None = Field(None, description="names the data; else that of their content, or of some samples")


class NamedSettings(Settings):
    model: str = Field(description="module:attr, of the model's class or of a function that makes one")
    dataset: str = Field(description="module:attr, of a dataset, a DataLoader, or a function that gives one")
    loss_fn: str = Field(description="module:attr, of a function (output, target) or (model, batch)")
    val_dataset: str | None = Field(None, description="module:attr, as dataset")


@dataclass(frozen=True)
class Parts:
    """`model_kwargs` are those that JSON cannot say. Raises TypeError, ValueError for data that cannot be used."""

    model: Callable[..., nn.Module]
    loss_fn: Callable[..., Tensor]
    dataset: Any
    val_dataset: Any = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for given, name in ((self.dataset, "dataset"), (self.val_dataset, "val_dataset")):
            if given is not None:
                _check_data(given, name)

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        return self.dataset.collate_fn if isinstance(self.dataset, DataLoader) else default_collate

    @cached_property
    def takes_model(self) -> bool:
        """Whether loss_fn is (model, batch); it is where the first parameter is called `model`."""
        target = self.loss_fn.forward if isinstance(self.loss_fn, nn.Module) else self.loss_fn
        try:
            return next(iter(inspect.signature(target).parameters), None) == "model"
        except (TypeError, ValueError):  # a built-in function has none
            return False

    def split(self, val_share: float) -> tuple[MapDataset, MapDataset]:
        """Training and validation data; without val_dataset the same samples are held out in every run."""
        whole = plain(self.dataset)
        if self.val_dataset is not None:
            return whole, plain(self.val_dataset)
        held_out = max(1, round(val_share * len(whole)))
        order = shuffled(len(whole), _SPLIT_KEY)
        training, validation = (sorted(part.tolist()) for part in (order[held_out:], order[:held_out]))
        return Subset(whole, training), Subset(whole, validation)

    def content_of_data(self, val_share: float) -> Content:
        """Raises Unsteady."""
        content = Content()
        for data in self.split(val_share):
            add_data(content, data)
        return content


def plain(given: Any) -> Any:
    return given.dataset if isinstance(given, DataLoader) else given


def _check_data(given: Any, name: str) -> None:
    data = plain(given)
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(
            f"{name}: a {type(data).__name__} has no samples by number, so that no run could be told how many to train "
            "on, or go on where it stopped; give one with __getitem__ and __len__: a torch Dataset, a list"
        )
    if isinstance(data, Mapping):
        raise TypeError(f"{name}: a {type(data).__name__} has samples by key; give a list of them, or a torch Dataset")
    if len(data) < 2:
        raise ValueError(f"{name} has {len(data)} samples: nothing to train on and to hold out")


S = TypeVar("S", bound=Settings)


class Assembled(Workload[S], Generic[S]):
    """`parts` says of what."""

    def parts(self) -> Parts:
        raise NotImplementedError

    def __init__(self, config: S, env: Env) -> None:
        super().__init__(config, env)
        self._parts = self.parts()

    def data(self) -> tuple[MapDataset, MapDataset]:
        return self._parts.split(self.config.val_share)

    def data_digest(self) -> str | None:
        try:
            return self.config.data_digest or self._parts.content_of_data(self.config.val_share).hexdigest()
        except Unsteady:
            return None

    def collate(self, items: list[Any]) -> Any:
        return self._parts.collate(items)

    def model(self) -> nn.Module:
        return self._parts.model(**{**self._parts.model_kwargs, **self.config.model_kwargs})

    def units(self, batch: Any) -> int:
        if self.config.tokens_per_sample is not None:
            return super().units(batch) * self.config.tokens_per_sample
        return _elements(batch)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self._parts.takes_model:
            return self._parts.loss_fn(model, batch), {}
        if not isinstance(batch, Sequence) or len(batch) < 2:
            raise TypeError(
                f"a loss_fn (output, target) wants batches (input, …, target), and they are a {type(batch).__name__}; "
                "let the dataset give tuples, or give a loss_fn whose first parameter is `model`: (model, batch)"
            )
        *inputs, target = batch
        return self._parts.loss_fn(model(*inputs), target), {}


class Named(Assembled[NamedSettings]):
    """A model, data and a loss of your own, by their names: what `relight.find_optimal` trains in its own process."""

    Config = NamedSettings

    def parts(self) -> Parts:
        names = self.config
        val_dataset = None if names.val_dataset is None else _data_named(names.val_dataset)
        return Parts(imported(names.model), _loss_named(names.loss_fn), _data_named(names.dataset), val_dataset)

    def sources(self) -> Iterable[Any]:
        parts = self._parts
        return [made_by(each) for each in (parts.model, parts.loss_fn, parts.dataset, parts.collate) if is_own(each)]


def _data_named(path: str) -> Any:
    found = imported(path)
    return found() if inspect.isclass(found) or (not hasattr(found, "__getitem__") and callable(found)) else found


def _loss_named(path: str) -> Any:
    found = imported(path)
    return found() if inspect.isclass(found) else found


def bound(parts: Parts, digest: str | None) -> type[Assembled[Settings]]:
    """The workload of live objects. `digest` is of the data; its code has none, for who trains it knows its content."""

    class Bound(Assembled[Settings]):
        Config = Settings

        def parts(self) -> Parts:
            return parts

        def data_digest(self) -> str | None:
            return digest

        def sources(self) -> Iterable[Any]:
            return ()

    return Bound


def _elements(batch: Any) -> int:
    """Of the labels; of a batch that has none, as those of language models, of the whole."""
    if isinstance(batch, Tensor):
        return batch.numel()
    if isinstance(batch, Mapping):
        found = batch.get(_LABELS)
    else:
        found = batch[-1] if isinstance(batch, Sequence) and len(batch) else None
    if found is None:
        raise TypeError(
            f"nobody can say how many tokens a batch has that is a {type(batch).__name__} without {_LABELS!r}; give "
            "tokens_per_sample"
        )
    return _elements(found)
