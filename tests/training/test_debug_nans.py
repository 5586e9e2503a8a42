"""Where in the model numbers stop being finite."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from phi3_jax.lora import Lora
from phi3_jax.training.debug_nans import find_nonfinite
from tests.helpers.models import random_lora, tiny_model
from tests.helpers.nonfinite import POISON, bad_rows, good_rows, overflowing


def changed(model, path, index, value):
    """The model with a number of one of its weights replaced."""
    state = dict(nnx.to_flat_state(nnx.state(model)))
    key = tuple(path.split("."))
    state[key] = state[key].replace(state[key].get_value().at[index].set(value))
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(state))


def changed_lora(lora: Lora, module: str, leaf: str, index, value) -> Lora:
    items = dict(lora.items())
    items[module] = replace(items[module], **{leaf: getattr(items[module], leaf).at[index].set(value)})
    return Lora.from_items(items, lora.config)


@pytest.fixture(scope="module")
def model():
    return tiny_model(2)


def find(model, lora, rows=None):
    batch = {name: jnp.asarray(x) for name, x in (rows or good_rows()).items()}
    return find_nonfinite(model, lora, batch, jax.random.key(0), neftune_alpha=5.0)


def test_the_base_weight_is_found(model):
    lora = random_lora(model, lora_dropout=0.1)
    assert find(model, lora) is None
    for module in ("self_attn.qkv_proj", "mlp.down_proj", "post_attention_layernorm"):
        index = (1, 0) if "norm" in module else (1, 0, 0)
        broken = changed(model, f"model.layers.{module}.weight", index, jnp.nan)
        assert find(broken, lora) == f"the base weight model.layers.1.{module}.weight"
    assert find(changed(model, "lm_head.weight", (3, 3), jnp.inf), lora) == "the base weight lm_head.weight"
    assert find(changed(model, "model.norm.weight", 3, jnp.inf), lora) == "the base weight model.norm.weight"
    found = find(changed(model, "model.embed_tokens.weight", (POISON, 0), jnp.inf), lora, bad_rows())
    assert found == f"the base weight model.embed_tokens.weight, in the row of token {POISON}"


def test_the_adapter_is_found(model):
    lora = changed_lora(random_lora(model), "model.layers.mlp.down_proj", "lora_B", (1, 0, 0), jnp.nan)
    assert find(model, lora) == "the adapter's model.layers.1.mlp.down_proj.lora_B"
    part = changed_lora(
        random_lora(model, target_modules=["v_proj"]), "model.layers.self_attn.v_proj", "lora_A", (0, 0, 0), jnp.inf
    )
    assert find(model, part) == "the adapter's model.layers.0.self_attn.v_proj.lora_A"


def test_activations_that_overflow_are_found(model):
    lora = random_lora(model)
    large = changed_lora(lora, "model.layers.self_attn.o_proj", "lora_B", (1,), 3e38)
    found = find(model, large)
    assert found.startswith("the activations that the adapter of model.layers.1.self_attn.o_proj puts out")


@pytest.mark.slow
def test_activations_that_overflow_in_float16_are_found():
    half = tiny_model(2, jnp.float16, initializer_range=60.0)
    assert find(half, random_lora(half)).startswith("the activations that come out of model.layers.0.")


def test_a_gradient_that_overflows_is_found(model):
    lora = overflowing(random_lora(model, target_modules=["o_proj"]))
    assert find(model, lora) == "in the backward pass, the gradient of model.layers.1.self_attn.o_proj.lora_A"
