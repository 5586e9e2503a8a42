"""PEFT's tensors of adapters: their names, the way there from ours, and the way back.

In between stand PEFT's modules: a plain adapter of one layer for each name that a checkpoint has.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from phi3_jax.config.lora import LoraConfig
from phi3_jax.hf.safetensors_io import TensorSource
from phi3_jax.lora.adapters import (
    AnyAdapter,
    DoraEmbedding,
    DoraLinear,
    HeadRows,
    LoraEmbedding,
    LoraLinear,
    ResidualLora,
    StackableAdapter,
    TokenRows,
)
from phi3_jax.lora.describe import described
from phi3_jax.lora.fresh import token_modules
from phi3_jax.lora.fused import Plain, fused, slice_table
from phi3_jax.lora.stack import STACK, ModuleAdapter, num_layers, stacked, unstacked
from phi3_jax.lora.targets import Module, checkpoint_name, checkpoint_names
from phi3_jax.lora.tree import Lora, Slice
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.peft.slices import has_rank, rank_and_alpha, slice_record, split_slices
from phi3_jax.system.dotted import last_part, sibling
from phi3_jax.system.errors import InputError

PREFIX = "base_model.model."

_LINEAR = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
_EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B", "magnitude": "lora_magnitude_vector"}
_ROWS = {"rows": "token_adapter.trainable_tokens_delta"}
_SLICES = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def tensor_names(name: str, adapter: AnyAdapter) -> dict[str, str]:
    """Field of the adapter -> PEFT's name of the tensor, for a module that checkpoints call `name`."""
    table = _LINEAR
    if isinstance(adapter, LoraEmbedding | DoraEmbedding):
        table = _EMBEDDING
    elif isinstance(adapter, TokenRows):
        table = _ROWS
    present = (field for field in table if getattr(adapter, field, None) is not None)
    return {field: f"{PREFIX}{name}.{table[field]}" for field in present}


def saved_names(name: str, num_layers: int) -> list[str]:
    """PEFT's names of the tensors of a module of `modules_to_save`, one a layer."""
    return [f"{PREFIX}{full}.weight" for full in checkpoint_names(name, num_layers)]


# To PEFT


def to_peft(lora: Lora) -> tuple[dict[str, AnyAdapter], LoraConfig, dict[str, str]]:
    """PEFT's modules of an adapter, the configuration that describes them, and metadata for the file.

    Raises:
        InputError: For adapters that no one configuration of PEFT can describe.
    """
    modules: dict[str, AnyAdapter] = {}
    parts: dict[str, list[tuple[Slice, Plain]]] = {}
    for name, adapter in lora.items():
        rows = _slice_of(lora, name)
        for full, one in _unstacked(name, adapter):
            plain = _as_plain(one)
            if rows is None:
                modules[full] = plain
            else:
                assert isinstance(plain, Plain)
                parts.setdefault(sibling(full, rows.parent), []).append((rows, plain))
    modules |= {whole: fused(found) for whole, found in parts.items()}
    config = _checked(lora.config, modules)
    ranks = {name: rank_and_alpha(config, name, one) for name, one in modules.items() if has_rank(one)}
    depth = max((num_layers(adapter) for name, adapter in lora.items() if name.startswith(STACK)), default=0)
    return modules, described(config, ranks, depth, lora.saved), slice_record(config, parts)


def sources(modules: Mapping[str, AnyAdapter], saved: Mapping[str, Array]) -> Iterator[TensorSource]:
    """The tensors to write: of PEFT's modules, then the weights of `modules_to_save`."""
    for name, adapter in modules.items():
        for field, tensor in tensor_names(name, adapter).items():
            yield _source(tensor, np.asarray(getattr(adapter, field)))
    for name, weight in saved.items():
        whole = np.asarray(jax.device_get(weight))
        layers = list(whole) if name.startswith(STACK) else [whole]
        for tensor, array in zip(saved_names(name, len(layers)), layers, strict=True):
            yield _source(tensor, array)


def _source(name: str, array: np.ndarray) -> TensorSource:
    return TensorSource(name, np.dtype(np.float32), array.shape, lambda: array.astype(np.float32))


def _slice_of(lora: Lora, name: str) -> Slice | None:
    if last_part(name) in _SLICES and name not in lora.slices:
        raise InputError(
            f"{name} is a slice of a fused layer, but lora.slices does not say which rows it is; make the Lora with "
            "init_lora, load_adapter or dataclasses.replace"
        )
    return lora.slices.get(name)


def _unstacked(name: str, adapter: ModuleAdapter) -> Iterator[tuple[str, AnyAdapter]]:
    """(name in a checkpoint, adapter of one layer) pairs."""
    if not name.startswith(STACK):
        yield name, jax.device_get(adapter)
        return
    for layer, one in unstacked(adapter):
        yield checkpoint_name(name, layer), one


def _as_plain(adapter: AnyAdapter) -> AnyAdapter:
    if not isinstance(adapter, ResidualLora):
        return adapter
    plain = adapter.as_plain()
    # What has not moved takes nothing away and adds nothing: zeros say that without rounding.
    still_a = (adapter.lora.lora_A == adapter.start_A).all(axis=-1)
    still_b = (adapter.lora.lora_B == adapter.start_B).all(axis=-2)
    still = jnp.tile(still_a & still_b, 2)
    return replace(plain, lora_B=jnp.where(still, 0, plain.lora_B))


def _checked(config: LoraConfig, modules: Mapping[str, AnyAdapter]) -> LoraConfig:
    """The configuration with what it says of all adapters alike."""
    kinds = {isinstance(one, DoraLinear | DoraEmbedding) for one in modules.values() if has_rank(one)}
    biases = {one.lora_bias is not None for one in modules.values() if isinstance(one, LoraLinear)}
    for field, found in (("use_dora", kinds), ("lora_bias", biases)):
        if len(found) > 1:
            raise InputError(
                f"some adapters have {field} and others not, which PEFT's files cannot say; save them apart"
            )
    return replace(config, use_dora=kinds == {True}, lora_bias=biases == {True})


# From PEFT


def peft_adapters(model: Phi3ForCausalLM, config: LoraConfig, modules: Sequence[Module]) -> dict[str, AnyAdapter]:
    """PEFT's modules for a configuration, with the shapes of arrays in place of these.

    Raises:
        InputError: Where `trainable_token_indices` names something that is not there.
    """
    adapters: dict[str, AnyAdapter] = {
        name: _shapes(module, config, *config.rank_and_alpha(name)) for module in modules for name in module.names
    }
    for name, ids in token_modules(model, config).items():
        kind = HeadRows if name == "lm_head" else TokenRows
        adapters[name] = kind(_shape(len(ids), model.config.hidden_size), ids)
    return adapters


def _shapes(module: Module, config: LoraConfig, r: int, alpha: float) -> AnyAdapter:
    rows, columns = module.shape
    scaling = config.scaling_of(r, alpha)
    if module.is_embedding:
        plain = _shape(r, rows), _shape(columns, r)
        return DoraEmbedding(*plain, _shape(columns), scaling) if config.use_dora else LoraEmbedding(*plain, scaling)
    a, b = _shape(r, columns), _shape(rows, r)
    if config.use_dora:
        return DoraLinear(a, b, _shape(rows), scaling, config.lora_dropout)
    return LoraLinear(a, b, scaling, config.lora_dropout, _shape(rows) if config.lora_bias else None)


def _shape(*sizes: int) -> Array:
    shape: Any = jax.ShapeDtypeStruct(sizes, jnp.float32)
    array: Array = shape  # in the place of one
    return array


def from_peft(
    model: Phi3ForCausalLM,
    config: LoraConfig,
    modules: Mapping[str, AnyAdapter],
    saved: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> Lora:
    """The reverse of `to_peft`: adapters of fused layers that are made of slices become those of the slices.

    Args:
        model: The base.
        config: What adapter_config.json says.
        modules: As `peft_adapters` gives them, with arrays.
        saved: By module name the stacked weights of `modules_to_save`.
        metadata: Of the file.
    """
    modules, ranks, preferred = split_slices(model, config, modules, metadata)
    depth = model.config.num_hidden_layers
    adapters = _stacked(modules, depth)
    return Lora.from_items(
        adapters,
        described(preferred, ranks, depth, saved),
        {name: jnp.asarray(weight) for name, weight in saved.items()},
        {name: part for name, part in slice_table(model).items() if name in adapters},
    )


def _stacked(modules: Mapping[str, AnyAdapter], num_layers: int) -> dict[str, ModuleAdapter]:
    layers: dict[str, dict[int, StackableAdapter]] = {}
    adapters: dict[str, ModuleAdapter] = {}
    for full, adapter in modules.items():
        if full.startswith(STACK):
            assert isinstance(adapter, StackableAdapter)
            layer, _, tail = full.removeprefix(STACK).partition(".")
            layers.setdefault(f"model.layers.{tail}", {})[int(layer)] = adapter
        else:
            adapters[full] = jax.tree.map(jnp.asarray, adapter)
    return adapters | {name: stacked(found, num_layers) for name, found in layers.items()}
