"""Models and adapters of random numbers, without JAX's own draws, each of which compiles a program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


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
