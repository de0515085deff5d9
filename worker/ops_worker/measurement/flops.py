"""FLOPs of prefill and decode, counted from the matrix products that the model itself does; a multiply-add is two.

Short generations are watched product by product, as torch's dispatcher gets them, with the formulas of
torch.utils.flop_counter: so gated FFNs, grouped queries, experts and an LM head on the last position alone are counted
as they run, whatever the architecture. What they cost at other lengths follows, since everything per position is affine
in the length, and attention quadratic in a prefill, affine in decode: of that, the numbers at three lengths tell all.

Attention is counted as the full square of queries and keys, as the counter of torch has it and as eager attention
computes it; a kernel that skips the masked half does less. Padding is computed, hence counted. Elementwise arithmetic
(norms, activations, softmax) and lookups are not, by convention: their share is small, and no peak is given for them.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ops_contract.measurements import FlopsRecord

# Of prompts. More than one token, and within any sliding window.
PROBES = (2, 3, 4)


@dataclass(frozen=True)
class Ran:
    """A batch as it was computed: `length` of its padded prompts, `generated` of its longest sequence."""

    sequences: int
    length: int
    generated: int


class Part(NamedTuple):
    """Products of one kind; `window`: how many positions back the layer looks at most, null: all."""

    kind: str
    window: int | None


class Probe(NamedTuple):
    prefill: Counter[Part]
    decode: Counter[Part]
    weights: set[int]


def count(model: Any, ran: Sequence[Ran]) -> FlopsRecord:
    probes = [_probe(model, length) for length in PROBES]
    prefill: Counter[str] = Counter()
    decode: Counter[str] = Counter()
    for shape, times in Counter(ran).items():
        for part, flops in _prefill(probes, shape).items():
            prefill[part.kind] += flops * times
        for part, flops in _decode(probes, shape).items():
            decode[part.kind] += flops * times
    return FlopsRecord(
        prefill=prefill.total(),
        decode=decode.total(),
        parts=dict(prefill + decode),
        params=sum(parameter.numel() for parameter in model.parameters()),
        uncounted=_uncounted(model, set.union(*(probe.weights for probe in probes))),
    )


def _prefill(probes: Sequence[Probe], shape: Ran) -> dict[Part, int]:
    parts = {part for probe in probes for part in probe.prefill}
    at = {part: _through([*zip(PROBES, (probe.prefill[part] for probe in probes), strict=True)]) for part in parts}
    return {part: shape.sequences * flops(shape.length) for part, flops in at.items()}


def _decode(probes: Sequence[Probe], shape: Ran) -> dict[Part, int]:
    """The first new token is the prefill's, and the last is not fed back."""
    lengths = range(shape.length + 1, shape.length + shape.generated)
    found = {}
    for part in {part for probe in probes for part in probe.decode}:
        # The step after a prompt of n looks at n + 1 positions.
        at = _through([(length + 1, probe.decode[part]) for length, probe in zip(PROBES, probes, strict=True)])
        seen = (min(length, part.window or length) for length in lengths)
        found[part] = shape.sequences * sum(at(length) for length in seen)
    return found


def _through(points: Sequence[tuple[int, int]]) -> Callable[[int], int]:
    """The parabola through three points at successive integers (Newton's forward differences), in whole numbers."""
    (first, a), (_, b), (_, c) = points
    slope, bend = b - a, c - 2 * b + a
    return lambda at: a + slope * (at - first) + bend * (at - first) * (at - first - 1) // 2


def _probe(model: Any, length: int) -> Probe:
    """Two tokens after a prompt of `length`: the prefill, and one step of decode."""
    prompt = torch.zeros((1, length), dtype=torch.long, device=model.device)
    products = _Products(model)
    with _plainly(model), products.watching(), torch.no_grad():
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
        )
    prefill, decode = products.forwards
    return Probe(prefill, decode, products.multiplied)


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """The same arithmetic without kernels that hide their products: fused attention, grouped experts, compiled code."""
    attention, experts = model.config._attn_implementation, model.get_experts_implementation()
    with ExitStack() as stack:
        if attention.startswith("flash"):
            stack.callback(model.set_attn_implementation, attention)
            model.set_attn_implementation("sdpa")
        stack.callback(model.set_experts_implementation, experts)
        model.set_experts_implementation("eager")
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves its modes untyped
    """The FLOPs of each forward pass of `model`, and the storages of the weights that something was multiplied with."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.forwards: list[Counter[Part]] = []
        self.multiplied: set[int] = set()
        self._model = model
        self._weights = {_storage(parameter) for parameter in model.parameters()}
        head = getattr(model.get_output_embeddings(), "weight", None)
        self._head = None if head is None else _storage(head)
        self._windows = windows(model.config)
        self._layer: int | None = None  # whose attention is at work

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self._model.register_forward_pre_hook(self._begins).remove)
            for module in self._model.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    stack.callback(module.register_forward_pre_hook(self._enters).remove)
                    stack.callback(module.register_forward_hook(self._leaves).remove)
            stack.enter_context(self)
            yield

    def _begins(self, *_: Any) -> None:
        self.forwards.append(Counter())

    def _enters(self, module: Any, *_: Any) -> None:
        self._layer = module.layer_idx

    def _leaves(self, *_: Any) -> None:
        self._layer = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and self.forwards:
            operands = {_storage(argument) for argument in args if isinstance(argument, Tensor)}
            self.forwards[-1][self._part(operands)] += formula(*args, **kwargs, out_val=result)
            self.multiplied |= operands & self._weights
        return result

    def _part(self, operands: set[int]) -> Part:
        if self._head in operands:
            return Part("lm_head", None)
        if operands & self._weights:
            return Part("linear", None)
        if self._layer is None:
            return Part("other", None)
        return Part("attention", self._windows[self._layer] if self._layer < len(self._windows) else None)


def windows(config: Any) -> list[int | None]:
    """Of each layer, how many positions it keeps at most; null: all."""
    from transformers import DynamicCache

    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


def _uncounted(model: Any, multiplied: Collection[int]) -> list[str]:
    """Modules with matrices that nothing was multiplied with, embeddings apart; layers as one, `layers.*`."""
    found = set()
    for name, module in model.named_modules():
        matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
        if not isinstance(module, nn.Embedding) and any(_storage(matrix) not in multiplied for matrix in matrices):
            found.add(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    return sorted(found)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
