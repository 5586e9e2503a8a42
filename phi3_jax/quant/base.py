"""What the kinds of quantised weight share: being made dense again, without a gradient."""

from functools import partial
from types import ModuleType
from typing import ClassVar, Literal, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Arrays = Array | np.ndarray  # what the model holds, or what the host has just made

QuantType = Literal["nf4", "fp4", "int8"]


class Quantized:
    """A linear layer's quantised weight, or a stack of them: a pytree to hold in place of the array."""

    codes: Arrays
    quant_type: ClassVar[QuantType]

    @property
    def double_quant(self) -> bool:
        """Whether its statistics are quantised too."""
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight it stands for, `[*stack, out, in]`."""
        raise NotImplementedError

    def laid_out(self, platform: str) -> Self:
        """The same weight, of numpy arrays, with its codes in the order that is best for `cpu`, `gpu` or `tpu`."""
        del platform
        return self

    @jax.named_scope("dequantise")
    def dequantize(self, dtype: DTypeLike) -> Float[Arrays, "out in"]:
        """The weight of a single layer, computed in float32 and rounded to `dtype`.

        It has no gradient, and the model's rematerialisation policies do not keep it for the backward
        pass. Of numpy arrays it is made with numpy; the two differ where a number is subnormal in
        float32 (below 1.2e-38), which XLA takes for zero.
        """
        if isinstance(self.codes, jax.Array):
            return _dequantize(np.dtype(dtype), self)
        return self.dense(np).astype(dtype)

    def dense(self, xp: ModuleType) -> Float[Arrays, "out in"]:
        """The weight of a single layer in float32, with `xp` numpy or jax.numpy."""
        raise NotImplementedError


def is_quantized(value: object) -> TypeGuard[Quantized]:
    """Whether a model's leaf is a quantised weight; `is_leaf` where a tree map must not enter it."""
    return isinstance(value, Quantized)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dequantize(dtype: np.dtype, weight: Quantized) -> Float[Array, "out in"]:
    # custom_vjp for its name, by which the rematerialisation policies know what they are not to keep.
    return jnp.asarray(weight.dense(jnp)).astype(dtype)


def _dequantize_forward(dtype: np.dtype, weight: Quantized) -> tuple[Float[Array, "out in"], None]:
    return _dequantize(dtype, weight), None


def _dequantize_backward(dtype: np.dtype, _: None, gradient: Array) -> tuple[None]:
    del dtype, gradient
    return (None,)


_dequantize.defvjp(_dequantize_forward, _dequantize_backward)
