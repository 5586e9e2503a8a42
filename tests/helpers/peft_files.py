"""What PEFT's files hold."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from phi3_jax import LoraConfig, Phi3ForCausalLM
from phi3_jax.lora import Lora, init_lora


def random_lora(model: Phi3ForCausalLM, **config: Any) -> Lora:
    """What init_lora makes, with random numbers everywhere."""
    settings = LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"], **config})
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_lora(model, settings, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), shapes)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}))


def assert_same(a: Lora, b: Lora) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
