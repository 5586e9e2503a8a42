"""`NF4Weight`: a weight in 4 bits, bit for bit as bitsandbytes stores it."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Shaped, UInt8

from phi3_jax.quant.base import Arrays, Quantized, QuantType
from phi3_jax.quant.blocks import (
    BLOCK_SIZE,
    FP4_LEVELS,
    NESTED_BLOCK_SIZE,
    NF4_LEVELS,
    quantize_absmax,
    quantize_blocks,
)
from phi3_jax.quant.dynamic import dynamic_map


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4Weight(Quantized):
    """A linear layer's weight in NF4 (QLoRA, arXiv:2305.14314), or a stack of such layers' weights.

    Where `in_features` is a multiple of 64 no block crosses a row, and codes and absmax have the
    rows as an axis; other weights are flat, `[*stack, out · in / 2]` and one absmax each 64 numbers.

    Attributes:
        codes: `[*stack, out, in / 2]`: two levels a byte, the first in the high bits.
        absmax: `[*stack, out, in / 64]`: the largest magnitude of each block; float32, or with double
            quantisation the 8-bit codes of it.
        nested_absmax: `[*stack, nested]`: with double quantisation, the scale of each 256 of these codes, in
            the order of the flat weight.
        offset: `[*stack]`: with double quantisation, what these codes are counted from.
        out_features: Rows of the weight it stands for.
        in_features: Its columns.
        dtype: Its type.
    """

    codes: UInt8[Arrays, "*stack out bytes"]
    absmax: Shaped[Arrays, "*stack out blocks"]
    nested_absmax: Float[Arrays, "*stack nested"] | None
    offset: Float[Arrays, "*stack"] | None
    out_features: int = field(metadata={"static": True})
    in_features: int = field(metadata={"static": True})
    dtype: np.dtype = field(metadata={"static": True})

    quant_type: ClassVar[QuantType] = "nf4"
    levels: ClassVar[np.ndarray] = NF4_LEVELS

    @property
    def double_quant(self) -> bool:
        """Whether its absmax are quantised too."""
        return self.nested_absmax is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight it stands for, `[*stack, out, in]`."""
        stack = self.codes.shape[: -2 if _has_rows(self.in_features) else -1]
        return (*stack, self.out_features, self.in_features)

    def dense(self, xp: ModuleType) -> Float[Arrays, "out in"]:
        """Level times absmax, of a single layer, in float32."""
        levels = _take(xp, self.levels, _unpacked(xp, self.codes))
        absmax = self.absmax_values(xp)
        if _has_rows(self.in_features):
            weight = levels.reshape(*absmax.shape, BLOCK_SIZE) * absmax[..., None]
        else:  # the last block may not be full, nor the last byte
            size = self.out_features * self.in_features
            weight = levels[:size] * xp.repeat(absmax, BLOCK_SIZE)[:size]
        dense: Arrays = weight.reshape(self.out_features, self.in_features)
        return dense

    def absmax_values(self, xp: ModuleType) -> Float[Arrays, "out blocks"]:
        """The absmax of a single layer in float32, with `xp` numpy or jax.numpy."""
        if self.nested_absmax is None:
            return self.absmax
        scale = xp.repeat(self.nested_absmax, NESTED_BLOCK_SIZE)[: self.absmax.size].reshape(self.absmax.shape)
        # No product exceeds its scale, since no level exceeds 1. To say so changes nothing, but
        # keeps compilers from fusing product and sum into one operation that rounds once.
        values: Arrays = xp.minimum(_take(xp, dynamic_map(signed=True), self.absmax) * scale, scale) + self.offset
        return values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FP4Weight(NF4Weight):
    """A weight in bitsandbytes' FP4. Checkpoints hold such; nothing is quantised to it here."""

    quant_type: ClassVar[QuantType] = "fp4"
    levels: ClassVar[np.ndarray] = FP4_LEVELS


def quantize_nf4(weight: Float[ArrayLike, "out in"], *, double_quant: bool = True) -> NF4Weight:
    """One layer's weight in NF4, computed on the host; its arrays are numpy's where `weight` is.

    Codes and absmax are, bit for bit, those that bitsandbytes 0.50.2 makes of a weight of that type
    (float32, bfloat16 or float16).

    Args:
        weight: In float32, bfloat16 or float16.
        double_quant: Keep the absmax in 8 bits (QLoRA's double quantisation).

    Raises:
        InputError: Where the weight is not finite.
    """
    host = np.asarray(weight)
    codes, absmax = quantize_blocks(host)
    statistics = quantize_absmax(absmax) if double_quant else (absmax, None, None)
    quantized = from_flat(NF4Weight, codes, *statistics, shape=host.shape, dtype=host.dtype)
    return jax.tree.map(jnp.asarray, quantized) if isinstance(weight, jax.Array) else quantized


def from_flat(
    kind: type[NF4Weight],
    codes: UInt8[np.ndarray, "bytes"],
    absmax: Shaped[np.ndarray, "blocks"],
    nested_absmax: Float[np.ndarray, "nested"] | None,
    offset: Float[np.ndarray, ""] | None,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> NF4Weight:
    """One layer's weight, `shape` `[out, in]`, of what bitsandbytes keeps flat."""
    out_features, in_features = shape
    if _has_rows(in_features):
        codes, absmax = codes.reshape(out_features, -1), absmax.reshape(out_features, -1)
    return kind(codes, absmax, nested_absmax, offset, out_features, in_features, np.dtype(dtype))


def _has_rows(in_features: int) -> bool:
    return in_features % BLOCK_SIZE == 0


def _unpacked(xp: ModuleType, codes: UInt8[Arrays, "*rows bytes"]) -> UInt8[Arrays, "*rows codes"]:
    twice = xp.repeat(codes, 2, axis=-1)
    is_second = xp.arange(twice.shape[-1]) % 2 == 1
    unpacked: Arrays = xp.where(is_second, twice & 15, twice >> 4)
    return unpacked


def _take(xp: ModuleType, table: np.ndarray, codes: UInt8[Arrays, "*shape"]) -> Float[Arrays, "*shape"]:
    # The codes cannot leave the table, and making sure of it would take half the time.
    return table[codes] if xp is np else jnp.asarray(table).at[codes].get(mode="promise_in_bounds")
