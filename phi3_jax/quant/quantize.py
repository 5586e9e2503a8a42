"""A model whose decoder layers' linear weights are quantised, one layer's at a time."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.quant.base import Quantized, is_quantized
from phi3_jax.quant.int8 import quantize_int8
from phi3_jax.quant.nf4 import quantize_nf4
from phi3_jax.system.dotted import dotted
from phi3_jax.system.errors import InputError

KINDS = ("nf4", "int8")

# (checkpoint's name of a module, such as model.layers.3.mlp.down_proj; its weight) -> numpy arrays.
Quantizer = Callable[[str, Float[np.ndarray, "out in"]], Quantized]


def make_quantizer(quantization: str, *, double_quant: bool = True) -> Quantizer:
    """What quantises a module's weight to `nf4` or `int8`.

    Raises `InputError` for other kinds; what it returns does for weights that cannot be quantised.
    """
    if quantization not in KINDS:
        raise InputError(f"quantization is {quantization!r}, expected one of {', '.join(KINDS)}, or none at all")
    function: Any = quantize_int8 if quantization == "int8" else partial(quantize_nf4, double_quant=double_quant)

    def quantizer(name: str, weight: Float[np.ndarray, "out in"]) -> Quantized:
        try:
            return function(weight)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    return quantizer


def quantize_model(
    model: Phi3ForCausalLM, quantization: str, *, double_quant: bool = True, quantizer: Quantizer | None = None
) -> Phi3ForCausalLM:
    """A model with the linear weights of its decoder layers quantised; `model` itself stays as it is.

    Embeddings, norms and the output head are shared with `model`. Weights are quantised from the type
    they are in. (`Phi3ForCausalLM.from_pretrained(..., quantization=...)` never has them all in memory
    unquantised.)

    **Arguments**: `quantization`, `nf4` or `int8`; `double_quant`, that NF4's statistics are quantised too;
    `quantizer`, takes the place of these two, for starts that look at each weight (LoftQ).

    Raises `InputError` where the model is quantised already, or its weights cannot be.
    """
    quantizer = quantizer or make_quantizer(quantization, double_quant=double_quant)
    graph, state = nnx.split(model)
    leaves = dict(nnx.to_flat_state(state))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, leaf in leaves.items():
            value = leaf.get_value()
            if is_quantized(value):
                raise InputError(f"{dotted(path)} is quantised already; give the unquantised model")
            if not is_quantizable(path, value.shape):
                continue
            # Sliced before it comes to the host, which so has a layer at a time.
            layers = pool.map(
                lambda i, v=value, p=path: quantizer(layer_name(p, i), np.asarray(v[i])), range(len(value))
            )
            leaves[path] = leaf.replace(jax.tree.map(jax.device_put, stack_layers(layers, len(value), path, np.empty)))
    return nnx.merge(graph, nnx.from_flat_state(list(leaves.items())))


def is_quantizable(path: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether quantisation is for the leaf at `path` of a model's state: matrices of the decoder layers."""
    return path[:2] == ("model", "layers") and len(shape) == 3


def layer_name(path: tuple[Any, ...], layer: int) -> str:
    """What a checkpoint calls the module of a layer: `model.layers.3.mlp.down_proj`."""
    return dotted(("model.layers", layer, *path[2:-1]))


def stack_layers(
    layers: Iterable[Quantized],
    number: int,
    path: tuple[Any, ...],
    empty: Callable[[tuple[int, ...], np.dtype], np.ndarray],
) -> Quantized:
    """The weights of `number` layers, for the leaf at `path`, as one, in arrays that `empty(shape, dtype)` makes.

    Raises `InputError` where they are not of one kind.
    """
    stacked: list[np.ndarray] = []
    kind: Any = None
    for index, layer in enumerate(layers):
        parts, found = jax.tree.flatten(layer)
        if index == 0:
            stacked, kind = [empty((number, *part.shape), part.dtype) for part in parts], found
        if found != kind:
            raise InputError(
                f"{layer_name(path, index)} is quantised otherwise than layer 0's, or from another type; expected one"
            )
        for whole, part in zip(stacked, parts, strict=True):
            whole[index] = part
    return jax.tree.unflatten(kind, stacked)
