"""Fresh adapters, drawn from PEFT's distributions."""

import math
import zlib
from dataclasses import fields

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from phi3_jax.config import LoraConfig
from phi3_jax.lora.adapters import Lora, LoraEmbedding, LoraLinear
from phi3_jax.lora.targets import Module, match_targets
from phi3_jax.model import Phi3ForCausalLM


def init_lora(model: Phi3ForCausalLM, config: LoraConfig, key: PRNGKeyArray) -> Lora:
    """Adapters for the modules that `config.target_modules` names, in float32 whatever the base's type.

    Before training they change nothing (but with `init_lora_weights=False`). The numbers depend on
    `key` and on a module's name and shape, not on which other modules have adapters.

    **Arguments**
    - `model`: the base; only its shapes are looked at, so an abstract one (`nnx.eval_shape`) will do.
    - `key`: what everything random is drawn from.

    Raises `InputError` where a target matches nothing (see `match_targets`).
    """
    adapters = {}
    modules = match_targets(model, config.target_modules)
    for module in modules:
        # A checksum, since Python's own hash of a string differs from run to run.
        module_key = jax.random.fold_in(key, zlib.crc32(module.name.encode()))
        new = _init_embedding if module.is_embedding else _init_linear
        adapters[module.name] = new(module, config, module_key)
    # As in PEFT, the modules found take the place of the pattern that found them, so that an adapter
    # is the same pytree before it is saved and after it is loaded.
    entries = {entry.name: getattr(config, entry.name) for entry in fields(LoraConfig)}
    entries["target_modules"] = tuple(sorted(module.suffix for module in modules))
    return Lora.from_items(adapters, LoraConfig(**entries))


def _init_linear(module: Module, config: LoraConfig, key: PRNGKeyArray) -> LoraLinear:
    """PEFT's starts of a linear layer (`LoraLayer.reset_lora_parameters`).

    - True: A Kaiming-uniform with a = √5, that is uniform in ±1/√in; B zero.
    - `"gaussian"`: A normal with standard deviation 1/r; B zero.
    - False: A as with True and B by the same rule, uniform in ±1/√r.
    """
    out_features, in_features = module.shape
    a_key, b_key = jax.random.split(key)
    a_shape = (*module.stack, config.r, in_features)
    b_shape = (*module.stack, out_features, config.r)
    if config.init_lora_weights == "gaussian":
        a = jax.random.normal(a_key, a_shape, jnp.float32) / config.r
    else:
        a = _uniform(a_key, a_shape, 1 / math.sqrt(in_features))
    b = jnp.zeros(b_shape, jnp.float32)
    if config.init_lora_weights is False:
        b = _uniform(b_key, b_shape, 1 / math.sqrt(config.r))
    return LoraLinear(a, b, config.scaling, config.lora_dropout)


def _init_embedding(module: Module, config: LoraConfig, key: PRNGKeyArray) -> LoraEmbedding:
    """PEFT's start of an embedding: A zero (random with False), B standard normal, for every setting."""
    vocab, hidden = module.shape
    a_key, b_key = jax.random.split(key)
    a = jnp.zeros((config.r, vocab), jnp.float32)
    if config.init_lora_weights is False:
        a = jax.random.normal(a_key, (config.r, vocab), jnp.float32)
    return LoraEmbedding(a, jax.random.normal(b_key, (hidden, config.r), jnp.float32), config.scaling)


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
