"""A model whose decoder layers' linear weights are quantised, one layer's at a time."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Float

from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.leaves import LeafPath
from phi3_jax.quant.base import Quantized, is_quantized
from phi3_jax.quant.build import Leaf, build_model
from phi3_jax.quant.int8 import quantize_int8
from phi3_jax.quant.nf4 import quantize_nf4
from phi3_jax.system.dotted import dotted
from phi3_jax.system.errors import InputError

# (checkpoint's name of a module, such as model.layers.3.mlp.down_proj; its weight) -> numpy arrays.
Quantizer = Callable[[str, Float[np.ndarray, "out in"]], Quantized]


def make_quantizer(quantization: str, *, double_quant: bool = True) -> Quantizer:
    """What quantises a module's weight to `nf4` or `int8`.

    Raises:
        InputError: For other kinds. What is returned raises it for weights that cannot be quantised.
    """
    kinds: dict[str, Callable[[Float[np.ndarray, "out in"]], Quantized]] = {
        "nf4": partial(quantize_nf4, double_quant=double_quant),
        "int8": quantize_int8,
    }
    if quantization not in tuple(kinds):  # a tuple, since a BitsAndBytesConfig in the place of a name has no hash
        raise InputError(f"quantization is {quantization!r}, expected one of {', '.join(kinds)}, or none at all")

    def quantizer(name: str, weight: Float[np.ndarray, "out in"]) -> Quantized:
        try:
            return kinds[quantization](weight)
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

    Args:
        model: Whose weights are not quantised yet.
        quantization: `nf4` or `int8`.
        double_quant: Quantise NF4's statistics too.
        quantizer: Takes the place of these two, for starts that look at each weight (LoftQ).

    Raises:
        InputError: Where the model is quantised already, or its weights cannot be.

    Example:
        >>> import phi3_jax as p3
        >>> from flax import nnx
        >>> config = p3.Phi3Config(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...     num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=None,
        ... )
        >>> model = p3.quantize_model(p3.Phi3ForCausalLM(config, rngs=nnx.Rngs(0)), "int8")
        >>> weight = model.model.layers.mlp.down_proj.weight.get_value()
        >>> type(weight).__name__, weight.shape, str(weight.codes.dtype)
        ('Int8Weight', (2, 16, 32), 'int8')
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return build_model(model, _Model(pool, quantizer or make_quantizer(quantization, double_quant=double_quant)))


@dataclass(frozen=True)
class _Model:
    """A model as the source of its own leaves, quantised."""

    pool: ThreadPoolExecutor
    quantizer: Quantizer

    def quantizes(self, path: LeafPath, leaf: Leaf) -> bool:
        if is_quantized(leaf.get_value()):
            raise InputError(f"{dotted(path)} is quantised already; give the unquantised model")
        return is_quantizable(path, leaf.get_value().shape)

    def quantized(self, path: LeafPath, leaf: Leaf) -> Quantized:
        value = leaf.get_value()

        def layer(index: int) -> Quantized:
            # Sliced before it comes to the host, which so has a layer at a time.
            weight = self.quantizer(layer_name(path, index), np.asarray(value[index]))
            return weight.laid_out(jax.default_backend())

        layers = self.pool.map(layer, range(len(value)))
        stacked: Quantized = jax.tree.map(jax.device_put, stack_layers(layers, len(value), path, np.empty))
        return stacked

    def dense(self, path: LeafPath, leaf: Leaf, rows: slice | None = None) -> jax.Array:
        array: jax.Array = leaf.get_value()
        return array if rows is None else array[..., rows, :]


def is_quantizable(path: LeafPath, shape: tuple[int, ...]) -> bool:
    """Whether quantisation is for the leaf at `path` of a model's state: matrices of the decoder layers."""
    return path[:2] == ("model", "layers") and len(shape) == 3


def layer_name(path: LeafPath, layer: int) -> str:
    """What a checkpoint calls the module of a layer: `model.layers.3.mlp.down_proj`."""
    return dotted(("model.layers", layer, *path[2:-1]))


def check_kind(found: jax.tree_util.PyTreeDef, first: jax.tree_util.PyTreeDef, path: LeafPath, layer: int) -> None:
    """Raises `InputError` where a layer's weight is of another kind than layer 0's."""
    if found != first:
        raise InputError(
            f"{layer_name(path, layer)} is quantised otherwise than layer 0's, or from another type; expected one"
        )


def stack_layers(
    layers: Iterable[Quantized],
    number: int,
    path: LeafPath,
    empty: Callable[[tuple[int, ...], np.dtype], np.ndarray],
) -> Quantized:
    """The weights of `number` layers, for the leaf at `path`, as one, in arrays that `empty(shape, dtype)` makes.

    Raises:
        InputError: Where they are not of one kind.
    """
    stacked: list[np.ndarray] = []
    kind: jax.tree_util.PyTreeDef | None = None
    for index, layer in enumerate(layers):
        parts, found = jax.tree.flatten(layer)
        if kind is None:
            stacked, kind = [empty((number, *part.shape), part.dtype) for part in parts], found
        check_kind(found, kind, path, index)
        for whole, part in zip(stacked, parts, strict=True):
            whole[index] = part
    assert kind is not None
    whole_stack: Quantized = jax.tree.unflatten(kind, stacked)
    return whole_stack
