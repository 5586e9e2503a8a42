"""Adapters of every role, as pytrees for optimizers."""

import jax
import jax.numpy as jnp


def tree():
    """One leaf of every kind that PEFT has, as ones."""
    shapes = {
        "adapters": {
            "model": {
                "embed_tokens": {"lora_A": (4, 10), "lora_B": (6, 4), "rows": (2, 6)},
                "layers": {
                    "o_proj": {"lora_A": (3, 4, 6), "lora_B": (3, 6, 4), "lora_bias": (3, 6)},
                    "down_proj": {"lora": {"lora_A": (3, 4, 6), "lora_B": (3, 6, 4)}, "magnitude": (3, 6)},
                },
            }
        },
        "saved": {"lm_head": (10, 6), "model.norm": (6,)},
    }
    return {"lora": jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))}


def flat(pytree):
    found = jax.tree_util.tree_leaves_with_path(pytree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}
