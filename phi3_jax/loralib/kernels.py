"""Where Flax layers keep their weight, and how it turns into the layout of loralib's adapters."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from phi3_jax.system.errors import InputError

AdaptableLayer = nnx.Linear | nnx.LinearGeneral | nnx.Embed | nnx.Conv


def weight_name(layer: AdaptableLayer) -> str:
    """The attribute that holds the weight."""
    return "embedding" if isinstance(layer, nnx.Embed) else "kernel"


def layer_kernel(layer: AdaptableLayer) -> Array:
    """The weight as Flax lays it out."""
    kernel: Array = getattr(layer, weight_name(layer))[...]
    return kernel


def to_weight(layer: AdaptableLayer, kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """Flax's layout turned into PyTorch's.

    Linear `[in, out]` → `[out, in]` (several in or out axes are joined); convolution
    `[*window, in/groups, out]` → `[out, in/groups, *window]`; a table stays `[vocab, features]`.
    Leading axes of stacked layers stay in front.
    """
    if isinstance(layer, nnx.Embed):
        return kernel
    if isinstance(layer, nnx.Conv):
        return jnp.moveaxis(kernel, (-1, -2), _conv_axes(layer))
    ins, outs = features(layer)
    stack = kernel.shape[: kernel.ndim - len(ins) - len(outs)]
    if not fan_in_fan_out(layer):
        return kernel
    return jnp.swapaxes(kernel.reshape(*stack, math.prod(ins), math.prod(outs)), -1, -2)


def to_kernel(layer: AdaptableLayer, weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """The reverse of `to_weight`."""
    if isinstance(layer, nnx.Embed):
        return weight
    if isinstance(layer, nnx.Conv):
        return jnp.moveaxis(weight, _conv_axes(layer), (-1, -2))
    if not fan_in_fan_out(layer):
        return weight
    ins, outs = features(layer)
    return jnp.swapaxes(weight, -1, -2).reshape(*weight.shape[:-2], *ins, *outs)


def weight_shape(layer: AdaptableLayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the leading axes of a stacked layer, the shape of one layer's weight in PyTorch's layout).

    Works on abstract layers (`nnx.eval_shape`) too.

    Raises:
        InputError: For layers whose features are elsewhere than in the last axes.
    """
    kind = type(layer).__name__
    if isinstance(layer, nnx.LinearGeneral):
        trailing = tuple(range(-len(layer.in_features), 0))
        if layer.batch_axis or tuple(layer.axis) != trailing:
            raise InputError(
                f"{kind} with axis={layer.axis} and batch_axis={dict(layer.batch_axis)}: only the last axes, "
                f"axis={trailing}, can be adapted; leave the layer out"
            )
    if isinstance(layer, nnx.Embed):
        shape: tuple[int, ...] = (layer.num_embeddings, layer.features)
    elif isinstance(layer, nnx.Conv):
        shape = (layer.out_features, layer.in_features // layer.feature_group_count, *layer.kernel_size)
    else:
        ins, outs = features(layer)
        shape = (math.prod(outs), math.prod(ins))
    kernel = getattr(layer, weight_name(layer)).get_value()
    found = jax.eval_shape(lambda value: to_weight(layer, value), kernel).shape
    stack = found[: len(found) - len(shape)]
    if (*stack, *shape) != found:
        raise InputError(
            f"{kind} holds a weight {list(kernel.shape)} that its features do not explain: they say {list(shape)} (as "
            "PyTorch lays it out), and axes of stacked layers come first; leave the layer out"
        )
    return stack, shape


def features(layer: nnx.Linear | nnx.LinearGeneral) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sizes of the input's last axes, sizes of the output's)."""
    return _as_tuple(layer.in_features), _as_tuple(layer.out_features)


def fan_in_fan_out(layer: AdaptableLayer) -> bool:
    """Whether a linear layer's kernel is `[in, out]`, as always in Flax; a `loralib.Linear` may differ."""
    return bool(getattr(layer, "fan_in_fan_out", True))


def _as_tuple(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _conv_axes(conv: nnx.Conv) -> tuple[int, int]:
    sides = len(conv.kernel_size)
    return -sides - 2, -sides - 1
