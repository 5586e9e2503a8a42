import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax.lora import merge, merge_lora, unmerge_lora

IDS = jnp.array([[5, 3, 9, 1], [2, 2, 17, 18]])
EVERYTHING = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "embed_tokens")


def weights(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ("lm_head",), ("embed_tokens",), EVERYTHING])
def test_merged_computes_what_base_and_adapter_do(tiny, random_lora, tied, targets):
    model = tiny(tie_word_embeddings=tied)
    before = weights(model)
    lora = random_lora(model, target_modules=targets)
    merged = merge_lora(model, lora)
    # The same products in another order: float32 rounding of logits of size about 5.
    np.testing.assert_allclose(merged(IDS), model(IDS, lora=lora), rtol=1e-5, atol=2e-5)
    assert np.abs(merged(IDS) - model(IDS)).max() > 0.1
    for path, weight in weights(model).items():
        np.testing.assert_array_equal(weight, before[path])


@pytest.mark.parametrize("tied", [False, True])
def test_unmerged_is_the_base_again(tiny, random_lora, tied):
    model = tiny(tie_word_embeddings=tied)
    lora = random_lora(model, target_modules=EVERYTHING)
    merged = merge_lora(model, lora)
    back = weights(unmerge_lora(merged, lora))
    changed = weights(merged)
    for path, weight in weights(model).items():
        np.testing.assert_allclose(back[path], weight, atol=2e-6)  # a last bit of the merged weight's size
        assert ("norm" in str(path)) == np.array_equal(changed[path], weight)


def test_tied_embeddings_stay_tied_unless_an_adapter_parts_them(tiny, random_lora):
    model = tiny(tie_word_embeddings=True)
    tied = merge_lora(model, random_lora(model, target_modules="all-linear"))
    assert tied.lm_head is None
    assert tied.config.tie_word_embeddings
    untied = merge_lora(model, random_lora(model, target_modules=["lm_head"]))
    assert not untied.config.tie_word_embeddings
    assert untied.config.to_dict()["tie_word_embeddings"] is False
    np.testing.assert_array_equal(untied.model.embed_tokens.weight[...], model.model.embed_tokens.weight[...])
    assert np.any(untied.lm_head.weight[...] != model.model.embed_tokens.weight[...])


def test_a_bfloat16_weight_is_rounded_once(tiny, random_lora):
    """W + s·BA in float64, then to the nearest bfloat16; rounding the update first differs."""
    model = tiny(jnp.bfloat16)
    lora = random_lora(model, target_modules=["down_proj"])
    merged = np.asarray(merge_lora(model, lora).model.layers.mlp.down_proj.weight[...])
    assert merged.dtype == jnp.bfloat16
    (adapter,) = dict(lora.items()).values()
    base = np.asarray(model.model.layers.mlp.down_proj.weight[...], np.float64)
    update = adapter.scaling * np.asarray(adapter.lora_B, np.float64) @ np.asarray(adapter.lora_A, np.float64)
    np.testing.assert_array_equal(merged, (base + update).astype(np.float32).astype(jnp.bfloat16))
    twice = (base + update.astype(jnp.bfloat16).astype(np.float64)).astype(np.float32).astype(jnp.bfloat16)
    assert np.any(merged != twice)


@pytest.mark.optimized
def test_memory_is_one_layer_in_float32_not_the_stack(tiny, random_lora):
    """What XLA sets aside beside arguments and result for a stack of 64 bfloat16 layers."""
    model = tiny(jnp.bfloat16, num_hidden_layers=64, hidden_size=64, intermediate_size=128, head_dim=16)
    (adapter,) = dict(random_lora(model, target_modules=["gate_up_proj"]).items()).values()
    bits = model.model.layers.mlp.gate_up_proj.weight[...].view(jnp.uint16)
    compiled = merge._change_layers.lower(merge._merged, jnp.dtype(jnp.bfloat16), adapter, bits).compile()
    one_layer = 4 * bits[0].size
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * one_layer  # the stack would be 64


def test_merging_again_compiles_nothing_new(tiny, random_lora):
    model = tiny()
    lora = random_lora(model, target_modules="all-linear")
    merge_lora(model, lora)
    size = merge._change_layers._cache_size()
    merge_lora(model, lora)
    assert merge._change_layers._cache_size() == size


def test_unused_weights_are_shared_with_the_base(tiny, random_lora):
    model = tiny()
    merged = merge_lora(model, random_lora(model, target_modules=["o_proj"]))
    here, there = (m.model.layers.mlp.down_proj.weight[...] for m in (model, merged))
    assert here.unsafe_buffer_pointer() == there.unsafe_buffer_pointer()
    assert isinstance(jax.tree.leaves(nnx.state(merged))[0], jax.Array)
