"""LoftQ: base and start together are nearer to the weights than the quantised base alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import InputError, LoraConfig
from phi3_jax.hf.checkpoint import Checkpoint
from phi3_jax.hf.save import save_model
from phi3_jax.lora.loftq import LoftqQuantizer, loftq_init, nearest_of_rank
from phi3_jax.lora.stack import unstacked
from phi3_jax.model.leaves import abstract_model
from phi3_jax.quant import NF4Weight, quantize_nf4

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
IDS = jnp.array([[3, 4, 5, 6, 0], [7, 18, 9, 1, 2]])


def config(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": "loftq", **settings})


def weights(model, module="down_proj"):
    value = getattr(model.model.layers.mlp, module).weight.get_value()
    if isinstance(value, NF4Weight):
        return np.stack([jax.tree.map(lambda x, i=i: x[i], value).dequantize(jnp.float32) for i in range(3)])
    return np.asarray(value)


def lost(model, quantized, lora, module="down_proj"):
    """Of each layer: the error of the base alone, and that with the adapter."""
    adapters = dict(unstacked(lora.adapters["model"]["layers"]["mlp"][module]))
    rounded = np.stack([quantize_nf4(w).dequantize(np.float32) for w in weights(model, module)])
    alone = np.linalg.norm(weights(model, module) - rounded, axis=(1, 2))
    base = weights(quantized, module)
    whole = np.stack([base[i] + a.scaling * a.lora.lora_B @ a.lora.lora_A for i, a in sorted(adapters.items())])
    return alone, np.linalg.norm(weights(model, module) - whole, axis=(1, 2))


@pytest.mark.parametrize("iterations", [1, 5])
def test_what_quantising_loses_is_partly_won_back(tiny, iterations):
    model = tiny(**SIZES)
    quantized, lora = loftq_init(model, config(loftq_config={"loftq_iter": iterations}))
    alone, together = lost(model, quantized, lora)
    assert (together < 0.97 * alone).all()
    if iterations > 1:
        once = lost(model, *loftq_init(model, config()))[1]
        assert (together < once).all()


def test_the_start_is_the_best_of_its_rank(tiny):
    """After one iteration: s · B A is the truncated SVD of what was lost, whatever the scale."""
    model = tiny(**SIZES)
    quantized, lora = loftq_init(model, config(lora_alpha=12))
    residual = weights(model) - weights(quantized)
    for layer, adapter in unstacked(lora.adapters["model"]["layers"]["mlp"]["down_proj"]):
        u, s, vh = np.linalg.svd(residual[layer], full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vh[:4]
        found = adapter.scaling * adapter.lora.lora_B @ adapter.lora.lora_A
        np.testing.assert_allclose(found, best, atol=1e-5 * s[0])


def test_loaded_from_disk_it_is_the_same(tiny, tmp_path):
    model = tiny(**SIZES)
    settings = config(target_modules=["v_proj", "up_proj", "o_proj"], rank_pattern={"1.self_attn.o_proj": 2})
    save_model(model, tmp_path)
    quantizer = LoftqQuantizer(abstract_model(model.config), settings)
    loaded = Checkpoint.open(tmp_path).load_model(dtype=jnp.float32, quantization="nf4", quantizer=quantizer)
    in_memory = loftq_init(model, settings)
    for ours, theirs in zip(jax.tree.leaves(in_memory), jax.tree.leaves((loaded, quantizer.lora(loaded))), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert jax.tree.structure(in_memory[1]) == jax.tree.structure(quantizer.lora(loaded))


def test_the_update_of_the_untouched_base_is_zero_at_first(tiny):
    model = tiny(**SIZES)
    quantized, lora = loftq_init(model, config())
    for _, adapter in unstacked(lora.adapters["model"]["layers"]["mlp"]["down_proj"]):
        np.testing.assert_allclose(adapter.as_plain().delta(), 0, atol=1e-6)
    assert np.abs(quantized(IDS, lora=lora) - quantized(IDS)).max() > 1e-3


def test_a_weight_of_no_rank():
    a, b = nearest_of_rank(np.zeros((6, 4), np.float32), 2)
    assert a.shape == (2, 4)
    assert b.shape == (6, 2)
    np.testing.assert_array_equal(b @ a, 0)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"loftq_config": {"loftq_bits": 8}}, "nf4", r"loftq_bits 8 \(int8\), but the base is quantised to nf4"),
        ({}, "int8", r"loftq_bits 4 \(nf4\), but the base is quantised to int8"),
        ({"loftq_config": {"loftq_iter": 0}}, "nf4", "loftq_iter 0, expected a whole number of at least 1"),
        ({"target_modules": ["lm_head", "o_proj"]}, "nf4", "lm_head is not quantised; leave it out"),
        ({"r": 65}, "nf4", "r is 65, but .* has only 64 directions"),
    ],
)
def test_what_does_not_fit(tiny, settings, kind, message):
    with pytest.raises(InputError, match=message) as error:
        LoftqQuantizer(tiny(**SIZES), config(**settings), kind)
    assert "\n" not in str(error.value)
