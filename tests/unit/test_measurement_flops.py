"""FLOPs are counted from short generations, and are those that torch finds in the whole of a long one."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ops_contract.measurements import FlopsRecord, RandomModel
from ops_worker.measurement import models
from ops_worker.measurement.flops import Ran, count

VOCABULARY = 96
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
GROUPED = WIDTH | {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64},
    "llama": GROUPED | {"intermediate_size": 88},
    "opt": WIDTH | {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "mixtral": GROUPED | {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    # Five layers of six look back at six positions only.
    "gemma3_text": GROUPED | {"intermediate_size": 64, "num_hidden_layers": 6, "sliding_window": 6},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 4},
}
SEQUENCES, LENGTH, GENERATED = 3, 9, 7


def built(model_type: str, attention: str = "eager", **more: Any) -> Any:
    models.quiet()
    model = RandomModel(model_type=model_type, config=CONFIGS[model_type] | more)
    found = models.build(model, models.read_config(model), "float32", attention)
    found.generation_config.eos_token_id, found.generation_config.pad_token_id = None, 0
    return found


def by_torch(model: Any, new_tokens: int) -> int:
    """What torch counts in a whole generation, where every product is one that it knows."""
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
    model.set_experts_implementation(before)
    return int(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "mixtral", "gemma3_text"])
def test_prefill_and_decode_are_what_torch_counts(model_type: str, attention: str) -> None:
    model = built(model_type, attention)
    prefill, whole = by_torch(model, 1), by_torch(model, GENERATED)
    counted = count(model, [Ran(SEQUENCES, LENGTH, GENERATED)])
    assert counted.prefill == pytest.approx(prefill, rel=0.001)
    assert counted.decode == pytest.approx(whole - prefill, rel=0.001)
    assert counted.uncounted == []


def test_a_gated_ffn_and_grouped_queries_are_counted_as_they_are() -> None:
    """By hand, from the architecture: three matrices of the FFN, keys and values of half the width."""
    counted = count(built("llama"), [Ran(SEQUENCES, LENGTH, GENERATED)])
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 88  # queries, keys and values, output, FFN
    fed = LENGTH + GENERATED - 1
    assert counted.parts["linear"] == SEQUENCES * fed * 2 * 2 * layer
    assert counted.parts["lm_head"] == SEQUENCES * GENERATED * 2 * 32 * VOCABULARY
    pairs = LENGTH**2 + sum(range(LENGTH + 1, LENGTH + GENERATED))
    # Scores and values, of all four query heads, in both layers.
    assert counted.parts["attention"] == SEQUENCES * 2 * (2 * 2 * 4 * 8) * pairs


def test_the_parts_are_the_whole() -> None:
    counted = count(built("llama"), [Ran(SEQUENCES, LENGTH, GENERATED)])
    assert sum(counted.parts.values()) == counted.prefill + counted.decode


def test_tied_embeddings_cost_as_much_as_others_and_are_one_parameter() -> None:
    tied, own = built("llama", tie_word_embeddings=True), built("llama", tie_word_embeddings=False)
    ran = [Ran(SEQUENCES, LENGTH, GENERATED)]
    assert count(tied, ran).parts == count(own, ran).parts
    assert count(own, ran).params - count(tied, ran).params == 32 * VOCABULARY


def test_batches_of_different_sizes_add_up() -> None:
    model, ran = built("gpt2"), [Ran(4, 8, 5), Ran(4, 8, 5), Ran(1, 11, 3)]
    alone = [count(model, [one]) for one in ran]
    assert count(model, ran).decode == sum(one.decode for one in alone)
    assert count(model, ran).prefill == sum(one.prefill for one in alone)


def test_one_token_is_the_prefill_alone() -> None:
    counted = count(built("gpt2"), [Ran(1, 8, 1)])
    assert counted.decode == 0
    assert counted.prefill > 0


def test_an_end_of_sequence_does_not_end_the_counting() -> None:
    model = built("gpt2")
    expected = count(model, [Ran(1, 8, 4)])
    model.generation_config.eos_token_id = list(range(VOCABULARY - 1))  # all but one
    assert count(model, [Ran(1, 8, 4)]) == expected


def test_what_is_not_a_product_of_matrices_is_named() -> None:
    assert count(built("mamba"), [Ran(1, 8, 4)]).uncounted == ["backbone.layers.*.mixer"]


def test_the_model_is_left_as_it_was() -> None:
    model = built("mixtral", "sdpa")
    count(model, [Ran(1, 8, 4)])
    assert model.config._attn_implementation == "sdpa"
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_record_counts_parameters_once() -> None:
    assert isinstance(record := count(built("gpt2"), [Ran(1, 8, 4)]), FlopsRecord)
    layer = 12 * 32 * 32 + 13 * 32  # matrices; their biases, and two norms
    assert record.params == VOCABULARY * 32 + 64 * 32 + 2 * layer + 2 * 32
