"""`Int8Weight`: a weight in 8 bits, bit for bit as bitsandbytes stores it for LLM.int8()."""

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Int8

from phi3_jax.quant.base import Arrays, Quantized, QuantType
from phi3_jax.system.errors import InputError

RECIPROCAL = np.float32(7.874015718698502e-3)  # of 127, as bitsandbytes writes it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight(Quantized):
    """A linear layer's weight in int8, or a stack of such layers' weights: each row times 127 / its absmax.

    The codes are those of LLM.int8() (arXiv:2208.07339), but only the weight is quantised here.
    bitsandbytes rounds the activations to int8 as well, unless they are outliers, and multiplies
    integers; this weight is dequantised and multiplied with the activations as they are, which is
    nearer to the unquantised model.

    Attributes:
        codes: `[*stack, out, in]`.
        absmax: `[*stack, out]`, float32: the largest magnitude of each row; `SCB` in bitsandbytes.
    """

    codes: Int8[Arrays, "*stack out in"]
    absmax: Float[Arrays, "*stack out"]

    quant_type: ClassVar[QuantType] = "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight it stands for, `[*stack, out, in]`."""
        shape: tuple[int, ...] = self.codes.shape
        return shape

    def dense(self, xp: ModuleType) -> Float[Arrays, "out in"]:
        """Code · absmax / 127, of a single layer, in float32."""
        return self.codes.astype(xp.float32) * self.absmax[:, None] * RECIPROCAL


def quantize_int8(weight: Float[ArrayLike, "out in"]) -> Int8Weight:
    """One layer's weight in int8, computed on the host; its arrays are numpy's where `weight` is.

    Codes and absmax are, bit for bit, those that bitsandbytes 0.50.2 makes of a weight of that type
    (float32, bfloat16 or float16), which it rounds to float16 first.

    Raises:
        InputError: Where the weight is not finite in float16 (magnitudes above 65,504).
    """
    host = np.asarray(weight)
    codes = np.empty(host.shape, np.int8)
    absmax = np.empty(host.shape[0], np.float32)
    rows = max(1, 2**18 // host.shape[1])  # at a time, so that what lies between stays in the processor's cache
    for start in range(0, host.shape[0], rows):
        part = slice(start, start + rows)
        with np.errstate(over="ignore"):
            x = host[part].astype(np.float32).astype(np.float16).astype(np.float32)
        absmax[part] = largest = np.abs(x).max(axis=1)
        if not np.isfinite(largest).all():
            raise InputError(
                "the weight holds numbers that are not finite in float16, in which int8 quantisation reads them; "
                "quantise to nf4 instead, or mend the checkpoint"
            )
        # PyTorch divides a number by a tensor by way of the reciprocal, which rounds twice. A row of
        # zeros has no scale; its codes are zeros in bitsandbytes as well.
        scale = np.divide(np.float32(1), largest, out=np.zeros_like(largest), where=largest > 0) * np.float32(127)
        codes[part] = np.round(x * scale[:, None])
    quantized = Int8Weight(codes, absmax)
    return jax.tree.map(jnp.asarray, quantized) if isinstance(weight, jax.Array) else quantized
