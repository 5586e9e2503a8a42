"""4-bit codes in blocks, as bitsandbytes stores them: a level of a table times the block's absmax.

A weight is taken flat, row after row. Every 64 numbers share their largest magnitude, the absmax, and
each is the nearest of 16 levels times that. Two codes make a byte, the first in the high bits. With
double quantisation the absmax are 8-bit codes themselves, in blocks of 256, counted from their mean.

Written with numpy: unlike XLA it does not flush subnormal numbers to zero, so that the bits are those
of bitsandbytes for every weight.
"""

import numpy as np
from jaxtyping import Float, UInt8

from phi3_jax.quant.dynamic import dynamic_map
from phi3_jax.system.errors import InputError

BLOCK_SIZE = 64  # weights that share an absmax
NESTED_BLOCK_SIZE = 256  # absmax that share a scale of their own
CHUNK = 4096  # blocks at a time, so that what lies between two operations stays in the processor's cache
SMALLEST = np.float32(1e-38)  # what an absmax counts as at least, since zero has no reciprocal

# bitsandbytes' tables (`get_4bit_type`). NF4's levels are quantiles of a normal distribution, FP4's
# the numbers of two exponent bits and one mantissa bit over the largest of them, by their bits.
NF4_LEVELS = np.asarray(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_FP4_MAGNITUDES = np.asarray([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4_LEVELS = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])
FP4_LEVELS[8] = 0  # its negative zero is a zero in bitsandbytes' table


def quantize_blocks(weight: np.ndarray) -> tuple[UInt8[np.ndarray, "bytes"], Float[np.ndarray, "blocks"]]:
    """NF4 codes, two a byte, and the absmax of each block of a weight of any shape and float type.

    Raises:
        InputError: Where it is not finite.
    """
    flat = weight.reshape(-1)
    blocks = -(-flat.size // BLOCK_SIZE)
    codes = np.empty(blocks * BLOCK_SIZE, np.uint8)
    absmax = np.empty(blocks, np.float32)
    whole = flat.size // BLOCK_SIZE
    for start in range(0, whole, CHUNK):
        stop = min(start + CHUNK, whole)
        x = as_float32(flat[start * BLOCK_SIZE : stop * BLOCK_SIZE]).reshape(-1, BLOCK_SIZE)
        largest = np.abs(x).max(axis=1)
        absmax[start:stop] = _finite(largest)
        x *= (np.float32(1) / np.maximum(largest, SMALLEST))[:, None]
        codes[start * BLOCK_SIZE : stop * BLOCK_SIZE] = _nearest_nf4(x.reshape(-1))
    if whole < blocks:  # what is left over: divided where the others are multiplied, its absmax never zero
        x = as_float32(flat[whole * BLOCK_SIZE :])
        absmax[-1] = np.maximum(_finite(np.abs(x).max()), SMALLEST)
        padded = np.zeros(BLOCK_SIZE, np.float32)
        padded[: x.size] = x / absmax[-1]
        codes[whole * BLOCK_SIZE :] = _nearest_nf4(padded)
    packed = (codes[::2] << 4) | codes[1::2]
    return packed[: -(-flat.size // 2)], absmax


def _finite(absmax: np.ndarray) -> np.ndarray:
    if not np.isfinite(absmax).all():
        raise InputError("the weight holds infinity or NaN, expected finite numbers; mend the checkpoint")
    return absmax


def as_float32(flat: np.ndarray) -> np.ndarray:
    """A float32 copy."""
    if flat.dtype.name != "bfloat16":
        return flat.astype(np.float32)
    # The upper half of a float32; ml_dtypes' own conversion holds Python's lock, and the threads wait.
    return (flat.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _nearest_nf4(x: np.ndarray) -> np.ndarray:
    """The number of borders below each `x`; a border itself belongs to the lower level."""
    codes = np.zeros(x.shape, np.uint8)
    above = np.empty(x.shape, bool)
    for border in (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / np.float32(2):
        np.greater(x, border, out=above)
        codes += above.view(np.uint8)
    return codes


def quantize_absmax(
    absmax: Float[np.ndarray, "blocks"],
) -> tuple[UInt8[np.ndarray, "blocks"], Float[np.ndarray, "nested"], np.float32]:
    """Codes of the absmax less their mean, the scale of each block of codes, and that mean.

    The codes are the nearest ones. bitsandbytes' are, too, but for its CPU kernel, whose codes near
    the border between two levels are now and then the other one.
    """
    offset = absmax.mean(dtype=np.float64).astype(np.float32)
    centred = absmax - offset
    padded = np.zeros(-(-absmax.size // NESTED_BLOCK_SIZE) * NESTED_BLOCK_SIZE, np.float32)
    padded[: absmax.size] = centred
    x = padded.reshape(-1, NESTED_BLOCK_SIZE)
    scale = np.abs(x).max(axis=1)
    x = x * (np.float32(1) / np.maximum(scale, SMALLEST))[:, None]
    levels = dynamic_map(signed=True)
    borders = (levels[:-1] + levels[1:]) / np.float32(2)
    codes = np.searchsorted(borders, x.reshape(-1)[: absmax.size], side="left").astype(np.uint8)
    return codes, scale, offset
