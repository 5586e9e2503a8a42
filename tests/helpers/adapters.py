"""Every kind of adapter, as settings, and adapters as after some training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import LoraConfig, Phi3ForCausalLM
from phi3_jax.lora import Lora, init_lora

IDS = jnp.array([[3, 4, 5, 6, 0], [7, 18, 9, 1, 2]])

SLICES = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]

VARIANTS = {
    "plain": {},
    "slices": {"target_modules": [*SLICES, "o_proj"]},
    "some slices": {"target_modules": ["v_proj", "up_proj"]},
    "dora": {"use_dora": True},
    "dora on slices": {"use_dora": True, "target_modules": [*SLICES, "down_proj"]},
    "dora on some layers": {"use_dora": True, "layers_to_transform": [0, 2], "rank_pattern": {"2.mlp.down_proj": 4}},
    "dora on tables": {"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
    "ranks by layer": {"rank_pattern": {r"1\..*o_proj": 1, "down_proj": 4}, "alpha_pattern": {"0.mlp.down_proj": 7}},
    "slices of some layers": {"target_modules": r".*\.[02]\..*(q|up)_proj", "alpha_pattern": {"2.self_attn.q_proj": 9}},
    "pissa": {"init_lora_weights": "pissa"},
    "fast pissa": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "olora by layer": {"init_lora_weights": "olora", "rank_pattern": {"layers.1.*down_proj": 4}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "saved head": {"modules_to_save": ["lm_head", "norm"]},
    "saved layer": {"modules_to_save": ["qkv_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 0, 18]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [7]}},
}


def config(**settings):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, **settings})


def shaken(lora, seed=1):
    """The adapter as after some training: every array that trains moved."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf if "start_" in jax.tree_util.keystr(path) else leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for (path, leaf), key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


# Of plain kinds: with what makes them differ.
PLAIN = {
    "rsLoRA": {"target_modules": ["qkv_proj", "down_proj", "lm_head"], "r": 3, "use_rslora": True},
    "slices": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "layers and patterns": {
        "target_modules": ["o_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "rank_pattern": {"layers.2.mlp.down_proj": 4},
    },
}


def trained(model: Phi3ForCausalLM, seed: int = 0, **config: Any) -> Lora:
    """As after some training: nothing is what it was at the start."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"], **config}
    shapes = jax.eval_shape(lambda: init_lora(model, LoraConfig(**config), jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)
