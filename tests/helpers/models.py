"""Tiny random models and adapters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax import LoraConfig, Phi3Config, Phi3ForCausalLM
from phi3_jax.lora import Lora, init_lora

VOCAB = 53


def tiny_model(layers: int = 2, dtype: Any = jnp.float32, **overrides: Any) -> Phi3ForCausalLM:
    config = Phi3Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pad_token_id": 0,
            # Ten times the usual spread, so that attention is not uniform.
            "initializer_range": 0.2,
            **overrides,
        }
    )
    return Phi3ForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))


def random_lora(model: Phi3ForCausalLM, **config: Any) -> Lora:
    """Adapters that change something from the start: A and B are both random."""
    lora_config = LoraConfig(**{"r": 4, "init_lora_weights": False, **config})
    return init_lora(model, lora_config, jax.random.key(7))


def smallest_model(dtype: Any = jnp.float32, **config: Any) -> Phi3ForCausalLM:
    """A random model of 3 layers with grouped keys and values, as small as adapters of every kind allow."""
    sizes = {
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    return Phi3ForCausalLM(Phi3Config(**{**sizes, **config}), dtype=dtype, rngs=nnx.Rngs(0))


# A model's configuration, for tests that make their own.
CONFIG = Phi3Config(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    initializer_range=0.3,
)

# A config.json whose linear layers blocks divide.
QUANTIZABLE = {
    "model_type": "phi3",
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,  # no multiple of 64: down_proj is flat
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def quantizable_model(dtype=jnp.float32, **overrides) -> Phi3ForCausalLM:
    return Phi3ForCausalLM(Phi3Config.from_dict(QUANTIZABLE | overrides), dtype=dtype, rngs=nnx.Rngs(0))


def filled(make: Callable[[], Any], seed: int = 0, scale: float = 0.3) -> Any:
    """What `make()` gives (a model, or any pytree), all floats normal: nothing is zero, as after training."""
    random = np.random.default_rng(seed)

    def fill(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(random.normal(size=leaf.shape, scale=scale), leaf.dtype)
        return jnp.zeros(leaf.shape, leaf.dtype)

    made = nnx.eval_shape(make)
    if isinstance(made, nnx.Module):
        graph, state = nnx.split(made)
        return nnx.merge(graph, jax.tree.map(fill, state))
    return jax.tree.map(fill, made)
