"""What is kept for the backward pass."""

import jax
import jax.numpy as jnp

from phi3_jax.model.attention import run_kind
from phi3_jax.model.remat import remat_policy
from tests.helpers.attention import inputs, packed


def test_attention_policy_spares_the_second_forward_pass():
    """Loops in the gradient's program: two forward, two backward, and two more where it is run again."""
    q, k, v, _ = inputs(300, 2, 1)

    def loops(policy):
        body = jax.checkpoint(lambda q: run_kind("chunked", jnp.sin(q), k, v, packed(300), None), policy=policy)
        return jax.jit(jax.grad(lambda q: jnp.sum(body(q) ** 2))).lower(q).as_text().count("stablehlo.while")

    assert loops(remat_policy("attention")) == 4
    assert loops(remat_policy("full")) == 6
