"""What `find_optimal` wants of model, data and loss, tried before anything is trained; and sizes that a model may have.

Everything raises TypeError or ValueError, whose message names what to change.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ops_contract.studies import IsoFlop
from relight.optimal.workload import Assembled, Settings
from relight.training.order import DataOrder, to_device
from relight.training.randomness import Stream, derive, seed_everything
from relight.training.sizing import count_parameters, own_count
from relight.workload import Env

_SAMPLES = 2  # BatchNorm refuses one
_LARGEST = 2**20
_LARGEST_REAL = 200_000_000  # parameters, with memory

# Of a size, on the meta device where it can be built there, so that nothing has memory, however large.
Build = Callable[[int], nn.Module]


class NoModule(TypeError):
    """The model's class makes something else, whatever the size."""


def builder(model_cls: Callable[..., Any], size_param: str, model_kwargs: Mapping[str, Any]) -> Build:
    """Raises TypeError, ValueError for arguments that the model's class does not take."""
    _check_arguments(model_cls, size_param, model_kwargs)
    return partial(_built, model_cls, size_param, model_kwargs)


def check_loss(loss_fn: Any) -> None:
    if inspect.isclass(loss_fn):
        raise TypeError(f"loss_fn is a class; give one of it: {loss_fn.__name__}()")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}; give a function (output, target) or (model, batch)")


def check_sizes(build: Build, size_param: str, sizes: Sequence[int]) -> int:
    """The first one that can be built; `num_params()`, if there is one, has to say what is counted."""
    first: Exception | None = None
    for size in sizes:
        try:
            model = build(size)
        except NoModule:
            raise
        except Exception as error:
            first = first or error
            continue
        if notes := own_count(model, *count_parameters(model)):
            raise ValueError(f"{notes[0]}; let it return that, or remove it")
        return size
    assert first is not None
    raise ValueError(
        f"the model cannot be made with {size_param}={sizes[0]}: {_said(first)}; change model_kwargs, or give "
        "model_sizes that it takes"
    ) from first


def found_sizes(build: Build, size_param: str, study: IsoFlop) -> list[int]:
    """Numbers of at most four significant bits (…, 14, 15, 16, 18, …) that make models of a size that budgets admit.

    Widths often have to be multiples of something, and these are of large powers of two. What cannot be built is not
    among them.
    """
    low, high = study.tokens_per_param
    smallest, largest = (math.sqrt(c / 6 / r) for c, r in ((min(study.budgets), high), (max(study.budgets), low)))
    counts: list[int] = []
    found, failure = [], None
    for size in _ladder():
        try:
            model = build(size)
        except NoModule:
            raise
        except Exception as error:
            failure = failure or error
            continue
        params, embedding_params = count_parameters(model)
        if params > _LARGEST_REAL and not any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                f"models of {params:,} parameters are too large to try sizes with, for this one cannot be built on "
                "torch's meta device; give model_sizes"
            )
        counts.append(params - (embedding_params if study.embeddings == "excluded" else 0))
        if counts[-1] > largest:
            break
        if counts[-1] >= smallest:
            found.append(size)
    if found:
        return found
    if not counts:
        raise ValueError(f"no {size_param} was found of which a model can be made; give model_sizes") from failure
    raise ValueError(
        f"no {size_param} gives between {smallest:,.0f} and {largest:,.0f} parameters, which is what these budgets are "
        f"for: those that were tried have {min(counts):,} to {max(counts):,}. Give other compute_budgets or "
        "model_kwargs, or model_sizes"
    )


def check_step(workload_type: type[Assembled[Settings]], config: dict[str, Any], seed: int, device: str) -> None:
    """Forward and backward of one batch, as the engine does them."""
    seed_everything(derive(seed, Stream.BUILD))
    env = Env(device=torch.device(device), rank=0, world_size=1, seed=seed)
    workload = workload_type(Settings.model_validate(config), env)
    training, validation = workload.data()
    for name, data in (("dataset", training), ("val_dataset", validation)):
        try:
            batch = next(DataOrder(data, workload.collate, seed, _SAMPLES, 0).training(0, 0)).data
        except Exception as error:
            raise ValueError(f"{name}: its first samples cannot be read and put together: {_said(error)}") from error
        try:
            model = workload.model().to(env.device).train()
            loss, _ = workload.loss(model, to_device(batch, env.device))
        except Exception as error:
            what = "loss_fn(model, batch)" if workload.parts().takes_model else "loss_fn(model(input), target)"
            raise ValueError(f"{what} fails on the first batch of {name}: {_said(error)}") from error
        _check_loss_of(loss, name)
        if (units := workload.units(batch)) < 1:
            raise ValueError(f"a batch of {name} has {units} tokens: its labels are empty; give tokens_per_sample")
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own


def _check_loss_of(loss: Any, name: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"loss_fn gives {got}; let it return the mean over the batch, a tensor with one element")
    if not math.isfinite(loss.item()):
        raise ValueError(f"loss_fn gives {loss.item()} on the first batch of {name}, of a model that is new")
    if not loss.requires_grad:
        raise ValueError("the loss has no gradient: does loss_fn detach it, or has the model no parameters to train?")


def _check_arguments(model_cls: Any, size_param: str, model_kwargs: Mapping[str, Any]) -> None:
    if not callable(model_cls) or isinstance(model_cls, nn.Module):
        raise TypeError(f"model_cls is a {type(model_cls).__name__}; give a class, or a function that makes a model")
    if size_param in model_kwargs:
        raise ValueError(f"model_kwargs has {size_param}, which is what the sweep varies; leave it out")
    try:
        parameters = inspect.signature(model_cls).parameters.values()
    except (TypeError, ValueError):  # built in; calling it will tell
        return
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return
    taken = [each.name for each in parameters if each.kind is not each.POSITIONAL_ONLY]
    name = getattr(model_cls, "__name__", type(model_cls).__name__)
    if size_param not in taken:
        raise TypeError(
            f"{name} takes no {size_param!r}: it takes {', '.join(taken) or 'nothing'}; let model_size_param name what "
            "makes it larger"
        )
    if unknown := model_kwargs.keys() - set(taken):
        raise TypeError(f"model_kwargs has {', '.join(sorted(unknown))}, which {name} does not take")


def _built(model_cls: Callable[..., Any], size_param: str, model_kwargs: Mapping[str, Any], size: int) -> nn.Module:
    first: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = model_cls(**model_kwargs, **{size_param: size})
            break
        except Exception as error:
            first = first or error
    else:
        assert first is not None
        raise first
    if not isinstance(model, nn.Module):
        raise NoModule(f"model_cls makes a {type(model).__name__}; let it make a torch.nn.Module")
    return model


def _ladder() -> Iterator[int]:
    yield from range(1, 8)
    scale = 1
    while 8 * scale <= _LARGEST:
        yield from range(8 * scale, 16 * scale, scale)
        scale *= 2


def _said(error: Exception) -> str:
    """In one line: torch's own errors go on with stacks."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
