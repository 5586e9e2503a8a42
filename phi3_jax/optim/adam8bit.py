"""AdamW with states of 8 bits, as bitsandbytes' `AdamW8bit` keeps them.

Each moment is a code of one byte for every number and a float32 scale (absmax) for every 256 numbers:
8-bit dynamic quantisation, https://arxiv.org/abs/2110.02861. A step dequantises both moments, takes
AdamW's step in float32 with the new moments, and then quantises these again.

The blocks and `MIN_8BIT_SIZE` are those of one layer's tensor. bitsandbytes sees a tensor for every
layer; here they are stacked, and no block crosses from one layer into the next.

A code is always the nearest. bitsandbytes 0.50.2 means the same and departs from it: its CPU code sees
numbers in steps of about 1.5e-5, which is up to seven codes off for small second moments; its CUDA code
moves a negative first moment whose nearest code is 0 to the code below, and decays weights after the
step and not before (a difference of learning_rate² · weight_decay).
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, UInt8

from phi3_jax.lora import roles
from phi3_jax.quant.dynamic import dynamic_map

BLOCK_SIZE = 256
MIN_8BIT_SIZE = 4096  # tensors with fewer numbers keep their moments in float32


@cache
def _borders(*, signed: bool) -> Float[np.ndarray, "16 16"]:
    """Between each code and the next, in rows of 16, the last one infinite.

    The exact middle rounded down to float32: a float32 is above one if and only if above the other.
    """
    code = dynamic_map(signed=signed).astype(np.float64)
    middles = (code[:-1] + code[1:]) / 2
    borders = middles.astype(np.float32)
    borders = np.where(borders > middles, np.nextafter(borders, np.float32(-np.inf)), borders)
    return np.append(borders, np.float32(np.inf)).reshape(16, 16)


def nearest_code(x: Float[Array, "*shape"], *, signed: bool) -> UInt8[Array, "*shape"]:
    """The code whose number is nearest to `x`, the lower one where two are equally near."""
    borders = jnp.asarray(_borders(signed=signed))
    # Counts the borders below x in two steps of 16: three times as fast as a binary search on a CPU.
    row = jnp.sum(x[..., None] > borders[:-1, -1], axis=-1, dtype=jnp.int32)
    column = jnp.sum(x[..., None] > borders[row], axis=-1, dtype=jnp.int32)
    return (row * 16 + column).astype(jnp.uint8)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMoment:
    """A moment in 8 bits, quantised in blocks along each layer's flattened tensor.

    Attributes:
        codes: one for each number, in the parameter's shape.
        absmax: the largest magnitude in each block.
    """

    codes: UInt8[Array, "*shape"]
    absmax: Float[Array, "*stack blocks"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], stack: int) -> "QuantizedMoment":
        """Zeros; the first `stack` axes of the shape count tensors of their own."""
        blocks = -(-math.prod(shape[stack:]) // BLOCK_SIZE)
        return cls(jnp.zeros(shape, jnp.uint8), jnp.zeros((*shape[:stack], blocks), jnp.float32))


def quantize(values: Float[Array, "*shape"], *, signed: bool) -> QuantizedMoment:
    """Quantises one tensor."""
    blocks = _blocks(values)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    # A block of zeros has no scale to divide by, and stays zeros.
    codes = nearest_code(blocks / jnp.where(absmax > 0, absmax, 1)[:, None], signed=signed)
    return QuantizedMoment(_from_blocks(codes, values.shape), absmax)


def dequantize(moment: QuantizedMoment, *, signed: bool) -> Float[Array, "*shape"]:
    """The numbers that one tensor's codes stand for, in float32."""
    numbers = jnp.asarray(dynamic_map(signed=signed))[_blocks(moment.codes)]
    return _from_blocks(numbers * moment.absmax[:, None], moment.codes.shape)


def _blocks(values: Array) -> Array:
    """`[blocks, 256]`, flattened and padded with zeros."""
    return jnp.pad(values.reshape(-1), (0, -values.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)


def _from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)


def bias_correction(beta: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """1 - beta^step. Written as a difference it would lose five digits in float32 at the start."""
    return -jnp.expm1(step * math.log(beta)) if beta > 0 else jnp.ones((), jnp.float32)


Moment = QuantizedMoment | Float[Array, "*shape"]


class Adam8bitState(NamedTuple):
    """What the optimizer keeps.

    Attributes:
        step: how many are done.
        mu: the first moment, a `Moment` for each parameter.
        nu: the second one.
    """

    step: Int[Array, ""]
    mu: PyTree[Moment]
    nu: PyTree[Moment]


class _Advance(NamedTuple):
    direction: Array
    mu: Moment
    nu: Moment


def scale_by_adam8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction, to be decayed and scaled by the learning rate.

    Tensors of fewer than `MIN_8BIT_SIZE` numbers (in a layer) have moments of 32 bits, and so has the
    embedding's own weight, as transformers and PEFT ask of bitsandbytes.
    """

    def moment(path: tuple[object, ...], leaf: Array) -> Moment:
        stack = roles.stack_axes(path)
        if math.prod(leaf.shape[stack:]) < MIN_8BIT_SIZE or roles.is_embedding_table(path):
            return jnp.zeros(leaf.shape, jnp.float32)
        return QuantizedMoment.zeros(leaf.shape, stack)

    def init(params: optax.Params) -> Adam8bitState:
        # One set of arrays each: a donated buffer must not be given twice.
        mu, nu = (jax.tree_util.tree_map_with_path(moment, params) for _ in range(2))
        return Adam8bitState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        updates: optax.Updates, state: Adam8bitState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Adam8bitState]:
        del params
        step = optax.safe_increment(state.step)
        correction1, correction2 = bias_correction(b1, step), jnp.sqrt(bias_correction(b2, step))

        def advance(grad: Array, mu: Moment, nu: Moment) -> _Advance:
            grad = grad.astype(jnp.float32)
            m = b1 * _value(mu, signed=True) + (1 - b1) * grad
            v = b2 * _value(nu, signed=False) + (1 - b2) * grad * grad
            direction = (m / correction1) / (jnp.sqrt(v) / correction2 + eps)
            return _Advance(direction, _like(mu, m, signed=True), _like(nu, v, signed=False))

        def advance_layers(grad: Array, mu: Moment, nu: Moment) -> _Advance:
            if isinstance(mu, QuantizedMoment) and mu.absmax.ndim > 1:
                # Layer by layer, so that float32 moments exist for one at a time.
                done: _Advance = jax.lax.map(lambda layer: advance(*layer), (grad, mu, nu))
                return done
            return advance(grad, mu, nu)

        done = jax.tree.map(advance_layers, updates, state.mu, state.nu)
        direction, mu, nu = (
            jax.tree.map(lambda leaf, i=i: leaf[i], done, is_leaf=lambda node: isinstance(node, _Advance))
            for i in range(3)
        )
        return direction, Adam8bitState(step, mu, nu)

    return optax.GradientTransformation(init, update)


def _value(moment: Moment, *, signed: bool) -> Array:
    return dequantize(moment, signed=signed) if isinstance(moment, QuantizedMoment) else moment


def _like(old: Moment, new: Array, *, signed: bool) -> Moment:
    return quantize(new, signed=signed) if isinstance(old, QuantizedMoment) else new
