"""`NF4Weight`: a weight in 4 bits, bit for bit as bitsandbytes stores it."""

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int32, Shaped, UInt8

from phi3_jax.model.products import precise_matmul
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

    A byte holds two neighbours, as in a file, or, `by_halves`, two numbers that are half a row apart. The
    numbers are the same. TPUs compute on 128 lanes at a time and are slow to move what lies on them:
    halves are unpacked without moving anything, where neighbours have to be interleaved.

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
        by_halves: Whether byte i of a row holds its numbers i and in / 2 + i, in place of 2i and 2i + 1.
    """

    codes: UInt8[Arrays, "*stack out bytes"]
    absmax: Shaped[Arrays, "*stack out blocks"]
    nested_absmax: Float[Arrays, "*stack nested"] | None
    offset: Float[Arrays, "*stack"] | None
    out_features: int = field(metadata={"static": True})
    in_features: int = field(metadata={"static": True})
    dtype: np.dtype = field(metadata={"static": True})
    by_halves: bool = field(default=False, metadata={"static": True})

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

    def laid_out(self, platform: str) -> Self:
        """The same weight, of numpy arrays, with its codes by halves where `platform` is `tpu` and rows allow it."""
        wanted = is_by_halves(self.in_features, platform)
        if wanted == self.by_halves:
            return self
        codes = np.asarray(self.codes)
        return replace(self, codes=_halves(codes) if wanted else neighbours(codes), by_halves=wanted)

    def dense(self, xp: ModuleType) -> Float[Arrays, "out in"]:
        """Level times absmax, of a single layer, in float32."""
        if self.by_halves and xp is jnp:
            return self._dense_by_halves()
        codes = neighbours(np.asarray(self.codes)) if self.by_halves else self.codes
        levels = _take(xp, self.levels, _unpacked(xp, codes))
        absmax = self.absmax_values(xp)
        if _has_rows(self.in_features):
            weight = levels.reshape(*absmax.shape, BLOCK_SIZE) * absmax[..., None]
        else:  # the last block may not be full, nor the last byte
            size = self.out_features * self.in_features
            weight = levels[:size] * xp.repeat(absmax, BLOCK_SIZE)[:size]
        dense: Arrays = weight.reshape(self.out_features, self.in_features)
        return dense

    def _dense_by_halves(self) -> Float[Array, "out in"]:
        """The same without a gather, and without blocks of 64 lanes as an axis, which XLA would lay out anew."""
        halves = jnp.asarray(self.codes)
        # Joined as bytes: joined as levels XLA keeps them in float32, and the product that follows takes longer too.
        codes = jnp.concatenate([halves >> 4, halves & 15], axis=-1).astype(jnp.int32)
        levels = _chosen(self.levels, codes)
        # A product with zeros and ones hands every absmax to its 64 numbers, exactly at this precision.
        spread = np.repeat(np.eye(self.in_features // BLOCK_SIZE, dtype=np.float32), BLOCK_SIZE, axis=1)
        return levels * precise_matmul(jnp.asarray(self.absmax_values(jnp)), jnp.asarray(spread))

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


def is_by_halves(in_features: int, platform: str) -> bool:
    """Whether weights of this width are laid out by halves of a row where programs for `platform` use them.

    On a TPU, where half of a row is whole blocks; elsewhere unpacking neighbours costs nothing.
    """
    return platform == "tpu" and in_features % (2 * BLOCK_SIZE) == 0


def neighbours(codes: UInt8[np.ndarray, "*stack out bytes"]) -> UInt8[np.ndarray, "*stack out bytes"]:
    """Codes laid out by halves of a row as they are in a file: two neighbours a byte."""
    even, odd = codes[..., ::2], codes[..., 1::2]
    return np.concatenate([(even & 0xF0) | (odd >> 4), (even << 4) | (odd & 0xF)], axis=-1)


def _halves(codes: UInt8[np.ndarray, "*stack out bytes"]) -> UInt8[np.ndarray, "*stack out bytes"]:
    first, second = np.split(codes, 2, axis=-1)
    halves = np.empty_like(codes)
    halves[..., ::2] = (first & 0xF0) | (second >> 4)
    halves[..., 1::2] = (first << 4) | (second & 0xF)
    return halves


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


def _chosen(table: np.ndarray, codes: Int32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`table[codes]` by choosing between halves of the table, bit for bit of the code."""
    if len(table) == 1:
        return jnp.asarray(table[0])
    half = len(table) // 2
    return jnp.where((codes & half) != 0, _chosen(table[half:], codes), _chosen(table[:half], codes))
