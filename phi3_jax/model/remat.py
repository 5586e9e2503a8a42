"""Rematerialisation: which of a layer's values are kept for the backward pass, and which made again."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jaxtyping import Array, Shaped

from phi3_jax.parallel.mesh import platform
from phi3_jax.system.compat_xla import is_cudnn_attention, is_not_a_slice
from phi3_jax.system.errors import InputError

Policy = Callable[..., bool]  # what `jax.checkpoint` asks of each result whether it is kept

POLICIES = ("none", "dots", "attention", "full", "offload")

LAYER_INPUT = "layer_input"
PRODUCT = "product"  # of a linear layer, its adapter's part included
# What attention's backward pass needs beside q, k and v; the kernels give their results these names.
ATTENTION = ("attention_out", "attention_lse")
# What policies keep beside cuDNN's results; `none` where to write and read the rest takes longer than to compute it.
_KEPT = {
    "none": (LAYER_INPUT, PRODUCT, *ATTENTION),
    "dots": (LAYER_INPUT, PRODUCT, *ATTENTION),
    "attention": (LAYER_INPUT, *ATTENTION),
}


def checkpoint_residual(x: Shaped[Array, "*shape"], name: str) -> Shaped[Array, "*shape"]:
    """`x`, which policies know by `name`; for what a backward pass written by hand keeps.

    On CPUs 16-bit numbers are kept as integers: XLA's CPU backend slices bfloat16 in float32, and so would
    make a float32 copy of what all layers keep.
    """
    if platform() != "cpu" or x.dtype.itemsize != 2:
        named: Array = ad_checkpoint.checkpoint_name(x, name)
        return named
    bits = ad_checkpoint.checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def checkpoint_name(x: Shaped[Array, "*shape"], name: str) -> Shaped[Array, "*shape"]:
    """`checkpoint_residual`, and the gradient goes through."""
    return checkpoint_residual(x, name)


checkpoint_name.defvjp(lambda x, name: (checkpoint_residual(x, name), None), lambda _name, _none, gradient: (gradient,))


def remat_policy(name: str | bool) -> Policy:
    """`jax.checkpoint`'s policy of that name; True is `full`, and False `none`.

    - `none`: keep everything; nothing is computed twice. (On CPUs, what `dots` keeps: to write and read
      the rest takes longer there than to compute it.)
    - `dots`: keep each layer's input, the products with weights and attention's output; make the rest again.
    - `attention`: keep each layer's input and attention's output; make the rest again.
    - `full`: keep each layer's input alone.
    - `offload`: the same, moved to the host's memory meanwhile.

    Raises:
        InputError: for other names.
    """
    policies = jax.checkpoint_policies
    kind = {True: "full", False: "none"}[name] if isinstance(name, bool) else name
    policy: Policy | None = None
    if kind == "none" and platform() != "cpu":
        policy = is_not_a_slice
    elif kind in _KEPT:
        policy = policies.save_from_both_policies(policies.save_only_these_names(*_KEPT[kind]), is_cudnn_attention)
    elif kind == "full":
        policy = policies.save_only_these_names(LAYER_INPUT)
    elif kind == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    if policy is None:
        raise InputError(f"the rematerialisation policy is {name!r}, expected one of {', '.join(POLICIES)}")
    return policy
