"""Weights in 4 and 8 bits, as bitsandbytes stores them, for linear layers to hold."""

from phi3_jax.quant.base import Quantized, is_quantized
from phi3_jax.quant.int8 import Int8Weight, quantize_int8
from phi3_jax.quant.nf4 import FP4Weight, NF4Weight, quantize_nf4
from phi3_jax.quant.quantize import Quantizer, make_quantizer, quantize_model

__all__ = [
    "FP4Weight",
    "Int8Weight",
    "NF4Weight",
    "Quantized",
    "Quantizer",
    "is_quantized",
    "make_quantizer",
    "quantize_int8",
    "quantize_model",
    "quantize_nf4",
]
