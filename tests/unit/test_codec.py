"""Every state comes back bit for bit, and no file can do more than be refused."""

import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load as safetensors_load
from torch import Tensor

from relight.training import tensorfile
from relight.training.codec import CodecError, Encoded, Sharded, decode, digests, encode
from relight.training.tensorfile import MAX_DIMENSIONS, TensorFileError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.float8_e4m3fn,
]

floats = st.floats(allow_nan=True, allow_infinity=True)
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | floats
    | st.complex_numbers(allow_nan=True)
    | st.text()
    | st.binary(max_size=20)
    | st.binary(max_size=20).map(bytearray)
)
hashable = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
arrays = hnp.arrays(
    dtype=hnp.scalar_dtypes() | hnp.unicode_string_dtypes() | hnp.byte_string_dtypes(),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
laid_out = arrays | arrays.map(np.transpose) | arrays.map(lambda array: array[..., ::2] if array.ndim else array[()])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype with any bits, dense, transposed, strided, expanded, offset, empty, or without dimensions."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=n_bytes, max_size=n_bytes))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    dense = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype)
    tensor = dense.reshape(shape)
    how = draw(st.sampled_from(["dense", "transposed", "strided", "expanded", "sliced"]))
    if how == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if how == "strided" and tensor.dim():
        return tensor[..., ::2]
    if how == "expanded":
        return tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor[1:] if how == "sliced" and tensor.dim() else tensor


trees = st.recursive(
    plain | tensors() | laid_out,
    lambda parts: (
        st.lists(parts, max_size=4)
        | st.lists(parts, max_size=4).map(tuple)
        | st.dictionaries(hashable, parts, max_size=4)
        | st.dictionaries(st.text(), parts, max_size=4).map(OrderedDict)
        | st.sets(hashable, max_size=4)
        | st.frozensets(hashable, max_size=4)
    ),
    max_leaves=12,
)


def through_bytes(tree: Any) -> Any:
    encoded = encode(tree)
    return decode(encoded.document, tensorfile.parse(as_file(encoded.tensors)))


def as_file(stored: dict[str, Tensor]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(tensorfile.chunks(stored))), dtype=torch.uint8)


def same(a: Any, b: Any) -> bool:
    """Equal in type and in every bit, however deep; written without the codec."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and bits(a) == bits(b)
    if isinstance(a, (np.ndarray, np.generic)):
        # In another order of memory numpy adds in another order.
        return (a.dtype, a.shape, a.tobytes(), np.isfortran(a)) == (b.dtype, b.shape, b.tobytes(), np.isfortran(b))
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    return bool(a == b)


def bits(tensor: Tensor) -> bytes:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=300)
@given(trees)
def test_any_tree_comes_back_bit_for_bit(tree: Any) -> None:
    assert same(through_bytes(tree), tree)


@given(trees)
def test_digests_are_of_the_tree_alone(tree: Any) -> None:
    assert digests(encode(through_bytes(tree))) == digests(encode(tree))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2), torch.tensor([0.0, -0.0])),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (np.zeros(2), np.array([0.0, -0.0])),
        (1.0, 2.0),
        (float("nan"), float("inf")),
    ],
    ids=["tensor", "dtype", "array", "number", "no number"],
)
@pytest.mark.parametrize(
    ("place", "path"),
    [
        (lambda leaf: leaf, ""),
        (lambda leaf: {"state": {3: {"foo": leaf, "step": 1.0}}}, "state[3].foo"),
        (lambda leaf: {"state": [0, leaf]}, "state[1]"),
        (lambda leaf: {"state": (0, [leaf])}, "state[1][0]"),
        (lambda leaf: OrderedDict(state=OrderedDict(foo=leaf)), "state.foo"),
        (lambda leaf: {"state": Counter({"foo": leaf})}, "state.foo"),
    ],
    ids=["root", "dict", "list", "tuple", "OrderedDict", "Counter"],
)
def test_digests_name_what_differs(place: Callable[[Any], Any], path: str, a: Any, b: Any) -> None:
    first, second = digests(encode(place(a))), digests(encode(place(b)))

    assert [where for where in first if first[where] != second[where]] == [path]


@pytest.mark.parametrize("kind", [set, frozenset])
def test_digests_of_a_set_are_of_what_is_in_it(kind: type[Any]) -> None:
    """The bits of a numpy scalar are no part of the document."""
    first, second = digests(encode([kind({np.float64(1.0)})])), digests(encode([kind({np.float64(2.0)})]))

    assert set(first) == set(second) == {"[0][0]"}
    assert first != second


def test_tied_tensors_come_back_tied_and_are_stored_once() -> None:
    weight = torch.randn(3, 4)
    tree = {"embedding": weight, "head": weight, "bias": weight[1], "as_bytes": weight.view(torch.uint8)}

    back = through_bytes(tree)

    assert len(encode(tree).tensors) == 1
    assert same(back, tree)
    back["embedding"][1, 0] = 7.0
    assert back["head"][1, 0] == back["bias"][0] == 7.0


def test_a_view_stores_only_what_it_shows() -> None:
    column = torch.randn(1000, 1000)[10:12, 5]

    (stored,) = encode({"column": column}).tensors.values()

    assert stored.numel() == 1001


def test_views_of_several_dtypes_store_what_they_show_from_where_each_of_them_is_aligned() -> None:
    memory = torch.arange(64, dtype=torch.uint8)

    (stored,) = encode([memory[33:35], memory.view(torch.float64)[5:7]]).tensors.values()

    assert stored.tolist() == list(range(32, 56))


def test_a_view_that_ends_within_an_item_of_the_first_is_stored_to_its_end() -> None:
    memory = torch.arange(16, dtype=torch.uint8)
    tree = [memory.view(torch.float64)[:1], memory[8:11]]

    (stored,) = encode(tree).tensors.values()

    assert (stored.dtype, stored.tolist()) == (torch.uint8, list(range(11)))
    assert same(through_bytes(tree), tree)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=4))
def test_any_views_of_one_memory_come_back(views: list[tuple[torch.dtype, int, int]]) -> None:
    memory = torch.tensor([0, 1], dtype=torch.uint8).repeat(64)
    tree = [memory.view(dtype)[start : start + n] for dtype, start, n in views]

    assert same(through_bytes(tree), tree)


def test_decoded_tensors_share_no_memory_with_the_live_ones() -> None:
    live = torch.zeros(3)
    encoded = encode([live])

    (back,) = decode(encoded.document, encoded.tensors)
    live.add_(1)

    assert back.tolist() == [0.0, 0.0, 0.0]


def test_paths_that_read_alike_stay_apart() -> None:
    tree = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "__metadata__": torch.full((1,), 2.0), "": torch.ones(2)}

    assert same(through_bytes(tree), tree)


def test_what_is_stored_has_the_name_of_its_path_and_says_where_it_shows() -> None:
    tied = torch.zeros(2, 3)

    encoded = encode({"a": {"b": tied}, "a.b": torch.ones(1), "again": [tied], "scale": {3: np.ones(1)}})

    assert set(encoded.tensors) == {"a.b", "a.b#2", "scale[3]"}
    assert encoded.tensors["a.b"].shape == (2, 3)
    assert encoded.shown_at == {"a.b": ["a.b", "again[0]"], "a.b#2": ["a.b"]}
    assert (set(encode(tied).tensors), set(encode([tied]).tensors)) == ({"value"}, {"[0]"})
    assert json.loads(encode({"a": {"b": 1.5}}).document) == {"a": {"b": 1.5}}


@pytest.mark.parametrize(
    ("around", "last"),
    [
        (lambda part: [part], lambda part: [part]),
        (lambda part: (part,), lambda part: (part,)),
        (lambda part: {"a": part}, lambda part: {"a": part}),
        (lambda part: {3: part}, lambda part: {3: part}),
        (lambda part: (part,), lambda part: {part: 0}),
    ],
    ids=["list", "tuple", "dict", "pairs", "key"],
)
def test_what_can_be_saved_can_be_read_however_deep(around: Callable[[Any], Any], last: Callable[[Any], Any]) -> None:
    tree: Any = None
    for _ in range(99):
        tree = around(tree)
    tree = last(tree)

    assert same(through_bytes(tree), tree)
    with pytest.raises(CodecError, match=r"^\[0\].*: nested deeper than 100"):
        encode([tree])
    with pytest.raises(CodecError, match=r"^\[0\].*: nested deeper than 100"):
        decode(b"[" + encode(tree).document + b"]", {})


NAN_OF_ITS_OWN = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]


def test_what_lies_deep_under_names_that_are_empty_is_called_the_state() -> None:
    tree: Any = None
    for _ in range(101):
        tree = {"": tree}

    with pytest.raises(CodecError, match=r"^state: nested deeper than 100, or within itself$"):
        encode(tree)
    with pytest.raises(CodecError, match=r"^state: nested deeper than 100$"):
        decode(json.dumps(tree).encode(), {})


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "tuple", "items": []},
        {"a": {"$": 1}},
        "\ud800",
        10**5000,
        [Sharded("w", (2, 3), "bfloat16")],
        -math.inf,
        NAN_OF_ITS_OWN,
    ],
    ids=["tag", "dollar", "surrogate", "large", "sharded", "infinity", "nan"],
)
def test_what_json_would_not_keep_comes_back(tree: Any) -> None:
    assert same(through_bytes(tree), tree)


def test_an_integer_that_not_every_reader_of_json_holds_is_tagged() -> None:
    document = json.loads(encode([2**63 - 1, 2**63]).document)

    assert document == [2**63 - 1, {"$": "int", "hex": hex(2**63)}]


def test_empty_tensors_share_nothing() -> None:
    tree = {"a": torch.zeros(0), "b": torch.zeros(0, 3, dtype=torch.int64), "c": torch.zeros(2, 0)}

    assert list(encode(tree).tensors) == ["a", "b", "c"]
    assert same(through_bytes(tree), tree)


def test_a_counter_keeps_its_type() -> None:
    assert same(through_bytes({"milestones": Counter([30, 80, 80])}), {"milestones": Counter([30, 80, 80])})


class Unknown:
    pass


class Special(Tensor):
    pass


def within_itself() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Unknown(), "cannot keep a test_codec.Unknown; give tensors, numpy arrays, .* or dicts of them$"),
        (torch.zeros(2).to_sparse(), "sparse_coo"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2).as_subclass(Special), "cannot keep a Special; give a plain tensor"),
        (np.array([Unknown()]), "numpy dtype object"),
        (np.ma.array([1.0], mask=[True]), "MaskedArray of numpy dtype float64"),
        (len, "builtin_function"),
    ],
)
def test_what_it_does_not_know_is_named_with_its_path(value: Any, said: str) -> None:
    with pytest.raises(CodecError, match=rf"^optimizer\.state\[3\]\.foo: .*{said}"):
        encode({"optimizer": {"state": {3: {"foo": value}}}})
    with pytest.raises(CodecError, match=rf"^state: .*{said}"):
        encode(value)


def test_a_key_that_it_does_not_know_is_named_too() -> None:
    with pytest.raises(CodecError, match=r"^a\[1\] key: cannot keep a test_codec.Unknown"):
        encode({"a": [0, {Unknown(): 0}]})


def test_a_tree_within_itself_is_refused() -> None:
    with pytest.raises(CodecError, match="nested deeper"):
        encode(within_itself())


def test_the_safetensors_package_reads_the_files() -> None:
    stored = {"a.weight": torch.randn(2, 3), "b": torch.tensor(True), "c": torch.arange(3, dtype=torch.bfloat16)}

    read = safetensors_load(bytes(as_file(stored).numpy()))

    assert same(dict(sorted(read.items())), stored)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def file_of(header: Any, data: bytes = bytes(8)) -> Tensor:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text + data), dtype=torch.uint8)


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(0, dtype=torch.uint8),
        torch.full((8,), 255, dtype=torch.uint8),  # a header of 16 EiB
        file_of(b"{"),
        file_of(b"[]"),
        file_of(b"[" * 100_000),
        file_of({"a": 1}),
        file_of({"a": entry(dtype="F31")}),
        file_of({"a": entry(dtype=["F32"])}),
        file_of({"a": entry(shape=[3])}),
        file_of({"a": entry(shape=[-2])}),
        file_of({"a": entry(shape=[2**62, 2**62])}),
        file_of({"a": entry(shape=[True, 2])}),
        file_of({"a": entry(shape=[2] + [1] * 1000)}),
        file_of({"a": entry(data_offsets=[0, 2**40])}),
        file_of({"a": entry(data_offsets=[8, 16])}),  # a hole
        file_of({"a": entry(), "b": entry()}),  # an overlap
        file_of({"a": entry()}, bytes(9)),
        file_of({"a": entry()}, bytes(7)),
        torch.frombuffer(bytearray(b"\x80\x04cos\nsystem\n(S'true'\ntR."), dtype=torch.uint8),  # a pickle
    ],
)
def test_a_hostile_tensor_file_is_refused(data: Tensor) -> None:
    with pytest.raises(TensorFileError):
        tensorfile.parse(data)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_tensor_file_is_read_or_refused(data: st.DataObject) -> None:
    file = as_file({"a": torch.randn(3), "b": torch.zeros(2, 2, dtype=torch.int8)})
    at = data.draw(st.integers(0, file.numel() - 1))
    file[at] = data.draw(st.integers(0, 255))

    try:
        tensorfile.parse(file)
    except TensorFileError:
        return


VIEW = {"$": "tensor", "of": "a", "dtype": "float32", "shape": [2], "stride": [1], "offset": 0}
SHARDED = {"$": "sharded", "of": "a", "shape": [2], "dtype": "float32"}
ARRAY = {"$": "ndarray", "of": "a", "dtype": "<f4", "shape": [2], "order": "C", "scalar": False}


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"NaN",
        b"[" * 100_000,
        b"[" * 500 + b"]" * 500,
        {"$": "pickle"},
        {"$": ["tensor"]},
        {"$": "float", "bits": "00"},
        {"$": "int", "hex": "zz"},
        {"$": "bytes", "base64": "*"},
        {"$": "bytearray", "base64": "*"},
        {"$": "tuple", "items": "abc"},
        {"$": "dict", "items": [[[], 1]]},
        {"$": "set", "items": [[]]},
        {"$": "tensor"},
        VIEW | {"of": "b"},
        VIEW | {"dtype": "load"},
        VIEW | {"dtype": "float128"},
        VIEW | {"shape": [3]},
        VIEW | {"shape": [-1]},
        VIEW | {"shape": [2**62, 2**62], "stride": [1, 1]},
        VIEW | {"stride": [2]},
        VIEW | {"stride": [2**62]},
        VIEW | {"stride": []},
        VIEW | {"offset": 1},
        VIEW | {"offset": -1},
        ARRAY | {"dtype": "O"},
        ARRAY | {"dtype": "float1000"},
        ARRAY | {"shape": [3]},
        ARRAY | {"shape": [2**40]},
        ARRAY | {"order": "Z"},
        SHARDED | {"of": 3},
        SHARDED | {"shape": [-1]},
        SHARDED | {"dtype": "load"},
        [ARRAY, ARRAY],  # of a large one, any number of copies
        [ARRAY, VIEW],
    ],
)
def test_a_hostile_document_is_refused(document: Any) -> None:
    text = document if isinstance(document, bytes) else json.dumps({"x": document}).encode()

    with pytest.raises(CodecError):
        decode(text, {"a": torch.zeros(2)})


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"$": "pickle"}, "state: unknown type 'pickle'"),
        ({"a": {"$": "tuple", "items": [0, VIEW | {"of": "b"}]}}, "a[1]: not a tensor: 'b'"),
        ({"a": {"$": "dict", "items": [[3, VIEW | {"of": "b"}]]}}, "a[3]: not a tensor: 'b'"),
        ({"a": {"$": "dict", "items": [[{"$": "pickle"}, 0]]}}, "a key: unknown type 'pickle'"),
        ({"a": [{"$": "tuple", "items": "abc"}]}, "a[0]: not a tuple: items is not a list"),
        ({"a": {"$": "set", "items": [{"$": "pickle"}]}}, "a[0]: unknown type 'pickle'"),
        ({"a": {"$": "frozenset", "items": [{"$": "pickle"}]}}, "a[0]: unknown type 'pickle'"),
        ({"a": {"$": "OrderedDict", "items": [[3, {"$": "pickle"}]]}}, "a[3]: unknown type 'pickle'"),
        ({"a": {"$": "Counter", "items": [[3, {"$": "pickle"}]]}}, "a[3]: unknown type 'pickle'"),
        ({"a": {"$": "int", "hex": 3}}, "a: not a int: hex is not text"),
        (VIEW | {"shape": 2}, "state: not a tensor: 2 is not a list of sizes"),
        (VIEW | {"stride": []}, "state: not a tensor: shape [2] and strides [] differ in length"),
        (VIEW | {"shape": [3]}, "state: not a tensor: shape [3], strides [1] from 0 reach past 2 items"),
        (VIEW | {"offset": 1}, "state: not a tensor: shape [2], strides [1] from 1 reach past 2 items"),
        (ARRAY | {"order": "Z"}, "state: not a ndarray: order 'Z'"),
        (ARRAY | {"shape": [3]}, "state: not a ndarray: 8 bytes are not shape [3] of float32"),
        (math.nan, "the document is not JSON: NaN is no JSON"),
    ],
)
def test_what_is_wrong_with_a_document_is_said_with_its_path(document: Any, said: str) -> None:
    with pytest.raises(CodecError) as refused:
        decode(json.dumps(document).encode(), {"a": torch.zeros(2)})

    assert str(refused.value) == said


@pytest.mark.parametrize("dtype", ["S0", "<U0", "S"])
def test_items_without_bytes_do_not_become_gigabytes(dtype: str) -> None:
    document = json.dumps(ARRAY | {"dtype": dtype, "shape": [2**40]}).encode()

    with pytest.raises(CodecError, match="not a ndarray: numpy dtype"):
        decode(document, {"a": torch.zeros(0)})


@pytest.mark.parametrize("record", [ARRAY | {"shape": [2] + [1] * 1000}, VIEW | {"stride": [1] * 1000}])
def test_sizes_are_counted_before_they_are_multiplied(record: dict[str, Any]) -> None:
    with pytest.raises(CodecError, match=r"\d+ dimensions"):
        decode(json.dumps(record).encode(), {"a": torch.zeros(2)})


def test_a_tensor_of_as_many_dimensions_as_there_may_be_comes_back() -> None:
    assert same(through_bytes(torch.ones([1] * MAX_DIMENSIONS)), torch.ones([1] * MAX_DIMENSIONS))


def test_torch_imports_nothing_that_a_document_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "__getattr__", asked.append)

    with pytest.raises(CodecError, match="no dtype '_inductor'"):
        decode(json.dumps(VIEW | {"dtype": "_inductor"}).encode(), {"a": torch.zeros(2)})

    assert asked == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=3), parts, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.sampled_from([VIEW, ARRAY]), st.data())
def test_an_altered_record_is_read_or_refused(record: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(record)))
    altered = record | {key: data.draw(json_values)}

    try:
        decode(json.dumps(altered).encode(), {"a": torch.zeros(2)})
    except CodecError:
        return


def test_encoding_needs_no_copy_of_dense_tensors() -> None:
    weight = torch.randn(4)
    encoded: Encoded = encode({"weight": weight})

    assert encoded.tensors["weight"].data_ptr() == weight.data_ptr()
