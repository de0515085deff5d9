"""The engine over transformers: what it is asked, what it says, and what it refuses beforehand. On the CPU, tiny."""

import functools
import json
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ops_contract.measurements import MeasurementConfig, RandomModel, Task
from ops_worker.measurement import models, requirements
from ops_worker.measurement.engines import Checked, Generated
from ops_worker.measurement.flops import Ran, count
from ops_worker.measurement.pytorch import PytorchEngine

WORDS = ["<end>", "<pad>", "a", "joule", "is", "watt", "second", "one", "of", "heat"]
VOCABULARY = 96
# Weights so large that the tokens vary.
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64, "initializer_range": 0.5}
RANDOM = RandomModel(model_type="gpt2", config=GPT2)
# Half of all tokens end a sequence, so that some end early, and the prompts are of the other half.
ENDS = list(range(VOCABULARY // 2))
ENDING = RandomModel(model_type="gpt2", config=GPT2 | {"eos_token_id": ENDS})
TASK = {"n_prompts": 5, "input_tokens": 8, "output_tokens": 6}


def config(model: str | RandomModel = RANDOM, **more: Any) -> MeasurementConfig:
    task = Task(**(TASK | more.pop("task", {})))
    return MeasurementConfig(model=model, task=task, **({"batch_size": 2} | more))


def engine(model: str | RandomModel = RANDOM, **more: Any) -> PytorchEngine:
    return PytorchEngine(config(model, **more), "cpu")


def loaded(model: str | RandomModel = RANDOM, **more: Any) -> PytorchEngine:
    found = engine(model, **more)
    assert found.check(None).failures == []
    found.load()
    return found


def said(found: PytorchEngine) -> list[list[int]]:
    """The new tokens of every prompt."""
    new = [found._generate(found._at(batch), found._config.task.output_tokens) for batch in range(found.batches)]
    return [row for tokens in new for row in tokens.tolist()]


def asked(found: PytorchEngine) -> list[list[int]]:
    return [row for batch in found._batches for row in batch.input_ids.tolist()]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 as save_pretrained leaves it, with a tokenizer of a word a token."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    models.quiet()
    directory = tmp_path_factory.mktemp("gpt2")
    model = RANDOM.model_copy(update={"config": GPT2 | {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}})
    models.build(model, models.read_config(model), "float32", "eager").save_pretrained(directory)
    words = Tokenizer(kinds.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>").save_pretrained(directory)
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a joule is one watt second\n\none joule of heat\n  \njoule\n", encoding="utf-8")
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# What is run.


def test_batches_are_of_the_given_size_and_the_last_one_of_the_rest() -> None:
    found = loaded()
    assert found.batches == 3
    assert [found.prompts(batch) for batch in range(4)] == [2, 2, 1, 2]


def test_it_says_what_generate_says() -> None:
    found = loaded()
    built = models.build(RANDOM, models.read_config(RANDOM), "float32", "eager")
    built.generation_config.eos_token_id = None
    ids = torch.tensor(asked(found))
    plain = built.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert said(found) == plain[:, 8:].tolist()


def test_the_length_is_forced_where_weights_are_random() -> None:
    assert any(token in ENDS for row in said(loaded(ENDING)) for token in row)
    assert loaded(ENDING).generate(0) == Generated(tokens_in=16, tokens_out=12)


def test_tokens_out_end_with_the_first_end_of_each_sequence() -> None:
    found, forced = loaded(ENDING, task={"ignore_eos": False}), loaded(ENDING)
    counted = [found.generate(batch).tokens_out for batch in range(found.batches)]
    lengths = [next((at for at, token in enumerate(row, 1) if token in ENDS), 6) for row in said(forced)]
    assert counted == [sum(lengths[0:2]), sum(lengths[2:4]), lengths[4]]
    assert len(set(lengths)) > 1
    assert max(lengths) > 1


def test_a_stored_model_ends_its_sequences_itself_unless_told_otherwise(stored: Path) -> None:
    assert loaded(str(stored))._ends is not None
    assert loaded(str(stored), task={"ignore_eos": True})._ends is None


def test_what_a_model_brings_along_of_sampling_is_not_followed(stored: Path, tmp_path: Path) -> None:
    copy = copied(stored, tmp_path)
    sampling = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": 0, "max_length": 9}
    (copy / "generation_config.json").write_text(json.dumps(sampling))
    assert said(loaded(str(copy))) == said(loaded(str(stored)))


def test_the_first_token_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found, steps = loaded(), []
    found._model.register_forward_hook(lambda *_: steps.append(1))
    found.first_token(0)
    assert len(steps) == 1


def test_the_same_seed_asks_the_same_and_builds_the_same() -> None:
    one, again = loaded(), loaded()
    assert asked(one) == asked(again)
    assert said(one) == said(again)
    assert asked(loaded(task={"seed": 1})) != asked(one)
    assert said(loaded(RANDOM.model_copy(update={"seed": 1}))) != said(one)


def test_no_generator_of_the_process_is_touched() -> None:
    torch.rand(1)  # not where a seed would set it
    before = torch.get_rng_state(), random.getstate()
    found = loaded()
    found.generate(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_random_tokens_are_never_special_ones(stored: Path) -> None:
    task = {"n_prompts": 64, "input_tokens": 32}
    drawn = {token for row in asked(loaded(str(stored), task=task)) for token in row}
    assert drawn == set(range(2, len(WORDS)))  # and none that the tokenizer does not know
    three = RANDOM.model_copy(update={"config": GPT2 | {"vocab_size": 4, "eos_token_id": [1, 2], "bos_token_id": 3}})
    assert {token for row in asked(loaded(three)) for token in row} == {0}


def test_prompts_of_a_file_are_its_lines_repeated(stored: Path, prompts: Path) -> None:
    found = loaded(str(stored), task={"prompts_file": str(prompts)}, batch_size=5)
    words = {number: word for number, word in enumerate(WORDS)}
    lines = [" ".join(words[token] for token in row if token != 1) for row in asked(found)]
    first, second, third = "a joule is one watt second", "one joule of heat", "joule"
    assert lines == [first, second, third, first, second]


def test_padding_is_on_the_left_and_counts_for_nothing(stored: Path, prompts: Path) -> None:
    task = {"prompts_file": str(prompts), "n_prompts": 3, "ignore_eos": True}
    together, alone = (loaded(str(stored), task=task, batch_size=size) for size in (3, 1))
    assert asked(together)[2] == [1, 1, 1, 1, 1, 3]
    assert together.generate(0).tokens_in == sum(alone.generate(batch).tokens_in for batch in range(3)) == 11
    assert said(together) == said(alone)


def test_what_a_prompt_has_beyond_input_tokens_is_cut_off(stored: Path, prompts: Path) -> None:
    found = loaded(str(stored), task={"prompts_file": str(prompts), "input_tokens": 2, "n_prompts": 1})
    assert found.generate(0).tokens_in == 2


def test_precision_is_that_of_the_weights(stored: Path) -> None:
    found = loaded(str(stored), precision="bfloat16")
    assert {parameter.dtype for parameter in found._model.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_all_that_is_compiled_is_compiled_by_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    # Without a compiler's minutes: the same graphs, which nothing makes faster.
    compiled = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    torch._dynamo.reset()
    counters.clear()
    one_layer = RandomModel(model_type="gpt2", config=GPT2 | {"n_layer": 1})
    plain, found = loaded(one_layer, task={"n_prompts": 3}), loaded(one_layer, compile=True, task={"n_prompts": 3})
    graphs = counters["stats"]["unique_graphs"]
    assert said(found) == said(plain)
    flops = [one.flops([one.generate(0), one.generate(1)]) for one in (plain, found)]
    assert flops[0] == flops[1]
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_flops_are_of_what_the_batches_came_to() -> None:
    found = loaded(ENDING, task={"ignore_eos": False})
    window = [found.generate(batch) for batch in range(found.batches)]
    longest = [found._lengths[batch] for batch in range(found.batches)]
    assert min(longest) < 6
    shapes = [Ran(size, 8, length) for size, length in zip([2, 2, 1], longest, strict=True)]
    assert found.flops(window) == count(found._model, shapes)


def test_peak_memory_is_since_the_reset() -> None:
    found = loaded()
    found.reset_peak_memory()
    before = found.peak_memory_bytes()
    held = bytearray(b"1" * (64 * 2**20))
    grown = found.peak_memory_bytes()
    assert before is not None
    assert grown is not None
    assert grown - before >= len(held)
    del held
    found.reset_peak_memory()
    assert (found.peak_memory_bytes() or grown) < grown


def test_a_peak_that_nothing_resets_is_not_told() -> None:
    assert loaded().peak_memory_bytes() is None


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert engine().peak_flops_per_s() == (None, "what a CPU can do at most is not known")


def test_the_environment_tells_model_and_versions_before_it_is_loaded(stored: Path, prompts: Path) -> None:
    found = engine(str(stored), task={"prompts_file": str(prompts)}).environment()
    assert json.loads(json.dumps(found)) == found
    assert found["attention"] == "sdpa"
    assert found["packages"]["transformers"]
    assert found["model"]["weights"] == "safetensors"
    assert found["model"]["params"] == VOCABULARY * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64
    assert len(found["prompts_sha256"]) == 64


def test_closing_lets_the_model_go() -> None:
    found = loaded()
    found.close()
    assert found.batches == 0
    assert found._model is None


# What is refused.


def refused(found: PytorchEngine) -> list[str]:
    return list(found.check(None).failures)


def test_random_weights_are_warned_of() -> None:
    assert engine().check(None) == Checked(
        [], ["the weights are random: what the model says is noise, and the length of the output is forced"]
    )


def test_every_failure_is_told_at_once(tmp_path: Path) -> None:
    told = refused(
        engine(attention="flash_attention_2", task={"prompts_file": str(tmp_path / "none"), "output_tokens": 60})
    )
    beginnings = [
        "flash_attention_2 needs a package",
        "flash_attention_2 runs on CUDA devices alone",
        "flash_attention_2 has no float32",
        "a prompts file needs the model's tokenizer, and random weights have none",
        f"the prompts file {tmp_path}/none cannot be read",
        "input_tokens 8 and output_tokens 60 are 68 positions, and the model has 64",
    ]
    assert [any(line.startswith(begins) for line in told) for begins in beginnings] == [True] * len(beginnings)
    assert len(told) == len(beginnings)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (RandomModel(model_type="gtp2"), "transformers knows no model_type gtp2 (there is gpt2)"),
        (
            RandomModel(model_type="gpt2", config={"n_layers": 2}),
            "the config of a gpt2 has no n_layers (there is n_layer)",
        ),
        (RandomModel(model_type="gpt2", config={"dtype": "float16"}), "the config of a gpt2 has no dtype"),
        (RandomModel(model_type="gpt2", config={"n_layer": "two"}), "the config of a gpt2 is refused"),
        (RandomModel(model_type="gpt2", config={"n_head": 5}), "the model cannot be built with sdpa attention"),
        (RandomModel(model_type="bloom"), "the model cannot be built with sdpa attention"),
        (RandomModel(model_type="t5"), "t5 is no model of transformers that continues text"),
        ("./none/such", "./none/such is no directory on this worker"),
    ],
)
def test_a_model_that_cannot_be_is_refused(model: str | RandomModel, why: str) -> None:
    (told,) = refused(engine(model))
    assert told.startswith(why)


def test_a_name_that_is_not_cached_says_what_to_do_offline(offline: None) -> None:
    (told,) = refused(engine("relight/none"))
    assert told.startswith("relight/none is not whole in the local cache, and HF_HUB_OFFLINE is set")


def test_a_name_that_is_cached_needs_no_network(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import _detect_agent

    def asks(*_: Any, **__: Any) -> None:
        pytest.fail("it asked the network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(_detect_agent, "_registry", None)
    monkeypatch.setattr(socket, "getaddrinfo", asks)
    snapshot = cached(stored, tmp_path)
    assert said(loaded("relight/tiny")) == said(loaded(str(stored)))
    assert engine("relight/tiny").environment()["model"]["revision"] == snapshot.name


def test_a_name_that_is_not_wholly_cached_is_refused_offline(
    stored: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (cached(stored, tmp_path) / "model.safetensors").unlink()
    (told,) = refused(engine("relight/tiny"))
    assert "is not whole in the local cache" in told


def cached(stored: Path, cache: Path) -> Path:
    """As the hub's client keeps relight/tiny."""
    repository, commit = cache / "models--relight--tiny", "0" * 40
    snapshot = copied(stored, repository / "snapshots", commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def copied(stored: Path, parent: Path, name: str = "copy") -> Path:
    (parent / name).mkdir(parents=True)
    for file in stored.iterdir():
        (parent / name / file.name).write_bytes(file.read_bytes())
    return parent / name


def without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def half(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(shards))


def quantised(model: Path) -> None:
    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (without("config.json"), "has no config.json"),
        (without("model.safetensors"), "has no safetensors"),
        (pickled, "has no safetensors, and pickled weights are not read"),
        (half, "lacks model-00002-of-00002.safetensors of its weights"),
        (quantised, "its weights are quantised"),
        (without("tokenizer.json"), "has no tokenizer that can be read"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(
    stored: Path, prompts: Path, tmp_path: Path, harm: Callable[[Path], None], why: str
) -> None:
    copy = copied(stored, tmp_path)
    harm(copy)
    (told,) = refused(engine(str(copy), task={"prompts_file": str(prompts)}))
    assert why in told


def test_code_that_comes_with_a_model_is_never_run(stored: Path, tmp_path: Path) -> None:
    copy, trace = copied(stored, tmp_path), tmp_path / "ran"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (copy / "config.json").write_text(json.dumps(own))
    (copy / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: ...\n")
    (told,) = refused(engine(str(copy)))
    assert "is refused" in told
    assert not trace.exists()


def test_weights_that_are_missing_are_not_made_up(stored: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = copied(stored, tmp_path)
    weights = load_file(copy / "model.safetensors")
    weights.pop(next(name for name in weights if "c_fc.weight" in name))
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(models.Unusable, match=r"has no weights for .*c_fc\.weight"):
        engine(str(copy)).load()


@pytest.mark.parametrize(
    ("content", "why"), [(b"\xff\xfe joule", "codec can't decode"), (b"\n \n", "every line is empty")]
)
def test_a_prompts_file_without_prompts_is_refused(stored: Path, tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    (told,) = refused(engine(str(stored), task={"prompts_file": str(path)}))
    assert why in told


def test_memory_is_for_weights_and_cache_and_prompts() -> None:
    params = VOCABULARY * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64  # tokens, positions, layers, last norm
    cache = 2 * 2 * 32 * 14 * 2  # keys and values, layers, width, positions, sequences
    needed = 4 * (params + cache) + 16 * 5 * 8
    assert requirements.check(config(), "cpu", needed).failures == []
    (told,) = requirements.check(config(), "cpu", needed - 1).failures
    assert told.startswith(f"{params:,} parameters in float32, 2 cached sequences and the prompts need")


def test_transformers_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda _: None)
    assert refused(engine()) == ["transformers is not installed: `pip install 'relight[llm]'`"]


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.shutil, "which", lambda _: None)
    assert refused(engine(compile=True)) == ["compile needs a C++ compiler on the CPU, and there is none: install g++"]


def test_float16_on_a_cpu_is_warned_of(stored: Path) -> None:
    (told,) = engine(str(stored), precision="float16").check(None).warnings
    assert told.startswith("float16 on a CPU is slow")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (told,) = PytorchEngine(config(), "cuda").check(None).failures
    assert "finds no CUDA device here" in told


def test_bfloat16_that_a_device_would_emulate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_available": True, "is_bf16_supported": False, "get_device_name": "Tesla T4"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    assert PytorchEngine(config(precision="bfloat16"), "cuda").check(None).failures == [
        "Tesla T4 has no bfloat16: take float16"
    ]
    assert PytorchEngine(config(precision="float16"), "cuda").check(None).failures == []
