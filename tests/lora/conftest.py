"""Small random models: nothing here needs PyTorch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from phi3_jax import LoraConfig, Phi3Config, Phi3ForCausalLM
from phi3_jax.lora import Lora, init_lora
from tests.helpers.models import smallest_model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Phi3ForCausalLM]:
    """`tiny(dtype=..., **config)`: a random model of 3 layers with grouped keys and values."""

    def make(dtype: Any = jnp.float32, **config: Any) -> Phi3ForCausalLM:
        return smallest_model(dtype, **{"pad_token_id": 0, "initializer_range": 0.3, **config})

    return make


@pytest.fixture(scope="session")
def random_lora() -> Callable[..., Lora]:
    """`random_lora(model, **config)`: adapters with nothing zero, as after some training."""

    def make(model: Phi3ForCausalLM, seed: int = 1, **config: Any) -> Lora:
        settings = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, **config}
        return init_lora(model, LoraConfig(**settings), jax.random.key(seed))

    return make


@pytest.fixture(scope="session")
def abstract_phi3_mini() -> Phi3ForCausalLM:
    """Shapes of the full Phi-3-mini, without numbers."""
    return nnx.eval_shape(lambda: Phi3ForCausalLM(Phi3Config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
