"""`Lora`, the pytree of adapters."""

import jax.numpy as jnp

from phi3_jax import LoraConfig
from phi3_jax.lora import Lora, LoraEmbedding, LoraLinear


def test_items_and_from_items_are_each_others_reverse():
    linear = LoraLinear(jnp.ones((2, 1, 3)), jnp.ones((2, 4, 1)), 1.0)
    embedding = LoraEmbedding(jnp.ones((1, 5)), jnp.ones((3, 1)), 1.0)
    items = {"model.layers.mlp.down_proj": linear, "model.embed_tokens": embedding}
    lora = Lora.from_items(items, LoraConfig())
    assert lora.adapters == {"model": {"layers": {"mlp": {"down_proj": linear}}, "embed_tokens": embedding}}
    assert dict(lora.items()) == items
